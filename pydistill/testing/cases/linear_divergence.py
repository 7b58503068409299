"""The cases of `pydistill.linear_divergence`.

`run` gives, for one case and backend, the loss and the gradients of hidden states, weight and bias,
recomputed and computed in forward; `truth` is the reference in fp64 on the same, already rounded,
numbers.
"""

from __future__ import annotations

import zlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pydistill.ops.divergence import divergence
from pydistill.ops.linear_divergence import linear_divergence
from pydistill.reference.divergence import KINDS
from pydistill.reference.linear_head import Head, head_logits
from pydistill.testing.case import Case, Expected
from pydistill.testing.cases import _linear

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
_SHORT = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}


def _case(
    name: str,
    rows: int,
    v: int,
    kind: str = "forward_kl",
    *,
    h: tuple[int, int] = (24, 40),
    dtypes: tuple[torch.dtype, torch.dtype] = (FP32, FP32),
    teacher_v: int | None = None,
    biased: bool = False,
    frozen: tuple[str, ...] = (),
    per_row: tuple[str, ...] = (),
    masked: str | None = None,
    labelled: bool = False,
    pattern: str = "normal",
    prefix: tuple[int, ...] | None = None,
    marks: tuple[str, ...] = (),
    gate: Case | None = None,
    **options: Any,
) -> Case:
    options = {"kind": kind, "reduction": "none", **options}
    short = _SHORT[dtypes[0]] + ("" if dtypes[0] == dtypes[1] else f"+{_SHORT[dtypes[1]]}")
    case_id = f"{kind}-{name}-{short}-{rows}x{h[0]}x{v}"
    shape = prefix or (rows,)

    def inputs(device: torch.device | str, seed: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed + zlib.crc32(case_id.encode()))
        kwargs: dict[str, Any] = dict(options)
        for side, size, vocab in (("student", h[0], v), ("teacher", h[1], teacher_v or v)):
            hidden, weight, bias = _linear.head(rows, size, vocab, dtypes, biased, g)
            if pattern == "poisoned" and side == "student":
                hidden[1, 0] = torch.nan  # of a row that does not count
            kwargs[f"{side}_hidden"] = hidden.reshape(*shape, size).to(device)
            kwargs[f"{side}_weight"] = weight.to(device)
            if bias is not None:
                kwargs[f"{side}_bias"] = bias.to(device)
        for parameter in per_row:
            low, high = {"temperature": (0.5, 2.0), "weight": (0.0, 2.0)}.get(parameter, (0.1, 0.9))
            value = low + (high - low) * torch.rand(shape, generator=g)
            kwargs[parameter] = value.to(device)
        if masked:
            mask = torch.arange(rows) % 3 != 1 if masked == "third" else torch.zeros(rows).bool()
            kwargs["mask"] = mask.reshape(shape).to(device)
        if labelled:
            labels = torch.randint(0, min(v, teacher_v or v), shape, generator=g)
            kwargs["labels"] = torch.where(torch.rand(shape, generator=g) < 0.2, -100, labels).to(
                device
            )
        if frozen:
            kwargs["frozen"] = tuple(f"student_{part}" for part in frozen)
        return kwargs

    products = 2 * rows * v
    return Case(
        op="linear_divergence",
        id=case_id,
        inputs=inputs,
        shape=(rows, v),
        dtypes=dtypes,
        options=options,
        tolerances=_linear.tolerances(dtypes),
        flops={
            "in_forward": products * (3 * h[0] + h[1]),
            "recompute": products * (4 * h[0] + 2 * h[1]),
        },
        marks=frozenset(marks),
        gate=gate,
    )


