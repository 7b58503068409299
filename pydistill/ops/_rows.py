"""What every operator on rows of logits shares: prefixes, one-value-a-row arguments, masks,
reductions, batching.

A row is one position of the flattened prefix of `[..., V]`. A row is *counted* when its mask is
True, its label is not `ignore_index` and its weight is not zero; kernels never read the logits of a
row that is not counted.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

REDUCTIONS = ("mean", "sum", "none")


def values_readable(x: Tensor) -> bool:
    """Whether reading a value of `x` now is free: eager, on the CPU, not inside a functorch
    transform."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def check_logits(name: str, logits: Tensor) -> None:
    """Raises unless `logits` is a floating-point tensor `[..., V]` with V >= 1."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} is a {type(logits).__name__}; pass a tensor of logits [..., V].")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"{name} has dtype {logits.dtype}; pass fp32, bf16, fp16 or fp64 logits.")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(logits.shape)}; pass logits [..., V] with V >= 1."
        )


def flatten(logits: Tensor) -> Tensor:
    """`[..., V]` as `[rows, V]` with a unit last stride; a view where the strides allow it, else a
    copy."""
    rows = logits if logits.ndim == 2 else logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def row_index(name: str, index: Tensor | None, limit: int, device: torch.device) -> Tensor | None:
    """An int64 `[R]` index into `limit` flattened rows; values are checked where that is free."""
    if index is None:
        return None
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.ndim != 1:
        got = (
            f"{index.dtype} {tuple(index.shape)}"
            if isinstance(index, Tensor)
            else type(index).__name__
        )
        raise TypeError(
            f"{name} is {got}; pass an int64 tensor [R] of rows of the flattened prefix."
        )
    check_device(name, index, device)
    if values_readable(index) and index.numel():
        low, high = (int(v) for v in index.aminmax())
        if low < 0 or high >= limit:
            bad = low if low < 0 else high
            raise ValueError(
                f"{name} holds {bad}, outside the {limit} rows of the prefix; use 0 to {limit - 1}."
            )
    return index.contiguous()


def warn(message: str) -> None:
    """Warns at the line outside this package that led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] == "pydistill":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(
            f"{name} is on {x.device} and the other arguments on {device}; move one of them."
        )


def row_values(name: str, value: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    """A per-row argument, given as `shape` (the result's prefix) or a 0-d tensor, as `[R]`."""
    check_device(name, value, device)
    if value.ndim and tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; pass a scalar or one value a row, shape"
            f" {tuple(shape)}."
        )
    return value.expand(tuple(shape)).reshape(-1)


