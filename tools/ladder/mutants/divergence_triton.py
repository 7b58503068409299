"""Mutants of `divergence`'s Triton kernels, and the check that kills them.

`KERNELS` break kernels/divergence.py, `KINDS` the kinds in kernels/_common/divergences.py, `HEAD`
adaptive_kl's searches in kernels/_common/head.py, and `NUMERICS` the functions below them. The
check compares launches in the strict interpreter with the reference, on rows made so that every
line matters, and counts bytes: a kernel that reads too much is broken as well. Each mutant comes in
under the name that the launchers import.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pydistill.ops._rows import group_by_row
from pydistill.reference.divergence import KINDS as KINDS_BY_NAME
from pydistill.reference.divergence import Inputs, Options, divergence_reference
from tools.ladder.interpreter import Guards, strict
from tools.ladder.mutation import Mutant

FORWARD = [
    Mutant("if tl.load(counted + pair) == 0:", "if tl.load(counted + pair) == 7:"),
    Mutant("(at_t < teacher_count)", "(at_t <= teacher_count)"),
    Mutant("(label < vocab)", "(label <= vocab)"),
    Mutant("new_s = tl.maximum(max_s, tl.max(s, 0))", "new_s = tl.max(s, 0)"),
    Mutant("z_t = z_t * scale_t +", "z_t = z_t +"),
    Mutant("z_1 = z_1 * tl.exp(max_s - shift_s)", "z_1 = z_1 * scale_s"),
    Mutant("phis = phis * scale +", "phis = phis +"),
    Mutant("if estimate & (start == 0):", "if start == 0:"),
    Mutant("again = estimate & repeat", "again = estimate & (repeat != repeat)"),
    Mutant("again = estimate & repeat", "again = estimate"),
    Mutant("centred >= a / 16.0", "centred >= 0.0"),
    Mutant("(plain > 1.0) &", "(plain > 1e-9) &"),
    Mutant("value = tl.where(infinite, INF, value)", "value = tl.where(infinite, 0.0, value)"),
    Mutant("tl.where(new_s == -INF, 0.0, new_s)", "new_s"),
    Mutant("if WITH_TEACHER:", "if True:"),
    Mutant("and (KEPT_ROW == 0)", "and (KEPT_ROW >= 0)"),
    Mutant("kept if kept <= KEPT else 0", "0"),
    Mutant(
        "kept = triton.next_power_of_2(vocab) if", "kept = triton.next_power_of_2(vocab) // 2 if"
    ),
    Mutant("(t > boundary) |", "(t >= boundary) |"),
    Mutant("(rank <= at_boundary)", "(rank < at_boundary)"),
    Mutant("ties += tl.sum(tied, 0)", "ties = tl.sum(tied, 0)"),
    Mutant("w * d_value + (1.0 - w) * c", "(1.0 - w) * d_value + w * c"),
    Mutant("q * tl.maximum(log_q, -FAR)", "q * log_q"),
    Mutant("first_s = tl.minimum(first_s, ", "first_s = tl.maximum(0 * first_s, "),
    Mutant("sound = (z_s > 0.0) & (z_s < INF)", "sound = (z_s < INF)"),
    Mutant("value * temperature * temperature if", "value * temperature if"),
    Mutant("lse = max_s + log_z1", "lse = max_s + log_zs"),
    Mutant("value + adjust if KIND", "-value if KIND"),
]
BACKWARD = [
    Mutant("zero_from = vocab\n", "zero_from = columns\n"),
    Mutant("zero_from = 0", "zero_from = vocab"),
    Mutant("if upstream != 0.0:", "if upstream > 0.0:"),
    Mutant("gradient += _gradient(", "gradient = _gradient("),
    Mutant("for position in range(begin, end):", "for position in range(begin, end - 1):"),
    Mutant("tl.load(row_start + program + 1)", "tl.load(row_start + program) + 1"),
    Mutant("gradient = q - p\n", "gradient = p - q\n"),
    Mutant("gradient = q_h - q * c", "gradient = q_h"),
    Mutant("gradient = -q * (d + c)", "gradient = -q * d"),
    Mutant("gradient = w * (q - p) -", "gradient = w * (q - p) +"),
    Mutant("upstream * k * temperature * temperature", "upstream * temperature * temperature"),
    Mutant("soft = soft * (1.0 - label_weight)", "soft = soft * label_weight"),
    Mutant("(label_weight + 2.0 * z_loss * lse)", "(label_weight + z_loss * lse)"),
    Mutant("tl.where(at == label, picked, 0.0)", "tl.where(at == label + 1, picked, 0.0)"),
    Mutant("lse = max_s + tl.load(base + 6)", "lse = max_s + log_zs"),
    Mutant("teacher_vocab = tl.where(max_s == max_s, vocab, 0)", "teacher_vocab = vocab"),
]
KERNELS = [*FORWARD, *BACKWARD]
KINDS = [
    Mutant("tl.minimum(tl.maximum(d, -FAR), FAR)", "d"),
    Mutant("share_of_p, 1.0 - share_of_p)", "1.0 - share_of_p, share_of_p)"),
    Mutant("k * (t - s) - offset", "k * (t - s)"),
    Mutant("beta * weighted_phi(p, mixture, x) +", "weighted_phi(p, mixture, x) +"),
    Mutant("-0.5 * larger * expm1(-a), q * sign", "-0.5 * larger * expm1(-a), p * sign"),
    Mutant("-(1.0 - alpha) * q * tl.exp(x)", "-(1.0 - alpha) * p * tl.exp(x)"),
    Mutant("q * (y + 1.0 - alpha * tl.exp(y))", "q * (y + 1.0 - tl.exp(y))"),
    Mutant("_to_mixture(d, expm1(-a), 1.0 - alpha)", "_to_mixture(d, expm1(-a), alpha)"),
    Mutant("by_q = tl.abs(beta) >= tl.abs(alpha)", "by_q = tl.abs(beta) < tl.abs(alpha)"),
    Mutant("is_far = (tl.abs(total * d) >= 0.5)", "is_far = (tl.abs(total * d) >= INF)"),
    Mutant("q_s * (d + phi(-x) * per_alpha)", "q_s * (d - phi(-x) * per_alpha)"),
    Mutant("tl.where(d >= 0.0, 1.0 + root, -1.0)", "tl.where(d >= 0.0, 1.0, -1.0)"),
    Mutant("ratio * e * e, tl.where(d >= 0.0, ratio, -ratio)", "ratio * e * e, -ratio"),
    Mutant("(1.0 - w) * q * (1.0 - d) - w * p", "(1.0 - w) * q * -d - w * p"),
    Mutant("return no_q | no_p", "return no_q"),
    Mutant("tl.minimum(beta, total), tl.minimum(alpha, total)", "beta, alpha"),
    Mutant("(beta > 0.0) & (beta < 1.0)", "(beta < 1.0)"),
]
NUMERICS = [
    Mutant("x * x * (0.5 - x * tail)", "x * x * (0.5 + x * tail)"),
    Mutant("p * (d - 1.0) + q", "p * d + q"),
    Mutant("_phi_series(-x) + x", "_phi_series(x) + x"),
    Mutant("(w - (u - 1.0)) / u", "0.0 * w"),
    Mutant("tl.where(x == 0.0, 0.0, x)", "x"),
]
HEAD = [
    Mutant("_WAYS = tl.constexpr(16)", "_WAYS = tl.constexpr(8)"),
    Mutant("tl.where(above == 0.0, tl.maximum(count, 1), count)", "count"),
    Mutant("tl.maximum(count, 1), count)", "tl.maximum(count, 1), count + 1)"),
    Mutant("tl.floor((half - above) /", "tl.floor(half /"),
    Mutant("mass += partial_sums(tl.exp(tl.where", "mass = partial_sums(tl.exp(tl.where"),
    Mutant("lowest = tl.minimum(lowest, ", "lowest = tl.minimum(INF, "),
    Mutant("highest = tl.maximum(highest, ", "highest = tl.maximum(-INF, "),
    Mutant(
        "mass += partial_sums(tl.exp(k * (row[i]", "mass = partial_sums(tl.exp(k * (row[i]"
    ),
    Mutant("most = tl.maximum(most, block)", "most = block"),
    Mutant("(row_t + at, at < vocab)\n        most", "(row_t + at, at < vocab - 1)\n        most"),
    Mutant("tl.where(max_t == -INF, 0.0, max_t)", "0.0"),
    Mutant("half = 0.5 * z_t", "half = 0.4 * z_t", occurrence=0),
    Mutant("above = tl.where(more, above, beyond)", "above = tl.where(more, above, 0.0)"),
    Mutant("half = 0.5 * z_t", "half = 0.4 * z_t", occurrence=1),
    Mutant("high + 1).to(tl.int32)", "high).to(tl.int32)"),
    Mutant("above = tl.max(tl.where(more, 0.0, mass), 0)", "above = tl.min(mass, 0)"),
    Mutant("dropped = tl.where(key < 0, (1 << KEY_SHIFT) - 1, 0)", "dropped = 0"),
    Mutant("low = tl.where(half < 1.0, high, low)", "low = low"),
]  # fmt: skip
PARTS = {
    "forward": FORWARD,
    "backward": BACKWARD,
    "kinds": KINDS,
    "head": HEAD,
    "numerics": NUMERICS,
}


def check_kernels(module: ModuleType) -> None:
    """Raises unless the kernels are right; `module` is their file, under its own name."""
    small_blocks(module)
    check_flags(module)
    check_second_sweep(module)
    check_head(module)
    check_everything(module)


def check_functions(module: ModuleType) -> None:
    """Raises unless every kind is right; `module` is a file that the kernels import."""
    del module
    kernels = importlib.import_module("pydistill.kernels.divergence")
    small_blocks(kernels)
    check_kinds(kernels)
    check_second_sweep(kernels)
    check_head(kernels)
    check_flags(kernels)


def check_searches(module: ModuleType) -> None:
    """Raises unless both searches for adaptive_kl's head are right; `module` is their file."""
    del module
    kernels = importlib.import_module("pydistill.kernels.divergence")
    small_blocks(kernels)
    check_head(kernels)


