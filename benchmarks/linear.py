"""What the benchmarks of fused-linear operators share: a head's gradients, gated and timed.

Every step takes hidden states and weight of the student's head, and what its loss wants beside
them, and returns a loss, a mean over rows, and the gradients of both. The floor is the products
alone, by `torch.mm` into memory that is there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Contestant, Gate, Step
from pydistill import _registry

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# Logits rounded to bf16, as `torch.mm` rounds them, cost the peers up to 1e-2 of the loss.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
THEIR_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
Loss = Callable[..., Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


class Inputs:
    """Hidden states and weight of the student, and what else its losses take.

    A loss is called as `loss(hidden, weight, *others)`; `others` are cut to a few rows as the
    hidden states are, but for `wholes`, by their place. `exact` is the loss in fp64.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        others: tuple[Tensor, ...],
        exact: Loss,
        wholes: tuple[int, ...] = (),
    ) -> None:
        self.hidden, self.weight, self.others = hidden, weight, others
        self.exact, self.wholes = exact, wholes

    def products(self) -> list[tuple[Tensor, Tensor]]:
        """Hidden states and weight of every head that is not the student's."""
        return []

    def gate(self, loss: Loss, limit: float, has_value: bool, output: Gradients) -> Gate:
        """The timed call's gradient of a few hidden states, and the loss and the weight's gradient
        of a call on those rows alone, against fp64."""
        at = torch.linspace(0, len(self.hidden) - 1, min(len(self.hidden), 8)).long()
        few = self.hidden[at]
        others = [x if i in self.wholes else x[at] for i, x in enumerate(self.others)]
        exact = [x.double() if x.is_floating_point() else x for x in others]
        want, *slopes = forward_backward(self.exact, few.double(), self.weight.double(), *exact)
        value, _, weight = forward_backward(loss, few, self.weight, *others)
        hidden = output[1][at].double() * (len(self.hidden) / len(at))
        errors = {
            "loss": float(abs(value - want) / abs(want)),
            "hidden": float((hidden - slopes[0]).norm() / slopes[0].norm()),
            "weight": float((weight.double() - slopes[1]).norm() / slopes[1].norm()),
        }
        if not has_value:
            del errors["loss"]
        return Gate(errors, dict.fromkeys(errors, limit))


def forward_backward(loss: Loss, hidden: Tensor, weight: Tensor, *others: Tensor) -> Gradients:
    leaves = (hidden.detach().requires_grad_(), weight.detach().requires_grad_())
    value = loss(*leaves, *others)
    return value.detach(), *torch.autograd.grad(value, leaves)


def step(
    x: Inputs, *, loss: Loss, limits: dict[torch.dtype, float] = LIMITS, value: bool = True
) -> Step:
    """`value=False`: the peer's loss is another, of the same gradient."""
    return Step(
        partial(forward_backward, loss, x.hidden, x.weight, *x.others),
        check=partial(x.gate, loss, limits[x.hidden.dtype], value),
    )


def compiled_step(x: Inputs, *, loss: Loss, **arguments: Any) -> Step:
    torch.compiler.reset()
    return step(x, loss=torch.compile(loss, dynamic=False), **arguments)


def products(x: Inputs) -> Step:
    """Every product of the loss and its gradients, and nothing else."""
    s, w, others = x.hidden, x.weight, x.products()
    logits, hidden, weight = s.new_empty(len(s), len(w)), torch.empty_like(s), torch.empty_like(w)

    def run() -> None:
        for h, v in others:
            torch.mm(h, v.T, out=logits)
        torch.mm(s, w.T, out=logits)
        torch.mm(logits, w, out=hidden)
        torch.mm(logits.T, s, out=weight)

    return Step(run)


FLOOR = Contestant("floor: torch.mm", products, "floor")


def contestants(
    ours: dict[str, Loss], eager: Loss, peers: dict[str, tuple[Loss, bool]] | None = None
) -> tuple[Contestant, ...]:
    """Ours by name, eager, `torch.compile` of it, the peers (`value` of `step` with each), the
    floor."""
    their = partial(step, limits=THEIR_LIMITS)
    peers = peers or {}
    names = ("eager", "compiled", *peers)
    return (
        *(Contestant(name, partial(step, loss=f), against=names) for name, f in ours.items()),
        Contestant("eager", partial(their, loss=eager), "peer"),
        Contestant("compiled", partial(compiled_step, loss=eager, limits=THEIR_LIMITS), "peer"),
        *(
            Contestant(name, partial(their, loss=loss, value=value), "peer")
            for name, (loss, value) in peers.items()
        ),
        FLOOR,
    )


def rows(table: Any, quick: bool) -> int:
    """How many of the case's rows are measured: with --quick few, of the whole head."""
    return min(int(table.shape[0]), 32) if quick else int(table.shape[0])


def case(
    table: Any,
    name: str,
    quick: bool,
    inputs: Callable[[Any, int], Any],
    products: float,
    **more: Any,
) -> Case:
    """A case of the operator's table, held against the flops of its `products`, each once."""
    count, dtype = rows(table, quick), table.dtypes[0]
    chosen = _registry.explain(_registry.OPERATORS[table.op], "cpu")
    return Case(
        name,
        bytes=0,
        flops=products * count / table.shape[0],
        inputs=partial(inputs, table, count),
        notes={"backend": f"{chosen.backend} ({chosen.reason})"},
        roof="mm_fp32" if dtype == torch.float32 else "mm_bf16",
        **more,
    )
