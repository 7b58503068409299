"""The cases of `pydistill.verify`.

`run` gives, for one case and backend, every field of the result, the integers as fp64 so that one
comparison serves all (they must be equal: the same coins, the same decisions, the same tokens).
`truth` is the reference, which is fp64, on the same, already rounded, numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pydistill.ops.verify import verify
from pydistill.reference.verify import TREES
from pydistill.testing.case import Case, Expected, Tolerance

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
_SHORT = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}
_EXACT, _CLOSE = Tolerance(0.0, 0.0), Tolerance(1e-6, 1e-6)

TOLERANCES = {
    "tokens": _EXACT,
    "num_accepted": _EXACT,
    "flags": _EXACT,
    "path": _EXACT,
    "logprobs": _CLOSE,
    "overlap": _CLOSE,
    "bias": _CLOSE,
    "target_lse": _CLOSE,
    "draft_lse": _CLOSE,
}
_EACH: dict[str, Callable[[int], Any]] = {  # warpers that differ by request
    "temperature": lambda b: torch.linspace(0.0, 1.5, b),
    "top_k": lambda b: 9 * torch.arange(b),
    "top_p": lambda b: torch.linspace(0.3, 1.0, b),
    "min_p": lambda b: torch.linspace(0.0, 0.2, b),
    "draft_temperature": lambda b: torch.linspace(1.4, 0.0, b),
    "draft_top_k": lambda b: 7 * (b - torch.arange(b)),
    "draft_top_p": lambda b: torch.linspace(1.0, 0.5, b),
    "draft_min_p": lambda b: torch.linspace(0.1, 0.0, b),
}


def _rows(
    pattern: str, batch: int, slots: int, v: int, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """fp32 logits of target and draft, of a named pattern."""
    target = 2 * torch.randn(batch, slots + 1, v, generator=g)
    draft = target[:, :-1] + torch.randn(batch, slots, v, generator=g)
    if pattern == "equal":
        draft = target[:, :-1].clone()
    elif pattern == "ties":
        target, draft = target.round(), draft.round()
    elif pattern == "peaked":
        target[:, :, v // 3] += 25
        draft[:, :, v // 3] += torch.linspace(0, 50, batch)[:, None]
    elif pattern == "disjoint":
        target[..., : v // 2], draft[..., v // 2 :] = -torch.inf, -torch.inf
    elif pattern == "infinite":  # a padded vocabulary, and rows with few tokens or one
        target[..., -2:], draft[..., -2:] = -torch.inf, -torch.inf
        target[0, 1:, 3:] = -torch.inf
        draft[-1, :, : v // 2] = -torch.inf
    elif pattern == "late":  # each block's maximum is far above those before
        rise = torch.arange(v) // 700 * 30.0
        target, draft = target + rise, draft + rise
    elif pattern != "normal":
        raise ValueError(f"pattern={pattern!r} is not known.")
    return target, draft


def _sampled(draft: Tensor, g: torch.Generator) -> Tensor:
    """A token of each row, mostly a likely one."""
    noise = torch.rand(draft.shape, generator=g).log().neg().log()
    return (draft.float() - noise).argmax(-1)


_SHAPES: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {  # trees of (batch, nodes)
    "chain": lambda b, n, g: torch.arange(-1, n - 1),
    "siblings": lambda b, n, g: torch.full((n,), -1),
    "levels": lambda b, n, g: torch.arange(n) // 3 - 1,
    "random": lambda b, n, g: (
        (torch.rand(b, n, generator=g) ** 0.6 * (torch.arange(n) + 1)).long() - 1
    ),
}


def _tree_rows(target: Tensor, draft: Tensor, tree: Tensor, g: torch.Generator) -> Tensor:
    """Tokens of a tree, siblings drawn without replacement from the draft's row of their place."""
    noise = torch.rand(draft.shape, generator=g).log().neg().log()
    order = (draft.float() - noise).argsort(-1, descending=True)
    rows = tree.expand(draft.shape[:2]) + 1
    ids = torch.empty(rows.shape, dtype=torch.int64)
    for request in range(rows.shape[0]):
        used = [0] * (rows.shape[1] + 1)
        for node, row in enumerate(rows[request].tolist()):
            ids[request, node] = order[request, row, used[row] % draft.shape[-1]]
            used[row] += 1
    return ids


