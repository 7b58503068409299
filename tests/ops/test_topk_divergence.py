"""`topk_divergence`: the formulas written out once more, the table of cases, and what is peculiar
to a teacher known on K tokens."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydistill import _registry, divergence, topk_divergence, topk_divergence_jvp
from pydistill.reference.topk_divergence import SAVED, STATUS, TAILS, TOPK_KINDS
from pydistill.testing import Case, load

OP = "topk_divergence"
TABLE = [case for case in load(OP) if "bench" not in case.marks]
close = torch.testing.assert_close
PAIRS = [
    (kind, tail) for kind in TOPK_KINDS for tail in TAILS if (kind, tail) != ("reverse_kl", "zero")
]


def teacher(rows: int, v: int, k: int, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and ids of the top k in random order, and of the tail; fp64."""
    log_p = torch.log_softmax(scale * torch.randn(rows, v, dtype=torch.float64), -1)
    values, ids = log_p.topk(k)
    order = torch.randperm(k)
    tail = (
        torch.logsumexp(log_p.scatter(1, ids, -math.inf), 1)
        if k < v
        else torch.full((rows,), -math.inf, dtype=torch.float64)
    )
    return values[:, order], ids[:, order], tail


def plain(kind: str, tail: str, logits: Tensor, log_p: Tensor, ids: Tensor, beta: float) -> Tensor:
    """D of one row, cell by cell, from probabilities."""
    p, q = log_p.exp(), torch.softmax(logits, -1)[ids]
    if tail in ("renormalize", "zero"):
        p = p / p.sum()
    if tail == "renormalize":
        q = q / q.sum()
    if tail in ("bucket", "zero"):
        p, q = (torch.cat([x, 1 - x.sum()[None]]) for x in (p, q))
    m = beta * p + (1 - beta) * q
    xlogy = torch.special.xlogy
    return {
        "forward_kl": lambda: (xlogy(p, p) - xlogy(p, q)).sum(),
        "reverse_kl": lambda: (xlogy(q, q) - xlogy(q, p)).sum(),
        "jsd": lambda: (
            beta * (xlogy(p, p) - xlogy(p, m)) + (1 - beta) * (xlogy(q, q) - xlogy(q, m))
        ).sum(),
        "tvd": lambda: (p - q).abs().sum() / 2,
    }[kind]()


@pytest.mark.parametrize(("kind", "tail"), PAIRS)
def test_reference_against_the_formulas(kind: str, tail: str) -> None:
    student = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    log_p, ids, _ = teacher(4, 12, 5)
    beta = 0.3 if kind == "jsd" else None
    options: dict[str, Any] = {"beta": beta, "reduction": "none", "impl": "reference"}
    got = topk_divergence(student, log_p, ids, kind, tail=tail, **options)
    want = torch.stack(
        [plain(kind, tail, student[i], log_p[i], ids[i], beta or 0.5) for i in range(4)]
    )
    close(got, want, rtol=1e-9, atol=1e-12)
    upstream = torch.randn(4, dtype=torch.float64)
    close(
        *(torch.autograd.grad(x, student, upstream)[0] for x in (got, want)), rtol=1e-8, atol=1e-11
    )


@pytest.mark.parametrize("case", TABLE, ids=repr)
def test_case(case: Case, check_everywhere: Callable[[Case], None]) -> None:
    check_everywhere(case)


def test_table_covers_what_it_should() -> None:
    assert len({case.id for case in load(OP)}) == len(load(OP))
    for kind, tail in PAIRS:
        of_pair = [c for c in TABLE if c.kind == kind and c.options["tail"] == tail]
        assert {1, 31, 1000, 3000} <= {case.shape[1] for case in of_pair}
        assert {dtype for case in of_pair for dtype in case.dtypes} == {
            torch.float32,
            torch.bfloat16,
            torch.float16,
        }
        labelled = [c for c in of_pair if c.options.get("label_weight") and c.options.get("z_loss")]
        assert {torch.float32, torch.bfloat16} <= {c.dtypes[0] for c in labelled}


