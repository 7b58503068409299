"""`pydistill.verify` against what serving code does: warp the rows, softmax, accept, sample from
the residual or the bonus row (`verify_peers.py`).

Every step takes the logits of one block of B requests with four drafted tokens and returns tokens
and counts. The floor is one read of the rows that this block needs: those of the target up to the
first rejection, and those of the draft that were tried.

Drafts are constructed, so that every right contestant accepts the same: token 0 has no probability
under the target, and the draft is the target with a share of token 0. A drafted 0 is rejected, and
any other token, which the target likes more than the draft does, accepted. At acceptance 0 all
drafted tokens are 0. Which token follows is left to chance; its law is tested on 16 tokens, for
every contestant.

Blocks rotate through more memory than caches hold, and no two contestants take the same one.

The last cases have no claims: a draft that is known on 64 tokens a row, a tree, and the divergence
with its gradient from the verification.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import verify_peers as peers
from benchmarks.conftest import played_back
from benchmarks.harness import Case, Claim, Contestant, Gate, Step
from benchmarks.verify_peers import Found, filtered
from pydistill import _registry, verify, verify_with_gradient
from pydistill.testing.cases.verify import CASES

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
ACCEPTANCE = (0.0, 0.8, 1.0)
TOP_P = 0.9
SUPPORT = 64
TREE = torch.tensor([-1, -1, 0, 0], dtype=torch.int32)  # two children, and two of the first
OF_A_CALL = 40e-6  # seconds that a call may take beyond what its rows do
RING = 1 << 30  # bytes: the largest caches hold half of it
DISTINCT = 4  # blocks that are drawn; the others are copies, elsewhere in memory
LIMITS = {"wrong requests": 0.0, "law": 1.0}


class Shape(NamedTuple):
    batch: int
    slots: int
    vocab: int
    dtype: torch.dtype
    form: str = "dense"  # or "sparse", "tree"


class Block(NamedTuple):
    target: Tensor
    draft: Tensor
    ids: Tensor
    support: Tensor | None  # the draft's tokens


def constructed(
    shape: Shape, acceptance: float, top_p: float | None, seed: int, alike: bool = False
) -> Block:
    """Requests differ in their drafted tokens and in their logits; or, `alike`, in the tokens
    alone, and the draft's logits are disturbed."""
    g = torch.Generator().manual_seed(seed)
    batch, slots, vocab = shape.batch, shape.slots, shape.vocab
    rows = 1 if alike else batch
    target = 3 * torch.randn(rows, slots + 1, vocab, generator=g)
    support = None
    if shape.form == "sparse":  # on its tokens the target has nearly all of its mass
        drawn = torch.rand(rows, slots, vocab - 1, generator=g)
        support = F.pad(drawn.topk(min(SUPPORT, vocab) - 1).indices + 1, (1, 0))
        target[:, :-1].scatter_add_(-1, support, torch.full(support.shape, 30.0))
    target[..., 0] = -torch.inf
    target = target.to(shape.dtype)
    draft = filtered(target[:, :-1].float(), top_p).clone()
    if support is not None:
        draft = draft.gather(-1, support)
    if acceptance < 1:
        share = acceptance or 0.5
        draft[..., 0] = draft[..., 1:].logsumexp(-1) + math.log((1 - share) / share)
    if alike:
        draft += torch.randn(draft.shape, generator=g)
    target, draft = target.expand(batch, -1, -1), draft.to(shape.dtype).expand(batch, -1, -1)
    q = draft.float().softmax(-1)
    if shape.form == "tree":
        race = torch.rand(q.shape, generator=g).log() / q  # siblings without replacement
        ids = race[:, :2].topk(2).indices.flatten(1)
    else:
        ids = torch.multinomial(q.flatten(0, 1), 1, generator=g).reshape(batch, slots)
        if support is not None:
            support = support.expand(batch, -1, -1).contiguous()
            ids = support.gather(-1, ids[..., None])[..., 0]
    if acceptance == 0:
        ids.zero_()
    return Block(target.contiguous(), draft.contiguous(), ids, support)


def accepted_in(ids: Tensor, form: str) -> Tensor:
    """What construction makes certain. In the tree, a sibling of a 0 is accepted."""
    if form == "tree":
        return torch.where(ids[:, 0] != 0, 2, 1)
    return (ids != 0).long().cumprod(-1).sum(-1)


def needed_rows(ids: Tensor, form: str) -> tuple[int, int]:
    """Of the target and of the draft, all requests together."""
    accepted = accepted_in(ids, form)
    tried = accepted if form == "tree" else (accepted + 1).clamp(max=ids.shape[1])
    return int((accepted + 1).sum()), int(tried.sum())


