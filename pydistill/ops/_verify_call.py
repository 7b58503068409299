"""Argument checks of `pydistill.verify`: every argument in the form that kernels take."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydistill import _registry
from pydistill.ops import _rows
from pydistill.reference.verify import LENIENCES, METHODS, TREES, WARPERS, Inputs, Rule

_FORMS = LENIENCES[1:5]


class Call(NamedTuple):
    """A checked call. `check`: its values were left to the kernel, which looks at them anyway."""

    inputs: Inputs
    rule: Rule
    backend: str
    check: bool


def prepare(
    op: str,
    target: Tensor,
    draft: Tensor | None,
    ids: Tensor,
    rule: Rule,
    impl: str,
    explain: bool = True,
    *,
    draft_topk_ids: Tensor | None,
    tree: Tensor | None,
    num_drafted: int | Tensor | None,
    warpers: tuple[Any, ...],
    drafts: tuple[Any, ...],
    logit_bias: Tensor | None,
    seed: int | Tensor,
    position: int | Tensor,
) -> Call:
    """Raises for what cannot be right. Values of tensors are read here if `explain`, or where the
    kernel does not say that one is wrong."""
    _rows.check_logits("target_logits", target)
    shape, device = target.shape, target.device
    if len(shape) != 3 or shape[1] == 0:
        raise ValueError(
            f"target_logits has shape {tuple(shape)}; pass [B, K + 1, V], a row for each"
            " drafted token and one more."
        )
    batch, rows, vocab = shape
    slots = rows - 1
    if draft is not None:
        check_draft(draft, target, draft_topk_ids is not None)
        if METHODS[rule.method] == "tree_target_only":
            raise ValueError(
                "draft_logits is given, and method='tree_target_only' asks the target alone; pass"
                " draft_logits=None, or method='tree' or 'traversal'."
            )
    elif draft_topk_ids is not None:
        raise ValueError(
            "draft_topk_ids is given without draft_logits; pass the draft's logits [B, K, S] of"
            " these tokens, or neither for a draft that does not sample."
        )
    backend = backend_of(op, impl, device.type, target.dtype, METHODS[rule.method])
    check = not explain and backend == "cpu" and _rows.values_readable(target)
    known = not check and device.type == "cpu"  # values are read, where that is free
    ids = check_ids(ids, (batch, slots), vocab, device, known)
    counts = per_request(
        "num_drafted", slots if num_drafted is None else num_drafted, batch, device
    )
    positions = per_request("position", position, batch, device)
    if known:
        check_integers("num_drafted", counts, 0, slots, "drafted tokens")
        check_integers("position", positions, 0, None, "committed tokens")
    inputs = Inputs(
        unit_stride(target),
        None if draft is None else unit_stride(draft),
        ids,
        counts,
        warper_rows(warpers, drafts, batch, device, known),
        per_request("seed", seed, batch, device),
        positions,
        None if logit_bias is None else bias_rows(logit_bias, target),
        None if tree is None else parents(tree, ids, counts, known),
        None if draft is None or draft_topk_ids is None else supports(
            draft_topk_ids, draft, vocab, counts, known
        ),
    )  # fmt: skip
    return Call(inputs, rule, backend, check)


# Serving repeats its calls but for the numbers in the tensors, the positions, and seeds. What was
# checked and made for a call is kept by all that it depends on; values are checked by the kernel.
_calls: dict[Any, tuple[Any, ...]] = {}


def key_of(
    rule: Rule, target: Any, draft: Any, ids: Any, seed: Any, settings: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """All that the checks of an eager call on the CPU depend on; None where it is not kept."""
    kinds = tuple(map(type, settings))  # 1, 1.0 and True are one key otherwise
    if (
        type(target) is not Tensor
        or type(ids) is not Tensor
        or Tensor in kinds
        or target.requires_grad
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return None
    drafted: Any = None
    if draft is not None:
        if type(draft) is not Tensor or draft.requires_grad:
            return None
        drafted = (draft.shape, draft.stride(), draft.dtype, draft.device)
    return (
        rule, target.shape, target.stride(), target.dtype, target.device, drafted, ids.shape,
        ids.dtype, ids.device, ids.is_contiguous(), seed if type(seed) is int else None, settings,
        kinds, _registry.has_kernel,
    )  # fmt: skip


def known_call(
    key: Any, target: Tensor, draft: Tensor | None, ids: Tensor, seed: Any, position: Any
) -> tuple[Any, ...] | None:
    """The arguments of the kernel, if a call of this key was checked before."""
    try:
        found = None if key is None else _calls.get(key)
    except TypeError:  # a setting is no number
        return None
    if found is None:
        return None
    counts, warpers, seeds = found
    batch = target.shape[0]
    if type(seed) is not int:
        if not plain_integers(seed, batch):
            return None
        seeds = seed
    if type(position) is int and 0 <= position < 2**63:
        position = torch.full((1,), position, dtype=torch.int64)
    elif not plain_integers(position, batch):
        return None
    return (target, draft, ids, counts, warpers, seeds, position, None, None, None, *key[0], True)


def plain_integers(x: Any, batch: int) -> bool:
    return (
        type(x) is Tensor
        and x.dtype == torch.int64
        and x.shape == (batch,)
        and x.device.type == "cpu"
        and x.is_contiguous()
    )


def remember(key: Any, call: Call, target: Tensor, draft: Tensor | None, ids: Tensor) -> None:
    """Keeps a call that went well, if its tensors are passed on as they are."""
    inputs = call.inputs
    if inputs.target is target and inputs.draft is draft and inputs.ids is ids:
        if len(_calls) >= 256:
            _calls.clear()
        with suppress(TypeError):
            _calls[key] = (inputs.num_drafted, inputs.warpers, inputs.seed)


_native: dict[Any, str] = {}  # calls that a native kernel serves: once loaded, it stays


def backend_of(op: str, impl: str, device: str, dtype: torch.dtype, part: str) -> str:
    """Of a call with a method, or of the gradient."""
    key = (impl, device, dtype, _registry.has_kernel)
    found = _native.get(key)
    if found is None:
        found = _registry.resolve(op, impl, device, dtype, part)
        if found == "cpu" and not torch.compiler.is_compiling():
            _native[key] = found
    return found


def unit_stride(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def check_draft(draft: Any, target: Tensor, sparse: bool) -> None:
    if isinstance(draft, tuple):
        raise TypeError(
            "draft_logits is a tuple; of a draft known on S tokens a row, pass draft_logits"
            " [B, K, S] and the tokens' ids as draft_topk_ids."
        )
    _rows.check_logits("draft_logits", draft)
    _rows.check_device("draft_logits", draft, target.device)
    batch, rows, vocab = target.shape
    want = (batch, rows - 1, vocab)
    if draft.dtype != target.dtype:
        raise TypeError(
            f"draft_logits has dtype {draft.dtype}, target_logits {target.dtype}; widen one of"
            " them (bf16 to fp32 is exact)."
        )
    if sparse:
        if draft.ndim != 3 or tuple(draft.shape[:2]) != want[:2]:
            raise ValueError(
                f"draft_logits has shape {tuple(draft.shape)}, and target_logits"
                f" {tuple(target.shape)} with draft_topk_ids asks for {want[:2]} and S tokens a"
                " row; pass the logits that each drafted token was sampled from."
            )
    elif tuple(draft.shape) != want:
        fix = "pass the row that each drafted token was sampled from"
        if draft.ndim == 3 and draft.shape[:2] == want[:2]:
            fix = "slice both to the vocabulary they share, before the draft samples"
            fix += ", or name the draft's tokens in draft_topk_ids"
        raise ValueError(
            f"draft_logits has shape {tuple(draft.shape)}, and target_logits {tuple(target.shape)}"
            f" asks for {want}; {fix}."
        )


def check_ids(
    ids: Any, shape: tuple[int, int], vocab: int, device: torch.device, known: bool
) -> Tensor:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"draft_ids is {got}; pass int64 or int32 token ids [B, K].")
    _rows.check_device("draft_ids", ids, device)
    if tuple(ids.shape) != shape:
        raise ValueError(
            f"draft_ids has shape {tuple(ids.shape)}, and target_logits asks for {shape}; pass one"
            " token a slot, -1 where none was drafted."
        )
    rows = contiguous(ids)
    if known and _rows.values_readable(rows):
        wrong = (rows < -1) | (rows >= vocab)
        if bool(wrong.any()):
            raise ValueError(
                f"draft_ids holds {int(rows[wrong][0])}, outside the {vocab} tokens of the logits;"
                f" use 0 to {vocab - 1}, and -1 in slots without a token."
            )
    return rows


def contiguous(x: Tensor) -> Tensor:
    """int64, in order."""
    if x.dtype != torch.int64:
        x = x.long()
    return x if x.is_contiguous() else x.contiguous()


def parents(tree: Tensor, ids: Tensor, counts: Tensor, known: bool) -> Tensor:
    """int32 `[1, N]` or `[B, N]`."""
    if not isinstance(tree, Tensor) or tree.dtype not in (torch.int64, torch.int32):
        got = tree.dtype if isinstance(tree, Tensor) else type(tree).__name__
        raise TypeError(f"tree is {got}; pass int32 parents [N] or [B, N].")
    _rows.check_device("tree", tree, ids.device)
    batch, nodes = ids.shape
    if tuple(tree.shape) not in ((nodes,), (batch, nodes)):
        raise ValueError(
            f"tree has shape {tuple(tree.shape)}; pass {(nodes,)}, or {(batch, nodes)} for one a"
            " request: a parent for each of draft_ids."
        )
    rows = tree if tree.ndim == 2 else tree[None]
    if known and nodes and all(_rows.values_readable(x) for x in (rows, ids, counts)):
        node = torch.arange(nodes)
        wrong = ((rows < -1) | (rows >= node)) & (ids != -1) & (node < counts[:, None])
        if bool(wrong.any()):
            request, i = (int(x) for x in wrong.nonzero()[0])
            own = "-1" if i == 0 else f"-1 to {i - 1}"
            raise ValueError(
                f"tree gives node {i} the parent {int(rows.expand_as(ids)[request, i])}; a parent"
                f" comes before its children: use {own}, -1 being the committed tokens."
            )
    return rows.int().contiguous()


def supports(ids: Any, draft: Tensor, vocab: int, counts: Tensor, known: bool) -> Tensor:
    """int64 `[B, K, S]`, or `[1, 1, S]` if all rows share their tokens."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"draft_topk_ids is {got}; pass int64 or int32 token ids (ids.long()).")
    _rows.check_device("draft_topk_ids", ids, draft.device)
    if tuple(ids.shape) not in (tuple(draft.shape), tuple(draft.shape[-1:])):
        raise ValueError(
            f"draft_topk_ids has shape {tuple(ids.shape)}; pass {tuple(draft.shape)}, a token for"
            f" each of draft_logits, or {tuple(draft.shape[-1:])} if all rows have the same."
        )
    rows = contiguous(ids if ids.ndim == 3 else ids[None, None])
    if known and rows.numel() and _rows.values_readable(rows) and _rows.values_readable(counts):
        drafted = rows
        if ids.ndim == 3:  # rows where nothing was drafted may hold anything
            drafted = rows[torch.arange(rows.shape[1]) < counts[:, None].expand(len(rows), 1)]
        ordered = drafted.reshape(-1, rows.shape[-1]).sort(-1).values
        if ordered.numel() and int(ordered[:, -1].max()) >= vocab:
            raise ValueError(
                f"draft_topk_ids holds {int(ordered[:, -1].max())}, outside the {vocab} tokens of"
                f" target_logits; use 0 to {vocab - 1}, and -1 in empty slots."
            )
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        if bool(twice.any()):
            raise ValueError(
                f"draft_topk_ids names token {int(ordered[:, 1:][twice][0])} twice in a row; keep"
                " each token once (-1 marks an empty slot)."
            )
    return rows


