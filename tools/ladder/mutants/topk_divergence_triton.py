"""Mutants of `topk_divergence`'s Triton kernels, and the check that kills them.

The check compares launches in the strict interpreter with the reference, on the rows of
`topk_divergence_check`, and counts bytes: a kernel that reads too much is broken as well.
"""

from __future__ import annotations

from types import ModuleType

import torch

from tools.ladder.interpreter import strict
from tools.ladder.mutants import topk_divergence_check as common
from tools.ladder.mutation import Mutant

FORWARD = [
    Mutant("if tl.load(counted + row) == 0:", "if tl.load(counted + row) == 7:", 0),
    Mutant("if tl.load(counted + row) == 0:", "if tl.load(counted + row) == 7:", 1),
    Mutant("s = tl.where(at == token, -INF, s)", "s = s"),
    Mutant("end = tl.minimum(start + BLOCK, vocab)", "end = start + BLOCK"),
    Mutant("twice = twice | (following == token)", "twice = following == token"),
    Mutant("z = z * tl.exp(k * (top - shift)) + partial_sums", "z = z + partial_sums"),
    Mutant("new_top = tl.maximum(top, tl.max(s, 0))", "new_top = tl.max(s, 0)"),
    Mutant("tl.where(token == vocab, ID_OUT_OF_RANGE", "tl.where(token == vocab, ID_TWICE"),
    Mutant("ids.clamp(max=vocab)).int()", "ids.int())"),
    Mutant("tl.max(tl.where(s == most, log_p_here, -INF), 0)", "tl.max(log_p_here, 0)"),
    Mutant("tl.where(most > top, its_log_p, top_log_p)", "its_log_p"),
    Mutant("z = z * tl.exp(k * (top - shift)) + tl.sum", "z = z + tl.sum"),
    Mutant("tl.where(q_top >= 0.5, h_top,", "tl.where(q_top >= 5.0, h_top,"),
    Mutant("tl.where(q_t >= 0.5, h_t, 0.0)", "0.0"),
    Mutant("rest = q_h_t - q_t * about", "rest = q_h_t"),
    Mutant("rest = -tl.exp(log_outside - log_z) * about", "rest = 0.0 * about"),
    Mutant(
        "tl.where(tokens < vocab, tl.load(log_tail", "tl.where(tokens <= vocab, tl.load(log_tail"
    ),
    Mutant("undefined = undefined | (", "undefined = undefined & ("),
    Mutant("infinite = infinite | (", "infinite = infinite & ("),
    Mutant("scale = log_support.to(tl.float32)", "scale = log_z.to(tl.float32)"),
    Mutant("tl.where(log_q_t > -INF, off + h_t, off)", "off"),
    Mutant("(centre - high).to(tl.float32)", "0.0"),
    Mutant("tl.where(sound & (infinite == 0), centre, nan)", "tl.where(sound, centre, nan)"),
    Mutant("row_loss * temperature * temperature if", "row_loss * temperature if"),
]
CELLS = [
    Mutant("tl.minimum(tl.maximum(d, -FAR), FAR)", "d"),
    Mutant("h, q_h = 1.0 - tl.exp(d), q - p", "h, q_h = 1.0 - tl.exp(d), p - q"),
    Mutant("h, q_h = 1.0 - tl.exp(d), q - p", "h, q_h = -tl.exp(d), q - p"),
    Mutant("term = p * d + q_h", "term = p * d"),
    Mutant("h, q_h, term = h - 1.0, -p, p * d", "h, q_h, term = h - 1.0, -p, p * d - p + q"),
    Mutant("h, q_h = -d, -q * d", "h, q_h = d, -q * d"),
    Mutant("term = q_h - (q - p)", "term = q_h + (q - p)"),
    Mutant("h, q_h, term = 1.0 - d, q + q_h, q_h", "h, q_h, term = 1.0 - d, q_h, q_h"),
    Mutant("tl.log(beta * p + (1.0 - beta) * q)", "tl.log((1.0 - beta) * p + beta * q)"),
    Mutant("q_h = (1.0 - beta) * q * to_q", "q_h = q * to_q"),
    Mutant("term = beta * p * to_p + q_h", "term = p * to_p + q_h"),
    Mutant("tl.where(d > 0.0, -0.5, tl.where(d < 0.0, 0.5, 0.0))", "tl.where(d > 0.0, 0.5, -0.5)"),
    Mutant("term = 0.5 * tl.abs(p - q)", "term = tl.abs(p - q)"),
]
BACKWARD = [
    Mutant("+ tl.load(base + 4).to(tl.float64)", ""),
    Mutant("soft = tl.load(upstreams + row) * k", "soft = tl.load(upstreams + row)"),
    Mutant("soft * temperature * temperature if", "soft * temperature if"),
    Mutant("soft * (q_h - q * centre)", "soft * q_h"),
    Mutant("(upstream == 0.0) | (off == 0.0) |", "(upstream == 0.0) |"),
    Mutant("if (upstream == 0.0) | (off", "if (off"),
    Mutant("(centre == centre) | (upstream == 0.0), 0.0,", "(upstream == 0.0), 0.0,"),
    Mutant("factor * tl.exp(k * (s - max_s))", "factor * tl.exp(s - max_s)"),
    Mutant("soft * off * tl.exp(-tl.load(base + 1))", "soft * off"),
    Mutant("present = (token >= 0) & (token < columns)", "present = slot < slots"),
    Mutant(
        "if (centre == centre) & (tl.load(upstreams + row) != 0.0):",
        "if centre == centre:",
    ),
    Mutant(
        "slot = begin + tl.arange(0, SLOTS)\n            token",
        "slot = tl.arange(0, SLOTS)\n            token",
    ),
]
PARTS = {"forward": FORWARD, "cells": CELLS, "backward": BACKWARD}


