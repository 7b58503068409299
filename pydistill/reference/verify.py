"""The definition of `pydistill.verify`: how many drafted tokens the target accepts, and the token
that follows them.

Plain torch in fp64, in steps that tests can take apart: `distributions` (logits to p and q); for
chains `slot_tests` (with which odds a slot passes) and `final_weights` (what the last token is
drawn from); for trees `tree_tests` (both, of every node and row) and `tree_walk` (where it ends);
`verify_reference` (coins, decisions, results). docs/ops/verify.md has the formulas.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

CHAINS = ("token", "block", "typical")
TREES = ("tree_target_only", "tree", "traversal")
METHODS = CHAINS + TREES
LENIENCES = ("none", "linear", "square", "exponential", "ensemble", "tv_budget")
BAD_ID, BAD_TARGET, BAD_DRAFT, IMPOSSIBLE, BAD_PARENT = 1, 2, 4, 8, 16  # of a row's flags
ACCEPT, RESAMPLE, DRAFT = 0, 1, 2  # streams of coins
WARPERS = 4  # temperature (0: greedy), top_k (0: off), top_p (1: off), log of min_p (-inf: off)

_WORD = 0xFFFFFFFF


class Inputs(NamedTuple):
    """What every kernel is given. One row of anything but logits and ids serves all. In a tree K
    is the number of nodes."""

    target: Tensor  # [B, K + 1, V]
    draft: Tensor | None  # [B, K, V or S]; None: the drafted tokens are point masses
    ids: Tensor  # int64 [B, K]
    num_drafted: Tensor  # int64 [B or 1]
    warpers: Tensor  # fp64 [B or 1, 2 * WARPERS]: the target's and the draft's
    seed: Tensor  # int64 [B or 1]
    position: Tensor  # int64 [B or 1]
    logit_bias: Tensor | None  # [B or 1, V]
    parent: Tensor | None  # int32 [B or 1, K] for trees
    support: Tensor | None  # int64 [B or 1, K or 1, S]: the draft's tokens; None: all V


class Rule(NamedTuple):
    """Indices into METHODS and LENIENCES; `strength` is the lenience's number, or epsilon of
    typical, `alpha` typical's."""

    method: int
    lenience: int = 0
    strength: float = 0.0
    alpha: float = 0.0


class Outputs(NamedTuple):
    tokens: Tensor  # int64 [B, K + 1]
    num_accepted: Tensor  # int64 [B]
    logprobs: Tensor  # [B, K + 1]
    overlap: Tensor  # [B, K]
    bias: Tensor  # [B, K]
    target_lse: Tensor  # [B, K + 1]
    draft_lse: Tensor  # [B, K]
    flags: Tensor  # int32 [B, K + 1]
    path: Tensor  # int64 [B, K]


class Distributions(NamedTuple):
    """Warped rows: `p [B, K + 1, V]`, `q [B, K, V]`; zeros in a row without a softmax. `pointed
    [B]`: the request's drafted tokens are point masses."""

    p: Tensor
    q: Tensor
    target_lse: Tensor
    draft_lse: Tensor
    target_sound: Tensor
    draft_sound: Tensor
    pointed: Tensor


class SlotTests(NamedTuple):
    """Slot i passes when coin * den < num; `scale` r gives the residual [r p - q]+ of a prefix that
    ends before slot i (ignored by typical, which samples p)."""

    num: Tensor  # [B, K]
    den: Tensor  # [B, K]
    scale: Tensor  # [B, K]
    bias: Tensor  # [B, K]
    overlap: Tensor  # [B, K]


class TreeTests(NamedTuple):
    """Node i passes when coin(slot_i) * den < num, the earlier siblings having failed. A token
    that follows row r is drawn from `left[r]`: all children of the row have failed."""

    num: Tensor  # [B, K]
    den: Tensor  # [B, K]
    slot: Tensor  # [B, K], of the coin
    left: Tensor  # [B, K + 1, V]
    reach: Tensor  # [B, K]: the ratio of a node's path; a node of ratio 0 is not looked at
    overlap: Tensor  # [B, K], of rows
    usable: Tensor  # bool [B, K]
    fault: Tensor  # [B, K], of nodes