def _support(draft: Tensor, tokens: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits and ids `[B, K, S]` of the tokens of each row, in any order; one slot of every other
    request is empty."""
    tokens = tokens[..., torch.randperm(tokens.shape[-1], generator=g)]
    logits = draft.gather(-1, tokens)
    tokens[::2, :, 1], logits[::2, :, 1] = -1, torch.nan
    return logits, tokens


def _poison(target: Tensor, draft: Tensor, ids: Tensor) -> None:
    """One fault a request, at its first or last slot; requests 0 and 9 and beyond are sound."""
    target[1, 0, 5], target[2, -1, 0], target[3, 1] = torch.nan, torch.inf, -torch.inf
    draft[4, 0, -1], draft[5, -1, 2] = torch.nan, torch.inf
    ids[6, 0], ids[7, -1] = -1, -1
    draft[8, 1, ids[8, 1]] = -torch.inf


def _case(
    name: str,
    batch: int,
    slots: int,
    v: int,
    method: str = "token",
    *,
    dtype: torch.dtype = FP32,
    pattern: str = "normal",
    one_hot: bool = False,
    poisoned: bool = False,
    ragged: bool = False,
    biased: bool = False,
    support: int = 0,
    strided: bool = False,
    each: tuple[str, ...] = (),
    shape: str | None = None,
    marks: tuple[str, ...] = (),
    gate: Case | None = None,
    **options: Any,
) -> Case:
    case_id = f"{method}-{name}-{_SHORT[dtype]}-{batch}x{slots}x{v}"
    one_hot = one_hot or method == "tree_target_only"

    def inputs(device: torch.device | str, seed: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed + zlib.crc32(case_id.encode()))
        target, draft = (x.to(dtype) for x in _rows(pattern, batch, slots, v, g))
        tree = None if shape is None else _SHAPES[shape](batch, slots, g)
        tokens = draft.topk(support).indices
        if support:
            kept = torch.zeros_like(draft, dtype=torch.bool).scatter(-1, tokens, True)
            draft = torch.where(kept, draft, -torch.inf)
        ids = _sampled(draft, g) if tree is None else _tree_rows(target, draft, tree, g)
        if poisoned:
            _poison(target, draft, ids)
        if support:
            draft, tokens = _support(draft, tokens, g)
        if strided:
            wide = torch.full((batch, slots + 3, v + 5), torch.nan, dtype=dtype)
            wide[:, 2:, 3:-2] = target
            target = wide[:, 2:, 3:-2]
            draft = draft.transpose(0, 1).contiguous().transpose(0, 1)
        call: dict[str, Any] = {
            "target_logits": target.to(device),
            "draft_logits": None if one_hot else draft.to(device),
            "draft_ids": ids.to(device),
            "method": method,
            "seed": seed + 11,
            "position": (7 * torch.arange(batch)).to(device),
            **options,
        }
        if support:
            call["draft_topk_ids"] = tokens.to(device)
        if tree is not None:
            call["tree"] = tree.int().to(device)
        if ragged:
            call["num_drafted"] = (torch.arange(batch) % (slots + 1)).to(device)
            call["seed"] = (torch.arange(batch) * 2**40 - 3).to(device)
        if biased:
            call["logit_bias"] = torch.randn(batch, v, generator=g).to(device)
        for warper in each:
            call[warper] = _EACH[warper](batch).to(device)
        return call

    rows = batch * (slots + 1 + (0 if one_hot else slots))
    return Case(
        op="verify",
        id=case_id,
        inputs=inputs,
        shape=(batch * (slots + 1), v),
        dtypes=(dtype,),
        options={"kind": method, "slots": slots, **options},
        tolerances=TOLERANCES,
        bytes={"forward": rows * v * dtype.itemsize},
        flops={"forward": 6 * rows * v},
        marks=frozenset(marks),
        gate=gate,
    )


_LENIENT: dict[str, dict[str, Any]] = {
    "linear": {"lenience": ("linear", 0.3)},
    "square": {"lenience": ("square", 0.5)},
    "exponential": {"lenience": ("exponential", 0.4)},
    "ensemble": {"lenience": ("ensemble", 0.6)},
    "tv_budget": {"tv_budget": 0.1},
}


def _table() -> list[Case]:
    cases: list[Case] = []

    def add(*arguments: Any, **more: Any) -> None:
        cases.append(_case(*arguments, **more))

    everything: dict[str, Any] = {"temperature": 1.4, "top_k": 60, "top_p": 0.9, "min_p": 0.01}
    for method in ("token", "block", "typical"):
        for dtype in (FP32, BF16, FP16):
            add("plain", 40, 4, 1000, method, dtype=dtype, marks=("ladder",))
            add("blocks", 12, 3, 5000, method, dtype=dtype)
            add("warped", 30, 3, 2500, method, dtype=dtype, **everything)
            add("ties", 30, 3, 1500, method, dtype=dtype, pattern="ties", top_k=40, top_p=0.8)
            add("one_hot", 30, 4, 1300, method, dtype=dtype, one_hot=True)
            add("support", 24, 3, 3500, method, dtype=dtype, support=9)
        add("equal", 12, 4, 2100, method, pattern="equal")
        add("support_warped", 24, 3, 1500, method, support=80, **everything)
        add("support_poisoned", 14, 3, 1067, method, support=1067, poisoned=True)
        add("peaked", 30, 4, 1100, method, pattern="peaked")
        add("disjoint", 12, 3, 2050, method, pattern="disjoint")
        add("infinite", 20, 3, 1067, method, pattern="infinite", top_p=0.95)
        add("late", 12, 3, 5000, method, pattern="late", top_k=9)
        add("poisoned", 14, 3, 1067, method, poisoned=True, marks=("ladder",))
        add("ragged", 40, 3, 500, method, ragged=True, marks=("ladder",))
        add("biased", 20, 3, 1500, method, biased=True, top_k=50)
        add("strided", 12, 3, 1100, method, strided=True)
        add("each", 40, 3, 700, method, each=tuple(_EACH), marks=("ladder",))
        add("one_hot_warped", 30, 3, 1300, method, one_hot=True, **everything)
        add("greedy", 40, 4, 1300, method, pattern="ties", temperature=0.0)
        add("greedy_draft", 30, 4, 1300, method, draft_temperature=0.0)
        add("cold", 30, 4, 1200, method, temperature=0.05)
        add("hot_draft", 30, 4, 1200, method, draft_temperature=3.0, draft_top_p=0.99)
        add("tiny", 40, 4, 3, method)
        add("one_token", 3, 2, 1, method)
        add("no_slots", 4, 0, 1100, method)
        add("no_requests", 0, 3, 90, method)
        add("huge", 2, 2, 151936, method, marks=("slow",), top_p=0.9)
    for method in TREES:

        def plant(name: str, *arguments: Any, method: str = method, **more: Any) -> None:
            add(name, *arguments, method, **{"shape": "random", **more})

        for dtype in (FP32, BF16, FP16):
            plant("plain", 24, 7, 1000, dtype=dtype, marks=("ladder",))
            plant("levels", 12, 9, 1100, dtype=dtype, shape="levels")
            plant("warped", 12, 6, 1500, dtype=dtype, **everything)
            plant("ties", 12, 6, 1500, dtype=dtype, pattern="ties", top_k=40, top_p=0.8)
            plant("one_hot", 12, 6, 1300, dtype=dtype, one_hot=True)
        if method != "tree_target_only":
            plant("support", 12, 7, 3500, support=9)
            plant("support_warped", 12, 6, 1500, support=80, **everything)
        plant("chain", 24, 4, 500, shape="chain")
        plant("siblings", 12, 9, 1100, shape="siblings")
        plant("all_siblings", 24, 6, 6, shape="siblings")
        plant("equal", 8, 6, 2100, pattern="equal")
        plant("peaked", 16, 6, 1100, pattern="peaked")
        plant("disjoint", 8, 6, 2050, pattern="disjoint")
        plant("infinite", 12, 6, 1067, pattern="infinite", top_p=0.95)
        plant("late", 6, 5, 5000, pattern="late", top_k=9)
        plant("poisoned", 14, 6, 1067, poisoned=True, marks=("ladder",))
        plant("ragged", 24, 6, 500, ragged=True, marks=("ladder",))
        plant("biased", 8, 6, 1100, biased=True, top_k=50)
        plant("strided", 8, 6, 1100, strided=True)
        plant("each", 24, 6, 700, each=tuple(_EACH), marks=("ladder",))
        plant("greedy", 16, 6, 1100, pattern="ties", temperature=0.0)
        plant("greedy_draft", 12, 6, 1100, draft_temperature=0.0)
        plant("cold", 16, 6, 1100, temperature=0.05)
        plant("hot_draft", 16, 6, 1100, draft_temperature=3.0, draft_top_p=0.99)
        plant("few", 40, 9, 3)
        plant("one_token", 3, 4, 1)
        plant("no_nodes", 4, 0, 1100)
        plant("no_requests", 0, 5, 90)
        plant("huge", 2, 3, 151936, marks=("slow",), top_p=0.9)
    for name, options in _LENIENT.items():
        for dtype in (FP32, BF16):
            add(name, 40, 4, 1000, dtype=dtype, **options)
        add(f"{name}_filtered", 20, 4, 1500, top_k=30, draft_top_p=0.9, draft_top_k=0, **options)
        add(f"{name}_one_hot", 30, 4, 1300, one_hot=True, top_p=0.9, **options)
        add(f"{name}_support", 24, 3, 3500, support=9, **options)
        add(f"{name}_greedy", 30, 4, 1300, temperature=0.0, **options)
        add(f"{name}_poisoned", 14, 3, 1067, poisoned=True, **options)
    for dtype in (FP32, BF16):
        for v in (32000, 49152, 151936):
            for batch in (1, 8):
                gate = _case("gate", batch, 4, v, dtype=dtype)
                add("bench", batch, 4, v, dtype=dtype, marks=("bench", "slow"), gate=gate)
    return cases


def run(case: Case, inputs: dict[str, Any], impl: str, seed: int) -> dict[str, Tensor]:
    """Every output of the case on backend `impl`."""
    found = verify(**inputs, impl=impl)._asdict()
    return {n: x if x.is_floating_point() else x.double() for n, x in found.items()}


def truth(case: Case, inputs: dict[str, Any], seed: int) -> dict[str, Expected]:
    """What `run` should give: the reference on fp64 logits, biased as the kernels bias them."""
    target, draft = inputs["target_logits"], inputs["draft_logits"]
    exact = {
        **inputs,
        "target_logits": target.double(),
        "draft_logits": None if draft is None else draft.double(),
    }
    if "logit_bias" in inputs:
        exact["target_logits"] = (target.float() + inputs["logit_bias"][:, None]).double()
        del exact["logit_bias"]
    return {name: Expected(x) for name, x in run(case, exact, "reference", seed).items()}


CASES: list[Case] = _table()