@pytest.mark.parametrize("kind", TOPK_KINDS)
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "truncate"])
def test_whole_vocabulary_is_the_dense_divergence(kind: str, tail: str, impl: str) -> None:
    student = (2 * torch.randn(5, 700)).requires_grad_()
    logits = 2 * torch.randn(5, 700)
    log_p, ids = torch.log_softmax(logits, -1).topk(700)
    options: dict[str, Any] = {"reduction": "none", "impl": impl}
    if tail == "bucket":
        options["tail_logprob"] = torch.full((5,), -20.0)  # of no token at all
    got = topk_divergence(student, log_p, ids, kind, tail=tail, **options)
    want = divergence(student, logits, kind, reduction="none", impl=impl)
    close(got, want, rtol=1e-5, atol=1e-6)
    upstream = torch.rand(5)
    close(
        *(torch.autograd.grad(x, student, upstream)[0] for x in (got, want)), rtol=1e-4, atol=1e-6
    )


def test_bucket_bounds_the_full_kl_from_below(impl: str) -> None:
    student = 2 * torch.randn(64, 200)
    log_p, ids, _ = teacher(64, 200, 200)
    full = divergence(
        student, torch.zeros(64, 200).scatter(1, ids, log_p.float()), reduction="none", impl=impl
    )
    before = torch.zeros(64)
    for k in (1, 4, 20, 100):  # supports that grow refine the cells
        order = log_p.argsort(-1, descending=True)[:, :k]
        values, some = log_p.gather(1, order), ids.gather(1, order)
        rest = torch.log1p(-values.exp().sum(1)).float()
        got = topk_divergence(
            student, values.float(), some, tail_logprob=rest, reduction="none", impl=impl
        )
        assert (got >= before - 1e-6).all() and (got <= full + 1e-5).all() and got.min() > 0
        before = got


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_peaked_rows_keep_their_tail(kind: str, each_cpu: str) -> None:
    """log q_t of -17, where 1 - Q is 0 in fp32 and other projects lose the gradient of the tail."""
    student = torch.randn(6, 4000)
    student[:, 7] = torch.logsumexp(student, 1) + torch.linspace(15, 19, 6)
    log_p, ids, tail = teacher(6, 4000, 4)
    ids[:, 0] = torch.where((ids == 7).any(1), ids[:, 0], 7)
    exact = student.double().requires_grad_()
    options: dict[str, Any] = {"reduction": "none"}
    want = topk_divergence(
        exact, log_p.float(), ids, kind, tail_logprob=tail, impl="reference", **options
    )
    (slope,) = torch.autograd.grad(want.sum(), exact)
    leaf = student.clone().requires_grad_()
    got = topk_divergence(
        leaf, log_p.float(), ids, kind, tail_logprob=tail.float(), impl=each_cpu, **options
    )
    (grad,) = torch.autograd.grad(got.sum(), leaf)
    close(got.double(), want.detach(), rtol=1e-5, atol=0)
    outside = torch.ones_like(student, dtype=torch.bool).scatter(1, ids, False)
    for part in (outside, ~outside):
        error = torch.where(part, grad.double() - slope, 0).norm(dim=1)
        assert (error <= 1e-5 * torch.where(part, slope, 0).norm(dim=1) + 1e-9).all()