class Walk(NamedTuple):
    end: Tensor  # [B]: the row after the last accepted node
    visited: Tensor  # bool [B, K + 1], of rows
    on_path: Tensor  # bool [B, K], of nodes


def coins(seed: Tensor, position: Tensor, slot: Tensor, stream: int) -> Tensor:
    """Uniform numbers in [0, 1), fp64, by Philox4x32-10, of int64 that broadcast."""
    seed, position, slot = torch.broadcast_tensors(seed, position, slot)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    c0, c1 = position & _WORD, (position >> 32) & _WORD
    c2, c3 = slot & _WORD, torch.full_like(slot, stream)
    for _ in range(10):
        h0, l0 = _product(c0, 0xD2511F53)
        h1, l1 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return (((c0 >> 5) << 26) + (c1 >> 6)).double() * 2.0**-53


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of a product of words, in 64 bits that have a sign."""
    high = (a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)) >> 16
    return high & _WORD, (a * b) & _WORD


def warped(logits: Tensor, warpers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits `[B, N, V]` and warpers `[B, WARPERS]`: distributions `[B, N, V]`, log-normalisers
    `[B, N]` (NaN for greedy requests) and whether a row has a softmax `[B, N]`."""
    x = logits.double()
    sound = ~(torch.isnan(x) | (x == math.inf)).any(-1) & (x > -math.inf).any(-1)
    x = torch.where(sound[..., None], x, 0)
    greedy = warpers[:, 0, None, None] == 0
    t = torch.where(greedy, 1.0, warpers[:, 0, None, None])
    largest = x.amax(-1, keepdim=True)
    e = torch.where(x >= cuts(x, warpers), ((x - largest) / t).exp(), 0)
    total = e.sum(-1, keepdim=True)
    point = torch.nn.functional.one_hot(x.argmax(-1), x.shape[-1]).double()
    p = torch.where(greedy, point, e / total) * sound[..., None]
    lse = largest / t + total.log()
    lse = torch.where(greedy | ~sound[..., None], math.nan, lse)[..., 0]
    return p, lse, sound


def cuts(x: Tensor, warpers: Tensor) -> Tensor:
    """The smallest logit that the filters keep, `[B, N, 1]`, of fp64 rows that have a softmax."""
    temperature, top_k, top_p, log_min_p = (w[:, None, None] for w in warpers.unbind(-1))
    t = torch.where(temperature == 0, 1.0, temperature)
    ordered = x.sort(-1, descending=True).values
    largest = ordered[..., :1]
    index = torch.where(top_k > 0, top_k, x.shape[-1]).clamp(max=x.shape[-1]).long() - 1
    cut = ordered.gather(-1, index.expand(*x.shape[:2], 1))
    e = torch.where(ordered >= cut, ((ordered - largest) / t).exp(), 0)
    above = e.cumsum(-1).roll(1, -1)  # of what is in front in the order
    above[..., 0] = 0
    place = torch.arange(x.shape[-1], device=x.device).expand_as(x)
    first = torch.where(ordered != ordered.roll(1, -1), place, 0).cummax(-1).values  # of its ties
    inside = (above.gather(-1, first) < top_p * e.sum(-1, keepdim=True)) | (top_p >= 1)
    nucleus = torch.where(inside, ordered, math.inf).amin(-1, keepdim=True)
    return torch.maximum(torch.maximum(cut, nucleus), largest + t * log_min_p)


def dense(logits: Tensor, support: Tensor | None, vocab: int) -> Tensor:
    """Rows `[B, K, V]` of logits on a support: -inf outside, and NaN throughout where an id is
    outside the vocabulary or comes twice. Ids below 0 mark empty slots."""
    if support is None:
        return logits
    ids = support.expand(logits.shape)
    ordered = ids.sort(-1).values
    wrong = ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(-1)
    wrong = wrong | (ids >= vocab).any(-1)
    place = torch.where((ids >= 0) & (ids < vocab), ids, vocab)  # a column that is cut off
    rows = logits.new_full((*ids.shape[:2], vocab + 1), -math.inf, dtype=torch.float64)
    rows = rows.scatter(-1, place, logits.double())[..., :vocab]
    return torch.where(wrong[..., None], math.nan, rows)