def small_blocks(kernels: Any) -> None:
    """Blocks of 256 fp32 logits, so that short rows have several."""
    kernels.THREADS = kernels.KEPT_THREADS = 64


def compare(
    kernels: ModuleType, inputs: Inputs, options: Options, *, with_stats: bool = False
) -> None:
    """One forward and one backward against the reference in fp64, every other upstream negative."""
    pairs = inputs.student.shape[0] if inputs.student_rows is None else len(inputs.student_rows)
    upstream = torch.linspace(0.5, 1.5, pairs) * (-1) ** torch.arange(pairs)
    if inputs.counted is not None:
        upstream = torch.where(inputs.counted, upstream, 0)
    loss, saved = torch.empty(pairs), torch.empty(pairs, 8)
    stats, grad = torch.empty(pairs * with_stats, 6), torch.empty_like(inputs.student)
    start_and_pairs: tuple[Tensor | None, Tensor | None] = (None, None)
    if inputs.student_rows is not None:
        start_and_pairs = group_by_row(inputs.student_rows, inputs.student.shape[0])
    with strict():
        kernels.divergence_fwd(*inputs, *options, loss, saved, stats)
        kernels.divergence_bwd(
            *inputs[:4], *start_and_pairs, *inputs[5:], saved, upstream, *options, grad
        )
    leaf = inputs.student.double().requires_grad_()
    exact = inputs._replace(student=leaf, teacher=inputs.teacher.double())
    if inputs.params is not None:
        exact = exact._replace(params=inputs.params.double())
    want, want_stats = divergence_reference(exact, options, with_stats=with_stats)
    (want_grad,) = torch.autograd.grad(want, leaf, upstream.double())
    close(loss, want)
    close(grad, want_grad)
    close(stats, want_stats)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6, equal_nan=True)