def small_blocks(kernels: ModuleType) -> None:
    """Blocks of 256 fp32 logits and 32 slots, so that short rows have several."""
    kernels.THREADS, kernels.SLOTS = 64, 32  # type: ignore[attr-defined]


def check_kernels(kernels: ModuleType) -> None:
    """Raises unless the kernels are right."""
    small_blocks(kernels)
    with strict():
        common.check_flags(kernels)
        common.check_more(kernels)
        common.check_values(kernels)
    check_bytes(kernels)


def check_bytes(kernels: ModuleType) -> None:
    """Every logit once, the support's K twice more forward and once more backward."""
    inputs = common.rows()._replace(counted=torch.arange(common.ROWS) % 2 == 0)
    upstream = inputs.counted.float() if inputs.counted is not None else torch.ones(0)
    live = int(upstream.sum())
    present = int((inputs.ids >= 0)[upstream > 0].sum())
    row, total = 4 * common.VOCAB, 4 * common.VOCAB * common.ROWS
    for tail, reads in (("bucket", 1), ("renormalize", 0)):
        options = common.options_of("forward_kl", tail)
        loss, saved = torch.empty(common.ROWS), torch.empty(common.ROWS, 7)
        grad = torch.empty_like(inputs.student)
        with strict() as forward:
            kernels.topk_divergence_fwd(*inputs, *options, loss, saved)
        with strict() as backward:
            kernels.topk_divergence_bwd(*inputs[:4], None, saved, upstream, *options, grad)
        finite = int((upstream * loss).isfinite().sum()) - (common.ROWS - live)
        gone = int((inputs.ids >= 0)[(upstream > 0) & ~loss.isfinite()].sum())
        assert forward.bytes["student"].loaded == live * row + 2 * 4 * present
        read = reads * finite * row + 4 * (present - gone)
        assert backward.bytes["student"].loaded == read, (backward.bytes["student"].loaded, read)
        assert backward.bytes["grad"].stored == total + 4 * (present - gone)
