"""What the fused-linear operators share: tiles, gradients of a head's tensors, autograd,
compile."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pydistill import (
    _registry,
    linear_divergence,
    linear_token_logprob,
    linear_topk_divergence,
)
from pydistill.ops import _linear_head
from pydistill.reference import divergence as dense_rows
from pydistill.reference import token_logprob as token_rows
from pydistill.reference import topk_divergence as sparse_rows
from pydistill.reference.divergence import KINDS

OP = "linear_divergence"
close = torch.testing.assert_close
Call = Callable[..., Tensor]


def dense(rows: int, v: int, h: int = 8) -> Call:
    theirs, head = torch.randn(rows, 5), torch.randn(v, 5)
    labels = torch.randint(0, v, (rows,))
    options: dict[str, Any] = {"labels": labels, "label_weight": 0.3, "z_loss": 0.01}

    def call(student_hidden: Tensor, student_weight: Tensor, /, **more: Any) -> Tensor:
        return linear_divergence(
            student_hidden, student_weight, theirs, head, "jsd", **{**options, **more}
        )

    return call


def sparse(rows: int, v: int, h: int = 8) -> Call:
    log_p, ids = torch.log_softmax(torch.randn(rows, v), -1).topk(5)
    return partial(linear_topk_divergence, topk_logprobs=log_p, topk_ids=ids, kind="reverse_kl")


def token(rows: int, v: int, h: int = 8) -> Call:
    """Both outputs of `linear_token_logprob` in one loss."""
    ids = torch.randint(0, v, (rows,))

    def call(
        hidden: Tensor, weight: Tensor, /, reduction: str = "mean", gradient: str = "recompute",
        **more: Any,
    ) -> Tensor:  # fmt: skip
        assert gradient == "recompute"
        found = linear_token_logprob(hidden, weight, ids, **more)
        loss = 0.3 * found.entropy - found.logprob
        return loss if reduction == "none" else loss.mean()

    return call


OPS = pytest.mark.parametrize("make", [dense, sparse, token])
DIVERGENCES = pytest.mark.parametrize("make", [dense, sparse])
# An operator of two outputs a row has no gradient in forward.
WAYS = pytest.mark.parametrize(
    ("make", "mode"),
    [(m, way) for m in (dense, sparse) for way in ("recompute", "in_forward")]
    + [(token, "recompute")],
)


def student(
    rows: int, v: int, h: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(rows, h).to(dtype).requires_grad_(),
        torch.randn(v, h).to(dtype).requires_grad_(),
    )


@WAYS
def test_tiles_do_not_matter(make: Any, mode: str, each_cpu: str, monkeypatch: Any) -> None:
    call, (hidden, weight) = make(13, 100), student(13, 100)
    mask = torch.arange(13) % 5 != 2
    outcomes = []
    for rows, tile_rows, tile_columns in ((192, 1024, 2048), (3, 4, 7), (1, 1, 99)):
        monkeypatch.setattr(_linear_head, "BLOCK_ROWS", rows)
        monkeypatch.setattr(_linear_head, "TILE_ROWS", tile_rows)
        monkeypatch.setattr(_linear_head, "TILE_COLUMNS", tile_columns)
        loss = call(hidden, weight, mask=mask, gradient=mode, impl=each_cpu)
        outcomes.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    for other in outcomes[1:]:
        for got, want in zip(other, outcomes[0], strict=True):
            close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 24, 25, 40])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]
)
@pytest.mark.usefixtures("native_impl")
def test_where_the_gradients_of_logits_are_kept_does_not_matter(
    rows: int, dtypes: Any, monkeypatch: Any
) -> None:
    """In the memory of the weight's gradient (H = 8 rows of it), beside it (up to 3 H, bf16), or
    not at all; and with a softcap, a bias, and tokens that the teacher does not have."""
    monkeypatch.setattr(_linear_head, "BLOCK_ROWS", 3)
    monkeypatch.setattr(_linear_head, "TILE_COLUMNS", 7)
    call = dense(rows, 50)
    hidden, weight = (x.detach().to(d) for x, d in zip(student(rows, 60), dtypes, strict=True))
    bias = torch.randn(60)
    wanted = []
    for kept in (True, False):
        if not kept:
            monkeypatch.setattr(_linear_head.Kept, "of", lambda *_: None)
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        loss = call(
            *leaves[:2], student_bias=leaves[2], student_softcap=5.0, student_logit_scale=1.5,
            vocab="min", gradient="in_forward",
        )  # fmt: skip
        loss.backward()
        wanted.append((loss.detach(), *(x.grad for x in leaves)))
    half = dtypes == (torch.bfloat16,) * 2  # dz is rounded where it is kept
    for got, want in zip(*wanted, strict=True):
        size = float(want.abs().max())
        close(got, want, rtol=0.02 if half else 1e-5, atol=(0.01 if half else 1e-6) * size)


def test_blocks_are_bounded_in_bytes() -> None:
    assert _linear_head.block_rows(100) == _linear_head.BLOCK_ROWS
    assert _linear_head.block_rows(1 << 20) * (1 << 22) <= _linear_head.BLOCK_BYTES
    assert _linear_head.block_rows(1 << 40) == 1
    for size in (0, 1, 191, 192, 193, 1024):
        for unit in (1, 12, 500):
            parts = list(_linear_head.spans(size, 192, unit))
            assert [i for s in parts for i in range(s.start, s.stop)] == list(range(size))
            assert all(0 < s.stop - s.start <= 192 for s in parts)
            assert len(parts) == -(-size // 192)
            assert unit != 12 or all((s.stop - s.start) % 12 == 0 for s in parts[:-1])


@OPS
def test_any_upstream_and_a_second_backward(make: Any, impl: str) -> None:
    call, (hidden, weight) = make(6, 50), student(6, 50)
    loss = call(hidden, weight, reduction="none", impl=impl)
    upstream = torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5, 1e-3])
    first = torch.autograd.grad(loss, (hidden, weight), upstream, retain_graph=True)
    second = torch.autograd.grad(3 * loss, (hidden, weight), upstream)
    for a, b in zip(first, second, strict=True):
        close(b, 3 * a)
    assert not first[0][2].any()
    alone = [call(hidden, weight, reduction="none", impl=impl)[i] for i in range(6)]
    parts = [torch.autograd.grad(x, weight)[0] * u for x, u in zip(alone, upstream, strict=True)]
    close(first[1], torch.stack(parts).sum(0), rtol=1e-5, atol=1e-6)


@DIVERGENCES
def test_in_forward_is_for_one_backward(make: Any, native_impl: str) -> None:
    call, (hidden, weight) = make(6, 50), student(6, 50)
    loss = call(hidden, weight, gradient="in_forward", impl=native_impl)
    (2.5 * loss).backward(retain_graph=True)
    want = torch.autograd.grad(2.5 * call(hidden, weight, impl=native_impl), (hidden, weight))
    close((hidden.grad, weight.grad), want, rtol=1e-5, atol=1e-7)
    with pytest.raises(RuntimeError, match="for one backward"):
        loss.backward()
    again = call(hidden, weight, gradient="in_forward", impl=native_impl)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(again, hidden, create_graph=True)
    with torch.no_grad():
        assert not call(hidden, weight, gradient="in_forward", impl=native_impl).requires_grad
    row_weight = torch.ones(6, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient to weight"):
        call(hidden, weight, weight=row_weight, gradient="in_forward", impl=native_impl)


@WAYS
def test_a_frozen_tensor_costs_no_product(
    make: Any, mode: str, each_cpu: str, monkeypatch: Any
) -> None:
    """Counted by the products that run: logits, hidden and weight."""
    products: list[tuple[int, ...]] = []
    plain = _linear_head.product

    def counting(a: Tensor, b: Tensor, out: Tensor, **more: Any) -> None:
        products.append(tuple(out.shape))
        plain(a, b, out, **more)

    monkeypatch.setattr(_linear_head, "product", counting)
    call = make(6, 50)
    for frozen in (0, 1):
        tensors = list(student(6, 50))
        tensors[frozen] = tensors[frozen].detach()
        products.clear()
        loss = call(*tensors, gradient=mode, impl=each_cpu)
        (grad,) = torch.autograd.grad(loss, tensors[1 - frozen])
        assert grad.shape in products and tensors[frozen].shape not in products


@OPS
def test_rows_that_do_not_count_cost_nothing(make: Any, each_cpu: str, monkeypatch: Any) -> None:
    rows: list[int] = []
    plain = _linear_head.Tiles.logits

    def counting(self: Any, at: slice, columns: slice) -> Tensor:
        rows.append(at.stop - at.start)
        return plain(self, at, columns)

    monkeypatch.setattr(_linear_head.Tiles, "logits", counting)
    call, (hidden, weight) = make(9, 50), student(9, 50)
    with torch.no_grad():
        hidden[4] = torch.nan
    mask = torch.arange(9) % 4 != 0
    loss = call(hidden, weight, mask=mask, reduction="none", impl=each_cpu)
    grads = torch.autograd.grad(loss.sum(), (hidden, weight))
    assert set(rows) == {6}
    assert loss.isfinite().all() and all(g.isfinite().all() for g in grads)
    assert not loss[~mask].any() and not grads[0][~mask].any()


@WAYS
def test_under_autocast(make: Any, mode: str, impl: str) -> None:
    """fp32 master weights beside bf16 hidden states: products keep fp32 sums, gradients their
    tensors' dtypes."""
    call, (hidden, weight) = make(6, 50), student(6, 50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = torch.nn.functional.linear(hidden, torch.eye(8))
        assert half.dtype == torch.bfloat16
        loss = call(half, weight, gradient=mode, impl=impl)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == torch.float32 and {g.dtype for g in grads} == {torch.float32}
    exact = half.detach().float().requires_grad_()
    want = call(exact, weight, impl="reference")
    close(loss, want, rtol=1e-5, atol=1e-6)
    close(grads[1], torch.autograd.grad(want, weight)[0], rtol=1e-4, atol=1e-6)


@OPS
def test_second_derivatives_raise(make: Any, native_impl: str) -> None:
    call, (hidden, weight) = make(6, 50), student(6, 50)
    loss = call(hidden, weight, impl=native_impl)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only; pass impl='reference'"):
        grad.sum().backward()
    tangent = torch.ones_like(hidden)
    with pytest.raises(RuntimeError, match="no forward mode; pass impl='reference'"):
        torch.func.jvp(
            lambda h: call(h, weight.detach(), impl=native_impl), (hidden.detach(),), (tangent,)
        )
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    if make is not dense:
        (first,) = torch.autograd.grad(call(*exact, impl="reference"), exact[0], create_graph=True)
        assert torch.autograd.grad(first.sum(), exact[1])[0].any()


@OPS
def test_func_grad(make: Any, kernel_impl: str) -> None:
    call, (hidden, weight) = make(6, 50), student(6, 50)
    f = partial(call, impl=kernel_impl)
    got = torch.func.grad(f, argnums=(0, 1))(hidden.detach(), weight.detach())
    close(got, torch.autograd.grad(f(hidden, weight), (hidden, weight)))


@OPS
def test_results_do_not_depend_on_threads(make: Any, each_cpu: str) -> None:
    call, (hidden, weight) = make(40, 700), student(40, 700)
    outcomes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        loss = call(hidden, weight, impl=each_cpu)
        outcomes.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    for other in outcomes[1:]:
        for a, b in zip(outcomes[0], other, strict=True):
            assert torch.equal(a, b)


def test_strided_tensors(impl: str) -> None:
    call = dense(6, 50)
    hidden, weight = torch.randn(8, 6).T, torch.randn(50, 16)[:, ::2]
    close(
        call(hidden, weight, impl=impl), call(hidden.contiguous(), weight.contiguous(), impl=impl)
    )


HALVES = (torch.bfloat16, torch.float16)
PAIRS = [(a, b) for a in (*HALVES, torch.float32) for b in (*HALVES, torch.float32) if a != b]


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_operands_of_one_type_are_narrowed_to_bf16_alone(dtypes: Any) -> None:
    assert _linear_head.common_type(*dtypes, narrow=False) == torch.float32
    narrowed = set(dtypes) == {torch.float32, torch.bfloat16}
    want = torch.bfloat16 if narrowed else torch.float32
    assert _linear_head.common_type(*dtypes, narrow=True) == want


def test_a_gpu_multiplies_operands_of_one_type(monkeypatch: Any) -> None:
    """By tensors that say they are a GPU's, and have no memory."""
    seen: list[tuple[str, torch.dtype, torch.dtype]] = []
    for name in ("matmul", "product_in_one_type"):
        monkeypatch.setattr(
            _linear_head, name,
            lambda a, b, *_, name=name, **__: seen.append((name, a.dtype, b.dtype)),
        )  # fmt: skip
    for device, mixed in (("cpu", "matmul"), ("cuda", "product_in_one_type")):
        for dtypes in (*PAIRS, *((x, x) for x in (*HALVES, torch.float32))):
            seen.clear()
            with FakeTensorMode():
                a, b = (torch.empty(4, 4, dtype=dtype, device=device) for dtype in dtypes)
                _linear_head.product(a, b, torch.empty(4, 4, device=device))
            assert seen == [("matmul" if dtypes[0] == dtypes[1] else mixed, *dtypes)]


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_product_in_one_type(dtypes: Any, transposed: bool, narrow: bool, monkeypatch: Any) -> None:
    """The value, in tiles, of numbers below fp16's smallest."""
    seen: set[torch.dtype] = set()
    plain = _linear_head.matmul

    def matmul(a: Tensor, b: Tensor, **more: Any) -> None:
        seen.update((a.dtype, b.dtype))
        plain(a, b, **more)

    monkeypatch.setattr(_linear_head, "TILE_COLUMNS", 8)
    monkeypatch.setattr(_linear_head, "matmul", matmul)
    a, b = torch.randn(6, 21).to(dtypes[0]), torch.randn(21, 19).to(dtypes[1])
    if dtypes[0] == torch.float32:
        a *= 1e-9
    if transposed:
        a, b = b.T, a.T
    want, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    rounded = narrow and set(dtypes) == {torch.float32, torch.bfloat16}
    types = {torch.bfloat16 if rounded else torch.float32}
    for accumulate in (False, True):
        out = torch.full_like(want, 1e-9 if accumulate else torch.nan, dtype=torch.float32)
        _linear_head.product_in_one_type(a, b, out, accumulate=accumulate, narrow=narrow)
        error = (out - (want + 1e-9 * accumulate)).abs() / (size + 1e-9)
        assert error.max() <= (2**-8 if rounded else 1e-6) and seen == types


@DIVERGENCES
@pytest.mark.parametrize("mode", ["recompute", "in_forward"])
@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_below_fp16s_range_are_not_lost_on_a_gpu(
    make: Any, mode: str, dtype: torch.dtype, kernel_impl: str, monkeypatch: Any
) -> None:
    """Those of a token's logits, in a mean over a million tokens; their sum is within the range."""
    call, (hidden, weight) = make(2048, 60), student(2048, 60, dtype=dtype)
    hidden = (hidden[0] + hidden / 8).detach()
    options = {"reduction": "mean", "denominator": float(1 << 20)}
    exact = weight.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(call(hidden.double(), exact, impl="reference", **options), exact)
    assert want.abs().max() > 100 * torch.finfo(torch.float16).smallest_normal / 1024
    monkeypatch.setattr(
        _linear_head, "product",
        lambda a, b, out, accumulate=False, narrow=False: _linear_head.product_in_one_type(
            a, b, out, accumulate=accumulate, narrow=narrow
        ),
    )  # fmt: skip
    loss = call(hidden, weight, impl=kernel_impl, gradient=mode, **options)
    (got,) = torch.autograd.grad(loss, weight)
    close(got.double(), want, rtol=2**-7, atol=2**-7 * float(want.abs().max()))


@pytest.mark.parametrize("shape", [(0, 8), (50, 0)])
def test_an_empty_weight_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"\[V, H\], neither of them 0"):
        dense(3, 50)(torch.randn(3, shape[1]), torch.randn(shape))