@pytest.mark.parametrize("scale", [60.0, 200.0, 5000.0])
@pytest.mark.parametrize("kind", TOPK_KINDS)
def test_tails_beyond_the_range_of_exp(kind: str, scale: float, each_cpu: str) -> None:
    student = torch.randn(3, 2500)
    student[:, 3] += scale
    log_p, _, tail = teacher(3, 2500, 1)
    ids = torch.full((3, 1), 3)
    exact, leaf = student.double().requires_grad_(), student.clone().requires_grad_()
    want = topk_divergence(
        exact, log_p, ids, kind, tail_logprob=tail, reduction="none", impl="reference"
    )
    options: dict[str, Any] = {"tail_logprob": tail.float(), "impl": each_cpu}
    got = topk_divergence(leaf, log_p.float(), ids, kind, reduction="none", **options)
    close(got.double(), want, rtol=1e-5, atol=0)
    slope, grad = (torch.autograd.grad(x.sum(), of)[0] for x, of in ((want, exact), (got, leaf)))
    close(grad.double(), slope, rtol=2e-5, atol=1e-30)
    spent = leaf.detach().clone().requires_grad_()
    loss = topk_divergence(
        spent.view_as(spent), log_p.float(), ids, kind, overwrite_logits=True,
        reduction="sum", **options,
    )  # fmt: skip
    close(torch.autograd.grad(loss, spent)[0], grad, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(("kind", "tail"), [p for p in PAIRS if p[1] in ("renormalize", "zero")])
def test_nothing_to_normalise_is_nan(kind: str, tail: str, impl: str) -> None:
    """Rows without a support; under `renormalize` also a student who gives it no mass."""
    student = torch.randn(3, 50)
    log_p, ids, _ = teacher(3, 50, 6)
    ids[0] = -1
    student[2, ids[2]] = -math.inf
    leaf = student.requires_grad_()
    loss = topk_divergence(leaf, log_p.float(), ids, kind, tail=tail, reduction="none", impl=impl)
    assert loss.isnan().tolist() == [True, False, tail == "renormalize"]
    (grad,) = torch.autograd.grad(loss.nan_to_num(0, 0).sum(), leaf)
    assert grad[1].isfinite().all()
    (grad,) = torch.autograd.grad(
        topk_divergence(leaf, log_p.float(), ids, kind, tail=tail, reduction="none", impl=impl)[0],
        leaf,
    )
    assert grad[0].isnan().all()


def test_empty_slots_are_not_read(impl: str) -> None:
    student = torch.randn(3, 50, requires_grad=True)
    log_p, ids, _ = teacher(3, 50, 6)
    want = topk_divergence(
        student, log_p[:, :4], ids[:, :4], tail="renormalize", reduction="none", impl=impl
    )
    log_p, ids = log_p.clone(), ids.clone()
    log_p[:, 4:], ids[:, 4:] = math.nan, torch.tensor([-1, -100])
    got = topk_divergence(student, log_p, ids, tail="renormalize", reduction="none", impl=impl)
    close(got, want)
    nothing = topk_divergence(
        student,
        log_p,
        torch.full_like(ids, -1),
        tail_logprob=torch.zeros(3),
        reduction="none",
        impl=impl,
    )
    close(nothing, torch.zeros(3))


def test_teacher_of_another_temperature(impl: str) -> None:
    student, logits = torch.randn(4, 60), 2 * torch.randn(4, 60)
    at_1, at_2 = (torch.log_softmax(logits / t, -1) for t in (1.0, 2.0))
    ids = at_1.topk(9).indices
    options: dict[str, Any] = {
        "tail": "zero",
        "temperature": 2.0,
        "reduction": "none",
        "impl": impl,
    }
    want = topk_divergence(student, at_2.gather(1, ids), ids, teacher_temperature=2.0, **options)
    close(topk_divergence(student, at_1.gather(1, ids), ids, **options), want)
    rows = {**options, "temperature": torch.full((4,), 2.0)}
    close(topk_divergence(student, at_1.gather(1, ids), ids, **rows), want)


def test_int32_ids_and_half_logprobs(impl: str) -> None:
    student = torch.randn(4, 60)
    log_p, ids, _ = teacher(4, 60, 5)
    want = topk_divergence(student, log_p.bfloat16().float(), ids, tail="zero", impl=impl)
    close(topk_divergence(student, log_p.bfloat16(), ids.int(), tail="zero", impl=impl), want)


def test_warns_where_the_tail_is_rounding(impl: str) -> None:
    student = torch.randn(2, 30)
    log_p, ids, tail = teacher(2, 30, 29, scale=8.0)
    log_p = log_p - torch.logsumexp(log_p, 1, keepdim=True)  # sums to 1
    text = r"pydistill\.topk_divergence: 1 minus.*below 1e-6 in 2 rows.*tail_logprob"
    with pytest.warns(UserWarning, match=text) as caught:
        loss = topk_divergence(student, log_p.float(), ids, reduction="none", impl=impl)
        topk_divergence_jvp(student, torch.ones_like(student), log_p.float(), ids, impl=impl)
    assert [w.filename for w in caught] == [__file__] * 2
    assert not loss.isnan().any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        topk_divergence(student, log_p.float(), ids, tail_logprob=tail.float(), impl=impl)
        topk_divergence(student, *teacher(2, 30, 3)[:2], impl=impl)


S = torch.randn(4, 9)
P, IDS = torch.log_softmax(torch.randn(4, 9), -1).topk(3)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown kind": (
        {"kind": "chi2"},
        ValueError,
        "kind='chi2' is not defined on a support; use one of forward_kl",
    ),
    "unknown tail": ({"tail": "ghost"}, ValueError, "tail='ghost' is not known; use one of bucket"),
    "infinite": ({"kind": "reverse_kl", "tail": "zero"}, ValueError, "infinite with tail='zero'"),
    "twice": (
        {"topk_ids": torch.tensor([[0, 1, 2], [3, 4, 5], [6, 2, 6], [0, 1, 2]])},
        ValueError,
        "token 6 twice in row",
    ),
    "id too large": ({"topk_ids": IDS + 9}, ValueError, "but student_logits has 9 tokens"),
    "ids of floats": ({"topk_ids": IDS.float()}, TypeError, "topk_ids is torch.float32"),
    "ids of another shape": ({"topk_ids": IDS[:, :2]}, ValueError, r"topk_ids has shape \(4, 2\)"),
    "logprobs of integers": ({"topk_logprobs": IDS}, TypeError, "topk_logprobs is torch.int64"),
    "other prefix": ({"topk_logprobs": P[:3]}, ValueError, r"topk_logprobs has shape \(3, 3\)"),
    "logprobs with gradient": (
        {"topk_logprobs": P.clone().requires_grad_()},
        ValueError,
        "topk_logprobs requires grad",
    ),
    "beta unused": ({"beta": 0.5}, ValueError, "beta is given, but kind='forward_kl'"),
    "beta outside": ({"kind": "jsd", "beta": 1.0}, ValueError, "beta=1 is outside"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature=0 is outside"),
    "temperatures differ": ({"temperature": 2.0}, ValueError, "recorded at 1, and its tail mass"),
    "temperature a row": (
        {"temperature": torch.ones(4)},
        ValueError,
        "temperature is a tensor, but tail='bucket'",
    ),
    "tail unused": (
        {"tail": "zero", "tail_logprob": torch.zeros(4)},
        ValueError,
        "tail_logprob is given, but tail='zero'",
    ),
    "tail of a list": ({"tail_logprob": [0.0]}, TypeError, "tail_logprob is list"),
    "tail shape": ({"tail_logprob": torch.zeros(3)}, ValueError, r"tail_logprob has shape \(3,\)"),
    "mask": ({"mask": torch.ones(4)}, TypeError, "mask is torch.float32"),
    "overwrite of rows": (
        {"overwrite_logits": True, "reduction": "none"},
        ValueError,
        "needs reduction='mean' or 'sum'",
    ),
    "unknown impl": ({"impl": "cudnn"}, ValueError, "impl='cudnn' is not known"),
    "not written": (
        {"impl": "triton"},
        ValueError,
        "impl='triton' cannot run topk_divergence here",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str, impl: str) -> None:
    given, error, message = WRONG[name]
    call = {
        "student_logits": S.clone().requires_grad_(),
        "topk_logprobs": P,
        "topk_ids": IDS,
        "impl": impl,
        **given,
    }
    with pytest.raises(error, match=message):
        topk_divergence(**call)


def test_flagged_rows(kernel_impl: str) -> None:
    """Where values are not read: duplicates, ids and parameters out of range make their row NaN."""
    ids = torch.tensor([[0, 1, 2], [3, 3, 4], [5, 9, 1], [6, 7, 8], [0, 2, 4], [3, 3, 9]])
    student, log_p = torch.randn(6, 9), torch.full((6, 3), -2.0)
    params = torch.tensor([[1.0, 0.5]] * 6)
    params[3, 0], params[4, 0] = -1.0, 2.0
    loss, saved, grad = torch.zeros(6), torch.zeros(6, SAVED), torch.zeros(6, 9)
    options = (0, TAILS["bucket"], 1.0, 0.5, False)
    tail = torch.full((6,), -1.0)
    _registry.overload("topk_divergence_fwd", kernel_impl)(
        student, ids, log_p, tail, None, params, *options, loss, saved
    )
    flagged = [False, True, True, True, False, True]
    assert loss.isnan().tolist() == flagged
    assert saved[:, STATUS].tolist() == [0, 2, 1, 0, 0, 1]
    _registry.overload("topk_divergence_bwd", kernel_impl)(
        student, ids, log_p, tail, params, saved, torch.ones(6), *options, grad
    )
    assert grad.isnan().all(1).tolist() == flagged
    assert not grad[[0, 4]].isnan().any()


@pytest.mark.parametrize(("kind", "tail"), PAIRS)
def test_gradcheck(kind: str, tail: str) -> None:
    student = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    log_p, ids, _ = teacher(2, 8, 3)
    f = lambda s: topk_divergence(s, log_p, ids, kind, tail=tail, reduction="none")
    assert torch.autograd.gradcheck(f, student)
    if kind != "tvd":
        assert torch.autograd.gradgradcheck(f, student)


def call(kind: str, tail: str, impl: str, v: int = 19) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    log_p, ids, _ = teacher(4, v, 5)
    f = lambda s: topk_divergence(s, log_p.float(), ids, kind, tail=tail, impl=impl)
    return torch.randn(4, v, requires_grad=True), f


@pytest.mark.parametrize(("kind", "tail"), PAIRS)
def test_every_way_to_a_derivative(kind: str, tail: str, impl: str) -> None:
    student, f = call(kind, tail, impl)
    loss = f(student)
    (grad,) = torch.autograd.grad(loss, student, retain_graph=True)
    close(torch.autograd.grad(3 * loss, student)[0], 3 * grad)
    close(torch.func.grad(f)(student.detach()), grad)
    tangent = torch.randn_like(student)
    want = (grad * tangent).sum()
    value, along = torch.func.jvp(f, (student.detach(),), (tangent,))
    close(along, want, rtol=1e-4, atol=1e-6), close(value, loss.detach())
    with forward_ad.dual_level():
        dual = f(forward_ad.make_dual(student.detach(), tangent))
        close(forward_ad.unpack_dual(dual).tangent, want, rtol=1e-4, atol=1e-6)
    batch = torch.randn(3, 4, 19)
    close(torch.vmap(f)(batch), torch.stack([f(x) for x in batch]))
    close(
        torch.vmap(torch.func.grad(f))(batch), torch.stack([torch.func.grad(f)(x) for x in batch])
    )
    along = torch.func.jvp(torch.vmap(f), (batch,), (torch.ones_like(batch),))[1]
    close(along, torch.stack([torch.func.grad(f)(x).sum() for x in batch]), rtol=1e-4, atol=1e-5)


def test_vmap_over_the_teacher(impl: str) -> None:
    student = torch.randn(4, 19)
    rows = [teacher(4, 19, 5) for _ in range(3)]
    log_p, ids, tail = (torch.stack([row[i] for row in rows]) for i in range(3))
    f = lambda p, i, t: topk_divergence(student, p.float(), i, tail_logprob=t.float(), impl=impl)
    close(torch.vmap(f)(log_p, ids, tail), torch.stack([f(*row) for row in rows]))


def test_explicit_tangent(impl: str) -> None:
    student = torch.randn(4, 19, requires_grad=True)
    log_p, ids, _ = teacher(4, 19, 5)
    tangent = torch.randn_like(student)
    loss, along = topk_divergence_jvp(student, tangent, log_p.float(), ids, "jsd", impl=impl)
    again = topk_divergence(student, log_p.float(), ids, "jsd", impl=impl)
    (grad,) = torch.autograd.grad(again, student)
    close(along, (grad * tangent).sum(), rtol=1e-4, atol=1e-6), close(loss, again.detach())
    with pytest.raises(ValueError, match=r"student_tangent has shape \(4, 3\)"):
        topk_divergence_jvp(student, tangent[:, :3], log_p.float(), ids, impl=impl)


def test_second_derivatives_raise(kernel_impl: str) -> None:
    student, f = call("forward_kl", "bucket", kernel_impl)
    (grad,) = torch.autograd.grad(f(student), student, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.parametrize(("kind", "tail"), PAIRS)
def test_overwrite(kind: str, tail: str, impl: str) -> None:
    log_p, ids, _ = teacher(5, 1300, 7)
    weight, mask = (
        torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0]),
        torch.tensor([True, True, True, False, True]),
    )
    options: dict[str, Any] = {
        "kind": kind,
        "tail": tail,
        "weight": weight,
        "mask": mask,
        "impl": impl,
    }
    student = torch.randn(5, 1300, requires_grad=True)
    want = topk_divergence(student, log_p, ids, **options)
    (slope,) = torch.autograd.grad(2 * want, student)
    logits = student * 1
    got = topk_divergence(logits, log_p, ids, overwrite_logits=True, **options)
    close(got, want)
    (grad,) = torch.autograd.grad(2 * got, student, retain_graph=True)
    close(grad, slope, rtol=1e-5, atol=1e-7)
    with pytest.raises(RuntimeError, match="keeps one gradient"):
        torch.autograd.grad(got, student)
    spent = student.detach().clone().requires_grad_()
    lse = torch.logsumexp(spent * 1, 1)  # saves what the next call overwrites
    view = spent * 1
    lse = torch.logsumexp(view, 1)
    topk_divergence(view, log_p, ids, overwrite_logits=True, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lse.sum().backward()


def test_a_nan_weight_is_a_nan_gradient_whatever_its_bits(each_cpu: str) -> None:
    """Rounded to bf16 as a number, a NaN of ones only would be 0."""
    student = torch.randn(2, 2048).bfloat16().requires_grad_()
    log_p, ids, _ = teacher(2, 2048, 4)
    weight = torch.tensor([-1, 0], dtype=torch.int32).view(torch.float32)
    loss = topk_divergence(
        student.view_as(student), log_p.float(), ids, reduction="sum", weight=weight,
        overwrite_logits=True, impl=each_cpu,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, student)
    assert grad[0].isnan().all() and not grad[1].any()


def test_rows_alone_and_on_more_threads(each_cpu: str) -> None:
    log_p, ids, tail = teacher(9, 2100, 30)
    student = torch.randn(9, 2100)

    def both(rows: slice | Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        leaf = s[rows].clone().requires_grad_()
        loss = topk_divergence(
            leaf,
            log_p[rows].float(),
            ids[rows],
            tail_logprob=tail[rows].float(),
            reduction="none",
            impl=each_cpu,
        )
        return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

    whole = both(slice(None), student)
    torch.set_num_threads(3)
    assert all(torch.equal(a, b) for a, b in zip(both(slice(None), student), whole, strict=True))
    assert all(
        torch.equal(a, b[4:5]) for a, b in zip(both(slice(4, 5), student), whole, strict=True)
    )
    student[3] = math.nan
    others = torch.arange(9) != 3
    for a, b in zip(both(slice(None), student), whole, strict=True):
        assert a[3].isnan().all() and torch.equal(a[others], b[others])


def test_maximum_far_from_the_beginning(each_cpu: str) -> None:
    """Blocks are summed about the maximum so far: one far above it costs time and nothing else."""
    for rise in (5.0, 20.0, 95.0, 3000.0):
        student = torch.randn(3, 5000)
        student[:, 3000:3003] += rise
        log_p, ids, tail = teacher(3, 5000, 12)
        exact = student.double().requires_grad_()
        want = topk_divergence(exact, log_p, ids, "jsd", tail_logprob=tail, impl="reference")
        (slope,) = torch.autograd.grad(want, exact)
        for overwrite in (False, True):
            leaf = student.clone().requires_grad_()
            got = topk_divergence(
                leaf * 1,
                log_p.float(),
                ids,
                "jsd",
                tail_logprob=tail.float(),
                overwrite_logits=overwrite,
                impl=each_cpu,
            )
            close(got.double(), want.detach(), rtol=1e-5, atol=1e-7)
            close(torch.autograd.grad(got, leaf)[0].double(), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["fwd", "bwd", "overwrite"])
def test_opcheck(name: str) -> None:
    log_p, ids, tail = teacher(4, 12, 3)
    teacher_side = (ids, log_p.float(), tail.float())
    options, params = (2, TAILS["bucket"], 1.5, 0.5, True), torch.tensor([[1.5, 0.4]] * 4)
    student, counted = torch.randn(4, 12), torch.tensor([True, False, True, True])
    loss, saved = torch.zeros(4), torch.zeros(4, SAVED)
    op = _registry.overload(f"topk_divergence_{name}", "cpu")
    if name == "fwd":
        arguments: tuple[Any, ...] = (
            student,
            *teacher_side,
            counted,
            params,
            *options,
            loss,
            saved,
        )
    elif name == "bwd":
        _registry.overload("topk_divergence_fwd", "cpu")(
            student, *teacher_side, counted, params, *options, loss, saved
        )
        arguments = (
            student,
            *teacher_side,
            params,
            saved,
            torch.rand(4) * counted,
            *options,
            torch.zeros(4, 12),
        )
    else:
        arguments = (
            student,
            *teacher_side,
            counted,
            params,
            torch.rand(4) * counted,
            *options,
            loss,
            saved,
        )
    tests = (
        "test_schema",
        "test_faketensor",
        "test_aot_dispatch_static",
        "test_aot_dispatch_dynamic",
    )
    torch.library.opcheck(op, arguments, test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rise", [1e6, 3e38])
@pytest.mark.parametrize("kind", TOPK_KINDS)
def test_a_later_block_far_beyond_the_range_of_exp(
    kind: str, rise: float, dtype: torch.dtype, each_cpu: str
) -> None:
    """Sums about the first block's maximum overflow; the row is finite all the same. (No
    log-probability counts as less than -1e30.)"""
    student = (0.1 * torch.randn(4, 5000)).to(dtype)
    log_p, ids, tail = teacher(4, 5000, 8)
    assert not torch.isin(ids[:2], torch.tensor([3500, 4999])).any()
    student[0, 3500] = student[1, 4999] = rise
    student[2, 3500] = rise  # in the support
    ids[2, 0] = torch.where((ids[2] == 3500).any(), ids[2, 0], 3500)
    exact, leaf = student.double().requires_grad_(), student.clone().requires_grad_()
    options: dict[str, Any] = {"reduction": "none"}
    want = topk_divergence(exact, log_p, ids, kind, tail_logprob=tail, impl="reference", **options)
    options |= {"tail_logprob": tail.float(), "impl": each_cpu}
    got = topk_divergence(leaf, log_p.float(), ids, kind, **options)
    close(got.double(), want.detach(), rtol=1e-5, atol=1e-6)
    slope, grad = (torch.autograd.grad(x.sum(), of)[0] for x, of in ((want, exact), (got, leaf)))
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    close(grad.double(), slope, rtol=rounding, atol=1e-6)
