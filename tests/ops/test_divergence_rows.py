"""What a row's result may depend on: its own logits and options, and nothing else.

Not the number of threads, not the rows around it, not its place in memory, bit for bit (that is the
kernels' promise; torch's own reductions, under the reference, make none). And the properties that
every divergence has, on numbers that hypothesis chooses.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pydistill import KINDS, _registry, divergence, divergence_with_stats

OP = "divergence"
HAS_NATIVE = _registry.has_kernel("divergence_fwd", "cpu")
close = torch.testing.assert_close


def both(student: Tensor, teacher: Tensor, kind: str, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses, row statistics and gradient."""
    leaf = student.detach().requires_grad_()
    out = divergence_with_stats(leaf, teacher, kind, temperature=1.3, reduction="none", impl=impl)
    (grad,) = torch.autograd.grad(out.loss, leaf, torch.linspace(0.5, 1.5, len(out.loss)))
    return out.loss.detach(), torch.stack(out[1:]), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_independent_of_threads(kind: str, dtype: torch.dtype, each_cpu: str) -> None:
    student, teacher = (3 * torch.randn(2, 37, 2111)).to(dtype).unbind()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(both(student, teacher, kind, each_cpu))
        leaf = student.clone().requires_grad_()
        over = divergence(leaf * 1, teacher, kind, overwrite_logits=True, impl=each_cpu)
        results[-1] += (torch.autograd.grad(over, leaf)[0],)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_independent_of_the_batch(kind: str, each_cpu: str) -> None:
    student, teacher = (3 * torch.randn(2, 9, 517)).unbind()
    loss, stats, grad = both(student, teacher, kind, each_cpu)
    upstream = torch.linspace(0.5, 1.5, 9)
    for row in (0, 4, 8):
        leaf = student[row : row + 1].clone().requires_grad_()
        out = divergence_with_stats(
            leaf, teacher[row : row + 1], kind, temperature=1.3, reduction="none", impl=each_cpu
        )
        alone = torch.autograd.grad(out.loss, leaf, upstream[row : row + 1])[0]
        assert torch.equal(out.loss, loss[row : row + 1])
        assert torch.equal(torch.stack(out[1:]), stats[:, row : row + 1])
        assert torch.equal(alone[0], grad[row])
    poisoned = student.clone()
    poisoned[3] = math.nan
    others = torch.arange(9) != 3
    for a, b in zip(both(poisoned, teacher, kind, each_cpu), (loss, stats, grad), strict=True):
        kept = (a[:, others], b[:, others]) if a.shape[0] == 6 else (a[others], b[others])
        assert torch.equal(*kept)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "chi2"])
