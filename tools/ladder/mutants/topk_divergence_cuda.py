"""Mutants of `topk_divergence`'s CUDA kernels, by part, and the check that kills them.

The check runs the rows of `topk_divergence_check` under cusim with its memory hooks, compares with
the fp64 reference, and counts bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pydistill.reference.topk_divergence import SAVED, Inputs
from tools.ladder.cuda.sim import CudaSim
from tools.ladder.cuda.topk_divergence import simulated
from tools.ladder.mutants import topk_divergence_check as common
from tools.ladder.mutation import Mutant

OUTSIDE = [
    Mutant("if (call.counted && !call.counted[index]) return;", ""),
    Mutant("if (mine >> i & 1u) s[i] = -INFINITY;", ""),
    Mutant("z *= exp2f(row.k2 * (max - most));", ""),
    Mutant("__syncthreads();  // the last stretch may still be in use", ""),
    Mutant("bits[i] = 0;\n  __syncthreads();", "bits[i] = 0;"),
    Mutant("(row.vocab - first + 31) / 32", "(row.vocab - first) / 32"),
    Mutant(
        "if (atomicOr(bits + at / 32, bit) & bit) wrong",
        "if (!atomicOr(bits + at / 32, bit)) wrong",
    ),
    Mutant("if (id >= row.vocab) wrong |= kIdOutOfRange;", ""),
    Mutant(
        "static_cast<int>(id) - first, kStretch)) continue;",
        "static_cast<int>(id), kStretch)) continue;",
    ),
    Mutant("(8 * (tile % 4)) & 0xffu", "(8 * (tile % 2)) & 0xffu"),
    Mutant("const double z = mine.z * exp2f(k2 * (mine.max - most));", "const double z = mine.z;"),
    Mutant("out_of_range ? kIdOutOfRange : (twice", "twice ? kIdTwice : (twice"),
    Mutant("row, first, bits);\n    const int end", "row, origin, bits);\n    const int end", 0),
]
CELLS = [
    Mutant("!call.counted[index]) return write_constant", "false) return write_constant"),
    Mutant("if (status != kSound ||", "if ("),
    Mutant("mine.z *= exp2f(row.k2 * (mine.max - s));", ""),
    Mutant("only ? log_support : log_z", "log_z"),
    Mutant("&& tokens < row.vocab)", "&& tokens <= row.vocab)"),
    Mutant("if (id < 0) continue;\n    ++present;", "++present;\n    if (id < 0) continue;"),
    Mutant("sums[1] += cell.q_h;", "sums[1] += cell.q;"),
    Mutant("centre += tail.q_h;", ""),
    Mutant("tail.q_h - tail.q * centre", "tail.q_h"),
    Mutant("slope = outside.z > 0.0 ? slope / outside.z : 0.0;", "slope /= outside.z;"),
    Mutant("if (truncated) tail.q =", "if (false) tail.q ="),
    Mutant("if (!(value < INFINITY)) centre = NAN;", "if (isnan(value)) centre = NAN;"),
    Mutant("static_cast<float>(centre - high)", "0.0f"),
    Mutant("p == 0.0 ? 0.0 : p * d", "p * d"),
    Mutant("q == 0.0 ? 0.0 : -q * d", "-q * d"),
    Mutant("both > 0.0 && both < INFINITY &&", ""),
    Mutant("return {term, q, -p};", "return {term, q, q - p};"),
    Mutant("return {term, q, q + term};", "return {term, q, term};"),
    Mutant("return {term - (q - p), q, term};", "return {term - (q - p), q, -term};"),
    Mutant("beta * p + (1.0 - beta) * q)", "(1.0 - beta) * p + beta * q)"),
    Mutant("d > 0.0 ? -0.5 : (d < 0.0 ? 0.5 : 0.0)", "d > 0.0 ? 0.5 : -0.5"),
    Mutant("? row.temperature * row.temperature : 1.0f;", "? row.temperature : 1.0f;", 0),
]
BACKWARD = [
    Mutant("const bool is_read = !constant && slope != 0.0f;", "const bool is_read = !constant;"),
    Mutant("upstream == 0.0f || isnan(saved[kCentre]);", "isnan(saved[kCentre]);"),
    Mutant("if (constant && upstream != 0.0f) factor = NAN;", ""),
    Mutant("upstream * t2 / row.temperature", "upstream * t2"),
    Mutant("(s[i] - outside_max)) : factor", "(s[i] - max_s)) : factor"),
    Mutant("exp2f(row.k2 * (s[i] - outside", "exp2f((s[i] - outside"),
    Mutant("is_wide_aligned(grad + origin)", "true"),
    Mutant("&& !(mine >> i & 1u))", "&& true)"),
    Mutant("if (mine == 0u) {", "if (true) {"),
    Mutant("__syncthreads();  // the sweep has read these logits too", ""),
    Mutant("+ saved[kCentreLow];", "+ 0.0;"),
    Mutant("cell.q_h - cell.q * centre", "cell.q_h"),
    Mutant("if (constant) return;", ""),
]
SHORT_STRETCHES = ["PYD_TOPK_WORDS=9"]  # 288 tokens: the rows have three
PARTS = {"outside": OUTSIDE, "cells": CELLS, "backward": BACKWARD}


def check(source: Path) -> None:
    """Raises unless the kernels in `source` are right, on rows of one stretch and of several."""
    check_all(CudaSim.build(source, hooks=True, defines=SHORT_STRETCHES))


def check_all(sim: CudaSim, order: str = "forward") -> None:
    ops = torch.ops.pydistill_cuda
    with simulated(sim, order):
        common.check_flags(ops)
        common.check_more(ops)
        check_in_place(ops)
        common.check_values(ops)
    check_bytes(sim)


def check_in_place(ops: Any) -> None:
    """Rows that begin anywhere, and a gradient that lies otherwise than its row."""
    inputs = common.rows()
    wide = torch.zeros(common.ROWS, common.VOCAB + 3)
    wide[:, 1:-2] = inputs.student
    options = common.options_of("jsd", "renormalize")
    inputs = inputs._replace(student=wide[:, 1:-2], log_tail=None)
    want, want_grad = common.wanted(inputs, options, common.UPSTREAM)
    grad = torch.zeros(common.ROWS, common.VOCAB + 3)[:, 2:-1]
    loss, saved = torch.empty(common.ROWS), torch.empty(common.ROWS, SAVED)
    ops.topk_divergence_fwd(*inputs, *options, loss, saved)
    ops.topk_divergence_bwd(*inputs[:4], None, saved, common.UPSTREAM, *options, grad)
    common.compare_gradients(grad, want_grad, inputs.ids, common.UPSTREAM)
    ops.topk_divergence_overwrite(*inputs, common.UPSTREAM, *options, loss, saved)
    common.close(loss, want)
    common.compare_gradients(inputs.student, want_grad, inputs.ids, common.UPSTREAM)


def check_bytes(sim: CudaSim) -> None:
    """Every logit once, the support's twice more forward and once more backward; every element of
    the gradient written once."""
    rows, vocab, slots = 3, 512, 16
    log_p, ids = torch.log_softmax(torch.randn(rows, vocab), 1).topk(slots)
    student, counted = torch.randn(rows, vocab), torch.tensor([True, False, True])
    tail, loss = torch.full((rows,), -1.0), torch.empty(rows)
    saved, grad = torch.empty(rows, SAVED), torch.empty(rows, vocab)
    ops = torch.ops.pydistill_cuda
    for mode, reads in (("bucket", 1), ("renormalize", 0)):
        inputs = Inputs(student, ids, log_p, tail if reads else None, counted, None)
        options = common.options_of("forward_kl", mode)
        with simulated(sim) as calls:
            ops.topk_divergence_fwd(*inputs, *options, loss, saved)
            ops.topk_divergence_bwd(
                *inputs[:4], None, saved, counted.float(), *options, grad
            )  # fmt: skip
        forward, backward = (call.report.buffers for call in calls)
        assert forward["student"].bytes_moved == 2 * 4 * (vocab + 2 * slots)
        assert backward["student"].bytes_moved == 2 * 4 * (reads * vocab + slots)
        assert backward["grad"].bytes_moved == rows * 4 * vocab
