"""Mutants of `divergence`'s CUDA kernels, by part, and the check that kills them.

The check runs rows of more than one tile a thread, near-equal and unlike ones, ties, infinities and
flags under cusim with its memory hooks, compares losses, gradients and statistics with the fp64
reference, and counts bytes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydistill.ops.divergence import divergence, divergence_with_stats
from pydistill.reference.divergence import KINDS, SAVED, STATS
from tools.ladder.cuda.divergence import SOURCE, simulated
from tools.ladder.cuda.sim import CudaSim
from tools.ladder.mutation import Mutant

FORWARD = [
    Mutant(
        "!call.counted[index]) return write_constant",
        "call.counted[index]) return write_constant",
    ),
    Mutant("student_row < call.student_count &&", "student_row <= call.student_count &&"),
    Mutant("teacher_row < call.teacher_count;", "teacher_row <= call.teacher_count;"),
    Mutant("call.labels[pair] < call.vocab", "call.labels[pair] <= call.vocab"),
    Mutant("hot = hard && pair.temperature != 1.0f", "hot = false"),
    Mutant("!(seen.z_s > 0.0f && seen.z_t > 0.0f)", "false"),
    Mutant("done = infinite ||", "done = true ||"),
    Mutant("if (infinite) row = {INFINITY, kKind == kForwardKl ? 0.0f : NAN};", ""),
    Mutant("kKind == kForwardKl ? 0.0f : NAN", "0.0f"),
    Mutant("total.head_error / total.error", "total.error / (total.error + total.head_error)"),
    Mutant("pair.params.share = w;", ""),
    Mutant(
        "pair.temperature * pair.temperature : 1.0f;\n  float loss",
        "pair.temperature : 1.0f;\n  float loss",
    ),
    Mutant("(lse - to_float(rows.student[", "(logz_one - to_float(rows.student["),
    Mutant(
        "call.z_loss * lse * lse + (1.0f - call.label_weight) * loss",
        "call.z_loss * lse * lse + loss",
    ),
    Mutant(
        "make_float4(seen.max_s, logz_s, seen.max_t, logz_t)",
        "make_float4(seen.max_s, logz_t, seen.max_t, logz_s)",
    ),
    Mutant("if (copy) rows.aim(copy);", ""),
    Mutant("if (keep) copy = ", "copy = "),
    Mutant("(bytes > PYD_SHARED_LIMIT", "(bytes >= PYD_SHARED_LIMIT"),
    Mutant("(bytes > PYD_SHARED_LIMIT", "(bytes > 1 + PYD_SHARED_LIMIT"),
    Mutant("stream, call, bytes > 0)", "stream, call, true)"),
]
STATISTICS = [
    Mutant("add[2] += fminf(x.p, x.q);", "add[2] += fmaxf(x.p, x.q);"),
    Mutant(
        "-static_cast<float>(rows.start(tile) + i)",
        "static_cast<float>(rows.start(tile) + i)",
    ),
    Mutant("add[0] -= times(x.q, x.log2_q);", "add[0] -= times(x.p, x.log2_q);"),
    Mutant("add[1] -= times(x.p, x.log2_p);", "add[1] -= times(x.p, x.log2_q);"),
    Mutant("sums[i] += add[i];", "sums[i] = add[i];"),
    Mutant("if (t[i] == saved.z)", "if (t[i] == saved.x)"),
    Mutant("block_reduce_each<kBlock>(first, Max{}, scratch);", ""),
    Mutant("fmaf(k, saved.x, saved.y)", "fmaf(1.0f, saved.x, saved.y)"),
    Mutant("fmaf(k, saved.z, saved.w)", "fmaf(k, saved.z, saved.y)"),
    Mutant("kLn2 * sums[0]", "sums[0]"),
    Mutant("|| isnan(saved.x)) {", ") {"),
]
BACKWARD = [
    Mutant("last = call.row_start[row + 1];", "last = first + 1;"),
    Mutant("&& call.grad_rows[pair_at(first)] == 0.0f) ++first;", "&& false) ++first;"),
    Mutant("if (call.grad_rows[pair_at(i)] == 0.0f) continue;", ""),
    Mutant("rows.aim(slope.teacher);", ""),
    Mutant("slope.soft * (pull - x.q * slope.centre)", "slope.soft * pull"),
    Mutant("slope.soft *= 1.0f - call.label_weight;", ""),
    Mutant("if (j == slope.label) gradient -= slope.at_label;", ""),
    Mutant("2.0f * upstream * call.z_loss", "upstream * call.z_loss"),
    Mutant("slope.poisoned = isnan(slope.centre);", ""),
    Mutant("if (j < rows.vocab) sum[e] += gradient;", "sum[e] += gradient;"),
    Mutant("upstream * t2 / pair.temperature", "upstream * t2"),
    Mutant(
        "store_tile(grad, rows.start(tile), columns, wide, sum);",
        "store_tile(grad, rows.start(tile), rows.vocab, wide, sum);",
    ),
    Mutant("is_wide_aligned(grad + rows.origin)", "true"),
    Mutant("if (row < 0 || row >= call.student_count) return;", ""),
]
SWEEPS = [
    Mutant("origin(tile_origin(s))", "origin(0)"),
    Mutant("origin * size) % sizeof(uint4) == 0;", "origin * size) % sizeof(uint4) != 1;"),
    Mutant("seen.z_t *= shrink_t;", ""),
    Mutant("seen.d_sum *= kReverse ? shrink_s : shrink_t;", ""),
    Mutant("if (hot) seen.z_one *= exp2f(kLog2E * (seen.max_s - max_s));", ""),
    Mutant(
        "scale = exp2f(fmaf(k2, kReverse ? max_t - max_s : max_s - max_t, seen.guess));",
        "",
    ),
    Mutant("if (kKl && tile < kBlock)", "if (kKl && true)"),
    Mutant("seen.guess = kReverse ? -guess : guess;", "seen.guess = 0.0f * guess;"),
    Mutant("tile += kBlock;\n  } while", "tile += kBlock + 1;\n  } while"),
    Mutant("taken <= 8.0f * value || a < 1e-11f", "true"),
    Mutant("kReverse ? value + error : -error", "kReverse ? value : 0.0f"),
    Mutant("value > 0.05f * touched", "true"),
    Mutant("t > value || (t == value && j <= last_tie)", "t >= value"),
    Mutant("if (above == 0.0f) ties = fmaxf(ties, 1.0f);", ""),
    Mutant("if (mass[c] > half) {", "if (mass[c] > 0.5f * half) {"),
    Mutant("for (int i = base; before < m; ++i)", "for (int i = base; before < m - 1; ++i)"),
    Mutant("before += here;", ""),
    Mutant("- origin * (teacher_dtype", "+ origin * (teacher_dtype"),
    Mutant(" + static_cast<int64_t>(sizeof(uint4) / sizeof(S)) - 1) * size", ") * size"),
    Mutant("if (kKind == kAdaptiveKl && copy) rows.keep(copy, tile, t);", ""),
    Mutant("keep_as<__half>(copy, tile, t)", "keep_as<__nv_bfloat16>(copy, tile, t)"),
    Mutant("start(tile), vocab, true, t);", "start(tile), vocab - 1, true, t);"),
    Mutant("total.no_p = apart[1] == INFINITY;", "total.no_p = false;"),
    Mutant(
        "const bool absent = t == -INFINITY && s == -INFINITY;",
        "const bool absent = false;",
    ),
]
TERMS = [
    Mutant("-1.0f / 6);", "-1.0f / 5);"),
    Mutant(
        "(weight > 0.0f ? weight * x : 0.0f) - weight + other",
        "weight * x - weight + other",
    ),
    Mutant("d > 0.0f ? -p * e : q * e", "d > 0.0f ? -q * e : p * e"),
    Mutant("d > 0.0f ? 1.0f - share : share", "d > 0.0f ? share : 1.0f - share"),
    Mutant("x.gap == 0.0f ? 0.0f : copysignf(1.0f, -x.gap)", "copysignf(1.0f, -x.gap)"),
    Mutant("return {0.5f * fabsf(x.gap)", "return {fabsf(x.gap)"),
    Mutant("(1.0f - a) * (1.0f - a)", "(1.0f - a)"),
    Mutant("times(x.q, to_q) + a * (1.0f - a)", "times(x.q, to_q) + a"),
    Mutant("larger * (p_larger ? (1.0f + e) * e : -e)", "larger * (p_larger ? e : -e)"),
    Mutant("-(value + 2.0f * x.gap)", "-(value + x.gap)"),
    Mutant("x.d > 0.0f ? e : 1.0f, 1.0f + e", "x.d > 0.0f ? 1.0f : e, 1.0f + e"),
    Mutant("b <= 0.0f || a + b <= 0.0f", "b < 0.0f || a + b < 0.0f"),
    Mutant("return b > 0.0f && b < 1.0f;", "return b > 0.0f && b <= 1.0f;"),
    Mutant(
        "a / s * phi_small(-s * x.d) - phi_small(-step)",
        "phi_small(-s * x.d) - phi_small(-step)",
    ),
    Mutant("term.pull = -above / a;", "term.pull = -above;"),
]
PARTS = {
    "forward": FORWARD,
    "statistics": STATISTICS,
    "backward": BACKWARD,
    "sweeps": SWEEPS,
    "kinds": TERMS,
}
# The file that each part breaks.
FILES = dict.fromkeys(("forward", "statistics", "backward"), "divergence.cu")
FILES |= {"sweeps": "divergence.cuh", "kinds": "divergence-kinds.cuh"}


def build(source: Path) -> CudaSim:
    """The kernels with `source` in place of the file of that name."""
    if source.suffix == ".cu":
        return CudaSim.build(source, hooks=True)
    folder = source.parent / "include"
    copy = folder / "cuda" / source.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(source.read_text())
    return CudaSim.build(SOURCE, hooks=True, include_dirs=[folder])


def check(source: Path) -> None:
    """Raises where the kernels built from `source` are wrong."""
    torch.manual_seed(0)
    sim = build(source)
    for part in (
        check_long_rows,
        check_near_equal_rows,
        check_pairs,
        check_kinds,
        check_head,
        check_infinite_rows,
        check_overwrite,
        check_flagged_rows,
    ):
        part(sim)


def assert_close(name: str, got: Tensor, want: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(
        got.double(),
        want.double(),
        rtol=rtol,
        atol=atol,
        equal_nan=True,
        msg=lambda m: f"{name}: {m}",
    )


def compare(
    sim: CudaSim,
    student: Tensor,
    teacher: Tensor,
    kind: str,
    *,
    rtol: float = 1e-5,
    shared_limit: int | None = None,
    **options: Any,
) -> list[Any]:
    """Loss and gradient against the reference in fp64; gives the calls."""
    options = {"reduction": "none", **options}
    leaf = student.detach().requires_grad_()
    exact = student.detach().double().requires_grad_()
    want = divergence(exact, teacher.double(), kind, impl="reference", **_doubled(options))
    upstream = torch.linspace(0.5, 1.5, want.numel())
    (want_grad,) = torch.autograd.grad(want, exact, upstream.double())
    with simulated(sim, "random:1", shared_limit) as calls:
        loss = divergence(leaf, teacher, kind, impl="cuda", **options)
        (grad,) = torch.autograd.grad(loss, leaf, upstream)
    assert_close(f"{kind} loss", loss, want, rtol, 1e-7 if rtol == 1e-5 else 0.0)
    size = want_grad.nan_to_num().abs().amax().item()
    rounding = 4e-3 if leaf.dtype == torch.bfloat16 else 1e-5
    assert_close(f"{kind} gradient", grad, want_grad, rounding, 2e-6 * size + 1e-12)
    return calls


def _doubled(options: dict[str, Any]) -> dict[str, Any]:
    floats = {k: v for k, v in options.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return {**options, **{k: v.double() for k, v in floats.items()}}


def check_long_rows(sim: CudaSim) -> None:
    """More than one tile a thread, growing maxima, unaligned rows, hard terms."""
    student = torch.randn(3, 5001) + torch.linspace(0, 3, 5001)
    teacher = (torch.randn(3, 5001) - torch.linspace(0, 2, 5001))[:, :4990]
    student[:, 4992:] = torch.nan
    student[1, 4000], teacher[1, 4100] = 20.0, 15.0
    temperature = torch.tensor([1.0, 2.0, 0.7])
    options: dict[str, Any] = {
        "vocab": "min",
        "labels": torch.tensor([4989, 17, 3]),
        "z_loss": 1e-2,
    }
    options |= {"temperature": temperature, "label_weight": 0.4, "scale_t2": True}
    with simulated(sim) as calls:
        got = divergence_with_stats(student, teacher, reduction="none", impl="cuda", **options)
    want = divergence_with_stats(
        student.double(), teacher.double(), reduction="none", impl="reference", **_doubled(options)
    )
    for name, a, b in zip(want._fields, got, want, strict=True):
        assert_close(name, a, b, 1e-5, 1e-6)
    tied = torch.randn(2, 2, 300).clamp(max=2.0)  # [side, row]: equal maxima, the lowest counts
    tied[0, 0, [7, 200]] = tied[1, 0, [7, 100]] = 5.0
    tied[0, 1, [100, 250]] = tied[1, 1, [7, 250]] = 5.0
    tied[1] += 1.0  # each side has a maximum of its own
    with simulated(sim):
        got = divergence_with_stats(tied[0], tied[1], reduction="none", impl="cuda")
    assert got.argmax_agreement.tolist() == [1.0, 0.0]
    calls = compare(sim, student, teacher, "forward_kl", **options)
    read = calls[0].report.buffers["teacher"].bytes_loaded
    assert read == teacher.numel() * 4, f"forward_kl read {read} bytes of the teacher"
    compare(sim, student, teacher, "reverse_kl", **options)
    mask = torch.tensor([True, False, True])
    calls = compare(sim, student, teacher, "jsd", mask=mask, vocab="min")
    read = calls[0].report.buffers["student"].bytes_loaded
    assert read == 2 * 2 * teacher.shape[1] * 4, f"jsd read {read} bytes of the student"
    read = calls[1].report.buffers["student"].bytes_loaded
    assert read == 2 * teacher.shape[1] * 4, f"backward read {read} bytes of the student"
    compare(sim, student[:, :4990], teacher.bfloat16(), "forward_kl", z_loss=0.01)


def misleading_rows(rows: int) -> tuple[Tensor, Tensor]:
    """Near-equal rows whose first tiles are unlike the rest and weigh next to nothing."""
    student = torch.randn(rows, 6000) / 2
    teacher = student + 1e-3 * torch.randn(rows, 6000)
    student[:, :2048] -= 12.0
    teacher[:, :2048] -= 12.0 - torch.linspace(1.0, 0.2, rows)[:, None]
    return student, teacher


def check_near_equal_rows(sim: CudaSim) -> None:
    for kind in ("forward_kl", "reverse_kl"):
        student = torch.randn(3, 4096)
        teacher = student + torch.tensor([1e-4, 1e-3, 1e-2])[:, None] * torch.randn(3, 4096)
        # On a grid on which t - s is exact even for t + 50: then the offset may cost nothing.
        student, teacher = (torch.round(x * 2**17) / 2**17 for x in (student, teacher))
        for offset in (0.0, 50.0):
            calls = compare(sim, student, teacher + offset, kind, rtol=1.1e-5)
            seen = calls[0].report.buffers["student"].bytes_loaded
            assert seen == student.numel() * 4, f"{kind} read {seen} bytes, not each row once"
        compare(sim, *misleading_rows(2), kind, rtol=1.1e-5)


def check_pairs(sim: CudaSim) -> None:
    """Gradients of one row's pairs add up; rows in no pair and uncounted pairs get nothing."""
    student, teacher = torch.randn(4, 77).bfloat16(), torch.randn(3, 77)
    rows = torch.tensor([2, 0, 2, 2, 0, 3])
    at = torch.tensor([1, 0, 2, 0, 2, 1])
    temperature = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.5, 1.0])
    mask = torch.tensor([False, True, True, False, True, True])
    options: dict[str, Any] = {"student_rows": rows, "teacher_rows": at, "mask": mask}
    options["temperature"] = temperature
    for kind in ("forward_kl", "tvd"):
        calls = compare(sim, student, teacher, kind, **options)
        read = calls[-1].report.buffers["teacher"].bytes_loaded
        assert read == 4 * 77 * 4, f"backward read {read} bytes of the teacher, not 4 rows"


