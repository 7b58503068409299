"""What the case tables of the fused-linear operators share: heads, outputs and their sizes.

A gradient that goes through a product is a sum of terms dz_j w_j whose dz_j is itself a
difference of terms the size of q_j and p_j (of q_j times the row's sum of |dz| where that is more:
chi2's q_j sum(p^2 / q)): its size is the same sum of absolute values. A gradient computed in
forward is rounded there, and once more when it is multiplied by the upstream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pydistill.reference.linear_head import Head, head_logits
from pydistill.testing.case import Case, Expected, Tolerance

PARTS = ("hidden", "weight", "bias")


def gradient_tolerances(dtypes: tuple[torch.dtype, ...]) -> dict[str, Tolerance]:
    """Beside what the rows' own table allows, logits are sums of H products, rounded in fp32; and
    where a head is bf16 a kernel may round dz to bf16 before it multiplies."""
    dz = torch.finfo(torch.bfloat16).eps / 2 if set(dtypes) == {torch.bfloat16} else 0.0
    return {part: Tolerance(1e-5, 1e-5 + (dz if part != "bias" else 0.0)) for part in PARTS}


def tolerances(dtypes: tuple[torch.dtype, ...]) -> dict[str, Tolerance]:
    again = max(torch.finfo(dtype).eps for dtype in dtypes) / 2
    parts = gradient_tolerances(dtypes)
    in_forward = Tolerance(1e-5 + again, parts["hidden"].atol)
    return {"loss": Tolerance(5e-6, 1e-6), **parts, "in_forward": in_forward}


def head(
    rows: int, h: int, v: int, dtypes: tuple[torch.dtype, torch.dtype], bias: bool,
    g: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Hidden states, weight and bias that give logits of a spread of about 2.5."""
    hidden = torch.randn(rows, h, generator=g).to(dtypes[0])
    weight = (2.5 / h**0.5 * torch.randn(v, h, generator=g)).to(dtypes[1])
    return hidden, weight, torch.randn(v, generator=g).to(dtypes[1]) if bias else None


def run(
    call: Callable[..., Tensor], inputs: dict[str, Any], upstream: Callable[[torch.Size], Tensor]
) -> dict[str, Tensor]:
    """The loss and the gradients of the student's tensors, recomputed and, where the reduction
    allows it, computed in forward."""
    names = [f"student_{part}" for part in PARTS if inputs.get(f"student_{part}") is not None]
    frozen = inputs.pop("frozen", ())
    out = {}
    modes = ("recompute",) if inputs["reduction"] == "none" else ("recompute", "in_forward")
    for mode in modes:
        leaves = {n: inputs[n].detach().clone().requires_grad_(n not in frozen) for n in names}
        loss = call(gradient=mode, **{**inputs, **leaves})
        asked = [n for n in names if n not in frozen]
        grads = torch.autograd.grad(loss, [leaves[n] for n in asked], upstream(loss.shape))
        out[f"loss.{mode}"] = loss.detach()
        for name, grad in zip(asked, grads, strict=True):
            part = name.removeprefix("student_")
            out[part if mode == "recompute" else f"in_forward.{part}"] = grad
    return out


def truth(
    call: Callable[..., Tensor],
    rows: Callable[[Tensor, dict[str, Any]], tuple[Tensor, Tensor]],
    inputs: dict[str, Any],
    upstream: Callable[[torch.Size], Tensor],
) -> dict[str, Expected]:
    """The same by the reference in fp64. `rows(logits, inputs)` is the loss of logits `[..., V]`
    and the teacher's probabilities, as far as they are known."""
    exact = {k: v.double() if is_float(v) else v for k, v in inputs.items()}
    parts = run(call, {**exact, "impl": "reference"}, lambda s: upstream(s).double())
    head = Head(
        exact["student_hidden"].nan_to_num(0),
        exact["student_weight"],
        exact.get("student_bias"),
        exact.get("student_logit_scale", 1.0),
        exact.get("student_softcap") or 0.0,
    )
    logits = head_logits(head).requires_grad_()
    loss, p = rows(logits, {k: v for k, v in exact.items() if not k.startswith("student_")})
    seed = upstream(loss.shape).double()
    (slope,) = torch.autograd.grad(loss, logits, seed)
    t = torch.as_tensor(exact.get("temperature", 1.0), dtype=torch.float64)
    t = t.expand(logits.shape[:-1])[..., None]
    q = (torch.softmax(logits / t, -1) + torch.softmax(logits, -1)).detach()
    v = min(q.shape[-1], p.shape[-1])
    q[..., :v] += p[..., :v]
    share = seed.abs()[..., None] if seed.ndim else seed.abs() / max(1, t.numel())
    if inputs.get("weight") is not None:
        share = share * exact["weight"][..., None]
    t2 = t**2 if inputs.get("scale_t2") else torch.ones_like(t)
    each = torch.maximum(share * t2 / t.clamp(max=1), slope.abs().sum(-1, keepdim=True) / 2)
    size = (slope.abs() + each * q) * abs(head.scale)
    size, hidden = size.reshape(-1, size.shape[-1]), head.hidden.reshape(-1, head.hidden.shape[-1])
    scales = {
        "loss": torch.tensor(1.0),
        "hidden": (size @ head.weight.abs()).reshape(head.hidden.shape),
        "weight": size.T @ hidden.abs(),
        "bias": size.sum(0),
    }
    return {
        k: Expected(v.detach(), scales[k.removeprefix("in_forward.").split(".")[0]])
        for k, v in parts.items()
    }


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and bool(value.dtype.is_floating_point)


def random_upstream(case: Case, seed: int) -> Callable[[torch.Size], Tensor]:
    """A random upstream gradient, the same at every call."""
    return lambda shape: torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
