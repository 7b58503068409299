"""One process among those that share a vocabulary, the register of checks, and how a sharded result
is compared with that of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

ROWS, VOCAB, PADDED = 13, 400, 392
CUTS = {2: (0, 130, VOCAB), 3: (0, 1, 270, VOCAB)}
CHECKS: dict[str, Callable[[Any], None]] = {}


class Ranks(NamedTuple):
    """The processes, as one of them sees them."""

    rank: int
    world: int
    group: Any

    @property
    def cuts(self) -> tuple[int, ...]:
        return CUTS[self.world]

    @property
    def columns(self) -> slice:
        return slice(self.cuts[self.rank], self.cuts[self.rank + 1])

    def raises(self, error: type[Exception], match: str, call: Callable[[], Any]) -> None:
        """On every rank, and the group is still in step."""
        with pytest.raises(error, match=match):
            call()
        dist.barrier(self.group)


def check(*values: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a check, once for each of `values`."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for value in values or (None,):
            given = () if value is None else value if isinstance(value, tuple) else (value,)
            name = "-".join([function.__name__, *map(str, given)]).replace(" ", "_")
            CHECKS[name] = lambda ranks, given=given: function(ranks, *given)
        return function

    return register


def logits(padded: bool = True) -> tuple[Tensor, Tensor]:
    """Student and teacher, from all but equal (row 0) to far apart; row 3 is equal."""
    student = torch.randn(ROWS, VOCAB) * 3
    teacher = student + torch.randn(ROWS, VOCAB) * torch.logspace(-3, 0.5, ROWS)[:, None]
    teacher[3] = student[3]
    if padded:
        student[:, PADDED:] = teacher[:, PADDED:] = -torch.inf
    return student, teacher


def token_ids(ranks: Ranks) -> Tensor:
    """Labels among which are the first and the last token of every shard."""
    ids = torch.randint(0, PADDED, (ROWS,))
    edges = [0, *(c for cut in ranks.cuts[1:-1] for c in (cut - 1, cut)), PADDED - 1]
    ids[: len(edges)] = torch.tensor(edges)
    return ids


def close(found: Tensor, wanted: Tensor) -> None:
    """To 1e-5, or 1e-6 of the largest number of the row."""
    assert found.dtype == wanted.dtype
    scale = wanted.nan_to_num(0, 0, 0).abs()
    scale = (scale.amax(-1, keepdim=True) if scale.ndim == 2 else scale).clamp(min=1)
    torch.testing.assert_close(found / scale, wanted / scale, rtol=1e-5, atol=1e-6, equal_nan=True)


def agree(found: Tensor, ranks: Ranks) -> None:
    """Every rank has the very same numbers."""
    all_of_them = [torch.empty_like(found) for _ in range(ranks.world)]
    dist.all_gather(all_of_them, found.contiguous(), group=ranks.group)
    for other in all_of_them:
        torch.testing.assert_close(other, found, rtol=0, atol=0, equal_nan=True)


def compare(
    ranks: Ranks,
    function: Callable[..., Tensor],
    student: Tensor,
    impls: tuple[str, ...] = ("auto", "reference"),
    truth: bool = False,
) -> None:
    """`function(student, columns, group=..., impl=...)` -> row values; sharded against whole (or,
    for `truth`, against the definition in fp64), with the gradient of a random mixture of the rows,
    twice."""
    upstream = torch.randn(ROWS)

    def mixture(x: Tensor) -> Tensor:
        return (x.reshape(-1) * upstream).sum()

    whole = student.clone().requires_grad_()
    wanted = function(whole.double() if truth else whole, slice(None)).float()
    (gradient,) = torch.autograd.grad(mixture(wanted), whole)
    for impl in impls:
        part = student[:, ranks.columns].clone().requires_grad_()
        found = function(part, ranks.columns, group=ranks.group, impl=impl)
        (local,) = torch.autograd.grad(mixture(found), part, retain_graph=True)
        (again,) = torch.autograd.grad(mixture(found), part)
        agree(found.detach(), ranks)  # first: a rank that fails alone leaves the others waiting
        close(found.detach(), wanted.detach())
        close(local, gradient[:, ranks.columns])
        torch.testing.assert_close(again, local, rtol=0, atol=0, equal_nan=True)


def supports(ranks: Ranks, teacher: Tensor, k: int = 16) -> tuple[Tensor, Tensor]:
    """Unsorted supports with empty slots, the edges of shards among their tokens."""
    ids = torch.stack([torch.randperm(PADDED)[:k] for _ in range(ROWS)])
    edge = token_ids(ranks)[:, None]
    ids[:, :1] = torch.where((ids == edge).any(1, keepdim=True), ids[:, :1], edge)
    ids[:, 3] = -1
    ids[5, 4:] = -1
    return torch.log_softmax(teacher, -1).gather(1, ids.clamp(min=0)), ids