def check_kinds(sim: CudaSim) -> None:
    student = torch.randn(3, 301)
    teacher = torch.stack([student[0] + 0.01 * torch.randn(301), *torch.randn(2, 301) * 2])
    for kind in KINDS:
        compare(sim, student, teacher, kind)
        compare(sim, student, teacher, kind, temperature=torch.tensor([0.8, 2.0, 1.0]))
    for alpha, beta in ((0.5, 0.0), (0.0, 0.5), (0.0, 0.0), (0.5, -0.5)):
        compare(sim, student, teacher, "alpha_beta", alpha=alpha, beta=beta)
    for kind in KINDS:
        compare(sim, student, student.clone(), kind)
    # p == q where both have support: no side to lean to.
    s, t = torch.zeros(1, 96), torch.zeros(1, 96)
    s[:, :32], t[:, -32:] = -torch.inf, -torch.inf
    compare(sim, s, t, "tvd")


def check_head(sim: CudaSim) -> None:
    """adaptive_kl with the teacher's row in shared memory and without: ties in token order, a head
    of one token, a head at exactly a half; and how often the row is read."""
    student, teacher = torch.randn(2, 1000), torch.round(torch.randn(2, 1000))
    few = torch.randn(2, 43)
    peaked = torch.zeros(2, 43)
    peaked[:, 7], peaked[1, 23] = 20.0, 20.0
    halves = torch.full((1, 9), -60.0)
    halves[0, [2, 3, 5, 7]] = 0.0  # the first two weigh a half together
    for limit in (0, None):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            compare(sim, student, teacher.to(dtype), "adaptive_kl", shared_limit=limit)
        compare(sim, few, peaked, "adaptive_kl", shared_limit=limit)
        compare(sim, few[:1, :9], halves, "adaptive_kl", shared_limit=limit)
    need = (1000 + 3) * 4  # tiles begin up to three fp32 logits before a row
    for limit, least, most in ((need - 1, 3.0, 12.0), (need, 1.0, 1.0)):
        forward, _ = compare(sim, student, teacher, "adaptive_kl", shared_limit=limit)
        read = forward.report.buffers["teacher"].bytes_loaded / (teacher.numel() * 4)
        assert least <= read <= most, f"read the teacher {read} times with {limit} bytes to keep it"


