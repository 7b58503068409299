"""Mutants of `topk_logprobs`' Triton kernels, and the check that kills them.

The check compares launches in the strict interpreter with the fp64 reference, on rows made so that
every line matters, and counts bytes: a kernel that reads too much is broken as well.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from pydistill.reference.topk_logprobs import topk_logprobs_reference
from tools.ladder.interpreter import Guards, strict
from tools.ladder.mutation import Mutant

CHOICE = [
    Mutant("tl.where(x != x, INF, x)", "x"),
    Mutant("tl.where(x != x, INF, x)", "tl.where(x != x, -INF, x)"),
    Mutant("key = (packed + _BELOW) >> _SHIFT", "key = packed >> _SHIFT"),
    Mutant("mass = tl.sum(tl.exp(", "mass = tl.max(tl.exp("),
    Mutant("mask=x > -INF, other=0.0", "mask=token < limit, other=0.0"),
    Mutant("tl.exp(_inverse(temperature) * (x - top[:, None]))", "tl.exp(x - top[:, None])"),
    Mutant("present = slot < size // GROUP", "present = slot <= size // GROUP"),
    Mutant("present[:, None] & (token < limit)", "present[:, None]"),
    Mutant("tl.minimum(lowest, tl.min(tl.where", "(tl.min(tl.where"),
    Mutant("tl.maximum(highest, tl.max(tl.where", "(tl.max(tl.where"),
    Mutant("count += tl.sum(beyond", "count = tl.sum(beyond"),
    Mutant("above = tl.where(enough, above, count)", "above = tl.where(enough, count, above)"),
    Mutant("lowest, low).to(tl.int64)", "cut, low).to(tl.int64)"),
    Mutant("filled, ties = tl.full((), 0, tl.int32), slots - above", "filled, ties = 0, slots"),
    Mutant("if before is not None:", "if (before is not None) & (slots == 0):"),
    Mutant("(tl.cumsum(tie, 0) <= ties)", "(tl.cumsum(tie, 0) < ties)"),
    Mutant("ties -= tl.sum(tie, 0)", "ties -= 0"),
    Mutant("filled += tl.sum(taken, 0)", "filled = tl.sum(taken, 0)"),
    Mutant("tl.where(inside, -INF, from_ordered_key(logit))", "from_ordered_key(logit)"),
    Mutant("new_top = tl.maximum(top, tl.max(x, 0))", "new_top = tl.max(x, 0)"),
    Mutant("e = tl.exp(k * (x - shift))", "e = tl.exp(x - shift)"),
    Mutant("e *= tl.load(masses", "e += 0.0 * tl.load(masses"),
    Mutant("tl.load(masses + row * stride + token", "tl.load(masses + row + token"),
    Mutant("z = z * tl.exp(k * (top - shift)).to(tl.float64) + ", "z = z + "),
    Mutant("k * group > KEPT", "k * group < 0"),
    Mutant("k * group * group * itemsize > 10 * vocab", "k < 0"),
    Mutant("2 * k * group <= vocab", "2 * k * group < 0"),
]
RESULTS = [
    Mutant("(first < INF) & ", ""),
    Mutant("(temperature > 0.0) & (temperature < INF)", "(temperature > 0.0)"),
    Mutant("(temperature > 0.0) & (temperature < INF)", "(temperature < INF)"),
    Mutant("absent = tl.where(sound, -INF, INF)", "absent = tl.where(sound, -INF, -1.0)"),
    Mutant("(slot > 0) & (slot < slots)", "slot < slots"),
    Mutant("(slot > 0) & (slot < slots)", "slot > 0"),
    Mutant("others += tl.sum", "others = tl.sum"),
    Mutant("log_tail = tl.log(z) + k * (top - peak)", "log_tail = tl.log(z) + (top - peak)"),
    Mutant("log_tail = tl.log(z) + k * (top - peak)", "log_tail = tl.log(z)"),
    Mutant("log1p(others + tl.exp(log_tail))", "log1p(others)"),
    Mutant("log1p(others + tl.exp(log_tail))", "tl.log(1.0 + others + tl.exp(log_tail))"),
    Mutant("(log_tail - log_z)", "log_tail"),
    Mutant("(k * peak + log_z)", "(peak + log_z)"),
    Mutant("value = k * (x.to(tl.float64) - peak) - log_z", "value = k * (x - peak)"),
    Mutant("descending=True", "descending=False"),
    Mutant("tl.where(x > absent, token, -1)", "token"),
]
PARTS = {"choice": CHOICE, "results": RESULTS}

ROWS = 8
# V and K: a row in registers; candidates in groups, few and so many that they are read again (from
# a vocabulary that is no multiple of the groups); groups too many as well; too many for groups.
SHAPES = ((500, 20), (1501, 3), (1501, 40), (9001, 18), (1501, 300))


def small_blocks(kernels: ModuleType) -> None:
    """Groups read in blocks of 256 fp32 logits, 512 candidates in registers, 32 slots at a time."""
    kernels.THREADS, kernels.KEPT, kernels.SLOTS = 32, 512, 32  # type: ignore[attr-defined]


def rows(vocab: int) -> Tensor:
    """Eight rows: one with a certain token; many ties; ties of both zeros; few tokens, far apart; a
    peak so high that exponentials about it are 0; one that rises; one all the same; the best tokens
    last."""
    z = 2 * torch.randn(ROWS, vocab, generator=torch.Generator().manual_seed(vocab))
    z[0, 5] = 42.0
    z[1] = z[1].round()
    z[2] = torch.where(z[2] > 0, 0.0, -0.0)
    z[3, torch.arange(vocab) % (vocab // 5) != 3] = -math.inf
    z[4, vocab // 2] = 190.0
    z[5] = z[5].sort().values
    z[6] = 1.5
    z[7, -7:] += 8.0
    return z


def run(
    kernels: ModuleType, logits: Tensor, k: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, logprobs, tail and lse."""
    count = len(logits)
    found = torch.empty(count, k).long(), torch.empty(count, k), torch.empty(count)
    outputs = (*found, torch.empty(count))
    kernels.topk_logprobs_fwd(logits, k, temperature, *outputs)
    return outputs