def _table() -> list[Case]:
    cases: list[Case] = []

    def add(*arguments: Any, **more: Any) -> None:
        cases.append(_case(*arguments, **more))

    for kind in KINDS:
        marks = ("ladder",) if kind in ("forward_kl", "jsd", "adaptive_kl") else ()
        add("plain", 5, 300, kind, marks=marks)
        add("mean", 5, 300, kind, reduction="mean")
        add("half", 5, 300, kind, dtypes=(BF16, BF16), reduction="mean", biased=True, marks=marks)
        add("tiles", 4, 4200, kind, reduction="sum", biased=True, marks=marks)
    for dtypes in ((BF16, FP32), (FP16, FP16), (FP32, BF16)):
        add("dtypes", 6, 40, "jsd", dtypes=dtypes, biased=True, reduction="sum")
    add("blocks", 400, 50, "jsd", reduction="mean", masked="third")
    add("odd", 3, 31, h=(7, 1))
    add("one_token", 3, 1)
    add("no_rows", 0, 90, reduction="mean")
    add("prefix", 6, 90, prefix=(2, 3), masked="third")
    add("all_masked", 4, 90, masked="all", reduction="mean")
    add("scaled", 5, 200, "reverse_kl", student_logit_scale=0.5, teacher_logit_scale=1.5)
    for reduction in ("none", "mean"):
        add(
            f"softcap_{reduction}", 5, 2300, "jsd", student_softcap=4.0, teacher_softcap=6.0,
            student_logit_scale=1.25, biased=True, reduction=reduction,
        )  # fmt: skip
        add(
            f"labels_{reduction}", 9, 2300, "reverse_kl", labelled=True, label_weight=0.3,
            z_loss=1e-3, temperature=2.0, scale_t2=True, masked="third", reduction=reduction,
            marks=("ladder",),
        )  # fmt: skip
        for v, teacher_v in ((120, 90), (90, 120)):
            add(
                f"vocab_{reduction}_{teacher_v}", 5, v, teacher_v=teacher_v, vocab="min",
                biased=True, labelled=True, label_weight=0.5, reduction=reduction,
            )  # fmt: skip
    for part in _linear.PARTS:
        frozen = tuple(p for p in _linear.PARTS if p != part)
        add(f"only_{part}", 5, 90, biased=True, frozen=frozen, reduction="mean")
    add("poisoned", 6, 90, "jsd", pattern="poisoned", masked="third", reduction="mean")
    add("per_row", 6, 90, "jsd", per_row=("temperature", "beta", "weight"), scale_t2=True)
    add("denominator", 6, 90, reduction="mean", denominator=17.0, masked="third")
    for dtype in (FP32, BF16):
        for rows, v, h in (
            (1024, 49152, 576), (1024, 49152, 2048), (1024, 151936, 576), (1024, 151936, 2048),
            (16, 49152, 576), (16, 151936, 2048),
        ):  # fmt: skip
            options: dict[str, Any] = {
                "h": (h, 2048),
                "dtypes": (dtype, dtype),
                "reduction": "mean",
            }
            gate = _case("bench", 8, v, **options)
            add("bench", rows, v, marks=("bench", "slow"), gate=gate, **options)
    return cases


def run(case: Case, inputs: dict[str, Any], impl: str, seed: int) -> dict[str, Tensor]:
    """Every output of the case on backend `impl`."""
    call = partial(linear_divergence, impl=impl)
    return _linear.run(call, inputs, _linear.random_upstream(case, seed))


def truth(case: Case, inputs: dict[str, Any], seed: int) -> dict[str, Expected]:
    """What `run` should give: the reference in fp64."""

    def rows(logits: Tensor, exact: dict[str, Any]) -> tuple[Tensor, Tensor]:
        head = Head(
            exact.pop("teacher_hidden"),
            exact.pop("teacher_weight"),
            exact.pop("teacher_bias", None),
            exact.pop("teacher_logit_scale", 1.0),
            exact.pop("teacher_softcap", None) or 0.0,
        )
        exact.pop("frozen", None)
        theirs = head_logits(head)
        loss = divergence(logits, theirs, impl="reference", **exact)
        return loss, torch.softmax(theirs, -1)

    return _linear.truth(linear_divergence, rows, inputs, _linear.random_upstream(case, seed))


CASES: list[Case] = _table()