class Inputs:
    """Blocks in rotation; every contestant takes the next one at each call."""

    def __init__(self, blocks: list[Block], copies: int = 1) -> None:
        self.blocks = blocks + [
            Block(*(x if x is None else x.clone() for x in block))
            for _ in range(copies - 1)
            for block in blocks
        ]
        self.seeds = torch.arange(len(blocks[0].ids))
        self.turn, self.position = count(), count()
        self.current = blocks[0]

    def next(self) -> Block:
        self.current = self.blocks[next(self.turn) % len(self.blocks)]
        return self.current


def ring(shape: Shape, acceptance: float, top_p: float | None, quick: bool) -> Inputs:
    blocks = [constructed(shape, acceptance, top_p, seed) for seed in range(DISTINCT)]
    size = sum(x.nbytes for block in blocks for x in block if x is not None)
    return Inputs(blocks, 1 if quick else max(1, RING // size))


def ours(x: Inputs, top_p: float | None = None, **options: Any) -> Found:
    """`draft_top_p=1`: the draft's rows are what was sampled from."""
    target, draft, ids, support = x.next()
    found = verify(
        target, draft, ids, draft_topk_ids=support, top_p=top_p, draft_top_p=1.0, seed=x.seeds,
        position=next(x.position), **options,
    )  # fmt: skip
    return found.tokens, found.num_accepted


def theirs(x: Inputs, call: Callable[..., Found], **options: Any) -> Found:
    target, draft, ids, support = x.next()
    if support is not None:
        wide = torch.full((*ids.shape, target.shape[-1]), -torch.inf, dtype=draft.dtype)
        draft = wide.scatter_(-1, support, draft)
    return call(target, draft, ids, **options)


def ours_with_gradient(x: Inputs) -> Found:
    target, draft, ids, _ = x.next()
    found = verify_with_gradient(target, draft, ids, seed=x.seeds, position=next(x.position)).result
    return found.tokens, found.num_accepted


def eager_with_gradient(x: Inputs) -> Found:
    """Forward KL and its gradient in every row, and the verification."""
    target, draft, ids, _ = x.next()
    leaf = draft.detach().requires_grad_()
    loss = F.kl_div(leaf.log_softmax(-1), target[:, :-1].softmax(-1), reduction="sum")
    torch.autograd.grad(loss, leaf)
    return peers.eager(target, draft, ids)


@functools.cache
def law(run: Callable[..., Found], options: tuple[tuple[str, Any], ...], shape: Shape) -> float:
    """Chi-square of the first token of 2,048 requests with 16 tokens, over the limit that a right
    contestant exceeds once in a million times."""
    arguments = dict(options)
    top_p = arguments.get("top_p")
    block = constructed(shape._replace(batch=2048, vocab=16), 0.8, top_p, 0, alike=True)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        tokens, _ = run(Inputs([block]), **arguments)
    due = filtered(block.target[0, :1].double(), top_p).softmax(-1)[0] * len(tokens)
    seen = tokens[:, 0].bincount(minlength=16).double()
    rare = due < 5
    cells = torch.stack([torch.cat([x[~rare], x[rare].sum()[None]]) for x in (seen, due)])
    seen, due = cells[:, cells.sum(0) > 0]
    freedom = len(due) - 1
    part = 2 / (9 * freedom)  # Wilson and Hilferty's quantile
    limit = freedom * (1 - part + 4.753 * math.sqrt(part)) ** 3
    return float(((seen - due) ** 2 / due).sum()) / limit


def step(x: Inputs, *, run: Callable[..., Found], shape: Shape, **options: Any) -> Step:
    found = law(run, tuple(options.items()), shape._replace(batch=0, vocab=0))

    def check(output: Found) -> Gate:
        tokens, accepted = output
        wrong = accepted != accepted_in(x.current.ids, shape.form)
        wrong |= (tokens >= 0).sum(-1) != accepted + 1
        return Gate({"wrong requests": float(wrong.sum()), "law": found}, LIMITS)

    return Step(partial(run, x, **options), check=check)


def floor(x: Inputs, *, form: str) -> Step:
    """As 32-bit numbers, since torch reads bf16 faster than it sums it."""

    def run() -> None:
        target, draft, ids, _ = x.next()
        rows = target.flatten(0, 1), draft.flatten(0, 1)
        for whole, needed in zip(rows, needed_rows(ids, form), strict=True):
            whole[:needed].view(torch.float32).sum()

    return Step(run)


def contestants(shape: Shape, top_p: float | None) -> tuple[Contestant, ...]:
    at = partial(step, shape=shape, **({} if top_p is None else {"top_p": top_p}))

    def peer(name: str, call: Callable[..., Found], **options: Any) -> Contestant:
        return Contestant(name, partial(at, run=theirs, call=call, **options), "peer")

    read = Contestant("floor: one read", partial(floor, form=shape.form), "floor")
    if shape.form == "tree":
        names: tuple[str, ...] = ("eager",)
        methods = [("tree", {"method": "tree", "tree": TREE})]
        methods.append(("traversal", {"method": "traversal", "tree": TREE}))
        others = [peer("eager", peers.eager_tree, tree=TREE)]
    else:
        names = ("vLLM", "transformers", "eager", "torch.compile")
        methods = [("token", {}), ("block", {"method": "block"})]
        others = [
            peer("vLLM", peers.vllm),
            peer("transformers", peers.transformers),
            peer("eager", peers.eager),
            peer("torch.compile", peers.compiled),
        ]
    subjects = [
        Contestant(name, partial(at, run=ours, **options), against=names)
        for name, options in methods
    ]
    return (*subjects, *others, read)


def gradient_contestants(shape: Shape) -> tuple[Contestant, ...]:
    at = partial(step, shape=shape)
    return (
        Contestant("with gradient", partial(at, run=ours_with_gradient), against=("eager",)),
        Contestant("token alone", partial(at, run=ours)),
        Contestant("eager", partial(at, run=eager_with_gradient), "peer"),
        Contestant("floor: one read", partial(floor, form=shape.form), "floor"),
    )


def claims(top_p: float | None) -> tuple[Claim, ...]:
    faster, reads = (10.0, 3.0) if top_p is None else (50.0, 6.0)
    return (
        Claim("token", "vLLM", at_least=faster),
        Claim("token", "transformers", at_least=faster),
        Claim("token", "floor: one read", at_most=reads, beyond=OF_A_CALL),
    )


def cases(quick: bool = False) -> list[Case]:
    """The shapes and dtypes of the case table at every acceptance, without and with top-p; then
    what else can be verified, at the largest of them."""
    out: list[Case] = []

    def add(
        name: str, shape: Shape, acceptance: float, top_p: float | None, of: tuple[Any, ...]
    ) -> None:
        batch, slots = shape.batch, shape.slots
        chances = [acceptance**i for i in range(slots + 1)]  # that a row is needed
        entries = sum(chances) * shape.vocab
        entries += sum(chances[:slots]) * (SUPPORT if shape.form == "sparse" else shape.vocab)
        if shape.form == "tree":
            entries = (2 + 2 * acceptance + 1) * shape.vocab
        chosen = _registry.explain(_registry.OPERATORS["verify"], "cpu", shape.dtype)
        out.append(
            Case(
                f"{DTYPES[shape.dtype]} B = {batch}, V = {shape.vocab}, {name}",
                bytes=batch * entries * shape.dtype.itemsize,
                flops=6 * batch * entries,
                inputs=partial(ring, shape, acceptance, top_p, quick),
                notes={"backend": f"{chosen.backend} ({chosen.reason})"},
                contestants=of[0],
                claims=of[1],
            )
        )

    for shape in shapes(quick):
        for top_p in (None, TOP_P):
            of = contestants(shape, top_p), claims(top_p)
            for acceptance in ACCEPTANCE:
                warped = "" if top_p is None else f", top-p {top_p}"
                add(f"accepted {acceptance}{warped}", shape, acceptance, top_p, of)
    largest = max(x.vocab for x in shapes(quick))
    for shape in shapes(quick):
        if shape.vocab == largest and shape.batch > 1:
            for form in ("sparse", "tree"):
                other = shape._replace(form=form)
                add(f"{form} draft", other, 0.8, None, (contestants(other, None), ()))
            add("gradient", shape, 0.8, None, (gradient_contestants(shape), ()))
    return out


def shapes(quick: bool) -> Iterator[Shape]:
    """Of the case table; in a hurry a small batch of one dtype and a large one of the other."""
    for table in CASES:
        slots, vocab, dtype = table.options["slots"], table.shape[1], table.dtypes[0]
        batch = table.shape[0] // (slots + 1)
        chosen = vocab == 32000 and (batch > 1) == (dtype == torch.float32)
        if "bench" in table.marks and (chosen or not quick):
            yield Shape(batch, slots, vocab, dtype)


@pytest.mark.benchmark(timer=played_back)
def test_verify(entry: tuple[Case, str], record: Callable[[tuple[Case, str]], None]) -> None:
    record(entry)