def check_infinite_rows(sim: CudaSim) -> None:
    student, teacher = torch.randn(4, 67), torch.randn(4, 67)
    student[:, -3:], teacher[:, -3:] = -torch.inf, -torch.inf
    student[1, 2], teacher[2, 4] = -torch.inf, -torch.inf
    student[3, 5], teacher[3, 6] = -torch.inf, -torch.inf
    for kind in KINDS:
        compare(sim, student, teacher, kind)
    compare(sim, student, teacher[:, :61], "reverse_kl", vocab="min")
    apart = torch.randint(-1, 2, (2, 4, 90), generator=torch.Generator().manual_seed(2)) * 1e4
    for kind in ("forward_kl", "tvd", "skew_reverse_kl"):
        compare(sim, torch.randn(4, 90) + apart[0], torch.randn(4, 90) + apart[1], kind)
    for alpha, beta in ((1.0, 0.0), (0.0, 1.0), (0.5, -0.5)):
        compare(sim, student, teacher, "alpha_beta", alpha=alpha, beta=beta)


def check_overwrite(sim: CudaSim) -> None:
    student, teacher = torch.randn(5, 131), torch.randn(5, 131)
    options: dict[str, Any] = {"student_rows": torch.tensor([3, 0, 4]), "reduction": "mean"}
    options["teacher_rows"] = torch.tensor([1, 1, 2])
    exact = student.double().requires_grad_()
    want = divergence(exact, teacher.double(), "jsd", impl="reference", **options)
    (want_grad,) = torch.autograd.grad(want, exact)
    leaf = student.clone().requires_grad_()
    with simulated(sim, "reverse"):
        loss = divergence(
            leaf.view_as(leaf), teacher, "jsd", overwrite_logits=True, impl="cuda", **options
        )
        (grad,) = torch.autograd.grad(loss, leaf)
    assert_close("overwrite loss", loss, want, 1e-5, 1e-7)
    assert_close("overwrite gradient", grad, want_grad, 1e-5, 1e-8)


