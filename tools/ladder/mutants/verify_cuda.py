"""Mutants of `verify`'s CUDA kernels, by file, and the check that kills them.

The check runs small cases of every method, warper and draft under cusim with its memory hooks,
compares every output with the fp64 reference, decides two things that only fp64 sums can, and
counts bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pydistill.ops.verify import VerifyResult, _forward, verify
from pydistill.reference.verify import (
    ACCEPT,
    METHODS,
    RESAMPLE,
    TREES,
    Inputs,
    Outputs,
    Rule,
    coins,
    verify_reference,
)
from pydistill.testing.case import Case
from pydistill.testing.case import check as check_case
from pydistill.testing.cases import verify as table
from tools.ladder.cuda.sim import CudaSim
from tools.ladder.cuda.verify import FEW_THREADS, SOURCE, simulated
from tools.ladder.mutation import Mutant

COINS = [
    Mutant("(seed >> 32)", "(seed >> 31)"),
    Mutant("(position >> 32)", "(position >> 31)"),
    Mutant("c3 = stream", "c3 = 0"),
    Mutant("static_cast<uint32_t>(slot)", "0"),
    Mutant("round < 10", "round < 9"),
    Mutant("0xD2511F53", "0xD2511F55"),
    Mutant("0xCD9E8D57", "0xCD9E8D59"),
    Mutant("^ c1 ^ k0", "^ k0"),
    Mutant("^ c3 ^ k1", "^ c3 ^ k0"),
    Mutant("k0 += 0x9E3779B9", "k0 += 0x9E3779B8"),
    Mutant("k1 += 0xBB67AE85", "k1 += 0xBB67AE84"),
    Mutant("(c0 >> 5) << 26", "(c0 >> 6) << 26"),
    Mutant("(c1 >> 6)", "(c1 >> 7)"),
]
WARP = [
    Mutant("end = min(begin + run, last)", "end = begin + run"),
    Mutant(
        "if (kept) kept[warp()] = mine;\n  }\n  __syncthreads();",
        "if (kept) kept[warp()] = mine;\n  }",
    ),
    Mutant("x[i] += b[i]", "x[i] = x[i]"),
    Mutant("(bias ? bias[id] : 0.0f)", "0.0f"),
    Mutant("(1u << shift) - 1u", "(1u << shift)"),
    Mutant("__popc(word & (bit - 1u))", "__popc(word & bit)"),
    Mutant("if (!(word & bit)) return -INFINITY;", ""),
    Mutant("return x < cut ? 0.0f : e;", "return x <= cut ? 0.0f : e;"),
    Mutant("const float d = below < least ? least : below;", "const float d = below;"),
    Mutant("z *= weight.below(max - most);", ""),
    Mutant("z * weight.below(max - w.max)", "z"),
    Mutant("w.sound = w.total > 0.0;  // NaN", "w.sound = 1;  // NaN"),
    Mutant("while (by_warp[first] != max) ++first;", "first = kWarps - 1;"),
    Mutant("min(start + kTile, vocab)", "start + kTile"),
    Mutant(
        "if (reader.at(id) == max) found = min(found, id);", "if (reader.at(id) == max) found = id;"
    ),
    Mutant("found = __reduce_min_sync(kFullMask, found);", ""),
    Mutant("mass += x[i] > pivot ? e[i]", "mass += true ? e[i]"),
    Mutant("sums[j] += x > pivots[j] ? e : 0.0;", "sums[j] += e;"),
    Mutant("tokens[j] += x[i] > pivot;", "tokens[j] += x[i] >= pivot;"),
    Mutant("5e-7 * w.total : 0.0", "0.0 : 0.0"),
    Mutant("order_of(w.cut) - 1", "order_of(w.cut)"),
    Mutant("> from.logits[i]) more", ">= from.logits[i]) more"),
    Mutant("if (weight < search.limit) least", "if (weight <= search.limit) least"),
    Mutant("if (mine == 0) search.exactly = search.again = 1;", "return cut;"),
    Mutant("warpers[kTemperature] * warpers[kLogMinP]", "warpers[kLogMinP]"),
    Mutant("if (!(cut > before)) continue;", "if (true) continue;"),
    Mutant("if (by_mass ? asked < 1.0 :", "if (by_mass ? false :"),
    Mutant("warpers[by_mass ? kTopP : kTopK]", "warpers[by_mass ? kTopP : kTopP]"),
]
REQUEST = [
    Mutant("id >= vocab ||", ""),
    Mutant("(atomicOr(bits + id / 32, bit) & bit)", "(atomicOr(bits + id / 32, bit) & 0u)"),
    Mutant("if (i < warp()) at += sums[i];", ""),
    Mutant("if (lane() >= step) sum += other;", "sum += other;"),
    Mutant("for (int i = thread; i < words; i += kBlock) bits[i] = 0;", ""),
    Mutant("fmaxf(fmaf(scale, px, -qx), 0.0f)", "fmaf(scale, px, -qx)"),
    Mutant("fmaf(scale, px, -qx)", "(px - qx)"),
    Mutant("fmaxf(fmaf(scale, px, -qx), 0.0f)", "px"),
    Mutant("same += fminf(p[i], q[i]);", "same += fmaxf(p[i], q[i]);"),
    Mutant("fminf(q[i], a * p[i]) - fminf(q[i], p[i])", "fminf(q[i], a * p[i])"),
    Mutant("p[i] > 0.0f ? expf", "true ? expf"),
    Mutant("const float kept = p[i] > a ? q[i] : 0.0f;", "const float kept = q[i];"),
    Mutant("0.5f * fabsf(kept - b * p[i])", "0.5f * fabsf(kept - p[i])"),
    Mutant("if (slot.tried[j] == id) return 0.0f;", ""),
    Mutant("bound *= coin;", "bound *= 1.0 - coin;"),
    Mutant("sum = before;\n    const int run", "sum = 0.0;\n    const int run"),
    Mutant("id < end && sum <= bound; ++id", "id < end; ++id"),
    Mutant("/ slot.rest", "* 1.0"),
    Mutant("row * call_.target_row_stride", "0"),
    Mutant("index() * call_.bias_step", "0"),
    Mutant("index() * call_.warper_step", "0"),
    Mutant("index() * call_.seed_step", "0"),
    Mutant("blockIdx.x * Layout(call).bytes", "0"),
    Mutant("warpers() + side * kWarpers", "warpers()"),
    Mutant("* den < num", "* num < den"),
    Mutant("s.residual[i] /= rest;", "s.residual[i] /= 1.0;"),
    Mutant("tried = tried || tokens[j] == id;", ""),
    Mutant("s.residual[part] = mass;", ""),
    Mutant("call_.flags[at(row)] |= kBadTarget;", ""),
    Mutant("row, kResampleStream", "row, kAcceptStream"),
    Mutant("if (s.q.point < 0) call_.draft_lse", "if (true) call_.draft_lse"),
    Mutant("if (s.p.point < 0) call_.target_lse", "if (true) call_.target_lse"),
]
CHAIN = [
    Mutant("open = open && slot < this->drafted() &&", "open = open && slot < call_.slots &&"),
    Mutant("flip(tested - 1, ratio, 1.0)) accepted", "flip(tested, ratio, 1.0)) accepted"),
    Mutant("row == read, open && !this->pointed_", "true, open && !this->pointed_"),
    Mutant("open = is_usable(slot);\n      if (!open) continue;", "is_usable(slot);"),
    Mutant("slots_[slot].scale = ratio;", "slots_[slot].scale = 1.0;"),
    Mutant("s.rest + (1.0 - ratio)", "s.rest"),
    Mutant("this->flip(slot - 1, s.rest,", "this->flip(slot - 1, ratio,"),
    Mutant("ratio = fmin(1.0, ratio * s.px / s.qx);", "ratio = ratio * s.px / s.qx;"),
    Mutant("accepted += open;", "++accepted;"),
    Mutant("if (id != -1) this->alone", "this->alone"),
    Mutant("fault == 0 && !this->pointed_ && !s.q.sound", "false"),
    Mutant("if (!(qx > 0.0)) fault = kImpossible;", ""),
    Mutant("s.rest = s.scale * (1.0 - s.px)", "s.rest = 1.0 - s.px"),
    Mutant("bias = fmin(1.0, odds) - s.px;", "bias = odds - s.px;"),
    Mutant("bias = (1.0 - weight(s.rest)) * s.rest", "bias = weight(s.rest) * s.rest"),
    Mutant("1.0 / (call_.strength * call_.strength)", "1.0 / call_.strength"),
    Mutant("1.0 - call_.strength / rest : 0.0", "1.0 - call_.strength / rest : 1.0"),
    Mutant("exp(call_.strength * log(s.px))", "s.px"),
    Mutant("s.px > bound", "s.px >= bound / 2"),
    Mutant("kind = pass == 0 ? kLikely : kUnlike;", "kind = kUnlike;"),
    Mutant("if (this->pointed_) bias = kept ? 1.0 - s.px : 0.0;", ""),
    Mutant("sum_by_warp(sum, scratch) / s.p.total", "sum_by_warp(sum, scratch)"),
    Mutant("call_.method != kTypical && s.rest > 0.0", "s.rest > 0.0"),
    Mutant("this->remove(accepted, call_.ids + this->draft_at(accepted), 1);", ""),
    Mutant("if (call_.method == kWhole) this->map_draft(accepted);", ""),
    Mutant("if (s.rest < 1e-3) this->refine(accepted);", ""),
    Mutant("call_.path[this->draft_at(i)] = i;", ""),
]
TREE = [
    Mutant("if (next.step == kEnter) this->alone([&] { open(row); });", ""),
    Mutant("!this->pointed_ && mapped != row) {", "false) {"),
    Mutant("tests && !this->pointed_) this->weigh(row);", "false) this->weigh(row);"),
    Mutant("parents()[node] >= -1 && parents()[node] < node", "parents()[node] >= -1"),
    Mutant("call_.flags[this->at(0)] |= kBadParent;", ""),
    Mutant("begin += branches()[r].count;", "begin += 1;"),
    Mutant("branches()[child].ratio = ratio;", "branches()[child].ratio = 1.0;"),
    Mutant("branches()[node + 1].ratio = 1.0;", ""),
    Mutant("if (tokens()[b.begin + j] == token) return false;", ""),
    Mutant("call_.flags[this->at(row)] |= kBadId;", ""),
    Mutant("flags |= s.p.sound ? kBadDraft : kBadTarget;", "flags |= kBadTarget;"),
    Mutant("s.scale = b.ratio;\n", "\n"),
    Mutant("s.overlap += target_of(row, j);", "s.overlap = target_of(row, j);"),
    Mutant("if (!possible) flags |= kImpossible;", ""),
    Mutant("num = b.ratio * px, den = b.mass;", "num = px, den = b.mass;"),
    Mutant("num = b.ratio * px, den = b.mass;", "num = b.ratio * px, den = 1.0;"),
    Mutant("px - b.rho * qx, 0.0)", "px, 0.0)"),
    Mutant("den = b.mass * qx / b.left;", "den = b.mass * qx;"),
    Mutant("den = b.mass * qx / b.left;", "den = qx / b.left;"),
    Mutant("!this->pointed_ && b.next > 0 && !s.exact;", "false;"),
    Mutant("b.rho * b.ratio + b.mass / b.left", "b.rho * b.ratio + b.mass"),
    Mutant("b.left -= probability_of", "b.left = 1.0 - probability_of"),
    Mutant("s.scale = b.ratio / b.factor;", ""),
    Mutant("if (s.exact || more ||", "if (false &&"),
    Mutant("b.rho = 1.0 / s.scale, b.left", "b.left"),
    Mutant("this->pointed_ ? s.rest : s.rest / s.scale", "s.rest"),
    Mutant("sure ? 1.0 : z / (z + (1.0 - b.ratio))", "z"),
    Mutant("if (call_.method == kTraversal) b.ratio = ratio;", ""),
    Mutant("if (u < sum) return accept", "if (u < target_of(row, j)) return accept"),
    Mutant("++accepted;\n    return {kEnter, node + 1};", "return {kEnter, node + 1};"),
    Mutant("if (row > 0 && !this->flip(row - 1,", "if (row > 0 && !this->flip(row,"),
    Mutant("if (!(ratio > 0.0)) return {kReject, row};", ""),
    Mutant("keep(r - 1, --offset)", "keep(r - 1, 0 * --offset)"),
    Mutant("bool left = s.rest > 0.0;", "bool left = false;"),
    Mutant("this->alone([&] { s.rest = b.mass; });", ""),
]
PARTS = {"coins": COINS, "warp": WARP, "request": REQUEST, "chain": CHAIN, "tree": TREE}
COINS_FIXTURE = Path(__file__).parents[3] / "tests/ladder/cuda_fixtures/verify_coins.cu"
# The file that each part breaks.
FILES = {part: f"verify-{part}.cuh" for part in PARTS} | {"chain": "verify.cu"}


def build(source: Path) -> CudaSim:
    """The kernels with `source` in place of the file of that name."""
    if source.suffix == ".cu":
        return CudaSim.build(source, hooks=True, defines=FEW_THREADS)
    folder = source.parent / "include"
    copy = folder / "cuda" / source.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(source.read_text())
    return CudaSim.build(SOURCE, hooks=True, defines=FEW_THREADS, include_dirs=[folder])


def check(source: Path) -> None:
    """Raises where the kernels built from `source` are wrong."""
    sim = build(source)
    if source.suffix == ".cuh":
        for stream in (ACCEPT, RESAMPLE):
            check_coin_bits(stream, [source.parent / "include"])
    check_all(sim)


def check_all(sim: CudaSim, order: str = "forward") -> None:
    for case in cases():
        with simulated(sim, order):
            report = check_case(case, impl="cuda")
        assert report.ok, report.message
    check_faults(sim)
    check_limit_in_doubt(sim)
    check_small_residual(sim)
    check_small_residual_of_siblings(sim)
    check_equal_rows_first(sim)
    check_equal_rows_below(sim)
    check_coins(sim)
    check_bytes(sim)


_EVERY: dict[str, Any] = {"temperature": 1.4, "top_k": 60, "top_p": 0.9, "min_p": 0.01}


def watched() -> list[Case]:
    """Those of `cases` that take the hooks to all code: one of every sort, the methods by turns."""
    chosen: dict[str, Case] = {}
    for case in cases():
        chosen.setdefault(case.id.split("-")[1] + str(case.kind in TREES), case)
    return list(chosen.values())


def cases() -> list[Case]:
    """Of every sort of the operator's table, with few requests and short rows."""
    chosen = []

    def add(name: str, method: str, *shape: int, **more: Any) -> None:
        batch, slots, vocab = shape or (8, 3, 300)
        chosen.append(table._case(name, batch, slots, vocab, method, **more))

    for method in ("token", "block", "typical"):
        add("plain", method)
        add("warped", method, 8, 3, 700, **_EVERY)
        add("each", method, each=tuple(table._EACH))
        add("support", method, 8, 3, 700, support=9)
        add("poisoned", method, 14, 3, 130, poisoned=True)
        add("one_hot", method, one_hot=True)
        add("tiny", method, 24, 3, 3)
    add("ties", "token", 8, 3, 1500, pattern="ties", top_k=40, top_p=0.8, dtype=torch.bfloat16)
    add("late", "token", 3, 2, 1500, pattern="late", top_k=9)
    add("infinite", "token", 8, 3, 167, pattern="infinite", top_p=0.95)
    add("min_p", "token", temperature=0.4, min_p=0.05)
    add("ragged", "block", 12, 3, 130, ragged=True, biased=True, strided=True)
    add("greedy", "token", 12, 3, 300, pattern="ties", temperature=0.0, one_hot=True)
    add("greedy", "typical", 12, 3, 300, pattern="ties", temperature=0.0)
    add("greedy_draft", "block", draft_temperature=0.0)
    add("equal", "block", pattern="equal")
    add("support_poisoned", "token", 14, 3, 130, support=130, poisoned=True)
    add("support_warped", "block", 12, 3, 400, support=80, **_EVERY)
    add("support_of_many", "token", 6, 2, 1500, support=80)  # more words than a warp has threads
    add("faint_power", "token", 16, 3, 130, pattern="infinite", lenience=("exponential", 0.02))
    add("large_budget", "token", 16, 3, 130, tv_budget=0.9)
    for name, options in table._LENIENT.items():
        add(name, "token", 16, 3, 130, **options)
        add(f"{name}_one_hot", "token", 8, 3, 130, one_hot=True, **options)
    for method in ("tree_target_only", "tree", "traversal"):
        add("plain", method, 10, 7, 300, shape="random")
        add("siblings", method, 10, 6, 130, shape="siblings", temperature=0.5)
        add("all_siblings", method, 16, 6, 6, shape="siblings")
        add("one_hot", method, 10, 6, 130, shape="random", one_hot=True)
        add("poisoned", method, 14, 6, 130, shape="random", poisoned=True)
        add("ragged", method, 14, 6, 67, shape="random", ragged=True)
        add("greedy", method, 10, 6, 130, shape="random", pattern="ties", temperature=0.0)
        add("few", method, 30, 9, 3, shape="random")
        add("one_hot_few", method, 40, 9, 4, shape="siblings", one_hot=True)
        add("peaked", method, 10, 6, 130, shape="random", pattern="peaked")
    for method in ("tree", "traversal"):
        add("support", method, 10, 7, 400, shape="random", support=9)
        add("disjoint", method, 8, 6, 130, shape="random", pattern="disjoint")
    return chosen