def biased(target: Tensor, logit_bias: Tensor | None) -> Tensor:
    """The target's rows; one addition, in fp32 at least."""
    if logit_bias is None:
        return target
    wide = torch.promote_types(target.dtype, torch.float32)
    return target.to(wide) + logit_bias[:, None].to(wide)


def distributions(inputs: Inputs) -> Distributions:
    target, ids = inputs.target, inputs.ids
    batch, slots = ids.shape
    vocab = target.shape[-1]
    warpers = inputs.warpers.expand(batch, -1)
    target = biased(target, inputs.logit_bias)
    p, target_lse, target_sound = warped(target, warpers[:, :WARPERS])
    point = torch.nn.functional.one_hot(ids.clamp(0, vocab - 1), vocab).double()
    if inputs.draft is None:
        nan = torch.full((batch, slots), math.nan, dtype=torch.float64, device=ids.device)
        pointed = torch.ones(batch, dtype=torch.bool, device=ids.device)
        return Distributions(p, point, target_lse, nan, target_sound, torch.isnan(nan), pointed)
    draft = dense(inputs.draft, inputs.support, vocab)
    q, draft_lse, draft_sound = warped(draft, warpers[:, WARPERS:])
    pointed = (warpers[:, 0] == 0) | (warpers[:, WARPERS] == 0)
    return Distributions(
        p,
        torch.where(pointed[:, None, None], point, q),
        target_lse,
        torch.where(pointed[:, None], math.nan, draft_lse),
        target_sound,
        draft_sound | pointed[:, None],
        pointed,
    )


def slot_tests(d: Distributions, ids: Tensor, length: Tensor, rule: Rule) -> SlotTests:
    """The tests of every slot, of which those below `length [B]` are usable."""
    p, q = d.p[:, :-1], d.q
    at = ids.clamp(0, p.shape[-1] - 1)[..., None]
    px, qx = p.gather(-1, at)[..., 0], q.gather(-1, at)[..., 0]
    overlap = torch.minimum(p, q).sum(-1)
    ones, zeros = torch.ones_like(px), torch.zeros_like(px)
    if METHODS[rule.method] == "block":
        return SlotTests(*_block(p, q, px, qx, length), zeros, overlap)
    if METHODS[rule.method] == "typical":
        entropy = -torch.special.xlogy(p, p).sum(-1, keepdim=True)
        kept = p > (rule.alpha * (-entropy).exp()).clamp(max=rule.strength)
        drafted = torch.where(kept, q, 0)
        bias = (drafted - drafted.sum(-1, keepdim=True) * p).abs().sum(-1) / 2
        return SlotTests(kept.gather(-1, at)[..., 0].double(), ones, ones, bias, overlap)
    f = _lenient(p, q, rule)
    bias = (torch.minimum(q, f) - torch.minimum(q, p)).sum(-1)
    return SlotTests(f.gather(-1, at)[..., 0], qx, ones, bias, overlap)


def _lenient(p: Tensor, q: Tensor, rule: Rule) -> Tensor:
    """f(p, q): a slot passes when coin * q < f."""
    kind, e = LENIENCES[rule.lenience], rule.strength
    if kind == "none":
        return p
    if kind == "linear":
        return p / e
    if kind == "square":
        return p / (e * e)
    if kind == "exponential":
        return torch.where(p > 0, p**e, 0)
    weight: float | Tensor = e
    if kind == "tv_budget":
        mass = (p - q).clamp(min=0).sum(-1, keepdim=True)
        weight = torch.where(mass > e, 1 - e / mass, 0)
    return weight * p + (1 - weight) * q


