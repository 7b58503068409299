"""The definition of `pydistill.verify`: how many drafted tokens the target accepts, and the token
that follows them.

Plain torch in fp64, in steps that tests can take apart: `distributions` (logits to p and q),
`slot_tests` (with which odds a slot passes), `final_weights` (what the last token is drawn from)
and `verify_reference` (coins, decisions, results). docs/ops/verify.md has the formulas.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

METHODS = ("token", "block", "typical")
LENIENCES = ("none", "linear", "square", "exponential", "ensemble", "tv_budget")
BAD_ID, BAD_TARGET, BAD_DRAFT, IMPOSSIBLE = 1, 2, 4, 8  # of a row's flags
ACCEPT, RESAMPLE, DRAFT = 0, 1, 2  # streams of coins
WARPERS = 4  # temperature (0: greedy), top_k (0: off), top_p (1: off), log of min_p (-inf: off)

_WORD = 0xFFFFFFFF


class Inputs(NamedTuple):
    """What every kernel is given. One row of `warpers`, `seed` or `logit_bias` serves all."""

    target: Tensor  # [B, K + 1, V]
    draft: Tensor | None  # [B, K, V]; None: the drafted tokens are point masses
    ids: Tensor  # int64 [B, K]
    num_drafted: Tensor  # int64 [B]
    warpers: Tensor  # fp64 [B or 1, 2 * WARPERS]: the target's and the draft's
    seed: Tensor  # int64 [B or 1]
    position: Tensor  # int64 [B]
    logit_bias: Tensor | None  # [B or 1, V]


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


class Distributions(NamedTuple):
    """Warped rows: `p [B, K + 1, V]`, `q [B, K, V]`; zeros in a row without a softmax."""

    p: Tensor
    q: Tensor
    target_lse: Tensor
    draft_lse: Tensor
    target_sound: Tensor
    draft_sound: Tensor


class SlotTests(NamedTuple):
    """Slot i passes when coin * den < num; `scale` r gives the residual [r p - q]+ of a prefix that
    ends before slot i (ignored by typical, which samples p)."""

    num: Tensor  # [B, K]
    den: Tensor  # [B, K]
    scale: Tensor  # [B, K]
    bias: Tensor  # [B, K]
    overlap: Tensor  # [B, K]


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
    temperature, top_k, top_p, log_min_p = (w[:, None, None] for w in warpers.unbind(-1))
    sound = ~(torch.isnan(x) | (x == math.inf)).any(-1) & (x > -math.inf).any(-1)
    x = torch.where(sound[..., None], x, 0)
    greedy = temperature == 0
    t = torch.where(greedy, 1.0, temperature)
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
    cut = torch.maximum(torch.maximum(cut, nucleus), largest + t * log_min_p)
    e = torch.where(x >= cut, ((x - largest) / t).exp(), 0)
    total = e.sum(-1, keepdim=True)
    point = torch.nn.functional.one_hot(x.argmax(-1), x.shape[-1]).double()
    p = torch.where(greedy, point, e / total) * sound[..., None]
    lse = largest / t + total.log()
    lse = torch.where(greedy | ~sound[..., None], math.nan, lse)[..., 0]
    return p, lse, sound


def distributions(inputs: Inputs) -> Distributions:
    target, ids = inputs.target, inputs.ids
    batch, slots = ids.shape
    vocab = target.shape[-1]
    warpers = inputs.warpers.expand(batch, -1)
    if inputs.logit_bias is not None:
        wide = torch.promote_types(target.dtype, torch.float32)
        target = target.to(wide) + inputs.logit_bias[:, None].to(wide)
    p, target_lse, target_sound = warped(target, warpers[:, :WARPERS])
    point = torch.nn.functional.one_hot(ids.clamp(0, vocab - 1), vocab).double()
    if inputs.draft is None:
        nan = torch.full((batch, slots), math.nan, dtype=torch.float64, device=ids.device)
        return Distributions(p, point, target_lse, nan, target_sound, torch.isnan(nan))
    q, draft_lse, draft_sound = warped(inputs.draft, warpers[:, WARPERS:])
    pointed = ((warpers[:, 0] == 0) | (warpers[:, WARPERS] == 0))[:, None]
    return Distributions(
        p,
        torch.where(pointed[..., None], point, q),
        target_lse,
        torch.where(pointed, math.nan, draft_lse),
        target_sound,
        draft_sound | pointed,
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
        den.append(torch.where(last | sure, 1.0, z + 1 - r))
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


def verify_reference(inputs: Inputs, rule: Rule) -> Outputs:
    """fp64 results, whatever the logits' dtype; raises nothing."""
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
    )
