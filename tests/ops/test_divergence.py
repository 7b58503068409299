"""Values and gradients of `divergence`: the formulas written out once more, and the table of cases.

The formulas prove the reference; the table then proves every backend against the reference.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pydistill import KINDS, divergence, divergence_with_stats
from pydistill.testing import Case, Expected, Tolerance, expected, load
from pydistill.testing.case import compare

OP = "divergence"
TABLE = [case for case in load(OP) if "bench" not in case.marks]
BENCH = [case for case in load(OP) if "bench" in case.marks]

Row = Callable[[Tensor, Tensor], Tensor]
log = torch.log


def with_mixture(f: Callable[[Tensor, Tensor, Tensor], Tensor], share_of_p: float) -> Row:
    return lambda p, q: f(p, q, share_of_p * p + (1 - share_of_p) * q)


# D(p, q), and q dD/dq as the maths page gives it (up to a constant times q).
FORMULAS: dict[tuple[str, float | None, float | None], tuple[Row, Row]] = {
    ("forward_kl", None, None): (lambda p, q: (p * log(p / q)).sum(), lambda p, q: -p),
    ("reverse_kl", None, None): (lambda p, q: (q * log(q / p)).sum(), lambda p, q: q * log(q / p)),
    ("jsd", None, 0.3): (
        with_mixture(lambda p, q, m: (0.3 * p * log(p / m) + 0.7 * q * log(q / m)).sum(), 0.3),
        with_mixture(lambda p, q, m: 0.7 * q * log(q / m), 0.3),
    ),
    ("tvd", None, None): (
        lambda p, q: (p - q).abs().sum() / 2,
        lambda p, q: q * torch.sign(q - p) / 2,
    ),
    ("skew_forward_kl", 0.2, None): (
        with_mixture(lambda p, q, m: (p * log(p / m)).sum(), 0.2),
        with_mixture(lambda p, q, m: -0.8 * q * p / m, 0.2),
    ),
    ("skew_reverse_kl", 0.2, None): (
        with_mixture(lambda p, q, m: (q * log(q / m)).sum(), 0.8),
        with_mixture(lambda p, q, m: q * (log(q / m) + 1 - 0.2 * q / m), 0.8),
    ),
    ("alpha_beta", 0.4, 0.9): (
        lambda p, q: -(p**0.4 * q**0.9 - 0.4 / 1.3 * p**1.3 - 0.9 / 1.3 * q**1.3).sum() / 0.36,
        lambda p, q: -(p**0.4 * q**0.9 - q**1.3) / 0.4,
    ),
    ("alpha_beta", 0.0, 0.7): (
        lambda p, q: (p**0.7 - q**0.7 + 0.7 * q**0.7 * log(q / p)).sum() / 0.49,
        lambda p, q: q**0.7 * log(q / p),
    ),
    ("alpha_beta", 0.7, 0.0): (
        lambda p, q: (q**0.7 - p**0.7 + 0.7 * p**0.7 * log(p / q)).sum() / 0.49,
        lambda p, q: -(p**0.7 - q**0.7) / 0.7,
    ),
    ("alpha_beta", 0.6, -0.6): (
        lambda p, q: ((p / q) ** 0.6 - 1 - 0.6 * log(p / q)).sum() / 0.36,
        lambda p, q: -((p / q) ** 0.6 - 1) / 0.6,
    ),
    ("alpha_beta", 0.0, 0.0): (
        lambda p, q: (log(p / q) ** 2).sum() / 2,
        lambda p, q: -log(p / q),
    ),
    ("adaptive_kl", None, None): (
        lambda p, q: head(p, q) * kl(p, q) + (1 - head(p, q)) * kl(q, p),
        lambda p, q: -head(p, q) * p - (1 - head(p, q)) * q * log(p / q),
    ),
    ("hellinger", None, None): (
        lambda p, q: ((p.sqrt() - q.sqrt()) ** 2).sum(),
        lambda p, q: -(p * q).sqrt(),
    ),
    ("chi2", None, None): (lambda p, q: ((p - q) ** 2 / q).sum(), lambda p, q: -(p**2) / q),
    ("todi", None, None): (
        lambda p, q: (p / (p + q) * p * log(p / q) + q / (p + q) * q * log(q / p)).sum(),
        lambda p, q: -p * p / (p + q) + q * q / (p + q) * (log(q / p) + 1),
    ),
}


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * log(p / q)).sum()


def head(p: Tensor, q: Tensor) -> float:
    """adaptive_kl's weight of the forward KL, token by token."""
    mass, inside, outside = 0.0, 0.0, 0.0
    for i, j in enumerate(sorted(range(len(p)), key=lambda j: -float(p[j]))):
        mass += float(p[j])
        error = abs(float(p[j] - q[j]))
        if i == 0 or mass <= 0.5:
            inside += error
        else:
            outside += error
    return inside / (inside + outside)


