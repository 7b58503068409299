"""What kills the mutants of `topk_divergence`'s GPU kernels: rows made so that every line matters.

The checks take the three kernels by their schemas, whoever runs them, and compare with the fp64
reference. Gradients are compared on the support and outside it apart: on a peaked row one of the
two is all but nothing beside the other.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pydistill.reference.divergence import KINDS
from pydistill.reference.topk_divergence import (
    ID_OUT_OF_RANGE,
    ID_TWICE,
    SAVED,
    STATUS,
    TAILS,
    Inputs,
    Options,
    topk_divergence_reference,
)

ROWS, VOCAB, SLOTS = 9, 600, 70  # more than a program takes at a time
COUNTED = torch.arange(ROWS) != 6
UPSTREAM = torch.tensor([1.0, -2.0, 0.5, 1.0, 1.0, -1.0, 0.0, 1.5, 0.0])


def rows() -> Inputs:
    """Nine rows: one token with most of the mass, and rows peaked in the support and outside it;
    neighbours as support; -inf; a close teacher; one that is not counted; maxima early and late;
    upstream 0.
    """
    g = torch.Generator().manual_seed(3)
    s, t = torch.randn(ROWS, VOCAB, generator=g), 2 * torch.randn(ROWS, VOCAB, generator=g)
    ids = t.topk(SLOTS).indices[:, torch.randperm(SLOTS, generator=g)]
    t[3, 220:290] += 9.0
    ids[3] = torch.arange(220, 290).flip(0)
    ids[1, 0] = next(j for j in range(VOCAB) if j not in ids[1])  # the teacher finds it unlikely
    s[0, ids[0, SLOTS - 2]] = 8.0
    s[1, ids[1, 0]] = 25.0
    s[2, next(j for j in range(550, VOCAB) if j not in ids[2])] = 26.0
    s[4, -20:] = -torch.inf
    s[5] = t[5] + 1e-3 * torch.randn(VOCAB, generator=g)
    s[6], s[8, 7] = torch.nan, torch.nan
    elsewhere = [j for j in range(VOCAB) if j not in ids[7]]
    s[7, elsewhere[:2] + elsewhere[-2:]] += 95.0
    log_p = torch.log_softmax(t.double(), 1)
    ids[2:5, 5:9] = -1
    log_tail = torch.logsumexp(log_p.scatter(1, ids.clamp(min=0), -torch.inf), 1)
    log_tail += 0.05  # cells that do not add up to 1
    log_p = torch.where(
        ids >= 0, log_p.gather(1, ids.clamp(min=0)), torch.nan
    )  # unread where empty
    return Inputs(s, ids, log_p.float(), log_tail.float(), COUNTED, None)


def options_of(kind: str, tail: str, **changes: Any) -> Options:
    return Options(KINDS[kind].id, TAILS[tail], 1.0, 0.5, False)._replace(**changes)


def run(ops: Any, inputs: Inputs, options: Options, upstream: Tensor) -> tuple[Tensor, ...]:
    """Loss, saved and gradient of one forward and one backward."""
    count = len(inputs.student)
    loss, saved = torch.empty(count), torch.empty(count, SAVED)
    grad = torch.empty_like(inputs.student)
    ops.topk_divergence_fwd(*inputs, *options, loss, saved)
    ops.topk_divergence_bwd(*inputs[:4], inputs.params, saved, upstream, *options, grad)
    return loss, saved, grad


def wanted(inputs: Inputs, options: Options, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the reference in fp64."""
    exact = inputs._replace(
        **{
            name: tensor.double()
            for name, tensor in inputs._asdict().items()
            if tensor is not None and tensor.is_floating_point()
        }
    )
    leaf = exact.student.requires_grad_()
    loss, _ = topk_divergence_reference(exact, options)
    (grad,) = torch.autograd.grad(loss, leaf, upstream.double())
    return loss.detach(), grad


def compare(ops: Any, inputs: Inputs, options: Options, upstream: Tensor) -> None:
    loss, _, grad = run(ops, inputs, options, upstream)
    want, want_grad = wanted(inputs, options, upstream)
    close(loss, want)
    compare_gradients(grad, want_grad, inputs.ids, upstream)


def compare_gradients(grad: Tensor, want: Tensor, ids: Tensor, upstream: Tensor) -> None:
    """To 2e-5 of their largest element on the support and outside it, or 1e-6 in all; rows that
    are to be peaked get no such allowance. 0 where the upstream is, whatever the row."""
    width = want.shape[1]
    support = torch.zeros(len(ids), width + 1).scatter(1, ids.where(ids >= 0, width), 1.0)
    assert not grad[upstream == 0].any()
    want = torch.where(upstream[:, None] == 0, 0, want)
    assert torch.equal(grad.isnan(), want.isnan()), "NaN in other rows"
    for part in (support[:, :width] > 0, support[:, :width] == 0):
        a, b = torch.where(part, grad.double(), 0).nan_to_num(), torch.where(part, want, 0)
        b = b.nan_to_num()
        allowed = 2e-5 * b.abs().amax(1)
        peaked = torch.arange(len(ids)).eq(1) | torch.arange(len(ids)).eq(2)
        allowed += torch.where(peaked & (len(ids) == ROWS), 1e-13, 1e-6)
        error = (a - b).abs().amax(1)
        assert (error <= allowed).all(), (error.tolist(), allowed.tolist())


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6, equal_nan=True)