def check_kinds(kernels: ModuleType) -> None:
    """Every kind on rows far apart, close, and with tokens that one side or both lack."""
    g = torch.Generator().manual_seed(1)
    s, t = 3 * torch.randn(5, 70, generator=g), 3 * torch.randn(5, 70, generator=g)
    t[1] = s[1] + 0.1 * torch.randn(70, generator=g)
    s[2:, -2:], t[2:, -2:] = -torch.inf, -torch.inf
    t[3, 7], s[4, 9] = -torch.inf, -torch.inf
    inputs = Inputs(s, t, None, None, None, None, None)
    for kind, spec in KINDS_BY_NAME.items():
        pairs = [(spec.alpha or 0.3, spec.beta or 0.3)]
        if kind == "alpha_beta":
            pairs += [(1.0, -0.3), (0.6, 0.0), (0.0, 0.6), (0.5, -0.5), (0.0, 0.0)]
        for alpha, beta in pairs:
            compare(kernels, inputs, Options(spec.id, 1.7, alpha, beta, False, 0.0, 0.0, 70))


def check_everything(kernels: ModuleType) -> None:
    """All options at once, two blocks, a smaller shared vocabulary, repeated and unused rows."""
    g = torch.Generator().manual_seed(2)
    s, t = 2 * torch.randn(9, 330, generator=g), 2 * torch.randn(8, 300, generator=g)
    s[1, :260], t[2, :260] = -torch.inf, -torch.inf
    s[3, 280], t[3, 270] = 30.0, 40.0
    s[2, 256:] += 4.0
    s[7, 2], t[6, 2] = 200.0, 20.0
    s[4, 3], t[4, 5], s[5, 299] = torch.nan, torch.inf, torch.inf
    t[5], s[6, :300] = -torch.inf, -torch.inf
    rows_s = torch.tensor([0, 1, 0, 2, 3, 4, 5, 6, 7, 3, 7])
    rows_t = torch.tensor([0, 1, 3, 2, 3, 0, 1, 1, 6, 1, 4])
    labels = torch.randint(261, 300, (11,), generator=g)
    params = 0.4 + torch.rand(11, 3, generator=g)
    counted = torch.arange(11) != 9
    s[8, :300] = torch.nan  # in no pair
    for kind in (0, 1, 3):
        options = Options(kind, 1.0, 0.5, 0.5, True, 0.3, 0.01, 300)
        inputs = Inputs(s, t, rows_s, rows_t, counted, labels, params)
        compare(kernels, inputs, options, with_stats=True)

    once = torch.tensor([7, 0, 2])
    inputs = Inputs(s.clone(), t, once, once, torch.tensor([True, True, False]), labels[:3], None)
    scale = torch.tensor([0.5, -2.0, 0.0])
    guards, loss = Guards(), torch.empty(3)
    spent = inputs._replace(student=guards(inputs.student))
    options = options._replace(kind=1)
    with strict():
        kernels.divergence_overwrite(*spent, scale, *options, loss)
    guards.check()
    leaf = s.double().requires_grad_()
    want, _ = divergence_reference(inputs._replace(student=leaf, teacher=t.double()), options)
    (want_grad,) = torch.autograd.grad(want, leaf, scale.double())
    close(loss, want)
    close(spent.student[once], want_grad[once])
    assert torch.equal(spent.student[[1, 3]], s[[1, 3]])


