"""Mutants of `verify`'s Triton kernels, and the checks that kill them.

A check compares launches in the strict interpreter with the fp64 reference, on requests made so
that every line matters, and counts bytes: a kernel that reads rows for nothing is broken as well.
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any

import torch

from pydistill.ops import _verify_call
from pydistill.reference.verify import Inputs, Outputs, Rule, verify_reference
from tools.ladder.interpreter import Guards, strict
from tools.ladder.mutation import Mutant

ROWS = [
    Mutant("tl.where(x != x, INF, x)", "x"),
    Mutant("tl.where(x != x, INF, x)", "tl.where(x != x, -INF, x)"),
    Mutant("x += tl.load(bias + at, mask=at < vocab, other=0.0)", "x += 0.0"),
    Mutant("tl.where(temperature == 0.0, 1.0, temperature)", "1.0 + 0.0 * temperature"),
    Mutant("inverse * 1.4426950408889634", "inverse * 1.4427"),
    Mutant("d * high + tl.maximum(d, -1e30) * low", "d * high"),
    Mutant("there = (token >= 0) & (token < vocab)", "there = token >= 0"),
    Mutant("& (slot < tl.load(num_drafted))", ""),
    Mutant("(tl.load(own) != 0.0) & (tl.load(own + WARPERS) != 0.0)", "True"),
    Mutant("return (row < reached) & sampled", "return sampled"),
    Mutant("return row <= reached", "return row >= 0"),
    Mutant("tl.where(top == -INF, 0.0, top)", "top"),
    Mutant("+ DRAFT * WARPERS)", ")", 0),
    Mutant("low + tl.maximum(span // 4, 1)", "low + span // 4"),
    Mutant("inside = (key >= first) & (key <= final)", "inside = key >= first"),
    Mutant("e = tl.where(x >= cut, e, 0.0)", "e = e * 1.0"),
    Mutant("key > a", "key >= a"),
    Mutant("key > b", "key >= b"),
    Mutant("key > c", "key >= c"),
    Mutant("tl.where(above_b < least, b,", "tl.where(above_b <= least, b,"),
    Mutant("bottom = tl.where(above_c >= most, c, bottom)", "bottom = bottom + 0"),
    Mutant("lowest.to(tl.int64) - 1", "lowest.to(tl.int64)"),
    Mutant("(top_k > 0.0) & (top_k < vocab)", "top_k > 0.0"),
    Mutant("by_mass & (cut > -INF)", "by_mass & (cut > INF)"),
    Mutant("tl.where(by_mass, top_p * total, top_k)", "tl.where(by_mass, top_p, top_k)"),
    Mutant("DOUBT * total, 0.0)", "0.0 * total, 0.0)"),
    Mutant("top_p * exact, exact * 0.0", "top_p * total, exact * 0.0"),
    Mutant("if (peak > -INF) & (peak < INF):", "if peak > -INF:"),
    Mutant("if (peak > -INF) & (peak < INF):", "if peak < INF:"),
    Mutant(
        "tl.min(tl.where(top == peak, lane, BLOCKS), 0)",
        "tl.max(tl.where(top == peak, lane, 0), 0)",
    ),
    Mutant(
        "point = tl.min(tl.where(x == peak, at, vocab), 0)",
        "point = tl.max(tl.where(x == peak, at, 0), 0)",
    ),
    Mutant(
        "bound = largest + temperature * tl.load(own + 3)", "bound = largest + tl.load(own + 3)"
    ),
    Mutant("rounded = least.to(tl.float64) < bound", "rounded = least.to(tl.float64) > bound"),
    Mutant("cut = tl.maximum(cut, least)", "cut = least"),
    Mutant("if about >= cut:", "if about > cut:"),
    Mutant("total += kept.to(tl.float64) * exactly(about, largest, inverse)", "total += kept"),
    Mutant("below.to(tl.float64) + kept * (largest - about)", "below.to(tl.float64)"),
    Mutant("below + mass * (largest - top)", "below"),
    Mutant("value = tl.where(x.to(tl.float64) >= cut, value, -INF)", "value = value + 0.0"),
    Mutant("tl.where(token == point, 0.0, -INF)", "0.0"),
    Mutant('tl.where(total > 0.0, value, float("nan"))', "value"),
    Mutant("tl.load(begin + 1)", "tl.load(begin + 1) - 1"),
    Mutant("logits = torch.where(ordered >= 0, logits, -INF.value)", "logits = logits * 1"),
    Mutant("wrong = twice.any(-1, keepdim=True) | ", "wrong = "),
    Mutant("| (ordered[..., -1:] >= vocab)", "| (ordered[..., -1:] > vocab)"),
    Mutant("place, -1)[..., 0]", "place, 0)[..., 0]"),
]
SLOTS = [
    Mutant("slot.to(tl.uint32), zero + stream", "slot.to(tl.uint32), zero"),
    Mutant("(c0 >> 5)", "(c0 >> 6)"),
    Mutant("(seed >> 32)", "(seed >> 31)"),
    Mutant("(position >> 32)", "(position >> 31)"),
    Mutant("x += tl.load(bias + request * bias_step + token, mask=there, other=0.0)", "x += 0.0"),
    Mutant(
        "outside = (token < -1) | (token >= tokens)", "outside = (token < 0) | (token >= tokens)"
    ),
    Mutant("fault = tl.where(q_sound, fault, BAD_DRAFT)", "fault = tl.where(q_sound, fault, 0)"),
    Mutant("fault = tl.where(log_p == log_p, fault, BAD_TARGET)", "fault = fault + 0"),
    Mutant("tl.exp(tl.where(known, log_q, -INF))", "tl.exp(log_q)"),
    Mutant("return px / strength", "return px / (strength * strength)"),
    Mutant("return px / (strength * strength)", "return px / strength"),
    Mutant("tl.exp(strength * tl.log(px))", "px"),
    Mutant("weight * px + (1.0 - weight) * qx", "weight * qx + (1.0 - weight) * px"),
    Mutant("1.0 - strength / rest", "1.0 - strength"),
    Mutant("tl.log(total) + inverse * depth / total", "tl.log(total) + depth / total"),
    Mutant("tl.minimum(alpha * tl.exp(-entropy), strength)", "alpha * tl.exp(-entropy)"),
    Mutant("gain = px / qx", "gain = px"),
    Mutant("ratio = tl.minimum(gained, 1.0)", "ratio = gained"),
    Mutant("scale = tl.where(slot > i, ratio, scale)", "scale = tl.where(slot >= i, ratio, scale)"),
    Mutant("passes = coin * qx < odds", "passes = coin * qx <= odds * 1.01"),
    Mutant(
        "length = tl.minimum(_leading(passes & (slot < length), SLOTS) + 1, length)", "length += 0"
    ),
]
COMPARE = [
    Mutant("if slot < tl.load(tested + request):", "if slot >= 0:"),
    Mutant("(x >= cut) & (at != token), weights", "x >= cut, weights"),
    Mutant(
        "tl.store(left + place, (scale * mass).to(tl.float32))",
        "tl.store(left + place, mass.to(tl.float32))",
        0,
    ),
    Mutant(
        "tl.store(left + place, (scale * mass).to(tl.float32))",
        "tl.store(left + place, mass.to(tl.float32))",
        1,
    ),
    Mutant(
        "tl.store(more + place, 0.5 * chosen * mass.to(tl.float32))", "tl.store(more + place, 0.0)"
    ),
    Mutant(
        "p = tl.where(x >= cut, weights(x, largest.to(tl.float32), inverse), 0.0)",
        "p = weights(x, largest.to(tl.float32), inverse)",
    ),
    Mutant(
        "q = tl.where(y >= q_cut, weights(y, q_largest.to(tl.float32), q_inverse), 0.0)",
        "q = weights(y, q_largest.to(tl.float32), q_inverse)",
    ),
    Mutant("kept = tl.where(p > least, q, 0.0)", "kept = q * 1.0"),
    Mutant("0.5 * tl.abs(kept - chosen * p)", "0.5 * tl.abs(kept - p)"),
    Mutant("factor *= factor", "factor *= 1.0"),
    Mutant("excess = tl.minimum(q, f) - tl.minimum(q, p)", "excess = tl.minimum(q, f)"),
    Mutant("tl.where(p > 0.0, tl.exp(number", "tl.where(p >= 0.0, tl.exp(number"),
    Mutant("tl.maximum(scale.to(tl.float32) * p - q, 0.0)", "tl.maximum(p - q, 0.0)"),
    Mutant("tl.maximum(scale.to(tl.float32) * p - q, 0.0)", "scale.to(tl.float32) * p"),
]
DECIDE = [
    Mutant("scale * (1.0 - px), px * 0.0", "1.0 - px, px * 0.0"),
    Mutant("tl.where(slot == i - 1, value, coming)", "tl.where(slot == i, value, coming)"),
    Mutant("sure = (coming == 0.0) & (ratio == 1.0)", "sure = coming == 0.0"),
    Mutant("last = slot == length - 1", "last = slot == slots - 1"),
    Mutant("coming + (1.0 - ratio)", "coming + 1.0"),
    Mutant("(coin * den < num) & (slot < length)", "coin * den < num"),
    Mutant("tl.max(tl.where(passes, slot + 1, 0), 0)", "_leading(passes, SLOTS)"),
    Mutant(
        "reported, seen = slot < length, slot <= length",
        "reported, seen = slot <= length, slot < length",
    ),
    Mutant("(1.0 - _weight_of_target(rest, strength, LENIENCE)) * rest", "rest * 1.0"),
    Mutant(
        "tl.where(pointed, tl.minimum(odds, 1.0) - px, excess)",
        "tl.where(pointed, odds - px, excess)",
    ),
    Mutant(
        "tl.where(pointed, tl.where(passes, rest, 0.0), excess)", "tl.where(pointed, rest, excess)"
    ),
    Mutant(
        "slot < tl.minimum(accepted + 1, length), slot <= accepted",
        "slot < tl.minimum(accepted + 1, length), slot < accepted",
    ),
    Mutant(
        "tl.where(reached & (total > 0.0), tl.where(greedy, nan, value), nan)",
        "tl.where(reached & (total > 0.0), value, nan)",
    ),
    Mutant("tl.where(ends & (total == 0.0), BAD_TARGET, 0)", "0"),
    Mutant("tl.where(seen, fault, 0)", "fault"),
]
SAMPLE = [
    Mutant(
        "(slot < tl.load(tested + request)) & (METHOD != TYPICAL)",
        "slot < tl.load(tested + request)",
    ),
    Mutant("by_p = tl.load(scales + place) / total", "by_p = 1.0 / total"),
    Mutant("if tl.sum(sums, 0) < _SMALL:", "if tl.sum(sums, 0) < 0.0:"),
    Mutant("dense = dense & (tl.load(own + WARPERS) != 0.0)", "dense = dense & True"),
    Mutant("slot.to(tl.int32), RESAMPLE", "slot.to(tl.int32), ACCEPT"),
    Mutant("tl.cumsum(sums, 0) > bound", "tl.cumsum(sums, 0) >= 0.0"),
    Mutant("bound -= tl.sum(tl.where(lane < block, sums, 0.0), 0)", "bound -= 0.0"),
    Mutant("(x >= cut) & (at != tried)", "x >= cut"),
    Mutant("w = tl.maximum(w - q * by_q, 0.0)", "w = w + 0.0"),
    Mutant(
        "value = inverse * (logit - largest) - tl.log(total)", "value = inverse * (logit - largest)"
    ),
    Mutant("p * by_p - q * by_q", "p * by_p"),
    Mutant("sums + rest, sums", "rest + 0.0, sums"),
]
PARTS = {"rows": ROWS, "slots": SLOTS, "compare": COMPARE, "decide": DECIDE, "sample": SAMPLE}

VOCAB, BLOCK = 150, 64
# Requests: plain; low top-k; top-p; min-p; all filters; greedy; a greedy draft; hot; one slot less,
# and the row behind it NaN; nothing drafted; an id of -1; NaN, +inf and nothing in the target; NaN
# and 0 in the draft.
REQUESTS = 16
WARPERS = {
    "temperature": [1, 1, 1, 0.7, 1.3, 0, 1, 2.5, *[1] * 8],
    "top_k": [0, 5, 0, 0, 90, 0, 0, VOCAB, *[0] * 8],
    "top_p": [1, 1, 0.6, 1, 0.8, 0.5, 1, 1, *[1] * 8],
    "min_p": [0, 0, 0, 0.15, 0.01, 0, 0, 0, *[0] * 8],
    "draft_temperature": [1, 1, 1.2, 1, 1, 1, 0, 0.5, *[1] * 8],
    "draft_top_k": [0, 9, 0, 0, 0, 0, 0, 0, *[0] * 8],
    "draft_top_p": [1, 1, 0.9, 1, 0.95, 1, 1, 1, *[1] * 8],
    "draft_min_p": [0] * 16,
}


def small_blocks(rows: ModuleType) -> None:
    """Blocks of 64 columns, of 16 in fp64."""
    rows.COLUMNS, rows.PER_THREAD = BLOCK, 2  # type: ignore[attr-defined]


def requests(slots: int = 3, vocab: int = VOCAB, seed: int = 1) -> dict[str, Any]:
    """Arguments of `verify` for REQUESTS requests."""
    g = torch.Generator().manual_seed(seed)
    target = 2 * torch.randn(REQUESTS, slots + 1, vocab, generator=g)
    draft = target[:, :-1] + torch.randn(REQUESTS, slots, vocab, generator=g)
    noise = torch.rand(draft.shape, generator=g).log().neg().log()
    ids = (draft - noise).argmax(-1)
    ids[0], ids[5] = target[0, :-1].argmax(-1), target[5, :-1].argmax(-1)  # these are accepted
    target[5, :, 149], ids[5, -1] = target[5].amax(-1), 149  # a tie
    ids[10, 1], target[11, 0, 70] = -1, math.nan
    target[12, 2, 3], target[13, 1] = math.inf, -math.inf
    draft[14, 1, 9], draft[15, 0, ids[15, 0]] = math.nan, -math.inf
    counts = torch.full((REQUESTS,), slots)
    counts[8], counts[9] = slots - 1, 0
    draft[8], target[8, slots - 1, 3] = target[8, :-1], math.nan  # only the last row is wrong
    return {
        "target": target, "draft": draft, "ids": ids, "num_drafted": counts,
        "seed": torch.arange(REQUESTS) * 2**40 - 3, "position": 2**33 * torch.arange(REQUESTS) + 5,
        **{name: torch.tensor(values, dtype=torch.float64) for name, values in WARPERS.items()},
    }  # fmt: skip


def prepared(call: dict[str, Any], rule: Rule) -> Inputs:
    """The form that kernels take, of values that are not checked."""
    names = _verify_call.NAMES
    return _verify_call.prepare(
        "verify", call["target"], call["draft"], call["ids"], rule, "cpu", False,
        draft_topk_ids=call.get("support"), tree=None, num_drafted=call["num_drafted"],
        warpers=tuple(call.get(n) for n in names),
        drafts=tuple(call.get("draft_" + n) for n in names),
        logit_bias=call.get("bias"), seed=call["seed"], position=call["position"],
    ).inputs  # fmt: skip


def outputs(inputs: Inputs) -> Outputs:
    """Memory for the results, filled with what a kernel may not leave."""
    batch, slots = inputs.ids.shape
    rows, drafted = (batch, slots + 1), (batch, slots)
    whole, single = torch.int64, torch.float32
    made = (
        (rows, whole), ((batch,), whole), (rows, single), (drafted, single), (drafted, single),
        (rows, single), (drafted, single), (rows, torch.int32), (drafted, whole),
    )  # fmt: skip
    return Outputs._make(torch.full(shape, 99, dtype=dtype) for shape, dtype in made)


def compare(found: Outputs, inputs: Inputs, rule: Rule) -> None:
    """Integers are equal; numbers to 1e-6 of themselves and of 1."""
    want = verify_reference(inputs, rule)
    for name, got, right in zip(Outputs._fields, found, want, strict=True):
        if got.is_floating_point():
            same = torch.isclose(got.double(), right, rtol=1e-6, atol=1e-6, equal_nan=True)
            assert same.all(), f"{name}: {got[~same].tolist()}, not {right[~same].tolist()}"
        else:
            assert torch.equal(got, right), f"{name}: {got.tolist()}, not {right.tolist()}"


def check_call(kernels: ModuleType, call: dict[str, Any], rule: Rule) -> None:
    inputs = prepared(call, rule)
    found = outputs(inputs)
    kernels.verify_fwd(*inputs, *rule, False, *found)
    compare(found, inputs, rule)


def rule(method: str = "token", lenience: tuple[str, float] | None = None, **options: Any) -> Rule:
    return _verify_call.rule_of(
        method, None, lenience, options.get("tv_budget"), options.get("typical")
    )


def some(call: dict[str, Any], chosen: list[int], **changes: Any) -> dict[str, Any]:
    """A few of the requests."""
    return {n: None if x is None else x[chosen] for n, x in call.items()} | changes


def check_methods(kernels: ModuleType) -> None:
    call = requests()
    check_call(kernels, call, rule())
    check_call(kernels, some(call, [0, 1, 5, 6, 8, 9, 10, 13, 14]), rule("block"))
    check_call(kernels, some(call, [0, 3, 5, 6, 7, 11]), rule("typical", typical=(0.1, 0.6)))


def check_lenient(kernels: ModuleType) -> None:
    call = some(requests(seed=4), [0, 3, 5, 6, 7])
    for lenience in (("linear", 0.3), ("square", 0.6), ("exponential", 0.4), ("ensemble", 0.6)):
        check_call(kernels, call, rule(lenience=lenience))
    check_call(kernels, call, rule(tv_budget=0.1))


def check_point_masses(kernels: ModuleType) -> None:
    call = some(requests(seed=2), [0, 3, 5, 7, 10], draft=None)
    for r in (rule(), rule("block"), rule("typical"), rule(tv_budget=0.1)):
        check_call(kernels, call, r)
    check_call(kernels, some(call, [0, 2]), rule(lenience=("square", 0.9)))


def check_bias(kernels: ModuleType) -> None:
    call = some(requests(seed=3), [0, 1, 4, 5, 7])
    call["bias"] = 2 * torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0))
    call["bias"][:, ::7] = -math.inf
    check_call(kernels, call, rule())
    check_call(kernels, call | {"bias": call["bias"][0], "draft": None}, rule("block"))


def check_support(kernels: ModuleType) -> None:
    """Tokens of every row, of which one is empty, one comes twice and one is too large."""
    call = some(requests(seed=6), [0, 1, 2, 4, 6, 7, 8, 14])
    g = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(VOCAB, generator=g)[:11] for _ in range(24)]).reshape(
        8, 3, 11
    )
    ids[:6, :, 3] = call["ids"][:6]
    ids = torch.where((ids == call["ids"][..., None]) & (torch.arange(11) != 3), -1, ids)
    logits = torch.where(ids < 0, math.nan, call["draft"].gather(-1, ids.clamp(min=0)))
    logits[7] = logits[0]
    ids[3, :, 7], ids[4, 2, 5], ids[5, 0, 1] = -1, ids[4, 2, 6], VOCAB
    call |= {"draft": logits, "support": ids}
    for r in (rule(), rule("block"), rule("typical", typical=(0.05, 0.9))):
        check_call(kernels, call, r)
    shared = ids[0, 0].clamp(min=0)
    once = some(requests(seed=7), [0, 1, 2])
    once |= {"draft": once["draft"][..., :11].contiguous(), "support": shared.unique()[:11]}
    once["draft"] = once["draft"][..., : len(once["support"])].contiguous()
    check_call(kernels, once, rule())


def check_draws(kernels: ModuleType) -> None:
    """Rejections, of tokens that p likes too: what is left, and of `typical` p itself."""
    g = torch.Generator().manual_seed(3)
    target = torch.randn(24, 3, VOCAB, generator=g)
    target[:, :, [9, 70, 140]] += 5.0
    draft = target[:, :-1].flip(-1)
    draft[:, 0, 70] = target[:, 0, 70] + 3.0
    ids = torch.full((24, 2), 70)
    call = {
        "target": target, "draft": draft, "ids": ids, "num_drafted": torch.full((24,), 2),
        "seed": torch.arange(24), "position": torch.arange(24),
        "temperature": (torch.arange(24) % 6 != 1).double(),
        "draft_temperature": (torch.arange(24) % 4 != 0).double(),
    }  # fmt: skip
    for r in (rule(), rule("block"), rule("typical", typical=(0.5, 1.0))):
        check_call(kernels, call, r)
    few = torch.tensor([66, 70, 80, 90, 100])  # of one block
    check_call(kernels, call | {"draft": draft[..., few], "support": few}, rule("block"))
    # p and q that differ by rounding but for the drafted token: an fp32 residual is noise.
    target[:, :, 7], draft = -math.inf, (3.0 * target[:, :-1]).clone()
    draft[:, :, 7] = 3.0 * (target[:, :-1].amax(-1) - 16.0)
    close = call | {"draft": draft, "ids": torch.full_like(ids, 7), "draft_temperature": 3.0}
    check_call(kernels, close, rule())


def check_rounding(kernels: ModuleType) -> None:
    """A top-p limit that is met exactly, or missed by less than fp32 can tell."""
    plain: dict[str, Any] = dict.fromkeys(WARPERS)
    call = requests(seed=8)
    # Eight equal tokens, of which `top_p` is met by four, and by one more a hair above.
    z = torch.full((REQUESTS, 4, VOCAB), -math.inf)
    z[..., 3::19] = 1.0 - torch.arange(8) * 1e-3
    share = torch.softmax(z[0, 0].double(), -1)
    share = share[share > 0].sort(descending=True).values.cumsum(0)
    met = torch.cat([share[:4], share[:4] - 1e-12, share[:4] + 1e-12, share[:4] + 1e-9])
    call |= {"target": z, "draft": z[:, :-1].contiguous(), "ids": torch.full((REQUESTS, 3), 3)}
    call |= plain | {"top_p": met, "num_drafted": torch.full((REQUESTS,), 3)}
    check_call(kernels, some(call, [0, 1, 4, 5, 9, 13]), rule())


def check_bounds(kernels: ModuleType) -> None:
    """Strided rows between guards."""
    guards = Guards()
    call = some(requests(), [0, 1, 4, 5])
    wide = torch.full((4, 6, VOCAB + 5), math.nan)
    wide[:, 2:, 3:-2] = call["target"]
    call["target"] = wide[:, 2:, 3:-2]
    call["draft"] = call["draft"].transpose(0, 1).contiguous().transpose(0, 1)
    inputs = prepared(call, rule("block"))
    inputs = Inputs._make(x if x is None else guards(x) for x in inputs)
    found = Outputs._make(guards(x) for x in outputs(inputs))
    kernels.verify_fwd(*inputs, *rule("block"), False, *found)
    guards.check()
    compare(found, inputs, rule("block"))


def check_bytes(kernels: ModuleType) -> None:
    """Rows behind the first rejection are read once, rows behind the last token never, and those
    that were tested twice; of the last token's row one block more."""
    call = some(requests(), [0, 0, 0])
    call |= dict.fromkeys(WARPERS)
    call["draft"] = call["target"][:, :-1].clone()
    call["target"][0, 1, call["ids"][0, 1]] = -math.inf  # rejected, at slot 1 of the first
    call["num_drafted"] = torch.tensor([3, 2, 0])
    with strict() as meter:
        inputs = prepared(call, rule())
        found = outputs(inputs)
        kernels.verify_fwd(*inputs, *rule(), False, *found)
    compare(found, inputs, rule())
    accepted = found.num_accepted.tolist()
    assert accepted == [1, 2, 0]
    by_kernel = {name: meter.of(name).bytes for name in ("_reduce_blocks", "_compare", "_sample")}
    row = 4 * VOCAB
    assert by_kernel["_reduce_blocks"]["logits"].loaded == (4 + 3 + 3 + 2 + 1) * row
    for side in ("target", "draft"):
        assert by_kernel["_compare"][side].loaded == (2 + 2) * row
    opened = by_kernel["_sample"]["target"].loaded
    assert 3 * (VOCAB - 2 * BLOCK) * 4 <= opened <= 3 * BLOCK * 4, opened
    assert by_kernel["_sample"]["draft"].loaded <= BLOCK * 4
    assert meter.of("_finish_rows").bytes["logits"].loaded == 0


def _run(kernels: ModuleType, *names: str) -> None:
    small_blocks(importlib.import_module("pydistill.kernels.verify_rows"))
    check_bytes(kernels)
    with strict():
        for name in names:
            globals()[f"check_{name}"](kernels)


# Each raises unless a part of the kernels is right, by the checks that can see it.


def check_rows(rows: ModuleType) -> None:
    kernels = importlib.import_module("pydistill.kernels.verify")  # it imports `rows` by name
    _run(kernels, "methods", "bias", "rounding", "support")


def check_slots(kernels: ModuleType) -> None:
    _run(kernels, "methods", "bias", "lenient", "support")


def check_compare(kernels: ModuleType) -> None:
    _run(kernels, "draws", "lenient", "point_masses", "support", "methods")


def check_decide(kernels: ModuleType) -> None:
    _run(kernels, "draws", "methods", "point_masses", "lenient")


def check_sample(kernels: ModuleType) -> None:
    _run(kernels, "draws", "methods", "point_masses")