def compare(sim: CudaSim, **arguments: Any) -> VerifyResult:
    """The result, after it was compared with that of the reference."""
    with simulated(sim):
        got = verify(**arguments, impl="cuda")
    want = verify(**arguments, impl="reference")
    close(got, want)
    return got


def close(got: VerifyResult | Outputs, want: VerifyResult | Outputs) -> None:
    for name, x, y in zip(got._fields, got, want, strict=True):
        allowed = 2e-6 if x.is_floating_point() else 0.0
        same = torch.isclose(x, y.to(x.dtype), rtol=allowed, atol=allowed, equal_nan=True)
        assert same.all(), f"{name} differs at {(~same).nonzero()[0].tolist()}"


def check_faults(sim: CudaSim) -> None:
    """Values that the operator refuses where it can read them."""
    g = torch.Generator().manual_seed(2)
    batch, nodes, vocab, size = 8, 4, 90, 12
    target = torch.randn(batch, nodes + 1, vocab, generator=g)
    support = torch.rand(batch, nodes, vocab, generator=g).argsort(-1)[..., :size].contiguous()
    draft = torch.randn(batch, nodes, size, generator=g)
    ids = support[..., 0].contiguous()
    ids[1, 0], ids[2, 0], support[3, 0, 5], support[4, 0, 7] = -7, vocab, vocab + 40, 2**40
    support[5, 0, 3] = support[5, 0, 4]
    parent = torch.tensor([[-1, 0, 0, 1]]).repeat(batch, 1).int()
    parent[6, 1], parent[7, 2] = 1, -2
    one = torch.tensor([[1.0, 0.0, 1.0, -math.inf] * 2], dtype=torch.float64)
    numbers = torch.tensor([nodes]), one, torch.tensor([8]), torch.arange(batch)
    for method in METHODS:
        tree = parent if method in TREES else None
        known = method != "tree_target_only"
        inputs = Inputs(
            target, draft if known else None, ids, *numbers, None, tree, support if known else None
        )
        rule = Rule(METHODS.index(method), 0, 0.3, 0.09)
        with simulated(sim):
            got = _forward(inputs, rule, "cuda")
        want = verify_reference(inputs, rule)
        assert want.flags[1 : 6 if known else 3, 0].all()
        assert tree is None or want.flags[6:, 0].all()
        close(got, want)