def check_flagged_rows(sim: CudaSim) -> None:
    """What a GPU call lets through: such rows are NaN, and read nothing foreign."""
    pairs, vocab = 10, 40
    student, teacher = torch.randn(pairs, vocab), torch.randn(pairs - 1, vocab)
    rows_s = torch.arange(pairs)
    rows_t = torch.tensor([0, -1, pairs - 1, 1, 2, 3, 4, 5, 6, 7])
    labels = torch.tensor([0, 1, 2, vocab, -7, 3, 4, 5, 6, 7])
    params = torch.tensor([[1.0, 0.0, 0.5]] * pairs)
    params[5, 0], params[6, 0], params[7, 2] = 0.0, math.inf, 1.0
    student[8, 3], student[9] = math.nan, -math.inf
    bad_student = torch.tensor([0, -1, pairs, 3, 4, 5, 6, 7, 8, 9])
    options = (KINDS["jsd"].id, 1.0, 0.0, 0.5, False, 0.5, 0.0, vocab)
    start, group = torch.arange(pairs + 1), torch.arange(pairs)
    ops = torch.ops.pydistill_cuda
    inputs: tuple[Tensor | None, ...] = (student, teacher, rows_s, rows_t, None, labels, params)
    loss, saved, stats = torch.zeros(pairs), torch.zeros(pairs, SAVED), torch.zeros(pairs, STATS)
    grad = torch.zeros(pairs, vocab)
    with simulated(sim):
        ops.divergence_fwd(*inputs, *options, loss, saved, stats)
        ops.divergence_bwd(
            *inputs[:4], start, group, labels, params, saved, torch.ones(pairs), *options, grad
        )
        assert loss.isfinite()[0] and grad.isfinite()[0].all()
        assert loss[1:].isnan().all() and grad[1:].isnan().all()
        assert saved[1:].isnan().all() and stats[1:].isnan().all() and stats[0].isfinite().all()
        # overwrite_logits names student rows without grouping them
        spent = student.clone()
        inputs = (spent, teacher, bad_student, rows_s.clamp(max=3), None, None, None)
        ops.divergence_overwrite(*inputs, torch.ones(pairs), *options[:5], 0.0, 0.0, vocab, loss)
    assert loss[1:3].isnan().all() and loss[[0, 3, 4, 5, 6, 7]].isfinite().all()
    assert torch.equal(spent[1:3], student[1:3]), "a row that no pair names was written"
