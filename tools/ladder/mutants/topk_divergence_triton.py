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
    Mutant("new_top = tl.maximum(top, tl.max(s, 0))", "new_top = tl.max(s, 0)", 0),
    Mutant("tl.where(token == vocab, ID_OUT_OF_RANGE", "tl.where(token == vocab, ID_TWICE"),
    Mutant("ids.clamp(max=vocab)).int()", "ids.int())"),
    Mutant("z = z * tl.exp(k * (top - shift)) + tl.sum", "z = z + tl.sum"),
    Mutant(
        "tl.where(tokens < vocab, tl.load(log_tail", "tl.where(tokens <= vocab, tl.load(log_tail"
    ),
    Mutant("tokens += tl.sum(present", "tokens += tl.sum((token == token)"),
    Mutant("value = tl.where(valid, value, nan)", "value = value"),
    Mutant("centre = tl.where(value < INF, centre", "centre = tl.where(valid, centre"),
    Mutant("centre += tl.sum(q_h, 0)", "centre = tl.sum(q_h, 0)"),
    Mutant("value += tl.sum(term, 0)", "value = tl.sum(term, 0)"),
    Mutant("scale = log_support.to(tl.float32)", "scale = log_z.to(tl.float32)"),
    Mutant("q_h_t - q_t * centre", "q_h_t"),
    Mutant("q_h_t - q_t * centre) / tail_z.to(tl.float64)", "q_h_t - q_t * centre)"),
    Mutant("tl.where(log_q_t > -INF, (q_h_t", "tl.where(log_q_t == log_q_t, (q_h_t"),
    Mutant("-q_t * centre / tail_z", "q_t * centre / tail_z"),
    Mutant("slope = tl.where(centre == centre, 0.0, nan)", "slope = centre - centre + 1.0"),
    Mutant("(centre - high).to(tl.float32)", "0.0"),
    Mutant("row_loss * temperature * temperature if", "row_loss * temperature if"),
]
CELLS = [
    Mutant("tl.where(q == 0.0, 0.0, -q * d)", "-q * d"),
    Mutant("q_h, term = q - p,", "q_h, term = p - q,"),
    Mutant("tl.where(p == 0.0, 0.0, p * d)", "p * d"),
    Mutant("            term += q_h", "            term += 0.5 * q_h"),
    Mutant("q_h = -p", "q_h = q - p"),
    Mutant("q_h = q + q_h", "q_h = q_h"),
    Mutant("            term -= q - p", "            term += q - p"),
    Mutant("tl.log(beta * p + (1.0 - beta) * q)", "tl.log((1.0 - beta) * p + beta * q)"),
    Mutant("(1.0 - beta) * q * (log_q - log_m)", "q * (log_q - log_m)"),
    Mutant("beta * p * (log_p - log_m)", "p * (log_p - log_m)"),
    Mutant("tl.where(d > 0.0, -0.5, tl.where(d < 0.0, 0.5, 0.0))", "tl.where(d > 0.0, 0.5, -0.5)"),
    Mutant("term = 0.5 * tl.abs(p - q)", "term = tl.abs(p - q)"),
]
BACKWARD = [
    Mutant("+ tl.load(base + 4).to(tl.float64)", ""),
    Mutant("soft = tl.load(upstreams + row) * k", "soft = tl.load(upstreams + row)"),
    Mutant("soft * temperature * temperature if", "soft * temperature if"),
    Mutant("soft * (q_h - q * centre)", "soft * q_h"),
    Mutant("(upstream == 0.0) | (slope == 0.0) |", "(upstream == 0.0) |"),
    Mutant("if (upstream == 0.0) | (slope", "if (slope"),
    Mutant("(centre == centre) | (upstream == 0.0), 0.0,", "(upstream == 0.0), 0.0,"),
    Mutant("factor * tl.exp(k * (s - outside_max))", "factor * tl.exp(s - outside_max)"),
    Mutant("tl.load(base + 1), soft * slope", "tl.load(base), soft * slope"),
    Mutant(
        "if (centre == centre) & (tl.load(upstreams + row) != 0.0):",
        "if centre == centre:",
    ),
    Mutant(
        "token, present = _support(ids + row * slots, slots, columns, begin",
        "token, present = _support(ids + row * slots, slots, columns, 0",
    ),
    Mutant(
        "log_p = load_fp32(log_p + slot, present)",
        "log_p = load_fp32(log_p + slot - begin, present)",
    ),
    Mutant("(token >= 0) & (token < vocab)", "token >= 0"),
]
PARTS = {"forward": FORWARD, "cells": CELLS, "backward": BACKWARD}


def small_blocks(kernels: ModuleType) -> None:
    """Blocks of 256 fp32 logits and 64 slots, so that short rows have several."""
    kernels.THREADS, kernels.SLOTS = 64, 64  # type: ignore[attr-defined]


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
    every = common.rows()
    tensors = {name: x[[0, 3, 6, 7]] for name, x in every._asdict().items() if x is not None}
    inputs = every._replace(**tensors)
    count, upstream = 4, torch.tensor([1.0, 1.0, 0.0, 1.0])  # one row is not counted
    live = int(upstream.sum())
    present = int((inputs.ids >= 0)[upstream > 0].sum())
    row = 4 * common.VOCAB
    for tail, reads in (("bucket", 1), ("renormalize", 0)):
        options = common.options_of("forward_kl", tail)
        loss, saved = torch.empty(count), torch.empty(count, 7)
        grad = torch.empty_like(inputs.student)
        with strict() as forward:
            kernels.topk_divergence_fwd(*inputs, *options, loss, saved)
        with strict() as backward:
            kernels.topk_divergence_bwd(*inputs[:4], None, saved, upstream, *options, grad)
        assert loss.isfinite().all()
        assert forward.bytes["student"].loaded == live * row + 2 * 4 * present
        assert backward.bytes["student"].loaded == reads * live * row + 4 * present
        assert backward.bytes["grad"].stored == count * row + 4 * present
