"""`pydistill.verify` against what serving code does in eager PyTorch: warp the rows, softmax,
accept, sample from the residual or the bonus row.

Every step takes the logits of one block of B requests with four drafted tokens and returns tokens
and counts. "eager" is transformers' `_speculative_sampling`, batched; "transformers" is that
function itself, one request at a time, as it takes no more. Where top-p is on, both sort the
target's rows first. The floor is one read of the rows that the call needs.

Drafts are constructed: at acceptance 0 the drafted token has no probability under the target, at 1
the draft is the target, at 0.8 it is the target mixed with a point elsewhere. Buffers rotate
through more memory than caches hold.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import played_back
from benchmarks.harness import Case, Claim, Contestant, Gate, Step
from pydistill import _registry, verify
from pydistill.testing.cases.verify import CASES

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
ACCEPTANCE = (0.0, 0.8, 1.0)
ROTATED = 1 << 28  # bytes of buffers
Block = tuple[Tensor, Tensor, Tensor]
Found = tuple[Tensor, Tensor]


def constructed(case: Any, acceptance: float, most: int) -> list[Block]:
    """At most so many blocks, whose drafted tokens are accepted with the given probability each."""
    batch, slots = case.shape[0] // (case.options["slots"] + 1), case.options["slots"]
    vocab, dtype = case.shape[1], case.dtypes[0]
    size = batch * (2 * slots + 1) * vocab * dtype.itemsize
    blocks = []
    for i in range(max(2, min(most, ROTATED // size))):
        g = torch.Generator().manual_seed(i)
        target = (3 * torch.randn(batch, slots + 1, vocab, generator=g)).to(dtype)
        target[..., 0] = -torch.inf
        draft = target[:, :-1].clone()
        q = draft.float().softmax(-1)
        if acceptance < 1:
            q *= acceptance
            q[..., 0] = 1 - acceptance
            draft = q.log().to(dtype)
        ids = torch.multinomial(q.flatten(0, 1), 1, generator=g).reshape(batch, slots)
        blocks.append((target, draft, ids))
    return blocks


class Inputs:
    """Blocks in rotation; every contestant takes the next one at each call."""

    def __init__(self, case: Any, acceptance: float, most: int) -> None:
        self.blocks = constructed(case, acceptance, most)
        self.turn, self.position = count(), count()

    def next(self) -> Block:
        return self.blocks[next(self.turn) % len(self.blocks)]


def ours(x: Inputs, **options: Any) -> Found:
    found = verify(*x.next(), seed=0, position=next(x.position), **options)
    return found.tokens, found.num_accepted


def filtered(z: Tensor, top_p: float | None) -> Tensor:
    """Target rows as transformers' TopPLogitsWarper leaves them."""
    if top_p is None:
        return z
    ordered, index = torch.sort(z, descending=False)
    removed = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    removed[..., -1:] = False
    return z.masked_fill(removed.scatter(-1, index, removed), -torch.inf)


def eager(x: Inputs, top_p: float | None = None, **_: Any) -> Found:
    target, draft, ids = x.next()
    p, q = filtered(target.float(), top_p).softmax(-1), draft.float().softmax(-1)
    px, qx = (y.gather(-1, ids[..., None])[..., 0] for y in (p[:, :-1], q))
    n = (torch.rand(ids.shape) * qx < px).long().cumprod(-1).sum(-1)
    at = n.clamp(max=ids.shape[1] - 1)[:, None, None].expand(-1, 1, p.shape[-1])
    last = p.gather(1, n[:, None, None].expand(-1, 1, p.shape[-1]))[:, 0]
    residual = (last - q.gather(1, at)[:, 0]).clamp(min=0)
    weights = torch.where((n < ids.shape[1])[:, None], residual, last)
    y = torch.multinomial(weights, 1)
    slot = torch.arange(ids.shape[1] + 1)
    tokens = torch.cat([ids, y], 1)
    return torch.where(slot < n[:, None], tokens, torch.where(slot == n[:, None], y, -1)), n


def transformers(x: Inputs, top_p: float | None = None, **_: Any) -> Found:
    from transformers.generation.utils import _speculative_sampling

    target, draft, ids = x.next()
    target, draft = filtered(target.float(), top_p), draft.float()
    tokens = torch.full((len(ids), ids.shape[1] + 1), -1)
    accepted = torch.zeros(len(ids), dtype=torch.int64)
    for i in range(len(ids)):
        valid, n = _speculative_sampling(
            ids[i : i + 1], draft[i : i + 1], ids.shape[1], target[i : i + 1]
        )
        tokens[i, : valid.shape[1]], accepted[i] = valid[0], n
    return tokens, accepted


def read(x: Inputs, acceptance: float) -> Tensor:
    target, draft, _ = x.next()
    if acceptance == 0:  # the first rows alone are needed
        return target[:, 0].sum() + draft[:, 0].sum()
    return target.sum() + draft.sum()


def gate(acceptance: float, output: Found) -> Gate:
    """What construction makes certain: nothing, or everything, is accepted."""
    tokens, accepted = output
    slots = tokens.shape[1] - 1
    wrong = (tokens >= 0).sum(-1) != accepted + 1
    if acceptance in (0.0, 1.0):
        wrong |= accepted != acceptance * slots
    return Gate({"wrong requests": float(wrong.sum())}, {"wrong requests": 0.0})


def step(x: Inputs, *, call: Callable[..., Found], acceptance: float, **options: Any) -> Step:
    return Step(partial(call, x, **options), check=partial(gate, acceptance))


def floor(x: Inputs, *, acceptance: float) -> Step:
    return Step(partial(read, x, acceptance))


def contestants(acceptance: float, top_p: float | None) -> tuple[Contestant, ...]:
    """`draft_top_p=1`: the draft sampled from all of its tokens."""
    at = partial(step, acceptance=acceptance, top_p=top_p)
    names = ("eager", "transformers")
    return (
        Contestant("token", partial(at, call=ours, draft_top_p=1.0), against=names),
        Contestant("block", partial(at, call=ours, draft_top_p=1.0, method="block"), against=names),
        Contestant("eager", partial(at, call=eager), "peer"),
        Contestant("transformers", partial(at, call=transformers), "peer"),
        Contestant("floor: one read", partial(floor, acceptance=acceptance), "floor"),
    )


def cases(quick: bool = False) -> list[Case]:
    """The shapes and dtypes of the case table at every acceptance, and once with top-p."""
    out = []
    for table in CASES:
        vocab, dtype = table.shape[1], table.dtypes[0]
        if "bench" not in table.marks or (quick and vocab != 32000):
            continue
        batch = table.shape[0] // (table.options["slots"] + 1)
        chosen = _registry.explain(_registry.OPERATORS["verify"], "cpu", dtype)
        for acceptance, top_p in (*((a, None) for a in ACCEPTANCE), (0.8, 0.9)):
            warped = "" if top_p is None else f", top-p {top_p}"
            out.append(
                Case(
                    f"{DTYPES[dtype]} B = {batch}, V = {vocab}, accepted {acceptance}{warped}",
                    bytes=table.bytes["forward"],
                    flops=table.flops["forward"],
                    inputs=partial(Inputs, table, acceptance, 2 if quick else 16),
                    notes={"backend": f"{chosen.backend} ({chosen.reason})"},
                    contestants=contestants(acceptance, top_p),
                    claims=(
                        Claim("token", "transformers", at_least=10.0 if top_p is None else 50.0),
                    ),
                )
            )
    return out


@pytest.mark.benchmark(timer=played_back)
def test_verify(entry: tuple[Case, str], record: Callable[[tuple[Case, str]], None]) -> None:
    record(entry)