def compare(found: tuple[Tensor, ...], logits: Tensor, k: int, temperature: float) -> None:
    """Ids are equal, numbers to 1e-6 of themselves and of 1; the first token's log-probability to
    1e-5 of itself, however certain the token."""
    want = topk_logprobs_reference(logits.double(), k, temperature)
    assert torch.equal(found[0], want[0]), "ids"
    for got, right in zip(found[1:], want[1:], strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-6, atol=1e-6, equal_nan=True)
    z = logits.double().sort(1, descending=True).values / temperature
    first = -torch.log1p((z[:, 1:] - z[:, :1]).exp().sum(1))
    first = torch.where(want[3].isnan(), torch.nan, first)
    got = found[1][:, 0].double()
    torch.testing.assert_close(got, first, rtol=1e-5, atol=1e-37, equal_nan=True)


def check_values(kernels: ModuleType) -> None:
    for vocab, k in SHAPES:
        z = rows(vocab)[: ROWS if vocab < 9000 else 2]
        compare(run(kernels, z, k, 0.7), z, k, 0.7)
    z = rows(1501).bfloat16()
    compare(run(kernels, z, 7, 1.0), z, 7, 1.0)
    z = rows(77)
    compare(run(kernels, z, 77, 1.0), z, 77, 1.0)


def check_flags(kernels: ModuleType) -> None:
    """Rows with NaN, of either sign and wherever, +inf or nothing are NaN, others not; so is a
    temperature out of range."""
    for vocab, k in ((512, 20), (1536, 3)):
        z = torch.randn(7, vocab, generator=torch.Generator().manual_seed(3))
        z[1, 3], z[2, -1], z[3, 300], z[4] = math.nan, -math.nan, math.inf, -math.inf
        z[5, 40], z[6, 2:] = -math.inf, -math.inf
        compare(run(kernels, z, k, 1.0), z, k, 1.0)
    for temperature in (-1.0, 0.0, math.inf, math.nan):
        ids, *others = run(kernels, z[:1, :60], 20, temperature)
        assert (ids == -1).all() and all(x.isnan().all() for x in others)


def check_bounds(kernels: ModuleType) -> None:
    """Strided rows between guards, of odd length."""
    for k in (3, 40):
        guards = Guards()
        wide = torch.full((3, 1509), math.nan)
        wide[:, 3:1504] = rows(1501)[[2, 3, 6]]
        z = guards(wide[:, 3:1504])
        outputs = [guards(x) for x in (torch.empty(3, k).long(), torch.empty(3, k))]
        outputs += [guards(torch.empty(3)), guards(torch.empty(3))]
        kernels.topk_logprobs_fwd(z, k, 1.0, *outputs)
        guards.check()
        compare(tuple(outputs), z, k, 1.0)


def check_bytes(kernels: ModuleType) -> None:
    """A row in registers is read twice, once to find its boundary; one in groups once, and the
    candidates as often as that, or once a step if they are too many."""
    sweep = ["_reduce_groups", "_choose"]
    for size, k, before, most in (
        (500, 20, [], 2 * 500),
        (1501, 3, sweep, 1501 + 2 * 3 * 32),
        (1501, 16, sweep, 1501 + 2 * 16 * 16),
        (9001, 18, sweep, 9001 + 2 * 18 * 16),
        (1501, 40, sweep, 1501 + 13 * 40 * 16),
    ):
        z = rows(size)[[1, 5, 7]]
        z[:, -29:] = -10.0  # the last group, which is shorter, must not be chosen
        with strict() as meter:
            run(kernels, z, k, 1.0)
        assert [launch.kernel for launch in meter.launches] == [*before, "_choose", "_write"]
        loaded = meter.launches[-2].bytes["values"].loaded
        if before:
            loaded += meter.launches[0].bytes["logits"].loaded
        assert loaded <= 12 * most and (k == 40 or loaded == 12 * most), (loaded, 12 * most)


def check_kernels(kernels: ModuleType) -> None:
    """Raises unless the kernels are right."""
    small_blocks(kernels)
    with strict():
        check_flags(kernels)
    check_bytes(kernels)
    with strict():
        check_values(kernels)
        check_bounds(kernels)