def per_request(name: str, value: Any, batch: int, device: torch.device) -> Tensor:
    """An integer, or one a request, as int64 `[1]` or `[B]`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, Tensor)):
        raise TypeError(f"{name} is a {type(value).__name__}; pass an int, or an int64 tensor [B].")
    if not isinstance(value, Tensor):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{name}={value} does not fit in an int64; choose a smaller one.")
        make = partial(torch.full, (1,), int(value), dtype=torch.int64, device=device)
        if name == "position" or not isinstance(value, int):  # positions do not repeat
            return make()
        return kept((value, device), make)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} has dtype {value.dtype}; pass an int64 tensor [B].")
    _rows.check_device(name, value, device)
    if value.ndim and tuple(value.shape) != (batch,):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; pass an int, or one a request, shape"
            f" {(batch,)}."
        )
    return contiguous(value if value.ndim else value[None])


# Numbers that calls repeat are kept as tensors; nothing writes to these.
_kept: dict[Any, Tensor] = {}


def kept(key: Any, make: Callable[[], Tensor]) -> Tensor:
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return make()  # under a tracer, tensors are its own
    found = _kept.get(key)
    if found is None:
        found = make()
        if torch._C._functorch.is_functorch_wrapped_tensor(found):
            return found
        if len(_kept) >= 256:
            _kept.clear()
        _kept[key] = found
    return found


def check_integers(name: str, value: Tensor, low: int, high: int | None, what: str) -> None:
    if not _rows.values_readable(value):
        return
    wrong = value < low if high is None else (value < low) | (value > high)
    if bool(wrong.any()):
        bounds = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}={int(value[wrong][0])} is no number of {what}; use {bounds}.")


# The bounds of a warper, inclusive.
_BOUNDS = {
    "temperature": (1e-30, 1e30),
    "top_k": (0.0, 2.0**53),
    "top_p": (1e-30, 1.0),
    "min_p": (0.0, 1.0),
}


NAMES = tuple(_BOUNDS)
_OFF = (1.0, 0.0, 1.0, -math.inf)  # min_p as its logarithm


def warper_rows(
    warpers: tuple[Any, ...], drafts: tuple[Any, ...], batch: int, device: torch.device, known: bool
) -> Tensor:
    """fp64 `[1, 2 * WARPERS]`, or `[B, 2 * WARPERS]` if one of them is one a request."""
    numbers: list[float] = []
    columns: list[tuple[int, Tensor]] = []
    ours: list[Any] = []
    for side, given in enumerate((warpers, drafts)):
        for i, name in enumerate(NAMES):
            value = given[i]
            if value is not None:
                value = warper("draft_" + name if side else name, value, batch, device, known)
                if name == "min_p":
                    value = logarithm(value)
            elif side:
                value = ours[i]
            else:
                value = _OFF[i]
            ours.append(value)
            if isinstance(value, Tensor):
                columns.append((len(numbers), value))
                value = _OFF[i]
            numbers.append(value)
    row = kept(
        (*numbers, device), lambda: torch.tensor([numbers], dtype=torch.float64, device=device)
    )
    if not columns:
        return row
    parts = dict(columns)
    return torch.stack(
        [parts[i] if i in parts else row[0, i].expand(batch) for i in range(2 * WARPERS)], 1
    )


def logarithm(x: float | Tensor) -> float | Tensor:
    if isinstance(x, Tensor):
        return x.log()
    return math.log(x) if x > 0 else -math.inf


def warper(name: str, value: Any, batch: int, device: torch.device, known: bool) -> float | Tensor:
    """A number, or fp64 `[B]`, within its bounds."""
    kind = name.removeprefix("draft_")
    low, high = _BOUNDS[kind]
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"{name} is a {type(value).__name__}; pass a number, or one a request.")
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"{name} has dtype {value.dtype}; pass numbers.")
        _rows.check_device(name, value, device)
        if value.ndim and tuple(value.shape) != (batch,):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; pass a number, or one a request, shape"
                f" {(batch,)}."
            )
        rows = value.detach().double().expand(batch)
        if not known or not _rows.values_readable(rows):
            return rows
        inside = within(kind, rows, low, high)
        if bool(torch.as_tensor(inside).all()):
            return rows
        value = float(rows[~torch.as_tensor(inside)][0])
    elif within(kind, float(value), low, high):
        return float(value)
    zero = "0 (greedy), or " if kind == "temperature" else ""
    whole = "a whole number " if kind == "top_k" else ""
    raise ValueError(f"{name}={value:g} is no {kind}; use {zero}{whole}from {low:g} to {high:g}.")


def within(kind: str, value: Any, low: float, high: float) -> Any:
    inside = (value >= low) & (value <= high)
    if kind == "temperature":
        return inside | (value == 0)
    if kind == "top_k":
        return inside & (value % 1 == 0)
    return inside


def bias_rows(bias: Tensor, target: Tensor) -> Tensor:
    """`[1, V]` or `[B, V]`, fp32 (fp64 for fp64 logits)."""
    if not isinstance(bias, Tensor) or not bias.dtype.is_floating_point:
        got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"logit_bias is {got}; pass a floating-point tensor [V] or [B, V].")
    _rows.check_device("logit_bias", bias, target.device)
    batch, _, vocab = target.shape
    if tuple(bias.shape) not in ((vocab,), (batch, vocab)):
        raise ValueError(
            f"logit_bias has shape {tuple(bias.shape)}; pass {(vocab,)}, or {(batch, vocab)} for"
            " one a request."
        )
    wide = torch.promote_types(target.dtype, torch.float32)
    return bias.reshape(-1, vocab).to(wide).contiguous()


def rule_of(
    method: str,
    tree: Any,
    lenience: Any,
    tv_budget: float | None,
    typical: tuple[float, float] | None,
) -> Rule:
    """Raises for a method that is unknown, and for a tree or numbers that do not fit it."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; use one of {', '.join(METHODS)}.")
    if tree is not None and method not in TREES:
        raise ValueError(
            f"tree is given, and method={method!r} is for chains; use one of {', '.join(TREES)}, or"
            " pass tree=None and one path of the tree."
        )
    if tree is None and method in TREES:
        raise ValueError(
            f"method={method!r} needs a tree; pass tree=, int32 [N] or [B, N]: the node that each"
            " drafted token follows, -1 for the committed tokens."
        )
    if method != "token" and (lenience is not None or tv_budget is not None):
        raise ValueError(
            f"lenience and tv_budget belong to method='token', not {method!r}; pass neither, or"
            " change the method."
        )
    if typical is not None and method != "typical":
        raise ValueError(f"typical={typical!r} belongs to method='typical', not {method!r}.")
    if lenience is not None and tv_budget is not None:
        raise ValueError("lenience and tv_budget both say how much is lost; pass one of them.")
    index = METHODS.index(method)
    if method == "typical":
        epsilon, alpha = pair("typical", (0.3, 0.09) if typical is None else typical)
        return Rule(index, 0, number("epsilon", epsilon), number("alpha", alpha))
    if tv_budget is not None:
        return Rule(index, LENIENCES.index("tv_budget"), number("tv_budget", tv_budget))
    if lenience is None:
        return Rule(index)
    kind, strength = pair("lenience", lenience)
    if kind not in _FORMS:
        raise ValueError(f"lenience={lenience!r} is not known; use one of {', '.join(_FORMS)}.")
    value = number(f"lenience {kind}", strength)
    if value < 1e-30 and kind != "ensemble":
        raise ValueError(f"lenience={lenience!r} accepts everything; use 1e-30 to 1.")
    return Rule(index, LENIENCES.index(kind), value)


def pair(name: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, tuple) or len(value) != 2:
        form = '("linear", 0.5)' if name == "lenience" else "(0.3, 0.09), epsilon and alpha"
        raise TypeError(f"{name} is {value!r}; pass a pair such as {form}.")
    return value[0], value[1]


def number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}; pass a number from 0 to 1.")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value:g} is outside 0 to 1; choose a number inside.")
    return float(value)
