"""The cases of `pydistill.topk_divergence`.

`run` gives, for one case and backend, the loss, the gradient under a random upstream, the tangent
along a random direction and, where the case allows it, the gradient of `overwrite_logits`. `truth`
is the reference in fp64 on the same, already rounded, numbers.

A gradient is a difference of terms the size of q (on the support also of p), and cancels where the
sides are close: its size in a row is its largest element plus k t2 (largest q + largest p). With
labels or z-loss the gradient of a bf16 or fp16 row is a sum of two, each rounded by itself.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from pydistill.ops.topk_divergence import topk_divergence, topk_divergence_jvp
from pydistill.reference.topk_divergence import TAILS, TOPK_KINDS
from pydistill.testing.case import Case, Expected, Tolerance

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
_SHORT = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}

# rtol holds for D itself; atol is what a sum over cells may lose where D is close to 0.
TOLERANCES = {
    "loss": Tolerance(1e-5, 1e-6),
    "grad": Tolerance(1e-5, 1e-5),
    "tangent": Tolerance(1e-5, 1e-5),
}


def _rows(pattern: str, rows: int, v: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """fp32 student and teacher logits [rows, v] of a named pattern."""
    s, t = 2 * torch.randn(rows, v, generator=g), 2 * torch.randn(rows, v, generator=g)
    if pattern == "peaked":  # log q_t from about -9 to -40
        lead = torch.linspace(14, 45, rows)
        s[:, 1] = lead
        t[:, 1] = lead.flip(0)
    elif pattern == "far":  # a student who all but leaves out all tokens but one: log q_t to -1000
        s[:, 1] = torch.linspace(100, 1000, rows)
        t[:, 1] = 9.0
    elif pattern == "same":
        t = s.clone()
    elif pattern == "infinite":
        s[:, -2:], t[:, -2:] = -torch.inf, -torch.inf  # a padded vocabulary
        s[1, 0], t[1, 0] = -torch.inf, 9.0
        t[2, 3] = -torch.inf
    elif pattern == "poisoned":  # the first and last rows must not notice
        s[1, 3], s[2, 0], s[3] = torch.nan, torch.inf, -torch.inf
    elif pattern != "normal":
        raise ValueError(f"pattern={pattern!r} is not known.")
    return s, t


def _case(
    name: str,
    rows: int,
    v: int,
    k: int,
    kind: str = "forward_kl",
    tail: str = "bucket",
    *,
    dtype: torch.dtype = FP32,
    pattern: str = "normal",
    empty_slots: bool = False,
    support: str = "teacher",
    per_row: tuple[str, ...] = (),
    masked: str | None = None,
    labelled: bool = False,
    prefix: tuple[int, ...] | None = None,
    marks: tuple[str, ...] = (),
    gate: Case | None = None,
    **options: Any,
) -> Case:
    options = {"kind": kind, "tail": tail, "reduction": "none", **options}
    case_id = f"{kind}-{tail}-{name}-{_SHORT[dtype]}-{rows}x{v}-k{k}"
    shape = prefix or (rows,)

    def inputs(device: torch.device | str, seed: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed + zlib.crc32(case_id.encode()))
        s, t = _rows(pattern, rows, v, g)
        log_p = torch.log_softmax(t.double() / options.get("teacher_temperature", 1.0), -1)
        chosen = {
            "teacher": t,
            "student": s.nan_to_num(0, 9, -9),
            "random": torch.randn(rows, v, generator=g),
        }
        ids = chosen[support].topk(k, -1).indices
        ids = ids[:, torch.randperm(k, generator=g)]
        outside = log_p.scatter(1, ids, -torch.inf)
        labels = labels_in_and_out(ids, outside, options.get("ignore_index", -100))
        if empty_slots:
            drop = torch.rand(rows, k, generator=g) < 0.3
            outside = torch.where(
                drop.any(1, keepdim=True), _put_back(outside, log_p, ids, drop), outside
            )
            ids = torch.where(drop, -1, ids)
        kwargs: dict[str, Any] = dict(options)
        kwargs["student_logits"] = s.to(dtype).reshape(*shape, v).to(device)
        probs = log_p.gather(1, ids.clamp(min=0))
        kwargs["topk_logprobs"] = probs.float().reshape(*shape, k).to(device)
        kwargs["topk_ids"] = ids.reshape(*shape, k).to(device)
        if tail == "bucket" and not options.get("tail_from_sum"):
            tail_mass = torch.logsumexp(outside, -1).clamp(min=-1e30)
            kwargs["tail_logprob"] = tail_mass.float().reshape(shape).to(device)
        kwargs.pop("tail_from_sum", None)
        for parameter in per_row:
            low, high = {"temperature": (0.5, 2.0), "beta": (0.1, 0.9)}.get(parameter, (0.0, 2.0))
            value = low + (high - low) * torch.rand(shape, generator=g)
            kwargs[parameter] = value.to(device)
        if masked:
            mask = torch.arange(rows) % 3 != 1 if masked == "third" else torch.zeros(rows).bool()
            kwargs["mask"] = mask.reshape(shape).to(device)
        if labelled:
            kwargs["labels"] = labels.reshape(shape).to(device)
        return kwargs

    row = rows * v * dtype.itemsize
    return Case(
        op="topk_divergence",
        id=case_id,
        inputs=inputs,
        shape=(rows, v),
        dtypes=(dtype,),
        options=options,
        tolerances={**TOLERANCES, "overwrite": Tolerance(1e-5 + torch.finfo(dtype).eps / 2, 1e-5)},
        bytes={"forward": row, "backward": 2 * row, "overwrite": 2 * row},
        flops={"forward": 4 * rows * v, "backward": 4 * rows * v, "overwrite": 6 * rows * v},
        marks=frozenset(marks),
        gate=gate,
    )


def labels_in_and_out(ids: Tensor, outside: Tensor, ignored: int) -> Tensor:
    """Labels `[R]` in turn ignored, a token of the support `ids [R, K]`, the teacher's likeliest of
    those `outside [R, V]` (where the support's log-probabilities are -inf), and of the support."""
    row = torch.arange(ids.shape[0])
    labels = torch.where(row % 2 == 1, ids[:, 0], outside.argmax(-1))
    return torch.where(row % 4 == 0, ignored, labels)


def _put_back(outside: Tensor, log_p: Tensor, ids: Tensor, drop: Tensor) -> Tensor:
    """The tail's log-probabilities with those of the dropped slots."""
    values = torch.where(drop, log_p.gather(1, ids), outside.gather(1, ids))
    return outside.scatter(1, ids, values)


def _table() -> list[Case]:
    cases: list[Case] = []
    hard: dict[str, Any] = {"label_weight": 0.3, "z_loss": 1e-2}

    def add(*arguments: Any, **more: Any) -> None:
        cases.append(_case(*arguments, **more))

    for kind in TOPK_KINDS:
        for tail in TAILS:
            if tail == "zero" and kind == "reverse_kl":
                continue
            # Of the other tails two cases run on emulated GPUs; all do on a full climb.
            apart = ("ladder",) if tail == "bucket" else ()
            once = apart if kind == "forward_kl" else ()
            add("plain", 5, 1000, 16, kind, tail, marks=("ladder",))
            add("plain", 5, 1000, 16, kind, tail, dtype=BF16)
            add("plain", 5, 1000, 16, kind, tail, dtype=FP16)
            add("blocks", 4, 3000, 64, kind, tail, dtype=BF16)
            add("odd", 3, 31, 5, kind, tail, reduction="mean", marks=apart)
            add("one_token", 3, 1, 1, kind, tail)
            add("one_slot", 5, 40, 1, kind, tail)
            add("whole", 4, 130, 130, kind, tail)
            add("empty_slots", 8, 257, 20, kind, tail, empty_slots=True, marks=apart)
            add("peaked", 9, 2000, 16, kind, tail, pattern="peaked", marks=apart)
            add("peaked", 9, 2000, 16, kind, tail, pattern="peaked", dtype=BF16)
            add("far", 4, 300, 9, kind, tail, pattern="far", marks=apart)
            if kind != "tvd":  # whose gradient hangs on the sign of p - q
                add("same", 4, 257, 32, kind, tail, pattern="same")
            add("student_support", 5, 300, 12, kind, tail, support="student")
            add("random_support", 5, 300, 12, kind, tail, support="random")
            add("infinite", 5, 67, 9, kind, tail, pattern="infinite", marks=apart)
            add("poisoned", 6, 67, 9, kind, tail, pattern="poisoned", marks=("ladder",))
            add(
                "weights",
                6,
                90,
                8,
                kind,
                tail,
                per_row=("weight",),
                reduction="mean",
                masked="third",
            )
            add("prefix", 6, 90, 8, kind, tail, prefix=(2, 3), masked="third")
            add("labels", 9, 300, 12, kind, tail, labelled=True, marks=once, **hard)
            add("labels", 9, 300, 12, kind, tail, labelled=True, dtype=BF16, per_row=("weight",),
                masked="third", ignore_index=-1, reduction="mean", **hard)  # fmt: skip
            add("ignored", 9, 90, 8, kind, tail, labelled=True, ignore_index=-1, reduction="mean")
            add("all_masked", 4, 90, 8, kind, tail, masked="all", reduction="mean")
            add("no_rows", 0, 90, 8, kind, tail, reduction="mean")
            add(
                "tempered",
                5,
                200,
                10,
                kind,
                tail,
                temperature=2.0,
                teacher_temperature=2.0,
                scale_t2=True,
            )
            if tail in ("renormalize", "zero"):
                add("retempered", 5, 200, 10, kind, tail, temperature=0.7, teacher_temperature=2.0)
                add("per_row", 6, 200, 10, kind, tail, per_row=("temperature",), scale_t2=True)
        add("from_sum", 5, 500, 16, kind, "bucket", tail_from_sum=True)
    add("beta", 6, 200, 10, "jsd", "bucket", per_row=("beta",))
    add("beta_0.1", 6, 200, 10, "jsd", "truncate", beta=0.1)
    for dtype in (FP32, BF16):
        long: dict[str, Any] = {"dtype": dtype, "empty_slots": True, "reduction": "sum"}
        add("labels_alone", 9, 3000, 64, labelled=True, label_weight=1.0, **long)
        add("labels_mixed", 9, 3000, 64, labelled=True, label_weight=0.3, **long)
        add("z_loss_alone", 9, 3000, 64, z_loss=0.1, **long)
        add("labels_whole", 6, 130, 130, tail="truncate", labelled=True, dtype=dtype, **hard)
    add("z_loss_poisoned", 6, 67, 9, pattern="poisoned", masked="third", z_loss=0.1)
    add("labels_t", 6, 90, 8, "jsd", "renormalize", labelled=True, temperature=2.0, scale_t2=True,
        prefix=(2, 3), reduction="mean", denominator=7.0, **hard)  # fmt: skip
    add("labels_per_row", 6, 90, 8, "jsd", "zero", labelled=True,
        per_row=("temperature", "beta", "weight"), **hard)  # fmt: skip
    for dtype in (FP32, BF16):
        add("huge", 2, 151936, 64, dtype=dtype, marks=("slow",))
        gate = _case("bench", 8, 151936, 64, dtype=dtype, reduction="mean")
        add(
            "bench",
            256,
            151936,
            64,
            dtype=dtype,
            reduction="mean",
            marks=("bench", "slow"),
            gate=gate,
        )
    return cases


def has_hard_terms(case: Case) -> bool:
    """Whether the case has a cross-entropy or a z-loss, which read the logits once more."""
    return bool(case.options.get("label_weight") or case.options.get("z_loss"))


def _without_hard_terms(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in arguments.items() if k not in ("label_weight", "z_loss")}


def run(case: Case, inputs: dict[str, Any], impl: str, seed: int) -> dict[str, Tensor]:
    """Every output of the case on backend `impl`."""
    student = inputs.pop("student_logits").detach().requires_grad_()
    loss = topk_divergence(student, impl=impl, **inputs)
    upstream, tangent = _directions(case, student, loss.shape, seed)
    (grad,) = torch.autograd.grad(loss, student, upstream)
    value, along = topk_divergence_jvp(student.detach(), tangent, impl=impl, **inputs)
    out = {"loss": loss, "grad": grad, "loss.with_tangent": value, "tangent": along}
    if inputs["reduction"] != "none" and not has_hard_terms(case):
        leaf = student.detach().clone().requires_grad_()
        spent = leaf.view_as(leaf)
        out["loss.overwrite"] = topk_divergence(spent, overwrite_logits=True, impl=impl, **inputs)
        (out["overwrite"],) = torch.autograd.grad(out["loss.overwrite"], leaf, upstream)
    return out


def truth(case: Case, inputs: dict[str, Any], seed: int) -> dict[str, Expected]:
    """What `run` should give: the reference in fp64."""
    rounded = inputs["student_logits"]
    exact = {k: v.double() if _is_float(v) else v for k, v in inputs.items()}
    student = exact.pop("student_logits").requires_grad_()
    loss = topk_divergence(student, impl="reference", **exact)
    upstream, tangent = _directions(case, rounded, loss.shape, seed)
    upstream, tangent = upstream.double(), tangent.double()
    (grad,) = torch.autograd.grad(loss, student, upstream)
    _, along = topk_divergence_jvp(student.detach(), tangent, impl="reference", **exact)

    t = torch.as_tensor(exact.get("temperature", 1.0), dtype=torch.float64).expand(
        rounded.shape[:-1]
    )
    t2 = t**2 if case.options.get("scale_t2") else torch.ones_like(t)
    weight = exact.get("weight", torch.ones_like(t))
    each = t2 / t  # of the divergence's terms, of which q and p are at most 1, as the label's are
    each = each.clamp(min=1) if has_hard_terms(case) else each
    largest = 2.0 * each * weight
    share = upstream.abs().expand(t.shape) if upstream.ndim == 0 else upstream.abs()
    if case.options["reduction"] == "mean":
        counted = weight * exact.get("mask", torch.ones_like(t))
        if "labels" in exact:
            counted = counted * (exact["labels"] != exact.get("ignore_index", -100))
        share = share / max(float(counted.sum()), 1e-30)
    size = (largest * share)[..., None]
    longest = tangent.abs().amax() if tangent.numel() else tangent.new_zeros(())
    tangent_size = 2.0 * each * longest
    if case.options["reduction"] == "mean":
        tangent_size = tangent_size.amax() if tangent_size.numel() else longest
    grad_size = grad.abs().nan_to_num(0, 0, 0).amax(-1, keepdim=True) + size
    if has_hard_terms(case):
        # Without this allowance a bf16 gradient was up to 2.2 times the allowed error off.
        share_of_soft = 1 - case.options.get("label_weight", 0.0)
        alone = topk_divergence(student, impl="reference", **_without_hard_terms(exact))
        soft = share_of_soft * torch.autograd.grad(alone, student, upstream)[0]
        parts = soft.abs() + (grad - soft).abs()
        grad_size = grad_size + torch.finfo(rounded.dtype).eps / 2 / TOLERANCES["grad"].atol * parts
    expected = {
        "loss": Expected(loss.detach(), t2 if case.options["reduction"] == "none" else 1.0),
        "grad": Expected(grad, grad_size),
        "tangent": Expected(along.detach(), tangent_size),
    }
    same = {f"loss.{mode}": expected["loss"] for mode in ("with_tangent", "overwrite")}
    return {**expected, **same, "overwrite": expected["grad"]}


def _directions(case: Case, student: Tensor, shape: torch.Size, seed: int) -> tuple[Tensor, Tensor]:
    """A random upstream gradient, and a random tangent in the logits' dtype."""
    g = torch.Generator().manual_seed(seed + 1 + zlib.crc32(case.id.encode()))
    upstream = torch.randn(shape, generator=g)
    tangent = torch.randn(student.shape, generator=g).to(student.dtype)
    return upstream.to(student.device), tangent.to(student.device)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and bool(value.dtype.is_floating_point)


CASES: list[Case] = _table()
