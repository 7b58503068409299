"""`causal_conv1d`: torch's own convolution, the table of cases, and what is peculiar to sequences:
pieces, packing, states."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from pydistill import _native, _registry, causal_conv1d
from pydistill.testing import Case, check, load
from pydistill.testing.cases.causal_conv1d import conv_case

OP = "causal_conv1d"
TABLE = [case for case in load(OP) if "bench" not in case.marks]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
close = torch.testing.assert_close


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> Tensor:
    """torch's convolution of the tokens behind those of the state."""
    given = torch.cat([state, x], 1).transpose(1, 2)
    out = F.conv1d(given, weight[:, None], bias, groups=weight.shape[0]).transpose(1, 2)
    return F.silu(out) if silu else out


def same(got: Tensor, want: Tensor, impl: str) -> None:
    """Bit for bit, of kernels; torch's sigmoid of a vector is not its sigmoid of a number."""
    if impl == "cpu" and _native.available():
        assert torch.equal(got, want)
    else:
        close(got, want, rtol=2 * torch.finfo(got.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4, 9])
def test_reference_against_torch(width: int, silu: bool) -> None:
    x, weight, bias = torch.randn(2, 7, 5), torch.randn(5, width), torch.randn(5)
    tensors = [t.double().requires_grad_() for t in (x, weight, bias)]
    state = torch.randn(2, width - 1, 5, dtype=torch.float64, requires_grad=True)
    out, final = causal_conv1d(
        *tensors, activation="silu" if silu else None, initial_state=state, output_final_state=True
    )
    want = plain(*tensors, state, silu)
    close(out, want)
    assert final is not None
    assert torch.equal(final, torch.cat([state, tensors[0]], 1)[:, 7:])
    up, leaves = torch.randn_like(out), [*tensors, state] if width > 1 else tensors
    close(*(torch.autograd.grad(y, leaves, up) for y in (out, want)))


def test_derivatives_of_the_reference() -> None:
    tensors = [torch.randn(s, dtype=torch.float64) for s in ((1, 9, 2), (2, 3), (2,), (3, 2, 2))]
    ends = torch.tensor([0, 4, 4, 9])

    def f(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        found = causal_conv1d(
            x, weight, bias, activation="silu", initial_state=state, output_final_state=True,
            cu_seqlens=ends, impl="reference",
        )  # fmt: skip
        return tuple(t for t in found if t is not None)

    leaves = tuple(t.requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("case", TABLE, ids=repr)
def test_case(case: Case, check_everywhere: Callable[[Case], None]) -> None:
    check_everywhere(case)


def test_table_covers_what_it_should() -> None:
    assert len({case.id for case in load(OP)}) == len(load(OP))
    for dtype in DTYPES:
        mine = [case for case in TABLE if case.dtypes == (dtype,)]
        assert {1, 3, 4, 7} <= {case.options["width"] for case in mine}
        assert any(case.shape[1] > 512 for case in mine) and any(c.shape[2] > 1024 for c in mine)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1,) * 12, (2, 1, 5, 4), (300, 256, 1, 44)])
def test_pieces_give_what_the_whole_gives(
    sizes: tuple[int, ...], dtype: torch.dtype, impl: str
) -> None:
    """Bit for bit: a token's row depends on its window alone."""
    x = torch.randn(2, sum(sizes), 37).to(dtype)
    weight, bias = torch.randn(37, 4), torch.randn(37)
    call: dict[str, Any] = {"activation": "silu", "output_final_state": True, "impl": impl}
    want, last = causal_conv1d(x, weight, bias, **call)
    outs, state = [], None
    for part in x.split(sizes, 1):
        out, state = causal_conv1d(part, weight, bias, initial_state=state, **call)
        outs.append(out)
    same(torch.cat(outs, 1), want, impl)
    assert state is not None and last is not None and torch.equal(state, last)


