"""Mutants of `token_logprob`'s Triton kernels, and the check that kills them.

The check compares launches in the strict interpreter with the fp64 reference, on rows made so that
every line matters, and counts bytes: a kernel that reads too much is broken as well.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from pydistill.reference.token_logprob import SAVED, Inputs, token_logprob_reference
from tools.ladder.interpreter import Guards, strict
from tools.ladder.mutation import Mutant

FORWARD = [
    Mutant("if tl.load(counted + row) == 0:", "if tl.load(counted + row) == 7:"),
    Mutant("new_top = tl.maximum(top, tl.max(z, 0))", "new_top = tl.max(z, 0)"),
    Mutant("tl.minimum(k * (new_top - top), _GONE)", "k * (new_top - top)"),
    Mutant("depth = scale * (depth + (rest + ties) * gap)", "depth = scale * depth"),
    Mutant("depth = scale * (depth + (rest + ties) * gap)", "depth = scale * (depth + rest * gap)"),
    Mutant("scale * (rest + ties), rest)", "scale * rest, rest)"),
    Mutant("ties = tl.where(raised, 0.0, ties)", "ties = ties"),
    Mutant("d = tl.maximum(k * (z - top), -FAR)", "d = k * (z - top)"),
    Mutant("tie = z == top", "tie = z > top"),
    Mutant("e = tl.where(z != z, z, e)", "e = tl.where(z != z, 0.0, e)"),
    Mutant("tl.where(tie, 0.0, e)", "e"),
    Mutant("(tl.sum(ties, 0) - 1.0)", "tl.sum(ties, 0)"),
    Mutant("/ (1.0 + others)", ""),
    Mutant("(tl.abs(top) < INF) & (k == k)", "k == k"),
    Mutant("(tl.abs(top) < INF) & (k == k)", "tl.abs(top) < INF"),
    Mutant("tl.where(sound, log1p(others)", "tl.where(sound, tl.log(1.0 + others)"),
    Mutant("(token >= 0) & (token < vocab)", "(token < vocab)"),
    Mutant("(token >= 0) & (token < vocab)", "(token >= 0) & (token <= vocab)"),
    Mutant("k * (z - top).to(tl.float64) - log_z", "(z - top).to(tl.float64) - log_z"),
    Mutant("tl.where(inside, log_z + below", "tl.where(inside, log_z"),
    Mutant("tl.where(inside, 0, ID_OUT_OF_RANGE)", "tl.where(inside, 0, 0)"),
    Mutant("tl.load(row_params + row)", "tl.load(row_params)"),
]
BACKWARD = [
    Mutant("at_token = -expm1(tl.load(base + 3))", "at_token = 1.0 - tl.exp(tl.load(base + 3))"),
    Mutant("flagged = tl.load(base + 4) != 0.0", "flagged = k != k"),
    Mutant("unused = (up == 0.0) & (up_entropy == 0.0)", "unused = up == 0.0"),
    Mutant("unused = (up == 0.0) & (up_entropy == 0.0)", "unused = up_entropy == 0.0"),
    Mutant("if flagged | unused:", "if flagged:"),
    Mutant("tl.where(unused, 0.0, float", "tl.where(flagged == 0, 0.0, float"),
    Mutant("up, up_entropy = k * up, k * up_entropy", "up, up_entropy = up, k * up_entropy"),
    Mutant("up, up_entropy = k * up, k * up_entropy", "up, up_entropy = k * up, up_entropy"),
    Mutant("- top), -FAR)", "- top), -INF)", 1),
    Mutant("q = tl.exp(d - log_z)", "q = tl.exp(d)"),
    Mutant("tl.where(at == token, at_token, -q)", "-q"),
    Mutant("tl.where(at == token, at_token, -q)", "tl.where(at == token, at_token, q)"),
    Mutant("(q * (d + depth))", "(q * d)"),
    Mutant("- up_entropy * (q", "+ up_entropy * (q"),
]
PARTS = {"forward": FORWARD, "backward": BACKWARD}

ROWS, VOCAB = 10, 600
IDS = torch.tensor([300, 299, 3, 0, 580, 599, -7, 555, 9, 17])
COUNTED = torch.arange(ROWS) != 6
UP = torch.tensor([1.0, -2.0, 0.0, 1.0, 1.0, -1.0, 0.0, 1.5, 0.0, 2.0])
UP_ENTROPY = torch.tensor([1.0, 0.0, -0.5, 0.5, 2.0, -1.0, 0.0, 1.5, 0.0, 1.0])


def rows() -> Tensor:
    """Ten rows: two peaked ones (the token the maximum, and beside it); ties over blocks; equal
    logits; -inf at the end and at the token; -inf for all the first block; one that is not counted;
    a late rise; one without upstream; one that rises in every block."""
    z = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(3))
    z[:2, 300] += 30.0
    z[2, ::200] = 7.0
    z[3] = 1.5
    z[4, -30:] = -math.inf
    z[5, :290] = -math.inf
    z[6], z[8] = math.nan, math.nan
    z[7, 550:553] += 95.0
    z[9] += torch.arange(VOCAB) * 0.05
    return z


def run(
    kernels: ModuleType, logits: Tensor, ids: Tensor, counted: Tensor | None,
    params: Tensor | None, t: float, ups: tuple[Tensor, Tensor],
) -> tuple[Tensor, ...]:  # fmt: skip
    """logprob, entropy, saved and gradient of one forward and one backward."""
    count = len(logits)
    logprob, entropy, saved = torch.empty(count), torch.empty(count), torch.empty(count, SAVED)
    grad = torch.empty_like(logits)
    kernels.token_logprob_fwd(logits, ids, counted, params, t, logprob, entropy, saved)
    kernels.token_logprob_bwd(logits, ids, params, saved, *ups, t, grad)
    return logprob, entropy, saved, grad


def wanted(
    logits: Tensor, ids: Tensor, counted: Tensor | None, params: Tensor | None, t: float,
    ups: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """logprob, entropy and gradient of the reference in fp64."""
    leaf = logits.double().requires_grad_()
    found = token_logprob_reference(Inputs(leaf, ids, counted, params), t)
    (grad,) = torch.autograd.grad(found[:2], leaf, [up.double() for up in ups])
    return found.logprob.detach(), found.entropy.detach(), grad


def compare(
    kernels: ModuleType, logits: Tensor, ids: Tensor, counted: Tensor | None,
    params: Tensor | None, t: float, ups: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """Outputs to a relative 3e-6; gradients to 1e-5 of the largest of their row, and at the token
    and the maximum of themselves."""
    logprob, entropy, _, grad = run(kernels, logits, ids, counted, params, t, ups)
    want, want_entropy, want_grad = wanted(logits, ids, counted, params, t, ups)
    unread = (ups[0] == 0) & (ups[1] == 0)
    want_grad = torch.where(unread[:, None], 0, want_grad)
    for got, right in ((logprob, want), (entropy, want_entropy)):
        torch.testing.assert_close(got.double(), right, rtol=3e-6, atol=1e-37, equal_nan=True)
    size = want_grad.abs().amax(1, keepdim=True)
    off = (grad.double() - want_grad).abs()
    fine = (off <= 1e-5 * size) | (grad.isnan() & want_grad.isnan())
    assert fine.all(), (off / size).amax(1)


def check_values(kernels: ModuleType) -> None:
    """Every row at one temperature and at one of its own, with both upstreams and with one."""
    z, params = rows(), torch.linspace(0.5, 2.0, ROWS)
    for t, own in ((1.0, None), (0.7, None), (1.0, params)):
        compare(kernels, z, IDS, COUNTED, own, t, (UP, UP_ENTROPY))
    compare(kernels, z, IDS, COUNTED, params, 1.0, (UP, 0 * UP))
    compare(kernels, z, IDS, COUNTED, params, 1.0, (0 * UP, UP_ENTROPY))


def check_flags(kernels: ModuleType) -> None:
    """Rows with an id or a temperature out of range, NaN, +inf or nothing are NaN, others not.
    Whole blocks: columns beside the row would be NaN by themselves."""
    guards = Guards()
    z = torch.randn(9, 512, generator=torch.Generator().manual_seed(3))
    z[5, 3], z[6, 270], z[7], z[8, 100] = math.nan, math.inf, -math.inf, -math.inf
    ids = guards(torch.tensor([0, 512, -1, 511, 5, 1, 2, 3, 100]))
    params = guards(torch.tensor([1.0, 1.0, 1.0, -1.0, math.inf, 1.0, 1.0, 1.0, 1.0]))
    up = (torch.arange(9) != 2).float()
    ups = (guards(up), guards(up.clone()))
    z = guards(z)
    logprob, entropy, saved, grad = run(kernels, z, ids, None, params, 1.0, ups)
    guards.check()
    flagged = [False, *[True] * 7, False]
    assert logprob.isnan().tolist() == entropy.isnan().tolist() == flagged
    assert not grad[2].any()  # without an upstream
    flagged[2] = False
    assert grad.isnan().all(1).tolist() == grad.isnan().any(1).tolist() == flagged
    assert saved[:, 4].tolist() == [0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert saved[1:3].isnan().tolist() == [[False, False, False, True, False]] * 2
    assert logprob[8] == -math.inf and entropy[8] > 4 and grad[8, 100] == 1


def check_tiles(kernels: ModuleType) -> None:
    """Backward over tiles of columns, in place, equals backward over whole rows."""
    z, ups = rows(), (UP, UP_ENTROPY)
    saved, whole = run(kernels, z, IDS, COUNTED, None, 0.8, ups)[2:]
    tiled = z.clone()
    for begin, end in ((0, 1), (1, 290), (290, 300), (300, 301), (301, VOCAB)):
        tile = tiled[:, begin:end]
        kernels.token_logprob_bwd(tile, IDS - begin, None, saved, *ups, 0.8, tile)
    assert torch.equal(tiled, whole)


def check_bytes(kernels: ModuleType) -> None:
    """Every logit once and the token's once more; nothing of a row without use."""
    z, live = rows(), UP.ne(0) | UP_ENTROPY.ne(0)
    logprob, entropy, saved = torch.empty(ROWS), torch.empty(ROWS), torch.empty(ROWS, SAVED)
    with strict() as forward:
        kernels.token_logprob_fwd(z, IDS, COUNTED, None, 1.0, logprob, entropy, saved)
    with strict() as backward:
        kernels.token_logprob_bwd(z, IDS, None, saved, UP, UP_ENTROPY, 1.0, torch.empty_like(z))
    row, counted = 4 * VOCAB, int(COUNTED.sum())
    assert forward.bytes["logits"].loaded == counted * (row + 4)
    assert backward.bytes["logits"].loaded == int(live.sum()) * row
    assert backward.bytes["grad"].stored == ROWS * row


def check_kernels(kernels: ModuleType) -> None:
    """Raises unless the kernels are right."""
    kernels.THREADS = 64  # type: ignore[attr-defined]  # blocks of 256 fp32: short rows have several
    with strict():
        check_flags(kernels)
        check_values(kernels)
        check_tiles(kernels)
    check_bytes(kernels)