def test_independent_of_alignment_and_stride(kind: str, each_cpu: str) -> None:
    student, teacher = (3 * torch.randn(2, 5, 133)).unbind()
    want = both(student, teacher, kind, each_cpu)

    def moved(x: Tensor, offset: int, pad: int) -> Tensor:
        buffer = torch.full((offset + 5 * (133 + pad),), math.nan)
        view = buffer[offset:].view(5, 133 + pad)[:, :133]
        view.copy_(x)
        return view

    for offset, pad in ((1, 0), (3, 2), (0, 11)):
        got = both(moved(student, offset, pad), moved(teacher, 5 - offset, pad + 1), kind, each_cpu)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_reproducible(kind: str, impl: str) -> None:
    student, teacher = torch.randn(2, 6, 301).unbind()
    first, second = (both(student, teacher, kind, impl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


logit = st.floats(-20, 20, width=32)
rows = st.integers(1, 24).flatmap(
    lambda v: st.tuples(
        st.lists(logit, min_size=v, max_size=v), st.lists(logit, min_size=v, max_size=v)
    )
)
quick = settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
BOUNDED = [kind for kind in KINDS if kind not in ("chi2", "alpha_beta")]


def tensors(pair: tuple[list[float], list[float]]) -> tuple[Tensor, Tensor]:
    return torch.tensor(pair[0]), torch.tensor(pair[1])


@quick
@given(pair=rows, kind=st.sampled_from(list(KINDS)))
def test_never_negative_and_zero_for_itself(
    pair: tuple[list[float], list[float]], kind: str, kernel_impl: str
) -> None:
    """Exactly so in a kernel; the reference, in its place without native code, sums terms of both
    signs in fp32."""
    rounding = 0.0 if HAS_NATIVE else 1e-5  # alpha_beta(x, x) reached 1.04e-6
    student, teacher = tensors(pair)
    assert divergence(student, teacher, kind, impl=kernel_impl) >= -rounding
    itself = student.clone().requires_grad_()
    loss = divergence(itself, student, kind, impl=kernel_impl)
    assert -rounding <= loss < 1e-6 + rounding
    assert torch.autograd.grad(loss, itself)[0].abs().max() < 1e-5


@quick
@given(pair=rows, kind=st.sampled_from(list(KINDS)))
def test_positive_where_the_rows_differ(
    pair: tuple[list[float], list[float]], kind: str, kernel_impl: str
) -> None:
    student, teacher = tensors(pair)
    apart = (torch.softmax(student, -1) - torch.softmax(teacher, -1)).abs().max()
    if apart > 1e-2:
        assert divergence(student, teacher, kind, impl=kernel_impl) > 1e-5


@quick
@given(pair=rows, kind=st.sampled_from(BOUNDED), shift=st.integers(-64, 64))
def test_shifts_of_the_logits_change_nothing(
    pair: tuple[list[float], list[float]], kind: str, shift: int, kernel_impl: str
) -> None:
    student, teacher = (torch.round(x * 64) / 64 for x in tensors(pair))  # exact after a shift
    want = divergence(student, teacher, kind, impl=kernel_impl)
    for moved in (
        (student + shift, teacher),
        (student, teacher + shift),
        (student + 7, teacher - 9),
    ):
        close(divergence(*moved, kind, impl=kernel_impl), want, rtol=2e-5, atol=2e-6)


@quick
@given(pair=rows, kind=st.sampled_from([k for k in BOUNDED if k != "adaptive_kl"]), data=st.data())
def test_permuted_vocabulary(
    pair: tuple[list[float], list[float]], kind: str, data: st.DataObject, kernel_impl: str
) -> None:
    """adaptive_kl is left out: which of two equal tokens is in its head hangs on their order."""
    student, teacher = tensors(pair)
    order = torch.tensor(data.draw(st.permutations(range(len(student)))))
    leaf, permuted = student.clone().requires_grad_(), student[order].requires_grad_()
    a = divergence(leaf, teacher, kind, impl=kernel_impl)
    b = divergence(permuted, teacher[order], kind, impl=kernel_impl)
    close(a, b, rtol=2e-5, atol=2e-6)
    if kind != "tvd":  # its gradient jumps where p = q
        (grad_a,), (grad_b,) = torch.autograd.grad(a, leaf), torch.autograd.grad(b, permuted)
        close(grad_a[order], grad_b, rtol=1e-4, atol=2e-5)


@quick
@given(pair=rows, kind=st.sampled_from(list(KINDS)), pad=st.integers(1, 40))
def test_padding_both_sides_changes_nothing(
    pair: tuple[list[float], list[float]], kind: str, pad: int, kernel_impl: str
) -> None:
    student, teacher = tensors(pair)
    padding = torch.full((pad,), -math.inf)
    want = divergence(student, teacher, kind, impl=kernel_impl)
    padded = torch.cat([student, padding]).requires_grad_()
    got = divergence(padded, torch.cat([teacher, padding]), kind, impl=kernel_impl)
    close(got, want, rtol=2e-5, atol=2e-6)
    assert (torch.autograd.grad(got, padded)[0][len(student) :] == 0).all()


@quick
@given(pair=rows)
def test_acceptance_is_one_minus_tvd(
    pair: tuple[list[float], list[float]], kernel_impl: str
) -> None:
    student, teacher = tensors(pair)
    stats = divergence_with_stats(student, teacher, "tvd", impl=kernel_impl)
    close(stats.acceptance, 1 - stats.loss, rtol=1e-5, atol=2e-6)
    assert 0 <= stats.student_entropy < math.log(len(student)) + 1e-5


@quick
@given(pair=rows, kind=st.sampled_from(list(KINDS)))
def test_gradient_of_a_row_sums_to_zero(
    pair: tuple[list[float], list[float]], kind: str, kernel_impl: str
) -> None:
    """Since D does not change when all logits move together."""
    student, teacher = tensors(pair)
    student.requires_grad_()
    (grad,) = torch.autograd.grad(divergence(student, teacher, kind, impl=kernel_impl), student)
    if torch.isfinite(grad).all():
        assert grad.sum().abs() <= 1e-5 * max(1.0, float(grad.abs().max())) * len(grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_a_maximum_far_from_the_beginning(
    kind: str, dtype: torch.dtype, each_cpu: str
) -> None:
    """The arg-max needs the maximum itself: here it is a little above the first columns', so that
    nothing else would miss it; the first two rows agree on it."""
    student, teacher = (2 * torch.randn(2, 4, 5120)).clamp(max=5.0).unbind()
    student[:, 4500] = teacher[:2, 4500] = 7.0
    teacher[2:, 3000] = 7.0
    student, teacher = student.to(dtype), teacher.to(dtype)
    got = divergence_with_stats(student, teacher, kind, reduction="none", impl=each_cpu)
    want = divergence_with_stats(
        student.double(), teacher.double(), kind, reduction="none", impl="reference"
    )
    assert got.argmax_agreement.tolist() == [1.0, 1.0, 0.0, 0.0]
    for name in want._fields[1:]:
        close(getattr(got, name).double(), getattr(want, name), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# chi2 is beyond fp32 here, and adaptive_kl's head may end one token earlier.
@pytest.mark.parametrize("kind", [k for k in BOUNDED if k != "adaptive_kl"] + ["alpha_beta"])
@pytest.mark.parametrize("rise", [20.0, 70.0, 95.0, 3000.0, -3000.0])
def test_maximum_far_from_the_beginning(
    rise: float, kind: str, dtype: torch.dtype, each_cpu: str
) -> None:
    """Sweeps guess the maximum from the first columns: one beyond exp's range, or a block of -inf,
    must cost time and nothing else."""
    student, teacher = (2 * torch.randn(2, 3, 5000)).unbind()
    student[:, 3000:3100] += rise
    teacher[:, 3050:3200] += rise
    student[1, 1024:2048] = teacher[1, 1024:2048] = -math.inf
    student, teacher = student.to(dtype), teacher.to(dtype)
    exact = student.double().requires_grad_()
    want = divergence(exact, teacher.double(), kind, reduction="none", impl="reference")
    (slope,) = torch.autograd.grad(want.sum(), exact)
    grad_error = 2e-6 if dtype == torch.float32 else 4e-3
    leaf = student.clone().requires_grad_()
    loss = divergence(leaf, teacher, kind, reduction="none", impl=each_cpu)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    close(loss.double(), want, rtol=2e-5, atol=2e-6)
    close(grad.double(), slope, rtol=grad_error, atol=grad_error)
    over = divergence(leaf * 1, teacher, kind, reduction="sum", overwrite_logits=True)
    close(over.double(), want.sum(), rtol=2e-5, atol=2e-6)
    (grad,) = torch.autograd.grad(over, leaf)
    close(grad.double(), slope, rtol=grad_error, atol=grad_error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise", [0.05, 0.1, 0.3, 0.5, 0.8, 1.5])
@pytest.mark.parametrize("kind", KINDS)
def test_from_near_to_far(kind: str, noise: float, dtype: torch.dtype, each_cpu: str) -> None:
    """The CPU kernels sum rows that are far apart by other formulas: exact on either side of the
    change, which these KLs of 1e-3 to 1 straddle."""
    teacher = (2 * torch.randn(6, 2100)).to(dtype)
    student = (teacher.float() + noise * torch.randn(6, 2100)).to(dtype)
    close_to_exact(kind, {}, student, teacher, each_cpu)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("jsd", {"beta": 2**-6}),
        ("jsd", {"beta": 1 - 2**-6}),
        ("skew_forward_kl", {"alpha": 1 - 2**-5}),
        ("skew_reverse_kl", {"alpha": 1 - 2**-5}),
        ("alpha_beta", {"alpha": 0.06, "beta": 0.9}),
        ("alpha_beta", {"alpha": 0.02, "beta": 0.03}),
        ("alpha_beta", {"alpha": 1.5, "beta": 2.0}),
        ("alpha_beta", {"alpha": -0.5, "beta": 1.2}),
    ],
)
def test_parameters_near_their_ends(kind: str, shape: dict[str, float], each_cpu: str) -> None:
    """KLs of about 1, yet values of 1e-3, or terms that cancel."""
    teacher = 2 * torch.randn(6, 2100)
    close_to_exact(kind, shape, teacher + 1.2 * torch.randn(6, 2100), teacher, each_cpu)


def close_to_exact(
    kind: str, shape: dict[str, float], student: Tensor, teacher: Tensor, impl: str
) -> None:
    exact = student.double().requires_grad_()
    want = divergence(exact, teacher.double(), kind, reduction="none", impl="reference", **shape)
    (slope,) = torch.autograd.grad(want.sum(), exact)
    leaf = student.clone().requires_grad_()
    loss = divergence(leaf, teacher, kind, reduction="none", impl=impl, **shape)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    close(loss.double(), want.detach(), rtol=1e-5, atol=0)
    error = (grad.double() - slope).norm(dim=1) / slope.norm(dim=1)
    assert error.max() <= (3e-5 if student.dtype == torch.float32 else 4e-3)


def test_head_with_equal_tokens_in_two_blocks(each_cpu: str) -> None:
    """Of equal tokens the first belong to adaptive_kl's head, also where a later block of the sweep
    has a larger maximum than the one before."""
    top = torch.linspace(6.4, 6.9, 32)
    teacher = torch.full((32, 4096), -12.0)
    teacher[:, 3] = 0
    teacher[:, [700, 3100, 3200, 3300]] = top[:, None]
    student = torch.randn(32, 4096)
    student[:, [700, 3200]] += 6
    exact = divergence(
        student.double(), teacher.double(), "adaptive_kl", reduction="none", impl="reference"
    )
    loss = divergence(student, teacher, "adaptive_kl", reduction="none", impl=each_cpu)
    close(loss.double(), exact, rtol=1e-5, atol=0)


def test_head_that_ends_among_many_equal_tokens(each_cpu: str) -> None:
    teacher = torch.randn(4, 1500)
    teacher[:, torch.randperm(1500)[:700]] = 4.0
    student = torch.randn(4, 1500)
    exact = divergence(
        student.double(), teacher.double(), "adaptive_kl", reduction="none", impl="reference"
    )
    loss = divergence(student, teacher, "adaptive_kl", reduction="none", impl=each_cpu)
    close(loss.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_labels_in_whole_blocks(kind: str, dtype: torch.dtype, each_cpu: str) -> None:
    """Rows longer than a block of the CPU kernels, which then write bf16 gradients directly."""
    student, teacher = torch.randn(2, 4, 2100).to(dtype).unbind()
    labels = torch.tensor([5, 1023, 1024, 2099])
    options = {"labels": labels, "label_weight": 0.4, "z_loss": 0.01, "reduction": "sum"}
    exact = student.double().requires_grad_()
    want = divergence(exact, teacher.double(), kind, impl="reference", **options)
    (slope,) = torch.autograd.grad(want, exact)
    for overwrite in (False, True):
        leaf = student.clone().requires_grad_()
        loss = divergence(
            leaf * 1, teacher, kind, impl=each_cpu, overwrite_logits=overwrite, **options
        )
        (grad,) = torch.autograd.grad(loss, leaf)
        close(loss.double(), want.detach(), rtol=1e-5, atol=0)
        close(grad.double(), slope, rtol=4e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