def opcheck(op: str, tensors: Any, numbers: Any, outputs: int, saved: int) -> None:
    """That the schemas of `op`'s kernels say what they write."""
    values, counted = [torch.zeros(4) for _ in range(outputs)], tensors[3]
    statistics, grads = torch.zeros(4, saved), (torch.zeros(4, 8), torch.zeros(30, 8))
    upstreams = [torch.rand(4) * counted for _ in range(outputs)]
    grads = (*grads, torch.zeros(0))
    calls: dict[str, tuple[Any, ...]] = {
        "fwd": (*tensors, *numbers, *values, statistics),
        "bwd": (*tensors, statistics, *upstreams, *numbers, *grads),
    }
    if outputs == 1:
        calls["gradients"] = (*tensors, *upstreams, *numbers, *values, *grads)
    for name, arguments in calls.items():
        kernel = _registry.overload(f"{op}_{name}", "cpu")
        kernel(*arguments)
        torch.library.opcheck(kernel, arguments, test_utils=("test_schema", "test_faketensor"))


HEAD = (torch.randn(4, 8), torch.randn(30, 8), None, torch.tensor([True, False, True, True]))


def test_opcheck_dense() -> None:
    params = torch.tensor([[1.5, 0.0, 0.5]] * 4)
    tensors = (*HEAD, torch.randn(4, 5), torch.randn(30, 5), None, None, params)
    numbers = (1.0, 0.0, 1.0, 0.0, KINDS["jsd"].id, 1.0, 0.0, 0.5, True, 0.0, 0.0, 30)
    opcheck("linear_divergence", tensors, numbers, 1, dense_rows.SAVED)


@pytest.mark.parametrize("label_weight", [0.0, 0.3])
def test_opcheck_sparse(label_weight: float) -> None:
    log_p, ids = torch.log_softmax(torch.randn(4, 30), -1).topk(5)
    tail, params = torch.log1p(-log_p.exp().sum(-1)), torch.tensor([[1.5, 0.5]] * 4)
    labels = torch.tensor([0, 29, 3, 7]) if label_weight else None
    tensors = (*HEAD, ids, log_p, tail, params, labels)
    mode = sparse_rows.TAILS["bucket"]
    numbers = (1.0, 0.0, KINDS["jsd"].id, mode, 1.0, 0.5, True, label_weight, 0.0)
    saved = sparse_rows.SAVED + (dense_rows.SAVED if label_weight else 0)
    opcheck("linear_topk_divergence", tensors, numbers, 1, saved)


def test_opcheck_token() -> None:
    tensors = (*HEAD, torch.tensor([0, 29, 3, 7]), torch.tensor([0.5, 1.0, 2.0, 1.0]))
    opcheck("linear_token_logprob", tensors, (1.0, 0.0, 1.0), 2, token_rows.SAVED)
