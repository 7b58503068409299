"""The rows of the operators from hidden states in the ladder's table.

They have no kernel of their own: the driver in `pydistill/ops/_linear_head.py` launches the row
operators' kernels on fp32 logits, whole rows in forward and tiles of columns, in place, in backward
(`in_forward`: whole rows in place). So it is the driver that runs here, with a head of `HIDDEN`
features, and a row of the table is the specialisation of a kernel that it launches. Bytes are those
of the row kernels alone, over their floor: logits read once and, backward, the gradient written
once; the products' are not counted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from tools.ladder import topk_divergence_table, topk_logprobs_table
from tools.ladder.rows import BYTES_ROWS, ROWS, VOCAB, Table, bytes_row, compiled_rows

HIDDEN = 8
SLOTS = topk_divergence_table.SLOTS
HELD = topk_logprobs_table.SLOTS
DIRECTIONS = ("forward", "backward", "in_forward")


class Form(NamedTuple):
    """A call: its operator, the variant it goes by, the kernels' names in the order of their first
    launches, and what its composed kernels take."""

    op: str
    variant: str
    kernels: tuple[str, ...]
    tensors: tuple[Any, ...]  # after the head and the mask
    numbers: tuple[Any, ...]


def forms(rows: int) -> Iterator[Form]:
    """Every row kernel: temperature 1, no labels, no mask."""
    import torch

    from pydistill.reference.divergence import KINDS
    from pydistill.reference.topk_divergence import TAILS

    g = torch.Generator().manual_seed(5)
    teacher = torch.randn(rows, HIDDEN, generator=g), torch.randn(VOCAB, HIDDEN, generator=g)
    for kind, spec in KINDS.items():
        parameters = (spec.id, 1.0, spec.alpha or 0.0, spec.beta or 0.0, False, 0.0, 0.0, VOCAB)
        yield Form(
            "linear_divergence", kind, (f"forward {kind}", f"backward {kind}"),
            (*teacher, None, None, None), (1.0, 0.0, *parameters),
        )  # fmt: skip
    log_p, ids = torch.log_softmax(torch.randn(rows, VOCAB, generator=g), 1).topk(SLOTS)
    tail = torch.log1p(-log_p.exp().sum(1))
    for kind, mode in topk_divergence_table.FORMS:
        variant = f"{kind} {mode}"
        yield Form(
            "linear_topk_divergence", variant,
            ("outside", f"forward {variant}", f"support {variant}", "backward", "place"),
            (ids, log_p, tail, None, None),
            (KINDS[kind].id, TAILS[mode], 1.0, 0.5, False, 0.0, 0.0),
        )  # fmt: skip
    token = (ids[:, 0].contiguous(), None)
    yield Form("linear_token_logprob", "", ("forward", "backward"), token, (1.0,))
    parts = tuple(part for part, _ in topk_logprobs_table.PARTS[VOCAB])
    yield Form("topk_logprobs_from_hidden", "", parts, (), (HELD, 1.0))


def calls(form: Form, rows: int) -> dict[str, Callable[[], None]]:
    """The operator's composed kernels by direction, of which backward comes after forward."""
    import torch

    from pydistill import _registry
    from pydistill.reference import divergence, token_logprob, topk_divergence

    g = torch.Generator().manual_seed(6)
    hidden, weight = torch.randn(rows, HIDDEN, generator=g), torch.randn(VOCAB, HIDDEN, generator=g)
    head, numbers = (hidden, weight, None), (1.0, 0.0, *form.numbers)

    def kernel(name: str, *arguments: Any) -> Callable[[], None]:
        return partial(_registry.overload(f"{form.op}{name}", "triton"), *arguments)

    if form.op == "topk_logprobs_from_hidden":
        slots, row = torch.empty(rows, HELD), torch.empty(rows)
        results = (slots.long(), slots, row, torch.empty_like(row))
        return {"forward": kernel("", *head, *numbers, *results)}
    columns = {
        "linear_divergence": divergence.SAVED,
        "linear_topk_divergence": topk_divergence.SAVED,
        "linear_token_logprob": token_logprob.SAVED,
    }[form.op]
    tensors, ones = (*head, None, *form.tensors), torch.ones(rows)
    outputs = [torch.empty(rows) for _ in range(2 if form.op == "linear_token_logprob" else 1)]
    saved, upstreams = torch.empty(rows, columns), [ones] * len(outputs)
    grads = (torch.empty_like(hidden), torch.empty_like(weight), torch.empty(0))
    found = {
        "forward": kernel("_fwd", *tensors, *numbers, *outputs, saved),
        "backward": kernel("_bwd", *tensors, saved, *upstreams, *numbers, *grads),
    }
    if form.op != "linear_token_logprob":
        found["in_forward"] = kernel("_gradients", *tensors, ones, *numbers, *outputs, *grads)
    return found


def triton_rows(target: str) -> Table:
    """Every kernel compiled for `target`; all directions of a call launch the same ones."""

    def launch(form: Form) -> None:
        for call in calls(form, ROWS).values():
            call()

    rows: Table = {}
    for form in forms(ROWS):
        keys = [f"triton {form.op} {name} fp32 {target}" for name in form.kernels]
        rows |= compiled_rows(target, partial(launch, form), keys)
    return rows


def triton_bytes() -> Table:
    """Bytes that the kernels ask for, in the strict interpreter; of the top-K losses one form."""
    os.environ["TRITON_INTERPRET"] = "1"
    from tools.ladder.interpreter import strict

    rows: Table = {}
    for form in forms(BYTES_ROWS):
        if form.op == "linear_topk_divergence" and form.variant != "forward_kl bucket":
            continue
        variant = f" {form.variant}" if form.op == "linear_divergence" else ""
        for direction, call in calls(form, BYTES_ROWS).items():
            with strict() as meter:
                call()
            key = f"triton {form.op} {direction}{variant} fp32 bytes"
            if form.op == "topk_logprobs_from_hidden":
                rows[key] = topk_logprobs_table.forward_bytes(meter, VOCAB, 4)
                continue
            moved = {name: seen.loaded + seen.stored for name, seen in meter.bytes.items()}
            rows[key] = bytes_row(_streams(form.op, direction), moved, 4)
    return rows


def _streams(op: str, direction: str) -> tuple[str, ...]:
    """The kernels' parameters that are rows of logits or their gradient."""
    logits = {
        "linear_divergence": ("student", "teacher"),
        "linear_topk_divergence": ("student",),
        "linear_token_logprob": ("logits",),
    }[op]
    return logits if direction == "forward" else (*logits, "grad")
