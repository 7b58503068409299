"""Arguments of `divergence`: what each means, and what a wrong one says."""

# ruff: noqa: E501  (the table of wrong arguments reads best with one a line)

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pydistill import divergence, divergence_with_stats

OP = "divergence"
close = torch.testing.assert_close
INF = math.inf


def t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


S, T = t(4, 9), t(4, 9)
ROWS = torch.tensor([0, 3])

# what is passed (over student [4, 9] and teacher [4, 9]), the error, and what its message must hold
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "student not a tensor": ({"student_logits": [1.0]}, TypeError, "student_logits is a list"),
    "student of integers": ({"student_logits": S.long()}, TypeError, "student_logits has dtype torch.int64"),
    "teacher of complex": ({"teacher_logits": T.cfloat()}, TypeError, "teacher_logits has dtype torch.complex64"),
    "no dimension": ({"student_logits": torch.tensor(1.0)}, ValueError, r"student_logits has shape \(\)"),
    "no vocabulary": ({"student_logits": t(4, 0)}, ValueError, r"student_logits has shape \(4, 0\)"),
    "other device": ({"teacher_logits": T.to("meta")}, ValueError, "teacher_logits is on meta"),
    "teacher requires grad": ({"teacher_logits": T.clone().requires_grad_()}, ValueError, "teacher_logits requires grad"),
    "unknown kind": ({"kind": "kl"}, ValueError, "kind='kl' is not known; use one of forward_kl"),
    "unknown reduction": ({"reduction": "batchmean"}, ValueError, "reduction='batchmean' is not known"),
    "unknown impl": ({"impl": "cudnn"}, ValueError, "impl='cudnn' is not known"),
    "impl of another device": ({"impl": "cuda"}, ValueError, "impl='cuda' cannot run divergence here: .*'cpu'"),
    "unknown convention": ({"convention": "gkd"}, ValueError, "convention='gkd' is not known; use one of hinton"),
    "kind outside convention": ({"convention": "hinton", "kind": "tvd"}, ValueError, "convention='hinton' does not define kind='tvd'"),
    "unknown vocab": ({"vocab": "pad"}, ValueError, "vocab='pad' is not known"),
    "vocabularies differ": ({"teacher_logits": t(4, 7)}, ValueError, "student_logits has 9 tokens and teacher_logits 7"),
    "prefixes differ": ({"teacher_logits": t(5, 9)}, ValueError, r"prefix \(4,\) and teacher_logits \(5,\)"),
    "same rows, other prefix": ({"teacher_logits": t(2, 2, 9)}, ValueError, r"prefix \(4,\) and teacher_logits \(2, 2\)"),
    "beta unused": ({"beta": 0.5}, ValueError, "beta is given, but kind='forward_kl' does not use it; it belongs to jsd"),
    "alpha unused": ({"kind": "jsd", "alpha": 0.5}, ValueError, "alpha is given, but kind='jsd' does not use it"),
    "beta at its end": ({"kind": "jsd", "beta": 1.0}, ValueError, r"beta=1 is outside \(0, 1\)"),
    "beta at its start": ({"kind": "jsd", "beta": 0.0}, ValueError, r"beta=0 is outside \(0, 1\)"),
    "beta of a row": ({"kind": "jsd", "beta": torch.tensor([0.5, 0.5, -0.25, 0.5])}, ValueError, "beta=-0.25 is outside"),
    "beta nan": ({"kind": "jsd", "beta": math.nan}, ValueError, "beta=nan is outside"),
    "alpha outside": ({"kind": "skew_forward_kl", "alpha": 1.5}, ValueError, "alpha=1.5 is outside"),
    "alpha infinite": ({"kind": "alpha_beta", "alpha": INF}, ValueError, "alpha=inf is outside"),
    "beta a string": ({"kind": "jsd", "beta": "half"}, TypeError, "beta is a str"),
    "beta shape": ({"kind": "jsd", "beta": torch.full((3,), 0.5)}, ValueError, r"beta has shape \(3,\)"),
    "temperature negative": ({"temperature": -2.0}, ValueError, "temperature=-2 is outside"),
    "temperature zero": ({"temperature": 0}, ValueError, "temperature=0 is outside"),
    "temperature infinite": ({"temperature": INF}, ValueError, "temperature=inf is outside"),
    "temperature nan": ({"temperature": math.nan}, ValueError, "temperature=nan is outside"),
    "temperature of a row": ({"temperature": torch.tensor([1.0, 1.0, 0.0, 1.0])}, ValueError, "temperature=0 is outside"),
    "temperature a bool": ({"temperature": True}, TypeError, "temperature is a bool"),
    "temperature of integers": ({"temperature": torch.ones(4).long()}, TypeError, "temperature has dtype torch.int64"),
    "temperature shape": ({"temperature": torch.ones(4, 1)}, ValueError, r"temperature has shape \(4, 1\)"),
    "label_weight outside": ({"label_weight": 1.5, "labels": torch.zeros(4).long()}, ValueError, "label_weight=1.5 is outside"),
    "label_weight nan": ({"label_weight": math.nan}, TypeError, "label_weight is nan"),
    "label_weight alone": ({"label_weight": 0.5}, ValueError, "label_weight=0.5 needs labels"),
    "z_loss a string": ({"z_loss": "1"}, TypeError, "z_loss is '1'"),
    "labels of floats": ({"labels": torch.zeros(4)}, TypeError, "labels is torch.float32"),
    "labels a list": ({"labels": [0, 1, 2, 3]}, TypeError, "labels is list"),
    "labels shape": ({"labels": torch.zeros(4, 1).long()}, ValueError, r"labels has shape \(4, 1\)"),
    "label too large": ({"labels": torch.tensor([0, 9, 1, 2])}, ValueError, "labels holds 9, .* token id below 9"),
    "label negative": ({"labels": torch.tensor([0, -1, 1, 2])}, ValueError, "labels holds -1, .* ignore_index=-100"),
    "mask of floats": ({"mask": torch.ones(4)}, TypeError, "mask is torch.float32; pass a bool"),
    "mask a list": ({"mask": [True] * 4}, TypeError, "mask is list"),
    "mask shape": ({"mask": torch.ones(3).bool()}, ValueError, r"mask has shape \(3,\)"),
    "weight of integers": ({"weight": torch.ones(4).long()}, TypeError, "weight is torch.int64"),
    "weight a number": ({"weight": 2.0}, TypeError, "weight is float"),
    "weight shape": ({"weight": torch.ones(4, 2)}, ValueError, r"weight has shape \(4, 2\)"),
    "mask on other device": ({"mask": torch.ones(4, device="meta").bool()}, ValueError, "mask is on meta"),
    "denominator zero": ({"denominator": 0.0}, ValueError, "denominator=0 is outside"),
    "denominator negative": ({"denominator": torch.tensor(-3.0)}, ValueError, "denominator=-3 is outside"),
    "denominator of rows": ({"denominator": torch.ones(4)}, ValueError, r"denominator has shape \(4,\)"),
    "denominator with sum": ({"denominator": 2.0, "reduction": "sum"}, ValueError, "denominator is given with reduction='sum'"),
    "denominator requires grad": ({"denominator": torch.ones((), requires_grad=True)}, ValueError, "denominator requires grad"),
    "rows of floats": ({"student_rows": torch.ones(4)}, TypeError, r"student_rows is torch.float32 \(4,\)"),
    "rows with two dimensions": ({"student_rows": ROWS[None]}, TypeError, r"student_rows is torch.int64 \(1, 2\)"),
    "student row too large": ({"student_rows": ROWS + 1, "teacher_rows": ROWS}, ValueError, "student_rows holds 4, outside the 4 rows"),
    "teacher row negative": ({"student_rows": ROWS, "teacher_rows": ROWS - 1}, ValueError, "teacher_rows holds -1, outside"),
    "unequal pairs": ({"student_rows": ROWS}, ValueError, "student's side has 2 rows and the teacher's 4"),
    "weight of the prefix with rows": ({"student_rows": ROWS, "teacher_rows": ROWS, "weight": torch.ones(4)}, ValueError, r"weight has shape \(4,\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_say_what_is_wrong(name: str) -> None:
    changed, error, message = WRONG[name]
    arguments = {"student_logits": S, "teacher_logits": T, **changed}
    for function in (divergence, divergence_with_stats):
        with pytest.raises(error, match=message) as raised:
            function(**arguments)
        said = str(raised.value)
        assert said.endswith(".") and "\n" not in said


def test_kernels_refuse_fp64(kernel_impl: str) -> None:
    with pytest.raises(ValueError, match=r"dtype torch\.float64 has no kernel; cast"):
        divergence(S.double(), T, impl=kernel_impl)
    with pytest.raises(TypeError, match=r"teacher_logits has dtype torch\.float64"):
        divergence(S, T.double(), impl=kernel_impl)
    assert divergence(S.double(), T).dtype == torch.float64  # auto: the reference


def test_unknown_argument_of_stats() -> None:
    with pytest.raises(TypeError, match="bta"):
        divergence_with_stats(S, T, bta=0.5)
    with pytest.raises(ValueError, match="overwrite_logits=True is not offered with statistics"):
        divergence_with_stats(S, T, overwrite_logits=True)


@pytest.mark.parametrize("shape", [(9,), (1, 9), (0, 9), (2, 3, 9), (2, 0, 9), (2, 1, 3, 9)])
def test_prefixes(shape: tuple[int, ...], impl: str) -> None:
    student, teacher = torch.randn(2, *shape).unbind()
    rows = divergence(student, teacher, reduction="none", impl=impl)
    flat = divergence(student.reshape(-1, 9), teacher.reshape(-1, 9), reduction="none", impl=impl)
    assert rows.shape == shape[:-1]
    assert torch.equal(rows.reshape(-1), flat)
    stats = divergence_with_stats(student, teacher, impl=impl)
    assert all(s.shape == shape[:-1] for s in stats[1:]) and stats.loss.shape == ()
    leaf = student.requires_grad_()
    assert torch.autograd.grad(divergence(leaf, teacher, impl=impl), leaf)[0].shape == shape


def test_reductions(impl: str) -> None:
    student, teacher = torch.randn(2, 2, 3, 9).unbind()
    weight = torch.tensor([[0.5, 2.0, 0.0], [1.0, 1.0, 3.0]])
    mask = torch.tensor([[True, True, True], [False, True, True]])
    plain = divergence(student, teacher, reduction="none", impl=impl)
    options: dict[str, Any] = {"weight": weight, "mask": mask, "impl": impl}
    rows = divergence(student, teacher, reduction="none", **options)
    close(rows, plain * weight * mask)
    close(divergence(student, teacher, reduction="sum", **options), rows.sum())
    close(divergence(student, teacher, **options), rows.sum() / (weight * mask).sum())
    close(divergence(student, teacher, denominator=7, **options), rows.sum() / 7)
    close(divergence(student, teacher, denominator=torch.tensor(7.0), **options), rows.sum() / 7)
    close(divergence(student, teacher, mask=mask, impl=impl), plain[mask].mean())
    close(divergence(student, teacher, impl=impl), plain.mean())


def test_nothing_counted(impl: str) -> None:
    student, teacher = (
        torch.full((3, 9), math.nan, requires_grad=True),
        torch.full((3, 9), math.nan),
    )
    nothing: list[dict[str, Any]] = [
        {"mask": torch.zeros(3).bool()},
        {"weight": torch.zeros(3)},
        {"labels": torch.full((3,), -100)},
        {"mask": torch.tensor([True, False, False]), "labels": torch.tensor([-100, 1, 1])},
        {"mask": torch.zeros(3).bool(), "weight": torch.ones(3), "denominator": 3.0},
    ]
    for options in nothing:
        for reduction in ("mean", "sum", "none"):
            if reduction != "mean":
                options.pop("denominator", None)
            loss = divergence(student, teacher, reduction=reduction, impl=impl, **options)
            (grad,) = torch.autograd.grad(loss.sum(), student)
            assert (loss == 0).all() and (grad == 0).all(), options
    loss = divergence(student[:0], teacher[:0], impl=impl)
    assert loss == 0 and loss.requires_grad


def test_scalars_and_rows_agree(impl: str) -> None:
    student, teacher = torch.randn(2, 2, 3, 9).unbind()
    rows = torch.full((2, 3), 0.3)
    for value in (rows, rows[0, 0], rows.double()):
        got = divergence(student, teacher, "jsd", beta=value, temperature=2 * value, impl=impl)
        close(got, divergence(student, teacher, "jsd", beta=0.3, temperature=0.6, impl=impl))


def test_rows_pair_different_prefixes(impl: str) -> None:
    student, teacher = torch.randn(2, 3, 9, requires_grad=True), torch.randn(5, 9)
    rows_s, rows_t = torch.tensor([5, 0, 0, 5, 2, 5]), torch.tensor([4, 1, 1, 0, 2, 3])
    rows = {"student_rows": rows_s, "teacher_rows": rows_t, "impl": impl}
    weight = torch.rand(6)
    got = divergence(student, teacher, "jsd", weight=weight, reduction="none", **rows)
    pairs = student.reshape(6, 9)[rows_s], teacher[rows_t]
    want = divergence(*pairs, "jsd", weight=weight, reduction="none", impl=impl)
    close(got, want)
    upstream = torch.randn(6)
    grads = [torch.autograd.grad(x, student, upstream, retain_graph=True)[0] for x in (got, want)]
    close(*grads)
    assert (grads[0].reshape(6, 9)[[1, 3, 4]] == 0).all()
    alone = divergence(
        student.detach(), teacher, student_rows=None, teacher_rows=torch.arange(6) % 5
    )
    close(alone, divergence(student.detach().reshape(6, 9), teacher[torch.arange(6) % 5]))
    empty = torch.empty(0).long()
    nothing = divergence(student, teacher, student_rows=empty, teacher_rows=empty, impl=impl)
    assert nothing == 0 and (torch.autograd.grad(nothing, student)[0] == 0).all()


@pytest.mark.parametrize("v_s, v_t", [(9, 7), (7, 9), (9, 9)])
def test_min_vocabulary(v_s: int, v_t: int, impl: str) -> None:
    student, teacher = torch.randn(4, v_s, requires_grad=True), torch.randn(4, v_t)
    got = divergence(student, teacher, vocab="min", impl=impl)
    low = min(v_s, v_t)
    want = divergence(student[:, :low], teacher[:, :low], impl=impl)
    close(got, want)
    close(*(torch.autograd.grad(x, student)[0] for x in (got, want)))
    with pytest.raises(ValueError, match=f"token id below {low}"):
        divergence(student, teacher, vocab="min", labels=torch.full((4,), low), impl=impl)


def test_labels_exclude_rows_without_their_cross_entropy(impl: str) -> None:
    student, teacher = torch.randn(2, 4, 9).unbind()
    labels = torch.tensor([1, -100, 3, 4])
    rows = divergence(student, teacher, reduction="none", impl=impl)
    close(divergence(student, teacher, labels=labels, impl=impl), rows[[0, 2, 3]].mean())


def test_uncounted_rows_are_never_read(impl: str) -> None:
    student, teacher = torch.randn(2, 4, 9).unbind()
    mask = torch.tensor([True, False, True, True])
    spoiled_s, spoiled_t = student.clone(), teacher.clone()
    spoiled_s[1], spoiled_t[1] = math.nan, math.inf
    leaf = spoiled_s.requires_grad_()
    loss = divergence(leaf, spoiled_t, "reverse_kl", mask=mask, impl=impl)
    assert loss == divergence(student, teacher, "reverse_kl", mask=mask, impl=impl)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert torch.isfinite(grad).all() and (grad[1] == 0).all()


def test_inputs_are_left_alone(impl: str) -> None:
    student, teacher = torch.randn(2, 4, 9).unbind()
    before = student.clone(), teacher.clone()
    leaf = student.requires_grad_()
    divergence(leaf, teacher, "jsd", temperature=2.0, impl=impl).backward()
    assert torch.equal(student.detach(), before[0]) and torch.equal(teacher, before[1])
    assert leaf._version == 0 and teacher._version == 0