def check_limit_in_doubt(sim: CudaSim) -> None:
    """A top-p that falls between two tokens by less than fp32 can tell: first one is kept that
    exact sums keep, then one is not that they do not."""
    g = torch.Generator().manual_seed(3)
    rows = torch.randn(6, 1, 1500, generator=g)
    p = rows.double().softmax(-1).sort(-1, descending=True).values.cumsum(-1)[:, 0, 400]
    for off in (1e-10, -1e-10):
        found = compare(
            sim, target_logits=rows, draft_logits=None, top_p=p + off, seed=3, position=0,
            draft_ids=torch.zeros(6, 0, dtype=torch.int64),
        )  # fmt: skip
        kept = found.target_lse[:, 0].double()
        whole = rows.double().logsumexp(-1)[:, 0]
        assert ((kept - whole).exp() - p).abs().max() < 1e-3


def check_small_residual(sim: CudaSim) -> None:
    """Rows that differ by a millionth of their mass, which is all that is left to draw from."""
    g = torch.Generator().manual_seed(4)
    batch, vocab = 40, 300
    target = 0.3 * torch.randn(batch, 2, vocab, generator=g)
    draft = target[:, :1].clone()
    target[:, 0, 7] = -math.inf
    draft[:, 0, 7] = math.log(1e-6 * vocab)
    found = compare(
        sim, target_logits=target, draft_logits=draft, seed=5, position=torch.arange(batch),
        draft_ids=torch.full((batch, 1), 7),
    )  # fmt: skip
    assert int(found.num_accepted.sum()) == 0 and len(set(found.tokens[:, 0].tolist())) > 20


