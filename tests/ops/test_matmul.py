"""`matmul`: the table of cases on every instruction set, exact products of any shape and layout,
and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from pydistill import _native, _registry
from pydistill.ops.matmul import OP as OPERATOR
from pydistill.ops.matmul import matmul
from pydistill.reference.matmul import matmul_reference
from pydistill.testing import Case, load
from pydistill.testing.cases.matmul import LAYOUTS, lay

OP = "matmul"
TABLE = [case for case in load(OP) if "bench" not in case.marks]
HAS_NATIVE = _registry.has_kernel("matmul_out", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
equal = torch.testing.assert_close


def whole(m: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers: exact in every dtype, and so are fp32 sums of their products."""
    return torch.randint(-8, 9, (m, n)).to(dtype)


@pytest.mark.parametrize("case", TABLE, ids=repr)
def test_case(case: Case, check_everywhere: Callable[[Case], None]) -> None:
    check_everywhere(case)


def test_table_covers_what_it_should() -> None:
    assert len({case.id for case in load(OP)}) == len(load(OP))
    assert {case.dtypes for case in TABLE} == {
        (a, b, out) for a in DTYPES for b in DTYPES for out in DTYPES
    }
    for layout in LAYOUTS:
        assert any(case.id.startswith(layout) for case in TABLE)


def test_reference_is_the_sum_of_products() -> None:
    a, b = torch.randn(4, 5, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    want = torch.stack([torch.stack([(a[i] * b[:, j]).sum() for j in range(3)]) for i in range(4)])
    equal(matmul_reference(a, b), want)
    equal(matmul(a, b), want)
    assert matmul(a, b.bfloat16()).dtype == torch.float64


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 70), st.integers(0, 300), st.integers(0, 110),
    st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS[:5]), st.sampled_from(LAYOUTS[:5]), st.sampled_from(LAYOUTS[:4]),
    st.booleans(), st.booleans(), st.sampled_from(_native.supported_capabilities() or ["none"]),
)  # fmt: skip
def test_exact_products_of_any_shape(
    m: int, k: int, n: int,
    a_dtype: torch.dtype, b_dtype: torch.dtype, out_dtype: torch.dtype,
    a_layout: str, b_layout: str, out_layout: str,
    accumulate: bool, narrow: bool, capability: str,
) -> None:  # fmt: skip
    if not HAS_NATIVE:
        pytest.skip("the native library has no matmul; run `make build`")
    a, b = whole(m, k, a_dtype), whole(k, n, b_dtype)
    out_dtype = torch.float32 if accumulate else out_dtype
    before = whole(m, n, out_dtype)
    want = a.double() @ b.double() + (before.double() if accumulate else 0)
    room = lay(before, out_layout)
    around = room._base.clone() if room._base is not None else None
    with _native.use_capability(capability):
        matmul(
            lay(a, a_layout), lay(b, b_layout), out=room, accumulate=accumulate, narrow=narrow,
            impl="cpu",
        )  # fmt: skip
    assert torch.equal(room, want.float().to(out_dtype))
    if around is not None and room.numel():  # nothing beside the result was written
        lay_of = room._base.isnan() if room._base.numel() != room.numel() else None
        assert lay_of is None or torch.equal(lay_of, around.isnan())


def test_results_do_not_depend_on_threads(each_cpu: str) -> None:
    shapes = [(64, 700, 900), (900, 700, 64), (3, 2000, 1500), (1500, 2000, 3), (300, 300, 300)]
    for m, k, n in shapes:
        for b_layout in ("rows", "columns"):
            a, b = torch.randn(m, k).bfloat16(), lay(torch.randn(k, n), b_layout)
            torch.set_num_threads(1)
            want = matmul(a, b, impl=each_cpu)
            for threads in (2, 3, 7):
                torch.set_num_threads(threads)
                assert torch.equal(matmul(a, b, impl=each_cpu), want)


def test_shared_panels_in_several_blocks(each_cpu: str) -> None:
    """A shared operand too big to be packed at once."""
    k = 40000
    a, b = whole(230, k, torch.bfloat16), whole(k, 240, torch.bfloat16)
    want = a.float() @ b.float()  # sums stay below 2^24
    equal(matmul(a, b, impl=each_cpu), want, rtol=0, atol=0)
    equal(matmul(b.t(), a.t(), impl=each_cpu), want.t(), rtol=0, atol=0)


def test_sums_are_fp32(impl: str) -> None:
    """bf16 sums would stop at 256."""
    a, b = torch.ones(2, 5000, dtype=torch.bfloat16), torch.ones(5000, 3, dtype=torch.bfloat16)
    equal(matmul(a, b, impl=impl), torch.full((2, 3), 5000.0), rtol=0, atol=0)


@pytest.mark.parametrize("m", [3, 40])
def test_narrow_rounds_an_fp32_operand_beside_a_bf16_one(m: int, each_cpu: str) -> None:
    """Once, to the nearest, and only there, where the processor multiplies bf16."""
    a, b = torch.randn(m, 301), torch.randn(301, 70).bfloat16()
    bound = 1.01 * 303 * 2.0**-24 * (a.abs().double() @ b.abs().double())
    products = _native.capability() in ("avx512_bf16", "amx")
    for left in (a, a.t().contiguous().t()):
        for right in (b, b.t().contiguous().t()):
            used = left.bfloat16() if products else left
            exact = (left.double() @ right.double(), used.double() @ right.double())
            for narrow, want in zip((False, True), exact, strict=True):
                got = matmul(left, right, narrow=narrow, impl=each_cpu).double()
                assert bool(((got - want).abs() <= bound).all())
                got = matmul(right.t(), left.t(), narrow=narrow, impl=each_cpu).double().t()
                assert bool(((got - want).abs() <= bound).all())
    wide = torch.randn(301, 70)
    assert torch.equal(matmul(a, wide, narrow=True, impl=each_cpu), matmul(a, wide, impl=each_cpu))
    half = wide.half()
    assert torch.equal(matmul(a, half, narrow=True, impl=each_cpu), matmul(a, half, impl=each_cpu))