@pytest.mark.parametrize("ends", [(1, 2, 3), (0, 0, 5, 5), (256, 256, 700), (255, 300, 511, 513)])
def test_packed_sequences_are_those_alone(ends: tuple[int, ...], impl: str) -> None:
    """Outputs, states and gradients; the weight's are sums in another order."""
    count, total = len(ends), ends[-1]
    x = torch.randn(1, total, 20, requires_grad=True)
    weight, bias = torch.randn(20, 4, requires_grad=True), torch.randn(20, requires_grad=True)
    before = torch.randn(count, 3, 20, requires_grad=True)
    call: dict[str, Any] = {"activation": "silu", "output_final_state": True, "impl": impl}
    cu = torch.tensor([0, *ends], dtype=torch.int32)
    packed, last = causal_conv1d(x, weight, bias, initial_state=before, cu_seqlens=cu, **call)
    alone = [
        causal_conv1d(x[:, a:b], weight, bias, initial_state=before[i : i + 1], **call)
        for i, (a, b) in enumerate(pairwise((0, *ends)))
    ]
    states = [state for _, state in alone if state is not None]
    same(packed, torch.cat([out for out, _ in alone], 1), impl)
    assert last is not None and torch.equal(last, torch.cat(states))
    up, up_state = torch.randn_like(packed), torch.randn_like(last)
    leaves = (x, before, weight, bias)
    got = torch.autograd.grad((packed, last), leaves, (up, up_state))
    apart = (torch.cat([out for out, _ in alone], 1), torch.cat(states))
    want = torch.autograd.grad(apart, leaves, (up, up_state))
    close(got[:2], want[:2], rtol=1e-6, atol=1e-6)
    close(got[2:], want[2:], rtol=1e-4, atol=1e-4)