def _block(
    p: Tensor, q: Tensor, px: Tensor, qx: Tensor, length: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """num, den and scale of block verification."""
    if not px.shape[1]:
        return px, px, px
    r = torch.ones_like(px[:, 0])
    num, den, scale = [], [], [r]
    for i in range(px.shape[1]):
        r = torch.minimum(torch.ones_like(r), r * px[:, i] / qx[:, i])  # NaN only where unusable
        scale.append(r)
        z = torch.zeros_like(r)
        if i + 1 < px.shape[1]:
            z = (r[:, None] * p[:, i + 1] - q[:, i + 1]).clamp(min=0).sum(-1)
        last = length == i + 1
        sure = (z == 0) & (r == 1)
        num.append(torch.where(last, r, torch.where(sure, 1.0, z)))
        den.append(torch.where(last | sure, 1.0, z + (1 - r)))
    return torch.stack(num, 1), torch.stack(den, 1), torch.stack(scale[:-1], 1)


def final_weights(
    d: Distributions, tests: SlotTests, accepted: Tensor, length: Tensor, rule: Rule
) -> Tensor:
    """What the token after `accepted [B]` drafted ones is drawn from: weights `[B, V]`."""
    p = _row(d.p, accepted)
    if METHODS[rule.method] == "typical" or tests.scale.shape[1] == 0:
        return p
    slot = accepted.clamp(max=tests.scale.shape[1] - 1)
    residual = (_row(tests.scale[..., None], slot) * p - _row(d.q, slot)).clamp(min=0)
    rejected = (accepted < length) & (residual.sum(-1) > 0)
    return torch.where(rejected[:, None], residual, p)


def _row(x: Tensor, index: Tensor) -> Tensor:
    """Row `index [B]` of `x [B, N, ...]`."""
    return x.gather(1, index[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0]


def sampled(weights: Tensor, coin: Tensor) -> Tensor:
    """The first id whose cumulative weight exceeds coin * sum; the last of positive weight if none
    does. `[B, V]`, `[B]` -> `[B]`."""
    sums = weights.cumsum(-1)
    index = (sums <= (coin * sums[:, -1])[:, None]).sum(-1)
    place = torch.arange(weights.shape[-1], device=weights.device)
    last = torch.where(weights > 0, place, 0).amax(-1)
    return torch.minimum(index, last)


def usable(inputs: Inputs, d: Distributions) -> tuple[Tensor, Tensor]:
    """How many leading slots can be tested `[B]`, and the fault of every slot's row `[B, K]`."""
    ids, vocab = inputs.ids, d.p.shape[-1]
    qx = d.q.gather(-1, ids.clamp(0, vocab - 1)[..., None])[..., 0]
    fault = torch.where(qx > 0, 0, IMPOSSIBLE)
    fault = torch.where(d.draft_sound, fault, BAD_DRAFT)
    fault = torch.where(d.target_sound[:, :-1], fault, BAD_TARGET)
    fault = torch.where((ids < 0) | (ids >= vocab), BAD_ID, fault)
    slot = torch.arange(ids.shape[1], device=ids.device)
    fault = torch.where(slot < inputs.num_drafted[:, None], fault, 0)
    good = (slot < inputs.num_drafted[:, None]) & (fault == 0)
    return good.long().cumprod(-1).sum(-1), torch.where(ids == -1, 0, fault)


def tree_tests(inputs: Inputs, d: Distributions, rule: Rule) -> TreeTests:
    """The tests of every node. A node's is made as if its earlier siblings had all failed, so one
    walk through the nodes in order of index makes them all, without a coin."""
    ids, method = inputs.ids, METHODS[rule.method]
    nodes, vocab = ids.shape[1], d.p.shape[-1]
    row, sane = _rows_of(inputs)
    at, each = ids.clamp(0, vocab - 1), torch.arange(len(ids), device=ids.device)
    p, q = d.p.clone(), d.q.clone()
    ratio = torch.ones_like(d.p[..., 0])
    chosen = torch.zeros_like(ratio)  # p of the children so far
    alive = torch.ones_like(ratio, dtype=torch.bool)
    num, den, reach = torch.zeros(3, *ids.shape, dtype=p.dtype, device=ids.device)
    fault = torch.zeros_like(ids)
    for i in range(nodes):
        r, x = row[:, i], at[:, i]
        point = torch.nn.functional.one_hot(x, vocab).to(p.dtype)
        p_r, q_r = p[each, r], torch.where(d.pointed[:, None], point, q[each, r])
        px, qx = p_r[each, x], q_r[each, x]
        twice = alive[:, 1 : i + 1] & (row[:, :i] == r[:, None]) & (at[:, :i] == x[:, None])
        wrong = torch.where(qx > 0, 0, IMPOSSIBLE)
        wrong = torch.where(d.draft_sound[each, r], wrong, BAD_DRAFT)
        wrong = torch.where(d.target_sound[each, r], wrong, BAD_TARGET)
        wrong = torch.where((ids[:, i] < 0) | (ids[:, i] >= vocab), BAD_ID, wrong)
        wrong = torch.where(sane[:, i], wrong, BAD_PARENT)
        there = (i < inputs.num_drafted) & (ids[:, i] != -1) & ~(sane[:, i] & twice.any(-1))
        fault[:, i] = torch.where(there, wrong, 0)
        alive[:, i + 1] = there & (wrong == 0) & alive[each, r]
        chosen[each, r] += torch.where(alive[:, i + 1], d.p[each, r, x], 0)
        num[:, i], den[:, i] = ratio[each, r] * px, qx
        reach[:, i] = (num[:, i] / den[:, i]).clamp(max=1)
        if method == "tree_target_only":
            num[:, i], den[:, i] = chosen[each, r], 1
        if method == "traversal":
            ratio[:, i + 1] = reach[:, i]
        rest, ratio_left = after_rejection(p_r, q_r, ratio[each, r])
        failed = alive[:, i + 1]
        p[each, r] = torch.where(failed[:, None], rest, p_r)
        ratio[each, r] = torch.where(failed, ratio_left, ratio[each, r])
        q[each, r] = torch.where(failed[:, None], without(q[each, r], x), q[each, r])
    if method == "traversal":
        num, den = ratio[:, 1:], torch.ones_like(den)
    else:
        reach = torch.ones_like(reach)
    slot = row if method == "tree_target_only" else torch.arange(nodes, device=ids.device)
    shared = torch.minimum(d.p[:, :-1], d.q).sum(-1)
    overlap = torch.where(d.pointed[:, None], chosen[:, :-1], shared)
    return TreeTests(num, den, slot.expand_as(ids), p, reach, overlap, alive[:, 1:], fault)


def after_rejection(p: Tensor, q: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """p and the ratio of a row once a child drawn from q has failed."""
    rest = (ratio[:, None] * p - q).clamp(min=0)
    z = rest.sum(-1)
    sure = (z == 0) & (ratio == 1)
    left = torch.where(z > 0, z, 1)
    p = torch.where((z > 0)[:, None], rest / left[:, None], p)
    return p, torch.where(sure, 1.0, z / torch.where(sure, 1.0, z + (1 - ratio)))


def without(q: Tensor, x: Tensor) -> Tensor:
    """q of the next sibling of x; zeros where nothing is left."""
    q = q.scatter(-1, x[:, None], 0.0)
    return q / torch.where(q.sum(-1) > 0, q.sum(-1), 1)[:, None]


def _rows_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The row that each node follows `[B, K]`, 0 where its parent cannot be, and if it can."""
    assert inputs.parent is not None
    parent = inputs.parent.long().expand_as(inputs.ids)
    sane = (parent >= -1) & (parent < torch.arange(parent.shape[1], device=parent.device))
    return torch.where(sane, parent + 1, 0), sane


def tree_walk(inputs: Inputs, tests: TreeTests, passes: Tensor, rule: Rule) -> Walk:
    """Where the walk ends, of what passes `[B, K]`. Children are tried in order of index; traversal
    tries a node after all of its children, the others before."""
    row, _ = _rows_of(inputs)
    nodes, each = row.shape[1], torch.arange(len(row), device=row.device)
    traversal = METHODS[rule.method] == "traversal"
    passes = passes & tests.usable
    end = row.new_zeros(len(row))
    found = row.new_full((len(row), nodes + 1), -1)  # the row that ends the walk, of each subtree
    if traversal:
        for i in reversed(range(nodes)):
            own = torch.where(passes[:, i], i + 1, -1)
            own = torch.where(found[:, i + 1] >= 0, found[:, i + 1], own)
            own = torch.where(tests.usable[:, i], own, -1)
            found[:, i + 1] = own
            found[each, row[:, i]] = torch.where(own >= 0, own, found[each, row[:, i]])
        end = found[:, 0].clamp(min=0)
    visited = torch.zeros_like(found, dtype=torch.bool)
    visited[:, 0] = True
    over = torch.zeros_like(visited)  # a child was accepted
    for i in range(nodes):
        r = row[:, i]
        open_ = tests.usable[:, i] & visited[each, r] & ~over[each, r] & (tests.reach[:, i] > 0)
        if traversal:
            visited[:, i + 1], done = open_, open_ & (found[:, i + 1] >= 0)
        else:
            visited[:, i + 1] = done = open_ & passes[:, i]
            end = torch.where(done, i + 1, end)
        over[each, r] |= done
    on_path = torch.zeros_like(tests.usable)
    node = end - 1
    for _ in range(nodes):
        on_path |= torch.arange(nodes, device=row.device) == node[:, None]
        node = torch.where(node >= 0, row[each, node.clamp(min=0)] - 1, -1)
    return Walk(end, visited, on_path)


def _verify_tree(inputs: Inputs, rule: Rule) -> Outputs:
    ids, nodes = inputs.ids, inputs.ids.shape[1]
    each, slot = (
        torch.arange(len(ids), device=ids.device),
        torch.arange(nodes + 1, device=ids.device),
    )
    d = distributions(inputs)
    t = tree_tests(inputs, d, rule)
    coin = coins(inputs.seed[:, None], inputs.position[:, None], t.slot, ACCEPT)
    walk = tree_walk(inputs, t, coin * t.den < t.num, rule)
    y = sampled(t.left[each, walk.end], coins(inputs.seed, inputs.position, walk.end, RESAMPLE))
    accepted = walk.on_path.sum(-1)
    path = torch.where(walk.on_path, slot[:-1], nodes).sort(-1).values  # parents come first
    emitted = ids.gather(1, path.clamp(max=max(nodes - 1, 0))) if nodes else ids
    path = torch.where(path < nodes, path, -1)
    sound = d.target_sound[each, walk.end]
    tokens = torch.cat([torch.where(path >= 0, emitted, -1), ids.new_full((len(ids), 1), -1)], 1)
    tokens[each, accepted] = torch.where(sound, y, -1)
    after = torch.cat([torch.zeros_like(accepted)[:, None], path + 1], 1)  # the row of each token
    logprobs = d.p[each[:, None], after, tokens.clamp(min=0)].log()
    row, _ = _rows_of(inputs)
    flags = torch.zeros_like(slot).repeat(len(ids), 1)
    tested = torch.zeros_like(walk.visited)
    for i in range(nodes):
        flags[each, row[:, i]] |= t.fault[:, i]
        tested[each, row[:, i]] |= t.usable[:, i]
    tested &= walk.visited
    at_end = slot == walk.end[:, None]
    flags = torch.where(walk.visited, flags, 0)
    flags |= torch.where(at_end & ~d.target_sound, BAD_TARGET, 0)
    nan, drafted = math.nan, tested[:, :-1]
    return Outputs(
        tokens,
        accepted,
        torch.where(tokens >= 0, logprobs, nan),
        torch.where(drafted, t.overlap, nan),
        torch.where(drafted, 0.0, nan),
        torch.where(tested | at_end, d.target_lse, nan),
        torch.where(drafted, d.draft_lse, nan),
        flags.int(),
        path,
    )


class GradientRows(NamedTuple):
    """What `verify_with_gradient` compares: logits `[B, K, V]` of draft and target, fp64, both to
    be divided by the draft's `temperature [B]`; zeros but in the `counted [B, K]`, rows that were
    evaluated. `wrong [B, K]`: rows without a softmax."""

    student: Tensor
    teacher: Tensor
    temperature: Tensor
    counted: Tensor
    wrong: Tensor


def gradient_rows(
    target: Tensor,
    draft: Tensor,
    warpers: Tensor,
    logit_bias: Tensor | None,
    overlap: Tensor,
    flags: Tensor,
) -> GradientRows:
    """`overlap` and `flags` are the verification's. Greedy requests have no softmax to derive."""
    warpers = warpers.expand(len(target), -1)
    wrong = (flags[:, :-1] & (BAD_TARGET | BAD_DRAFT)) != 0
    pointed = (warpers[:, 0] == 0) | (warpers[:, WARPERS] == 0)
    counted = ~torch.isnan(overlap) & ~wrong & ~pointed[:, None]
    x, y = biased(target, logit_bias)[:, :-1].double(), draft.double()
    x, y = (torch.where(counted[..., None], z, 0) for z in (x, y))
    temperature = torch.where(pointed, 1.0, warpers[:, WARPERS])
    ratio = temperature / torch.where(pointed, 1.0, warpers[:, 0])
    moved = (x - x.amax(-1, keepdim=True)) * ratio[:, None, None]  # at the draft's temperature
    teacher = torch.where(x >= cuts(x, warpers[:, :WARPERS]), moved, -math.inf)
    student = torch.where(y >= cuts(y, warpers[:, WARPERS:]), y, -math.inf)
    return GradientRows(student, teacher, temperature, counted, wrong)


def verify_reference(inputs: Inputs, rule: Rule) -> Outputs:
    """fp64 results, whatever the logits' dtype; raises nothing."""
    if METHODS[rule.method] in TREES:
        return _verify_tree(inputs, rule)
    ids, slots = inputs.ids, inputs.ids.shape[1]
    d = distributions(inputs)
    length, fault = usable(inputs, d)
    tests = slot_tests(d, ids, length, rule)
    slot = torch.arange(slots + 1, device=ids.device)
    coin = coins(inputs.seed[:, None], inputs.position[:, None], slot[None, :-1], ACCEPT)
    passes = (coin * tests.den < tests.num) & (slot[:-1] < length[:, None])
    whole = METHODS[rule.method] == "block"
    accepted = passes.long().cumprod(-1).sum(-1)
    if whole:
        accepted = torch.where(passes, slot[1:], 0).amax(-1) if slots else length
    weights = final_weights(d, tests, accepted, length, rule)
    y = sampled(weights, coins(inputs.seed, inputs.position, accepted, RESAMPLE))
    n = accepted[:, None]
    ended = _row(d.target_sound[..., None].long(), accepted) == 1
    drafted = torch.cat([ids, ids.new_full((len(ids), 1), -1)], 1)
    tokens = torch.where(slot < n, drafted, torch.where((slot == n) & ended, y[:, None], -1))
    logprobs = d.p.gather(-1, tokens.clamp(min=0)[..., None])[..., 0].log()
    tested = slot < (length[:, None] if whole else torch.minimum(n + 1, length[:, None]))
    seen = slot <= (length[:, None] if whole else n)
    fault = torch.cat([fault, torch.zeros_like(fault[:, :1]) if slots else n * 0], 1)
    flags = torch.where(seen, fault, 0)
    flags = flags | torch.where((slot == n) & ~d.target_sound, BAD_TARGET, 0)
    nan = math.nan
    return Outputs(
        tokens,
        accepted,
        torch.where(tokens >= 0, logprobs, nan),
        torch.where(tested[:, :-1], tests.overlap, nan),
        torch.where(tested[:, :-1], tests.bias, nan),
        torch.where(tested | (slot == n), d.target_lse, nan),
        torch.where(tested[:, :-1], d.draft_lse, nan),
        flags.int(),
        torch.where(slot[:-1] < n, slot[:-1], -1),
    )