def test_default_and_torch_paths() -> None:
    a, b = whole(5, 8, torch.bfloat16), whole(8, 6, torch.bfloat16)
    want = a.float() @ b.float()
    assert torch.equal(matmul(a, b), want)
    out = torch.ones(5, 6)
    assert matmul(a, b, out=out, accumulate=True) is out and torch.equal(out, want + 1)
    assert matmul(a, b, out_dtype=torch.float16).dtype == torch.float16


def test_what_other_devices_run() -> None:
    from pydistill.ops.matmul import _torch_mm

    for a_dtype, b_dtype, out_dtype in [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float16, torch.float32),
    ]:
        a, b = whole(5, 3, a_dtype), whole(3, 6, b_dtype)
        for accumulate in (False, True):
            out = torch.ones(5, 6, dtype=out_dtype)
            _torch_mm(a, b, accumulate, out)
            assert torch.equal(out, (a.float() @ b.float() + accumulate).to(out_dtype))


def test_version_counter(impl: str) -> None:
    out = torch.zeros(3, 3, requires_grad=True) * 1
    loss = out.square().sum()
    matmul(whole(3, 3), whole(3, 3), out=out.detach(), impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck() -> None:
    arguments = (torch.randn(3, 4), torch.randn(4, 5), True, False, torch.randn(3, 5))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(_registry.overload("matmul_out", "cpu"), arguments, test_utils=tests)


def refused(error: type[Exception], match: str, *arguments: Any, **more: Any) -> None:
    for impl in ("auto", "reference"):
        with pytest.raises(error, match=match):
            matmul(*arguments, impl=impl, **more)


def test_what_it_refuses() -> None:
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    refused(ValueError, r"\(3, 4\) and \(3, 4\); they must be", a, a)
    refused(ValueError, "they must be", a[0], b)
    refused(ValueError, "needs out", a, b, accumulate=True)
    refused(ValueError, r"out has shape \(5, 3\); it must be \(3, 5\)", a, b, out=torch.empty(5, 3))
    half = torch.empty(3, 5, dtype=torch.bfloat16)
    refused(ValueError, "accumulate=True needs an out of torch.float32", a, b, out=half,
            accumulate=True)  # fmt: skip
    refused(ValueError, "is not out's", a, b, out=half, out_dtype=torch.float32)
    refused(ValueError, r"strides \(20, 2\)", a, b, out=torch.empty(6, 10)[::2, ::2])
    refused(ValueError, r"strides \(0, 1\)", a, b, out=torch.empty(1, 5).expand(3, 5))
    refused(TypeError, "b has dtype torch.int64", a, torch.ones(4, 5, dtype=torch.int64))
    refused(RuntimeError, "detach a", a.clone().requires_grad_(), b)
    refused(ValueError, "a is on meta|b is on meta", a, b.to("meta"))
    with torch.no_grad():
        matmul(a.clone().requires_grad_(), b)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(a, torch.ones_like(a))
        refused(RuntimeError, "drops tangents", dual, b)
    with pytest.raises(ValueError, match="impl='triton' cannot run matmul here"):
        matmul(a, b, impl="triton")


def test_aliases_are_refused() -> None:
    memory = torch.randn(40)
    square = memory[:16].view(4, 4)
    refused(ValueError, "out shares memory with a", square, torch.randn(4, 4), out=square)
    refused(ValueError, "out shares memory with b", torch.randn(4, 4), square, out=square.t())
    late = memory[15:31].view(4, 4)
    refused(ValueError, "out shares memory with a", square, torch.randn(4, 4), out=late)
    beside = memory[16:32].view(4, 4)
    assert torch.equal(matmul(square, square, out=beside), matmul(square, square))
    op = _registry.overload("matmul_out", "cpu")
    for arguments in ((square, beside, False, False, square), (beside, square, False, False, late)):
        with pytest.raises(RuntimeError, match="out must not share memory"):
            op(*arguments)


def test_raw_op_is_memory_safe(native_impl: str) -> None:
    op = _registry.overload("matmul_out", native_impl)
    a, b, out = torch.randn(3, 4), torch.randn(4, 5), torch.empty(3, 5)
    for match, arguments in {
        "do not agree": (a, b.t(), False, False, out),
        "fp32, bf16 or fp16": (a.double(), b, False, False, out),
        "a must have a unit stride": (torch.randn(6, 8)[::2, ::2], b, False, False, out),
        "accumulate needs": (a, b, True, False, out.bfloat16()),
        "no element twice": (a, b, False, False, torch.empty(1, 5).expand(3, 5)),
        "must be a matrix": (a[0], b, False, False, out),
    }.items():
        with pytest.raises(RuntimeError, match=match):
            op(*arguments)


def test_the_package_does_not_export_it() -> None:
    import pydistill

    assert not hasattr(pydistill, "matmul") and OPERATOR.kernels == ["matmul_out"]