def test_a_bad_number_stays_in_its_window(impl: str) -> None:
    """NaN at one token of one channel: W outputs of that channel, none of the next sequence."""
    x = torch.randn(1, 20, 70)
    x[0, 8, 33] = torch.nan
    cu = torch.tensor([0, 10, 20])
    leaf = x.requires_grad_()
    out, _ = causal_conv1d(
        leaf, torch.randn(70, 4), activation="silu", cu_seqlens=cu, impl=impl
    )  # fmt: skip
    bad = torch.zeros(20, 70, dtype=torch.bool)
    bad[8:10, 33] = True
    assert torch.equal(out[0].isnan(), bad)
    (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    assert set(grad[0].isnan().nonzero()[:, 1].tolist()) == {33}
    assert not grad[0, 10:].isnan().any() and not grad[0, :5].isnan().any()


def test_left_padding(impl: str) -> None:
    """Tokens of 0 before a text are what no tokens are."""
    x, weight = torch.randn(1, 6, 10), torch.randn(10, 4)
    padded = F.pad(x, (0, 0, 5, 0))
    want, _ = causal_conv1d(x, weight, impl=impl)
    same(causal_conv1d(padded, weight, impl=impl)[0][:, 5:], want, impl)


@pytest.mark.parametrize("at", [-100.0, -20.0, -1.278, 0.0, 20.0, 100.0])
def test_silu_keeps_its_digits(at: float, native_impl: str) -> None:
    """Far below zero too, where 1 - sigmoid is 1 and sigmoid tiny."""
    x = torch.full((1, 1, 5), at).requires_grad_()
    out, _ = causal_conv1d(x, torch.ones(5, 1), activation="silu", impl=native_impl)
    exact = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    value = exact * torch.sigmoid(exact)
    close(out.double(), value.detach().expand(1, 1, 5), rtol=3e-7, atol=1e-38)
    (slope,) = torch.autograd.grad(value, exact)
    (got,) = torch.autograd.grad(out.sum(), x)
    near = 1e-7 if at == -1.278 else 0.0  # where the slope itself is 0
    close(got.double(), slope.expand(1, 1, 5), rtol=3e-7, atol=1e-37 + near)


def test_results_do_not_depend_on_threads(native_impl: str) -> None:
    x = torch.randn(2, 900, 700, requires_grad=True)
    weight, bias = torch.randn(700, 4, requires_grad=True), torch.randn(700, requires_grad=True)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out, _ = causal_conv1d(x, weight, bias, activation="silu", impl=native_impl)
        found.append((out, *torch.autograd.grad(out, (x, weight, bias), x.detach())))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_strides_and_upstreams(impl: str) -> None:
    """A slice of a projection, channels first, and upstreams that are expanded or transposed."""
    wide = torch.randn(2, 9, 50, requires_grad=True)
    weight = torch.randn(4, 12).T  # not contiguous
    for view in (wide[..., 7:19], wide.transpose(1, 2)[:, :, :9].transpose(1, 2)[..., 3:15]):
        want, _ = causal_conv1d(view.contiguous(), weight.contiguous(), impl=impl)
        out, _ = causal_conv1d(view, weight, impl=impl)
        assert torch.equal(out, want) and out.is_contiguous()
        for up in (torch.randn(1, 1, 12).expand(2, 9, 12), torch.randn(12, 9, 2).permute(2, 1, 0)):
            got, expected = (
                torch.autograd.grad(y, wide, up, retain_graph=True)[0] for y in (out, want)
            )
            assert torch.equal(got, expected)
    x = wide.detach()[..., :12].transpose(0, 1).contiguous().transpose(0, 1)
    want, _ = causal_conv1d(x.contiguous(), weight, impl=impl)
    assert torch.equal(causal_conv1d(x, weight, impl=impl)[0], want)


def test_what_needs_no_gradient_gets_none(impl: str) -> None:
    x, weight, bias = torch.randn(1, 5, 8), torch.randn(8, 4), torch.randn(8)
    state = torch.randn(1, 3, 8)
    for chosen in range(4):
        leaves = [t.clone() for t in (x, weight, bias, state)]
        leaves[chosen].requires_grad_()
        out, _ = causal_conv1d(*leaves[:3], initial_state=leaves[3], impl=impl)
        out.sum().backward()
        assert [t.grad is not None for t in leaves] == [i == chosen for i in range(4)]
    assert not causal_conv1d(x, weight, bias, impl=impl)[0].requires_grad


def test_fp64_is_the_references(native_impl: str) -> None:
    """A weight or a bias of fp64 too."""
    x, weight, bias = torch.randn(1, 6, 5), torch.randn(5, 4), torch.randn(5)
    for given in (
        (x.double(), weight, bias),
        (x, weight.double(), bias),
        (x, weight, bias.double()),
    ):
        out, _ = causal_conv1d(*given)
        assert out.dtype == given[0].dtype
        close(out.float(), causal_conv1d(x, weight, bias, impl="reference")[0])
        with pytest.raises(ValueError, match="impl='cpu' cannot run causal_conv1d here"):
            causal_conv1d(*given, impl=native_impl)


def test_backward_twice_and_second_derivatives(impl: str) -> None:
    x = torch.randn(1, 6, 8, requires_grad=True)
    out, _ = causal_conv1d(x, torch.randn(8, 4), activation="silu", impl=impl)
    first, again = (torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    if impl == "reference":
        assert torch.autograd.grad(grad.sum(), x)[0].abs().sum() > 0
    else:
        with pytest.raises(RuntimeError, match="first derivatives only; pass impl='reference'"):
            torch.autograd.grad(grad.sum(), x)


def test_vmap_and_functional_gradients(impl: str) -> None:
    x, weight, bias = torch.randn(3, 1, 6, 5), torch.randn(3, 5, 4), torch.randn(5)
    state = torch.randn(3, 1, 3, 5)

    def f(x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
        out, _ = causal_conv1d(
            x, weight, bias, activation="silu", initial_state=state, impl=impl
        )  # fmt: skip
        return out

    def total(x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
        return (f(x, weight, state) ** 2).sum()

    got = torch.func.vmap(f)(x, weight, state)
    close(got, torch.stack([f(*t) for t in zip(x, weight, state, strict=True)]))
    got = torch.func.vmap(f, in_dims=(None, 0, None))(x[0], weight, state[0])
    close(got, torch.stack([f(x[0], w, state[0]) for w in weight]))
    slopes = torch.func.vmap(torch.func.grad(total, argnums=(0, 1, 2)))(x, weight, state)
    each = [
        torch.func.grad(total, argnums=(0, 1, 2))(*t) for t in zip(x, weight, state, strict=True)
    ]
    close(slopes, tuple(torch.stack(t) for t in zip(*each, strict=True)))


def test_mapped_lengths_are_refused(kernel_impl: str) -> None:
    x, weight = torch.randn(1, 6, 5), torch.randn(5, 4)
    ends = torch.tensor([[0, 2, 6], [0, 3, 6]])
    with pytest.raises(ValueError, match="cu_seqlens is mapped by vmap"):
        torch.func.vmap(lambda e: causal_conv1d(x, weight, cu_seqlens=e, impl=kernel_impl)[0])(ends)


@settings(max_examples=100, deadline=None)
@hypothesis.given(
    st.integers(1, 3), st.integers(0, 40), st.integers(4, 80), st.integers(1, 9),
    st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from(_native.supported_capabilities() or ["none"]),
)  # fmt: skip
def test_any_shape(
    batch: int, length: int, channels: int, width: int, dtype: torch.dtype, bias: bool,
    silu: bool, state: bool, strided: bool, capability: str,
) -> None:  # fmt: skip
    """Of less than four numbers there is often none that is not cancelled."""
    if not _native.available():
        pytest.skip("the native library has no causal_conv1d; run `make build`")
    case = conv_case(
        "any", batch, length, channels, width, dtype=dtype, bias=bias, silu=silu, state=state,
        strided=strided,
    )  # fmt: skip
    with _native.use_capability(capability):
        report = check(case, "cpu")
    assert report.ok, report.message


X, WEIGHT = torch.randn(2, 6, 5), torch.randn(5, 4)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x of two dimensions": ({"x": X[0]}, ValueError, r"x has shape \(6, 5\); pass \[B, T, D\]"),
    "x of integers": ({"x": X.long()}, TypeError, "x is torch.int64"),
    "no channels": ({"x": X[..., :0]}, ValueError, r"x has shape \(2, 6, 0\)"),
    "a conv1d's weight": (
        {"weight": WEIGHT[:, None]}, ValueError, r"weight has shape \(5, 1, 4\).*squeeze\(1\)",
    ),
    "taps first": ({"weight": WEIGHT.T}, ValueError, r"weight has shape \(4, 5\) and x 5 channels"),
    "no taps": ({"weight": WEIGHT[:, :0]}, ValueError, r"weight has shape \(5, 0\)"),
    "bias": ({"bias": torch.ones(4)}, ValueError, r"bias has shape \(4,\); pass \(5,\)"),
    "activation": ({"activation": "gelu"}, ValueError, "activation='gelu' is not known"),
    "state channels first": (
        {"initial_state": torch.zeros(2, 5, 3)}, ValueError,
        r"initial_state has shape \(2, 5, 3\); pass \(2, 3, 5\)",
    ),
    "state of another dtype": (
        {"initial_state": torch.zeros(2, 3, 5).bfloat16()}, TypeError,
        r"initial_state is torch.bfloat16 and x torch.float32; pass initial_state.to\(torch.fl",
    ),
    "lengths beside a batch": (
        {"cu_seqlens": torch.tensor([0, 6])}, ValueError, "x has 2 rows beside cu_seqlens",
    ),
    "lengths short of the end": (
        {"x": X[:1], "cu_seqlens": torch.tensor([0, 2, 5])}, ValueError,
        r"cu_seqlens is \[0, 2, 5\] for 6 tokens; pass offsets that rise from 0 to 6",
    ),
    "lengths that fall": (
        {"x": X[:1], "cu_seqlens": torch.tensor([0, 4, 3, 6])}, ValueError, "offsets that rise",
    ),
    "lengths of floats": (
        {"x": X[:1], "cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens is torch.floa",
    ),
    "no lengths": (
        {"x": X[:1], "cu_seqlens": torch.tensor([], dtype=torch.long)}, ValueError,
        r"cu_seqlens has shape \(0,\)",
    ),
    "unknown impl": ({"impl": "cudnn"}, ValueError, "impl='cudnn' is not known"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str, impl: str) -> None:
    given, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        causal_conv1d(**{"x": X, "weight": WEIGHT, "impl": impl, **given})


@pytest.mark.parametrize("starts", [[0, 7], [1, 6], [0, 4, 2, 6], []])
def test_kernels_refuse_starts_outside_their_memory(starts: list[int], native_impl: str) -> None:
    kernel = _registry.overload("causal_conv1d_fwd", native_impl)
    with pytest.raises(RuntimeError, match="starts must"):
        kernel(
            X[0], WEIGHT, None, None, torch.tensor(starts, dtype=torch.long), False,
            torch.empty(6, 5),
        )  # fmt: skip


@pytest.mark.parametrize("name", ["fwd", "bwd"])
def test_opcheck(name: str) -> None:
    x, weight, bias, state = (torch.randn(s) for s in ((6, 5), (5, 4), (5,), (2, 3, 5)))
    given = (x, weight, bias, state, torch.tensor([0, 2, 6]), True)
    outputs = (torch.zeros(6, 5),)
    if name == "bwd":
        outputs = (x.clone(), torch.zeros(6, 5), torch.zeros(2, 3, 5), torch.zeros(1, 5, 5))
    tests = (
        "test_schema",
        "test_faketensor",
        "test_aot_dispatch_static",
        "test_aot_dispatch_dynamic",
    )
    op = _registry.overload(f"causal_conv1d_{name}", "cpu")
    torch.library.opcheck(op, (*given, *outputs), test_utils=tests)
