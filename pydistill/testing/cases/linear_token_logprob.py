"""The cases of `pydistill.linear_token_logprob`.

`run` gives both outputs and the gradients of hidden states, weight and bias under random upstreams
of both; `truth` is the reference in fp64 on the same, already rounded, numbers. A gradient's size
is the sum of its terms' absolute values, as in the other tables of fused-linear operators.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from pydistill.ops.linear_token_logprob import linear_token_logprob
from pydistill.ops.token_logprob import token_logprob
from pydistill.reference.linear_head import Head, head_logits
from pydistill.testing.case import Case, Expected, Tolerance
from pydistill.testing.cases import _linear

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
_SHORT = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}

# Logits are sums of H products, rounded in fp32: an error of 1e-6 of their size, whatever is made
# of them.
TOLERANCES = {
    "logprob": Tolerance(2e-6, 2e-6),
    "entropy": Tolerance(2e-6, 2e-6),
}


def _case(
    name: str,
    rows: int,
    v: int,
    *,
    h: int = 24,
    dtypes: tuple[torch.dtype, torch.dtype] = (FP32, FP32),
    biased: bool = False,
    masked: bool = False,
    per_row: bool = False,
    prefix: tuple[int, ...] | None = None,
    marks: tuple[str, ...] = (),
    gate: Case | None = None,
    **options: Any,
) -> Case:
    short = _SHORT[dtypes[0]] + ("" if dtypes[0] == dtypes[1] else f"+{_SHORT[dtypes[1]]}")
    case_id = f"{name}-{short}-{rows}x{h}x{v}"
    shape = prefix or (rows,)

    def inputs(device: torch.device | str, seed: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed + zlib.crc32(case_id.encode()))
        kwargs: dict[str, Any] = dict(options)
        hidden, weight, bias = _linear.head(rows, h, v, dtypes, biased, g)
        kwargs["hidden"] = hidden.reshape(*shape, h).to(device)
        kwargs["weight"] = weight.to(device)
        if bias is not None:
            kwargs["bias"] = bias.to(device)
        kwargs["ids"] = torch.randint(0, v, shape, generator=g).to(device)
        if per_row:
            kwargs["temperature"] = (0.5 + 1.5 * torch.rand(shape, generator=g)).to(device)
        if masked:
            kwargs["mask"] = (torch.arange(rows) % 3 != 1).reshape(shape).to(device)
            kwargs["ids"][~kwargs["mask"]] = -100
        return kwargs

    return Case(
        op="linear_token_logprob",
        id=case_id,
        inputs=inputs,
        shape=(rows, v),
        dtypes=dtypes,
        options=options,
        tolerances={**TOLERANCES, **_linear.gradient_tolerances(dtypes)},
        flops={"recompute": 8 * rows * v * h},
        marks=frozenset(marks),
        gate=gate,
    )


def _table() -> list[Case]:
    cases = []
    for dtypes in ((FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, BF16)):
        cases += [
            _case("plain", 5, 300, dtypes=dtypes, marks=("ladder",)),
            _case("tiles", 4, 4200, dtypes=dtypes, biased=True, marks=("ladder",)),
            _case("masked", 7, 90, dtypes=dtypes, masked=True),
        ]
    cases += [
        _case("blocks", 400, 50, masked=True),
        _case("odd", 3, 31, h=7),
        _case("one_token", 3, 1),
        _case("no_rows", 0, 90),
        _case("one_row", 1, 90, prefix=()),
        _case("prefix", 6, 90, prefix=(2, 3), masked=True, per_row=True),
        _case("tempered", 5, 200, temperature=0.6),
        _case("softcap", 5, 2300, softcap=4.0, logit_scale=1.25, biased=True),
    ]
    bf16: dict[str, Any] = {"h": 576, "dtypes": (BF16, BF16)}
    gate = _case("bench", 8, 151936, **bf16)
    cases.append(_case("bench", 1024, 151936, marks=("bench", "slow"), gate=gate, **bf16))
    return cases


def run(case: Case, inputs: dict[str, Any], impl: str, seed: int) -> dict[str, Tensor]:
    """Every output of the case on backend `impl`."""
    names = [part for part in _linear.PARTS if inputs.get(part) is not None]
    leaves = {part: inputs[part].detach().requires_grad_() for part in names}
    found = linear_token_logprob(**{**inputs, **leaves}, impl=impl)
    grads = torch.autograd.grad(found, list(leaves.values()), _upstreams(found, seed))
    return {
        "logprob": found.logprob.detach(),
        "entropy": found.entropy.detach(),
        **dict(zip(names, grads, strict=True)),
    }


def truth(case: Case, inputs: dict[str, Any], seed: int) -> dict[str, Expected]:
    """What `run` should give: the reference in fp64."""
    exact = {k: v.double() if _linear.is_float(v) else v for k, v in inputs.items()}
    found = run(case, exact, "reference", seed)
    hidden, weight, bias = (exact.pop(part, None) for part in _linear.PARTS)
    head = Head(hidden, weight, bias, exact.pop("logit_scale", 1.0), exact.pop("softcap", 0.0))
    logits = head_logits(head).requires_grad_()
    rows = token_logprob(logits, impl="reference", **exact)
    upstreams = _upstreams(rows, seed)
    (slope,) = torch.autograd.grad(rows, logits, upstreams)
    share = (upstreams[0].abs() + upstreams[1].abs())[..., None]
    size = (slope.abs() + share * torch.softmax(logits, -1).detach()) * head.scale
    size, hidden = size.reshape(-1, size.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
    scales: dict[str, Tensor | float] = {
        "logprob": 1.0,
        "entropy": 1.0,
        "hidden": (size @ head.weight.abs()).reshape(head.hidden.shape),
        "weight": size.T @ hidden.abs(),
        "bias": size.sum(0),
    }
    return {name: Expected(value.detach(), scales[name]) for name, value in found.items()}


def _upstreams(outputs: tuple[Tensor, ...], seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed + 1)
    return [torch.randn(x.shape, generator=g).to(x) for x in outputs]


CASES: list[Case] = _table()