def check_small_residual_of_siblings(sim: CudaSim) -> None:
    """The same, of a row on which a second drafted token is then tried: fp32 sums are wrong by
    about as much as there is left."""
    g = torch.Generator().manual_seed(9)
    batch, vocab = 40, 60
    target = 0.3 * torch.randn(batch, 3, vocab, generator=g)
    draft = target[:, :2].clone()
    target[:, 0, 7] = -math.inf
    draft[:, 0, 7] = math.log(1e-7 * vocab)
    ids = torch.stack([torch.full((batch,), 7), 8 + torch.arange(batch)], 1)
    for method in ("tree", "traversal"):
        compare(
            sim, target_logits=target, draft_logits=draft, draft_ids=ids, method=method, seed=5,
            tree=torch.tensor([[-1, -1]]).expand(batch, 2).int(), position=torch.arange(batch),
        )  # fmt: skip


def check_equal_rows_first(sim: CudaSim) -> None:
    """Chains that are certain to be accepted up to their last token: `block` has then settled on
    all before it."""
    g = torch.Generator().manual_seed(10)
    batch, vocab = 40, 60
    target = torch.randn(batch, 4, vocab, generator=g)
    draft = 2 * torch.randn(batch, 3, vocab, generator=g)
    draft[:, :2] = target[:, :2]
    ids = torch.multinomial(draft.softmax(-1).flatten(0, 1), 1, generator=g).view(batch, 3)
    found = compare(
        sim, target_logits=target, draft_logits=draft, draft_ids=ids, method="block", seed=5,
        position=torch.arange(batch),
    )  # fmt: skip
    assert set(found.num_accepted.tolist()) == {2, 3}