@pytest.mark.parametrize("t, scale_t2", [(1.0, False), (2.5, False), (0.4, True)])
@pytest.mark.parametrize(("kind", "alpha", "beta"), FORMULAS)
def test_reference_against_the_formulas(
    kind: str, alpha: float | None, beta: float | None, t: float, scale_t2: bool
) -> None:
    value, slope = FORMULAS[kind, alpha, beta]
    student = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 9, dtype=torch.float64)
    options = {"alpha": alpha, "beta": beta, "temperature": t, "scale_t2": scale_t2}
    loss = divergence(student, teacher, kind, reduction="none", impl="reference", **options)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    t2 = t * t if scale_t2 else 1.0
    for i in range(6):
        p, q = torch.softmax(teacher[i] / t, 0), torch.softmax(student[i].detach() / t, 0)
        assert loss[i].item() == pytest.approx(t2 * value(p, q).item(), rel=1e-9)
        qh = slope(p, q)
        torch.testing.assert_close(grad[i], t2 / t * (qh - q * qh.sum()), rtol=1e-9, atol=1e-12)


def test_formulas_cover_every_kind() -> None:
    assert {kind for kind, _, _ in FORMULAS} == set(KINDS)


def test_default_parameters() -> None:
    student, teacher = torch.randn(2, 3, 9).unbind()
    defaults = {
        "jsd": {"beta": 0.5},
        "skew_forward_kl": {"alpha": 0.1},
        "skew_reverse_kl": {"alpha": 0.1},
        "alpha_beta": {"alpha": 0.2, "beta": 0.7},
    }
    for kind, parameters in defaults.items():
        assert divergence(student, teacher, kind) == divergence(
            student, teacher, kind, **parameters
        )


def test_alpha_beta_joins_the_kls() -> None:
    student, teacher = torch.randn(2, 3, 9, dtype=torch.float64).unbind()
    for (a, b), kind in (((1.0, 0.0), "forward_kl"), ((0.0, 1.0), "reverse_kl")):
        ends = divergence(student, teacher, "alpha_beta", alpha=a, beta=b)
        near = divergence(student, teacher, "alpha_beta", alpha=a + 1e-7, beta=b + 1e-7)
        assert ends.item() == pytest.approx(divergence(student, teacher, kind).item(), rel=1e-12)
        assert ends.item() == pytest.approx(near.item(), rel=1e-5)


def test_hard_labels_and_z_loss_against_torch(impl: str) -> None:
    student, teacher = torch.randn(2, 8, 33).unbind()
    labels = torch.randint(0, 33, (8,))
    labels[3] = -7
    got = divergence(
        student, teacher, "reverse_kl", labels=labels, label_weight=0.3, ignore_index=-7,
        z_loss=0.02, temperature=2.0, scale_t2=True, impl=impl,
    )  # fmt: skip
    kept = labels != -7
    q, p = torch.log_softmax(student[kept] / 2, -1), torch.log_softmax(teacher[kept] / 2, -1)
    soft = torch.nn.functional.kl_div(p, q, log_target=True, reduction="batchmean")
    hard = torch.nn.functional.cross_entropy(student, labels, ignore_index=-7)
    z = torch.logsumexp(student[kept], -1).square().mean()
    assert got.item() == pytest.approx(float(0.7 * 4 * soft + 0.3 * hard + 0.02 * z), rel=1e-5)


