"""The cases of `pydistill.linear_topk_divergence`, as those of `linear_divergence`."""

from __future__ import annotations

import zlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pydistill.ops.linear_topk_divergence import linear_topk_divergence
from pydistill.ops.topk_divergence import topk_divergence
from pydistill.reference.topk_divergence import TAILS, TOPK_KINDS
from pydistill.testing.case import Case, Expected
from pydistill.testing.cases import _linear
from pydistill.testing.cases.topk_divergence import labels_in_and_out

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
_SHORT = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}


def _case(
    name: str,
    rows: int,
    v: int,
    k: int,
    kind: str = "forward_kl",
    tail: str = "bucket",
    *,
    h: int = 24,
    dtypes: tuple[torch.dtype, torch.dtype] = (FP32, FP32),
    biased: bool = False,
    masked: bool = False,
    labelled: bool = False,
    per_row: tuple[str, ...] = (),
    prefix: tuple[int, ...] | None = None,
    marks: tuple[str, ...] = (),
    gate: Case | None = None,
    **options: Any,
) -> Case:
    options = {"kind": kind, "tail": tail, "reduction": "none", **options}
    short = _SHORT[dtypes[0]] + ("" if dtypes[0] == dtypes[1] else f"+{_SHORT[dtypes[1]]}")
    case_id = f"{kind}-{tail}-{name}-{short}-{rows}x{h}x{v}-k{k}"
    shape = prefix or (rows,)

    def inputs(device: torch.device | str, seed: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed + zlib.crc32(case_id.encode()))
        kwargs: dict[str, Any] = dict(options)
        hidden, weight, bias = _linear.head(rows, h, v, dtypes, biased, g)
        kwargs["student_hidden"] = hidden.reshape(*shape, h).to(device)
        kwargs["student_weight"] = weight.to(device)
        if bias is not None:
            kwargs["student_bias"] = bias.to(device)
        log_p = torch.log_softmax(2 * torch.randn(rows, v, generator=g).double(), -1)
        values, ids = log_p.topk(k, -1)
        order = torch.randperm(k, generator=g)
        values, ids = values[:, order], ids[:, order]
        kwargs["topk_logprobs"] = values.float().reshape(*shape, k).to(device)
        kwargs["topk_ids"] = ids.reshape(*shape, k).to(device)
        outside = log_p.scatter(1, ids, -torch.inf)
        if tail == "bucket":
            rest = torch.logsumexp(outside, -1).clamp(min=-1e30)
            kwargs["tail_logprob"] = rest.float().reshape(shape).to(device)
        for parameter in per_row:
            low, high = {"temperature": (0.5, 2.0), "weight": (0.0, 2.0)}.get(parameter, (0.1, 0.9))
            value = low + (high - low) * torch.rand(shape, generator=g)
            kwargs[parameter] = value.to(device)
        if masked:
            kwargs["mask"] = (torch.arange(rows) % 3 != 1).reshape(shape).to(device)
        if labelled:
            labels = labels_in_and_out(ids, outside, options.get("ignore_index", -100))
            kwargs["labels"] = labels.reshape(shape).to(device)
        return kwargs

    products = 2 * rows * v * h
    return Case(
        op="linear_topk_divergence",
        id=case_id,
        inputs=inputs,
        shape=(rows, v),
        dtypes=dtypes,
        options=options,
        tolerances=_linear.tolerances(dtypes),
        flops={"in_forward": 3 * products, "recompute": 4 * products},
        marks=frozenset(marks),
        gate=gate,
    )


def _table() -> list[Case]:
    cases: list[Case] = []
    hard: dict[str, Any] = {"label_weight": 0.3, "z_loss": 1e-2}

    def add(*arguments: Any, **more: Any) -> None:
        cases.append(_case(*arguments, **more))

    for kind in TOPK_KINDS:
        for tail in TAILS:
            if tail == "zero" and kind == "reverse_kl":
                continue
            marks = ("ladder",) if tail == "bucket" else ()
            add("plain", 5, 300, 12, kind, tail, marks=marks)
            half: dict[str, Any] = {"dtypes": (BF16, BF16), "biased": True, "reduction": "mean"}
            add("half", 5, 300, 12, kind, tail, marks=marks, **half)
            add("tiles", 4, 4200, 40, kind, tail, biased=True, reduction="sum", marks=marks)
            add("masked", 6, 90, 8, kind, tail, prefix=(2, 3), masked=True, reduction="mean")
            once = marks if kind == "forward_kl" else ()
            add("labels", 9, 300, 12, kind, tail, labelled=True, masked=True, marks=once, **hard)
            add("labels_half", 9, 300, 12, kind, tail, labelled=True, per_row=("weight",), **half,
                **hard)  # fmt: skip
    for reduction in ("none", "sum"):
        options: dict[str, Any] = {"labelled": True, "biased": True, "reduction": reduction}
        add(f"labels_tiles_{reduction}", 4, 4200, 40, **options, **hard)
        add(f"labels_alone_{reduction}", 9, 300, 12, label_weight=1.0, **options)
        add(f"labels_mixed_{reduction}", 9, 300, 12, label_weight=0.3, **options)
        add(f"z_loss_alone_{reduction}", 9, 300, 12, z_loss=0.1, reduction=reduction)
        add(f"ignored_{reduction}", 9, 300, 12, ignore_index=-1, **options)
    add("labels_softcap", 6, 200, 8, "jsd", "renormalize", prefix=(2, 3), labelled=True,
        student_softcap=4.0, student_logit_scale=1.25, temperature=2.0, scale_t2=True,
        reduction="mean", denominator=7.0, **hard)  # fmt: skip
    add("whole", 4, 31, 31, "jsd")
    add("one_token", 3, 1, 1)
    add("no_rows", 0, 90, 8, reduction="mean")
    add("softcap", 5, 200, 8, "jsd", student_softcap=4.0, student_logit_scale=1.25, biased=True)
    add("per_row", 6, 90, 8, "jsd", "zero", per_row=("temperature", "beta", "weight"))
    for dtypes in ((BF16, FP32), (FP32, BF16)):
        add("dtypes", 6, 40, 8, dtypes=dtypes, reduction="sum")
    for h in (576, 2048):
        options = {"h": h, "dtypes": (BF16, BF16), "reduction": "mean"}
        gate = _case("bench", 8, 151936, 64, **options)
        add("bench", 1024, 151936, 64, marks=("bench", "slow"), gate=gate, **options)
    return cases


def run(case: Case, inputs: dict[str, Any], impl: str, seed: int) -> dict[str, Tensor]:
    """Every output of the case on backend `impl`."""
    call = partial(linear_topk_divergence, impl=impl)
    return _linear.run(call, inputs, _linear.random_upstream(case, seed))


def truth(case: Case, inputs: dict[str, Any], seed: int) -> dict[str, Expected]:
    """What `run` should give: the reference in fp64."""

    def rows(logits: Tensor, exact: dict[str, Any]) -> tuple[Tensor, Tensor]:
        p = torch.zeros_like(logits).scatter(-1, exact["topk_ids"], exact["topk_logprobs"].exp())
        return topk_divergence(logits, impl="reference", **exact), p

    return _linear.truth(linear_topk_divergence, rows, inputs, _linear.random_upstream(case, seed))


CASES: list[Case] = _table()