def check_equal_rows_below(sim: CudaSim) -> None:
    """Two siblings on a row where draft and target agree, under a token that may not stand: after
    the first nothing is left for the second."""
    g = torch.Generator().manual_seed(11)
    batch, vocab = 60, 6
    target = torch.randn(batch, 4, vocab, generator=g)
    draft = 2 * torch.randn(batch, 3, vocab, generator=g)
    draft[:, 1] = target[:, 1]
    first = torch.multinomial(draft[:, 0].softmax(-1), 1, generator=g)
    pair = torch.multinomial(draft[:, 1].softmax(-1), 2, generator=g)
    compare(
        sim, target_logits=target, draft_logits=draft, draft_ids=torch.cat([first, pair], 1),
        method="traversal", tree=torch.tensor([[-1, 0, 0]]).expand(batch, 3).int(), seed=5,
        position=torch.arange(batch),
    )  # fmt: skip


def check_coin_bits(stream: int, include_dirs: Sequence[Path] = ()) -> None:
    """Bit for bit those of the reference, with the generator's published answers among them."""
    g = torch.Generator().manual_seed(7)
    seed, position = torch.randint(-(2**62), 2**62, (2, 256), generator=g)
    slot = torch.randint(0, 2**31, (256,), generator=g)
    seed[0], position[0], slot[0] = 0, 0, 0
    seed[1], position[1], slot[1] = -1, -1, 2**32 - 1
    got = torch.empty(256, dtype=torch.float64)
    sim = CudaSim.build(COINS_FIXTURE, hooks=True, include_dirs=include_dirs)
    sim.call("pyd_coins", seed, position, slot, stream, got, 256)
    assert torch.equal(got, coins(seed, position, slot, stream))
    assert stream != ACCEPT or float(got[0]) == 0.39904647231489565