@pytest.mark.parametrize("case", TABLE + [c.gate for c in BENCH if c.gate is not None], ids=repr)
def test_case(case: Case, check_everywhere: Callable[[Case], None]) -> None:
    check_everywhere(case)


def test_near_equal_cases_are_what_they_claim() -> None:
    losses = [
        expected(case)["loss"].value.detach()
        for case in TABLE
        if "near_equal-" in case.id and case.kind in ("forward_kl", "reverse_kl")
    ]
    smallest, largest = (float(torch.cat(losses).aminmax()[i]) for i in (0, 1))
    assert 1e-8 <= smallest < 3e-8 and 1e-3 < largest < 0.1
    assert all(
        case.tolerances["loss"] == (1e-5, 0.0)
        for case in TABLE
        if "near_equal" in case.id and case.kind in ("forward_kl", "reverse_kl")
    )


def test_table_covers_what_it_should() -> None:
    assert len({case.id for case in load(OP)}) == len(load(OP))
    for kind in KINDS:
        of_kind = [case for case in load(OP) if case.kind == kind]
        assert {31, 2, 1, 1000, 32000} <= {case.shape[1] for case in of_kind}
        assert any("ladder" in case.marks for case in of_kind)
        assert any("bench" in case.marks for case in of_kind)
    assert {151936, 262144} <= {case.shape[1] for case in TABLE}
    assert all(case.gate is not None and case.bytes["forward"] > 0 for case in BENCH)


def test_same_seed_same_inputs() -> None:
    for case in load(OP, "ladder"):
        first, second, other = (case.inputs("cpu", seed) for seed in (0, 0, 1))
        for name, value in first.items():
            if isinstance(value, Tensor):
                assert torch.equal(value.nan_to_num(), second[name].nan_to_num())
        if case.shape[0]:
            assert not torch.equal(first["student_logits"], other["student_logits"]) or (
                "one_hot" in case.id
            )


def test_checker_tells_right_from_wrong() -> None:
    truth = Expected(torch.tensor([1.0, 0.0, math.nan, math.inf], dtype=torch.float64))
    exact = Tolerance(1e-5, 1e-6)

    def error(*values: float) -> float:
        return compare("x", torch.tensor(values), truth, exact)[0]

    assert error(1.0, 0.0, math.nan, math.inf) == 0
    assert error(1.00001, 0.0, math.nan, math.inf) < 1 < error(1.0001, 0.0, math.nan, math.inf)
    assert error(1.0, 9e-7, math.nan, math.inf) < 1 < error(1.0, 2e-6, math.nan, math.inf)
    nan, inf = math.nan, math.inf
    for wrong in (
        (1.0, 0.0, 0.0, inf),
        (1.0, 0.0, nan, 3e38),
        (nan, 0.0, nan, inf),
        (1, 0, nan, -inf),
    ):
        assert error(*wrong) == inf
    _, said = compare("x", torch.tensor([2.0, 0.0, nan, inf]), truth, exact)
    assert "x[0] is 2" in said
    assert compare("x", torch.ones(3), truth, exact)[0] == math.inf