def row_mask(mask: Tensor | None, shape: Sequence[int], device: torch.device) -> Tensor | None:
    """A bool argument of one value a row as `[R]`."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"mask is {got}; pass a bool tensor, True where the row counts (mask.bool())."
        )
    return row_values("mask", mask, shape, device)


def row_weight(weight: Tensor | None, shape: Sequence[int], device: torch.device) -> Tensor | None:
    """A floating-point argument of one value a row as `[R]`; it may require grad."""
    if weight is None:
        return None
    if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point:
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight is {got}; pass a floating-point tensor of one value a row.")
    return row_values("weight", weight, shape, device)


def check_range(
    name: str, value: float | Tensor, low: float, high: float, *, strict: bool = True, fix: str = ""
) -> None:
    """Raises when a scalar, or a per-row value that can be read freely, is outside (low, high) or
    not finite."""
    if isinstance(value, Tensor):
        if not values_readable(value) or not value.numel():
            return
        inside = (value > low) & (value < high) if strict else (value >= low) & (value < high)
        if bool(inside.all()):
            return
        value = float(value.detach()[~inside][0])
    elif (low < value if strict else low <= value) and value < high:
        return
    bounds = f"{'(' if strict else '['}{low:g}, {high:g})"
    raise ValueError(f"{name}={value:g} is outside {bounds}; {fix or 'choose a value inside it.'}")


def has_tangent(x: Tensor) -> bool:
    """Whether `x` carries a forward-mode tangent at the open level."""
    if forward_ad._current_level < 0:
        return False
    while torch._C._functorch.is_batchedtensor(x):  # unpack_dual has no batching rule
        x = torch._C._functorch.get_unwrapped(x)
    return forward_ad.unpack_dual(x).tangent is not None


def row_scalar(name: str, value: object) -> float | Tensor:
    """A scalar or a tensor; anything else, and a tensor that requires grad, raises."""
    if isinstance(value, Tensor):
        if value.requires_grad or has_tangent(value):
            raise ValueError(
                f"{name} requires grad, but no gradient flows to it; pass {name}.detach()."
            )
        if not value.dtype.is_floating_point:
            raise TypeError(
                f"{name} has dtype {value.dtype}; pass a floating-point tensor or a number."
            )
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name} is a {type(value).__name__}; pass a number or a tensor of one value a row."
        )
    return float(value)


def counted_rows(
    mask: Tensor | None,
    weight: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
) -> Tensor | None:
    """Bool `[R]` of the rows that count, or None when all do. Arguments are `[R]` already."""
    counted = mask
    if labels is not None:
        kept = labels != ignore_index
        counted = kept if counted is None else counted & kept
    if (
        weight is not None and not weight.requires_grad
    ):  # a learned weight of 0 still has a gradient
        kept = weight != 0
        counted = kept if counted is None else counted & kept
    return counted


def reduce_rows(
    loss: Tensor,
    weight: Tensor | None,
    counted: Tensor | None,
    reduction: str,
    denominator: float | Tensor | None,
    shape: Sequence[int],
) -> Tensor:
    """Weights `[R]` row losses and reduces them: mean is sum(w l) / sum(w), or / `denominator`; 0
    if nothing counts."""
    if weight is not None:
        loss = weight.to(loss.dtype) * loss
        if counted is not None:
            loss = torch.where(counted, loss, 0)
    if reduction == "none":
        return loss.reshape(tuple(shape))
    total = loss.sum()
    if reduction == "sum":
        return total
    scale = mean_scale(loss, weight, counted, denominator)
    if not isinstance(scale, Tensor):  # a number would make a forward-mode tangent fp64
        scale = total.new_full((), scale)
    return total * scale


def mean_scale(
    like: Tensor, weight: Tensor | None, counted: Tensor | None, denominator: float | Tensor | None
) -> Tensor | float:
    """1 / (the denominator of the mean), 0 where no row counts."""
    if denominator is not None:
        return 1.0 / denominator
    if weight is None and counted is None:
        return 1.0 / like.numel() if like.numel() else 0.0
    if weight is None:
        assert counted is not None
        size = counted.sum().to(like.dtype)
    else:
        kept = weight if counted is None else torch.where(counted, weight, 0)
        size = kept.to(like.dtype).sum()
    return torch.where(size == 0, 0.0, 1.0 / size)


def check_reduction(reduction: str, denominator: float | Tensor | None) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction={reduction!r} is not known; use one of {', '.join(REDUCTIONS)}."
        )
    if denominator is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"denominator is given with reduction={reduction!r}; it belongs to reduction='mean'."
        )
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(
                f"denominator has shape {tuple(denominator.shape)}; pass a number or a 0-d tensor."
            )
        if denominator.requires_grad:
            raise ValueError(
                "denominator requires grad, but none flows to it; pass denominator.detach()."
            )
    check_range("denominator", denominator, 0.0, math.inf, fix="pass the number of counted tokens.")


def group_by_row(index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """For `index [R]` into `rows` rows: `start [rows + 1]` and `pairs [R]`, so that
    pairs[start[i]:start[i+1]] hold i."""
    ordered, pairs = torch.sort(index, stable=True)
    bounds = torch.arange(rows + 1, device=index.device)
    return torch.searchsorted(ordered, bounds), pairs


def lead(x: Tensor, dim: int | None, batch: int) -> Tensor:
    """`x` with its vmapped dimension (or a new one) merged into dimension 0."""
    batched = x.movedim(dim, 0) if dim is not None else x.expand(batch, *x.shape)
    return batched.reshape(-1, *batched.shape[2:])


def lead_optional(x: Tensor | None, dim: int | None, batch: int) -> Tensor | None:
    return None if x is None else lead(x, dim, batch)


def lead_index(index: Tensor | None, dim: int | None, batch: int, rows: int) -> Tensor | None:
    """A row index whose target `[rows, V]` was merged by `lead` into `[batch * rows, V]`."""
    if index is None:
        return None
    batched = index.movedim(dim, 0) if dim is not None else index.expand(batch, *index.shape)
    return (batched + rows * torch.arange(batch, device=index.device)[:, None]).reshape(-1)


def check_overwrite(
    reduction: str, weight: Tensor | None, student_logits: Tensor, rows: Tensor
) -> None:
    """Raises where `overwrite_logits=True` cannot be had; `rows` is what `flatten` made."""
    if reduction == "none":
        raise ValueError("overwrite_logits=True needs reduction='mean' or 'sum', not 'none'.")
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "overwrite_logits=True is for eager mode; under torch.compile pass"
            " overwrite_logits=False."
        )
    if rows.data_ptr() != student_logits.data_ptr():
        raise ValueError(
            "overwrite_logits=True needs logits that view as [rows, V] with unit last stride,"
            f" not strides {student_logits.stride()}; pass student_logits.contiguous()."
        )
    if weight is not None and weight.requires_grad:
        raise ValueError("overwrite_logits=True gives no gradient to weight; pass weight.detach().")


def row_scale(
    like: Tensor,
    weight: Tensor | None,
    counted: Tensor | None,
    reduction: str,
    denominator: float | Tensor | None,
    rows: int | None = None,
) -> Tensor:
    """What each row's loss counts in a scalar reduction, `[R]`; fp32, or fp64 for fp64 logits."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    scale = torch.ones(like.shape[0] if rows is None else rows, dtype=dtype, device=like.device)
    if weight is not None:
        scale = weight.to(dtype)
    if counted is not None:
        scale = torch.where(counted, scale, 0)
    if reduction == "mean":
        scale = scale * mean_scale(scale, weight, counted, denominator)
    return scale.contiguous()


def spend_overwritten(ctx: Any) -> None:
    """Marks the one gradient of a call with `overwrite_logits=True` as used; raises if it is."""
    if ctx.used:
        raise RuntimeError(
            "overwrite_logits=True keeps one gradient, and backward has used it; pass"
            " overwrite_logits=False to run backward again."
        )
    if torch.is_grad_enabled():
        raise RuntimeError(
            "overwrite_logits=True has no second derivatives; pass overwrite_logits=False."
        )
    ctx.used = True