def check_head(kernels: Any) -> None:
    """adaptive_kl's two searches: rows that are read again, and rows that are kept; their bytes."""
    g = torch.Generator().manual_seed(5)
    s, t = torch.randn(2, 600, generator=g), torch.randn(2, 600, generator=g)
    t[1, 400] = 20.0
    for kept in (0, 1024):
        kernels.KEPT = kept
        check_rows_with_ties(kernels)
        compare(kernels, Inputs(s, t, None, None, None, None, None), _adaptive(600))
        for row, most in ((0, 2 if kept else 10), (1, 2)):  # the first token is more than half
            loss, saved = torch.empty(1), torch.empty(1, 8)
            args = (s[row : row + 1], t[row : row + 1], *(None,) * 5, *_adaptive(600))
            with strict() as meter:
                kernels.divergence_fwd(*args, loss, saved, loss[:0])
            assert meter.bytes["student"].loaded == 2 * 4 * 600
            assert meter.bytes["teacher"].loaded <= most * 4 * 600


def _adaptive(vocab: int) -> Options:
    return Options(KINDS_BY_NAME["adaptive_kl"].id, 1.0, 0.0, 0.0, False, 0.0, 0.0, vocab)


def check_rows_with_ties(kernels: ModuleType) -> None:
    """adaptive_kl where ties cross the head's boundary, where it is exactly half, or one token, or
    among neighbouring numbers, and where it is negative."""
    g = torch.Generator().manual_seed(4)
    s, t = torch.randn(8, 41, generator=g), torch.randn(8, 41, generator=g)
    t[:3] = torch.round(2 * t[:3]) / 4  # zeros of both signs among them
    t[1] -= 5.0
    t[3, :32], t[3, 32:] = 0.0, -torch.inf
    s[3, 32:] = -torch.inf
    t[4, 17] = 9.0
    t[5] = torch.where(torch.arange(41) % 2 == 1, 0.0, -0.0)  # 20 and 21: the half is among both
    t[6] = 1.0 + 2.0**-23 * (torch.arange(41) % 6)
    t[7] = -1.0 - 2.0**-7 * (torch.arange(41) % 6)
    inputs = Inputs(s, t, None, None, None, None, None)
    compare(kernels, inputs, _adaptive(41))
    long = inputs._replace(student=torch.randn(1, 600, generator=g), teacher=torch.zeros(1, 600))
    long.teacher[0, 599] = -0.3
    compare(kernels, long, _adaptive(600))
    half = inputs._replace(student=s.bfloat16().float(), teacher=t.bfloat16())
    compare(kernels, half, _adaptive(41))