def test_statistics_against_torch(impl: str) -> None:
    student, teacher = (3 * torch.randn(2, 2, 3, 50)).unbind()
    student[0, 0, :] = 0
    student[0, 0, [7, 9]] = 5.0
    teacher[0, 0, 7] = 50.0
    stats = divergence_with_stats(
        student, teacher, "jsd", temperature=1.5, reduction="none", impl=impl
    )
    p, q = torch.softmax(teacher / 1.5, -1), torch.softmax(student / 1.5, -1)
    close = torch.testing.assert_close
    close(stats.student_lse, torch.logsumexp(student / 1.5, -1))
    close(stats.teacher_lse, torch.logsumexp(teacher / 1.5, -1))
    close(stats.student_entropy, torch.special.entr(q).sum(-1))
    close(stats.teacher_entropy, torch.special.entr(p).sum(-1))
    close(stats.acceptance, torch.minimum(p, q).sum(-1))
    close(stats.argmax_agreement, (p.argmax(-1) == q.argmax(-1)).float())
    assert stats.argmax_agreement[0, 0] == 1  # the first of two equals
    close(
        stats.loss,
        divergence(student, teacher, "jsd", temperature=1.5, reduction="none", impl=impl),
    )
    assert not any(s.requires_grad for s in stats[1:])


def test_statistics_of_rows_that_do_not_count(impl: str) -> None:
    student, teacher = torch.randn(2, 4, 11).unbind()
    mask = torch.tensor([True, False, True, True])
    student[1], student[3, 2] = math.nan, math.nan
    stats = divergence_with_stats(student, teacher, mask=mask, reduction="none", impl=impl)
    for s in stats[1:]:
        assert torch.isnan(s).tolist() == [False, True, False, True]
    assert (
        stats.loss[1] == 0
        and torch.isnan(stats.loss[3])
        and torch.isfinite(stats.loss[[0, 2]]).all()
    )


INFINITIES = {
    # kind: (loss, gradient) where q = 0 < p, and where p = 0 < q
    "forward_kl": (("inf", "finite"), ("finite", "finite")),
    "reverse_kl": (("finite", "finite"), ("inf", "nan")),
    "jsd": (("finite", "finite"), ("finite", "finite")),
    "tvd": (("finite", "finite"), ("finite", "finite")),
    "skew_forward_kl": (("finite", "finite"), ("finite", "finite")),
    "skew_reverse_kl": (("finite", "finite"), ("finite", "finite")),
    "alpha_beta": (("finite", "finite"), ("finite", "finite")),
    "adaptive_kl": (("inf", "nan"), ("inf", "nan")),
    "hellinger": (("finite", "finite"), ("finite", "finite")),
    "chi2": (("inf", "nan"), ("finite", "finite")),
    "todi": (("inf", "nan"), ("inf", "nan")),
}


@pytest.mark.parametrize("kind", INFINITIES)
def test_infinities(kind: str, impl: str) -> None:
    student, teacher = torch.randn(2, 4, 9).unbind()
    student[0, 2], teacher[1, 2] = -math.inf, -math.inf
    student[2], teacher[3] = -math.inf, -math.inf  # not distributions at all
    student.requires_grad_()
    loss = divergence(student, teacher, kind, reduction="none", impl=impl)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    for row, (value, slope) in enumerate(INFINITIES[kind]):
        assert math.isinf(loss[row]) == (value == "inf") and loss[row] > 0
        assert torch.isnan(grad[row]).all() if slope == "nan" else torch.isfinite(grad[row]).all()
    assert torch.isnan(loss[2:]).all() and torch.isnan(grad[2:]).all()
    if kind == "forward_kl":
        q, p = torch.softmax(student[0].detach(), -1), torch.softmax(teacher[0], -1)
        torch.testing.assert_close(grad[0], q - p)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_absent_on_both_sides_is_not_there(kind: str, impl: str) -> None:
    student, teacher = torch.randn(2, 3, 20).unbind()
    padding = torch.full((3, 12), -math.inf)
    short = student.clone().requires_grad_()
    long = torch.cat([student, padding], -1).requires_grad_()
    padded_teacher = torch.cat([teacher, padding], -1)
    a = divergence(short, teacher, kind, reduction="none", impl=impl)
    b = divergence(long, padded_teacher, kind, reduction="none", impl=impl)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    (grad_a,), (grad_b,) = (torch.autograd.grad(x.sum(), y) for x, y in ((a, short), (b, long)))
    torch.testing.assert_close(grad_a, grad_b[:, :20], rtol=1e-4, atol=1e-7)
    assert (grad_b[:, 20:] == 0).all()