def check_values(ops: Any) -> None:
    inputs = rows()
    for kind, tail in (
        ("forward_kl", "bucket"),
        ("forward_kl", "truncate"),
        ("reverse_kl", "bucket"),
        ("reverse_kl", "truncate"),
        ("jsd", "bucket"),
        ("tvd", "renormalize"),
    ):
        changes = {"temperature": 0.8, "scale_t2": True} if kind == "reverse_kl" else {}
        options = options_of(kind, tail, beta=0.3, **changes)
        given = inputs if tail == "bucket" else inputs._replace(log_tail=None)
        compare(ops, given, options, UPSTREAM)


def check_more(ops: Any) -> None:
    """Infinite and undefined rows, students who all but leave the tail out and who do, the whole
    vocabulary, bf16, per-row parameters, in place."""
    g = torch.Generator().manual_seed(4)
    s, t = torch.randn(8, 40, generator=g), torch.randn(8, 40, generator=g)
    log_p, ids = torch.log_softmax(t, 1).topk(8)
    s[0, ids[0, 2]] = -torch.inf
    s[1, ids[1, 0]], s[2, 39 if 39 not in ids[2] else 38] = torch.inf, torch.inf
    log_p[3, 1] = torch.nan
    s[4] = -torch.inf
    s[6, ids[6, 0]] = 900.0
    s[7] = torch.full((40,), -torch.inf).scatter(0, ids[7], s[7, ids[7]])
    tail = torch.log1p(-log_p.exp().sum(1))
    upstream = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0])
    inputs = Inputs(s, ids, log_p, tail, None, None)
    for kind in ("forward_kl", "jsd"):
        compare(ops, inputs, options_of(kind, "bucket"), upstream)
    upstream[0] = 0.0  # an infinite row that the sum leaves out
    compare(ops, inputs, options_of("forward_kl", "bucket"), upstream)
    none = log_p.clone()
    none[5, 0] = -torch.inf
    for kind in ("forward_kl", "reverse_kl"):
        compare(ops, inputs._replace(log_p=none), options_of(kind, "bucket"), upstream)

    log_p, ids = torch.log_softmax(t[:6], 1).topk(40)
    params = torch.stack([torch.linspace(0.5, 2, 6), torch.linspace(0.2, 0.8, 6)], 1)
    half = torch.randn(6, 40, generator=g).bfloat16()
    ids[5, 3] = -1  # all but one token
    whole = Inputs(half, ids, log_p, torch.full((6,), -20.0), None, None)
    upstream = torch.linspace(1, 2, 6)
    options = options_of("forward_kl", "bucket", scale_t2=True, temperature=1.5)
    for given, choice in (
        (whole, options),
        (whole._replace(log_tail=None, params=params), options_of("jsd", "renormalize")),
    ):
        want, want_grad = wanted(given, choice, upstream)
        spent = given._replace(student=given.student.clone())
        loss, saved = torch.empty(6), torch.empty(6, SAVED)
        ops.topk_divergence_overwrite(*spent, upstream, *choice, loss, saved)
        close(loss, want)
        torch.testing.assert_close(spent.student.double(), want_grad, rtol=5e-3, atol=1e-6)


def check_flags(ops: Any) -> None:
    """Ids out of range or twice, and parameters out of range, are NaN and nothing else; their
    status says why."""
    ids = torch.tensor([[0, 1, 2], [3, 4, 3], [5, 300, 1], [6, 7, 8], [0, 2, 299], [0, 9, 1]])
    ids[5, 1] = 2**40
    count = len(ids)
    student, log_p = torch.randn(count, 300), torch.full((count, 3), -2.0)
    params = torch.tensor([[1.0, 0.5]] * count)
    params[3, 0], params[4, 0] = -1.0, 2.0
    tail = torch.full((count,), -1.0)
    inputs = Inputs(student, ids, log_p, tail, None, params)
    options = options_of("jsd", "bucket")
    loss, saved, grad = run(ops, inputs, options, torch.ones(count))
    flagged = [False, True, True, True, False, True]
    assert loss.isnan().tolist() == flagged, loss
    assert grad.isnan().all(1).tolist() == grad.isnan().any(1).tolist() == flagged
    want = [0, ID_TWICE, ID_OUT_OF_RANGE, 0, 0, ID_OUT_OF_RANGE]
    assert saved[:, STATUS].tolist() == want, saved[:, STATUS]
    for beta in (0.0, 1.0, math.nan):
        params[0, 1] = beta
        assert run(ops, inputs, options, torch.ones(count))[0][0].isnan()


def check_tiles(ops: Any, bounds: tuple[int, ...] = (0, 170, 171, 431, VOCAB)) -> None:
    """Backward over tiles of columns, ids shifted and negative elsewhere, is backward's own."""
    inputs = rows()
    for kind, tail in (("reverse_kl", "bucket"), ("forward_kl", "truncate")):
        options = options_of(kind, tail, temperature=0.8)
        _, saved, whole = run(ops, inputs, options, UPSTREAM)
        tiles = torch.full_like(whole, math.nan)
        for begin, end in pairwise(bounds):
            there = (inputs.ids >= begin) & (inputs.ids < end)
            shifted = torch.where(there, inputs.ids - begin, -1)
            ops.topk_divergence_bwd(
                inputs.student[:, begin:end], shifted, inputs.log_p, inputs.log_tail, None, saved,
                UPSTREAM, *options, tiles[:, begin:end],
            )  # fmt: skip
        torch.testing.assert_close(tiles, whole, rtol=1e-6, atol=0, equal_nan=True)