def check_flags(kernels: ModuleType) -> None:
    """Pairs with an index, a label or a parameter out of range are NaN and read nothing."""
    guards = Guards()
    s, t = guards(torch.randn(3, 40)), guards(torch.randn(2, 40))
    rows_t = guards(torch.tensor([0, 2, 1, -1, 1]))
    rows_s = guards(torch.tensor([0, 1, 2, 1, 0]))
    labels = guards(torch.tensor([5, 0, 40, 3, 39]))
    for kind, beta, flagged in ((0, 0.5, [1, 2, 3]), (2, 0.0, [0, 1, 2, 3, 4])):
        params = guards(torch.tensor([[1.0, 0.5, 0.5]] * 4 + [[2.0, 0.5, beta]]))
        params[:4, 2] = beta
        options = (kind, 1.0, 0.5, 0.5, False, 0.3, 0.0, 40)
        loss, saved, stats = (guards(torch.empty(5, *n)) for n in ((), (8,), (6,)))
        grad, start = guards(torch.empty(3, 40)), guards(torch.tensor([0, 2, 4, 5]))
        pairs = guards(torch.tensor([0, 4, 1, 3, 2]))
        with strict():
            kernels.divergence_fwd(
                s, t, rows_s, rows_t, None, labels, params, *options, loss, saved, stats
            )
            kernels.divergence_bwd(
                s, t, rows_s, rows_t, start, pairs, labels, params, saved, guards(torch.ones(5)),
                *options, grad,
            )  # fmt: skip
        guards.check()
        expected = torch.zeros(5, dtype=torch.bool)
        expected[flagged] = True
        assert torch.equal(loss.isnan(), expected), loss
        assert torch.equal(stats.isnan().all(-1), expected), stats
        assert torch.equal(grad.isnan().all(-1), torch.tensor([kind == 2, True, True])), grad


def check_second_sweep(kernels: ModuleType) -> None:
    """A close row whose first block misleads is read twice and keeps its digits; others once."""
    g = torch.Generator().manual_seed(3)
    t = torch.randn(3, 600, generator=g)
    s = t + 3e-4 * torch.randn(3, 600, generator=g)
    t[0, :256] -= 30.0
    s[0, :256] = t[0, :256] + 5.0
    s[2] = torch.randn(600, generator=g)
    loss, saved = torch.empty(3), torch.empty(3, 8)
    options = Options(0, 1.0, 0.0, 0.0, False, 0.0, 0.0, 600)
    for kind in (0, 1):
        args = (s, t, None, None, None, None, None)
        options = options._replace(kind=kind)
        with strict() as meter:
            kernels.divergence_fwd(*args, *options, loss, saved, loss[:0])
        assert meter.bytes["student"].loaded == meter.bytes["teacher"].loaded == 4 * 4 * 600
        exact, _ = divergence_reference(Inputs(s.double(), t.double(), *args[2:]), options)
        assert ((loss - exact).abs() <= 1e-5 * exact).all(), (loss, exact)