def check_coins(sim: CudaSim) -> None:
    """Seeds and positions of more than 32 bits; the first token of a flat row is the coin."""
    seeds = torch.tensor([0, -1, 2**40 + 5, -(2**62)]).repeat(3)
    compare(
        sim, target_logits=torch.zeros(12, 3, 1024), draft_logits=None, seed=seeds,
        draft_ids=torch.zeros(12, 2, dtype=torch.int64),
        position=torch.tensor([0, 2**33 + 1, 2**62]).repeat_interleave(4),
    )  # fmt: skip


def rejected(batch: int, slots: int, vocab: int, dtype: torch.dtype) -> dict[str, Any]:
    """Requests whose first drafted token the target forbids."""
    g = torch.Generator().manual_seed(6)
    target = torch.randn(batch, slots + 1, vocab, generator=g).to(dtype)
    draft = torch.randn(batch, slots, vocab, generator=g).to(dtype)
    target[:, 0, 0] = -math.inf
    return {
        "target_logits": target,
        "draft_logits": draft,
        "draft_ids": torch.zeros(batch, slots, dtype=torch.int64),
    }


def check_bytes(sim: CudaSim) -> None:
    """Rows behind the rejected token are not read; the others twice, and a little to draw."""
    vocab, inputs = 1024, rejected(2, 3, 1024, torch.float32)
    with simulated(sim) as calls:
        verify(**inputs, seed=0, position=0, impl="cuda")
        verify(**inputs | {"draft_logits": None}, seed=0, position=0, impl="cuda")
    sampled, pointed = (call.report.buffers for call in calls)
    row = 2 * 4 * vocab
    assert 2 * row < sampled["target"].bytes_moved < 4 * row
    assert 2 * row < sampled["draft"].bytes_moved < 4 * row
    assert row < pointed["target"].bytes_moved < 3 * row
