"""`topk_logprobs`: order and values against a sort written out once more, the table of cases, and
what is peculiar to a selection."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from pydistill import TopkLogprobs, _native, _registry, divergence, topk_divergence, topk_logprobs
from pydistill.testing import Case, load

OP = "topk_logprobs"
TABLE = [case for case in load(OP) if "bench" not in case.marks]
HAS_NATIVE = _registry.has_kernel("topk_logprobs_fwd", "cpu")
close = torch.testing.assert_close


def by_hand(row: list[float], k: int, temperature: float) -> tuple[list[int], list[float], float]:
    """ids, log-probabilities and log of the tail's mass of one row, in Python's fp64."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    z = [(row[i] - row[order[0]]) / temperature for i in order]

    def log_sum(terms: list[float]) -> float:
        top = max(terms, default=-math.inf)
        return (
            top + math.log(math.fsum(math.exp(t - top) for t in terms)) if top > -math.inf else top
        )

    log_z = log_sum(z)
    kept = [i if row[i] > -math.inf else -1 for i in order[:k]]
    return kept, [x - log_z for x in z[:k]], log_sum(z[k:]) - log_z


def check_by_hand(logits: Tensor, k: int, found: TopkLogprobs, temperature: float = 1.0) -> None:
    for row, ids, logprobs, tail in zip(logits.tolist(), *found[:3], strict=True):
        want_ids, want, want_tail = by_hand(row, k, temperature)
        assert ids.tolist() == want_ids
        close(logprobs.double(), torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=1e-5)
        close(tail.double(), torch.tensor(want_tail, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_reference_against_a_sort() -> None:
    x = torch.randn(4, 12, dtype=torch.float64).round(decimals=1)
    x[1, 4:] = -math.inf
    for k in (1, 5, 11, 12):
        found = topk_logprobs(x, k, temperature=1.7, impl="reference")
        check_by_hand(x, k, found, 1.7)
        close(found.lse, torch.logsumexp(x / 1.7, -1))
        assert found.ids.dtype == torch.int64 and found.logprobs.dtype == torch.float64


@pytest.mark.parametrize("case", TABLE, ids=repr)
def test_case(case: Case, check_everywhere: Callable[[Case], None]) -> None:
    check_everywhere(case)


def test_table_covers_what_it_should() -> None:
    assert len({case.id for case in load(OP)}) == len(load(OP))
    for dtype in _registry.OPERATORS[OP].dtypes:
        of_dtype = [case for case in TABLE if case.dtypes == (dtype,)]
        assert {1, 31, 1000, 4096, 5000} <= {case.shape[1] for case in of_dtype}
        assert any(case.options["k"] == case.shape[1] > 1000 for case in of_dtype)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int, float]:
    """Rows with ties, zeros of both signs and infinities, any stride, and a K."""
    v = draw(st.one_of(st.integers(1, 70), st.integers(1000, 2200)))
    k = draw(st.one_of(st.integers(1, min(v, 80)), st.integers(1, v)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(2, v, generator=g) * draw(st.sampled_from([0.1, 1.0, 8.0, 60.0]))
    if draw(st.booleans()):
        x = x.round()
    if draw(st.booleans()):
        share = draw(st.sampled_from([0.1, 0.5, 0.99]))
        x[:, 1:] = torch.where(torch.rand(2, v - 1, generator=g) < share, -math.inf, x[:, 1:])
    order = draw(st.sampled_from(["any", "rising", "falling"]))
    if order != "any":
        x = x.sort(-1, descending=order == "falling").values
    x = x.to(dtype)
    if draw(st.booleans()):
        x = x.T.contiguous().T
    else:
        x = torch.cat([x, torch.full((2, draw(st.integers(0, 5))), math.nan, dtype=dtype)], 1)[
            :, :v
        ]
    return x, k, draw(st.sampled_from([1.0, 0.3, 4.0]))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_any_rows(problem: tuple[Tensor, int, float]) -> None:
    x, k, temperature = problem
    if bool((x == -math.inf).all(-1).any()):
        x = torch.where(torch.arange(x.shape[1]) == 0, 1.0, x)
    for name in _native.supported_capabilities() if HAS_NATIVE else []:
        with _native.use_capability(name):
            found = topk_logprobs(x, k, temperature=temperature, impl="cpu")
        check_by_hand(x, k, found, temperature)
    check_by_hand(x, k, topk_logprobs(x, k, temperature=temperature, impl="reference"), temperature)


def test_backends_agree_on_equal_logits(each_cpu: str) -> None:
    """The chosen are those of the smallest ids, wherever a block or a pick of candidates ends."""
    x = torch.zeros(1, 6000)
    x[0, [17, 1023, 1024, 2047, 4096, 5999]] = 1.0
    for k in (1, 3, 6, 7, 64, 513, 1024, 1025, 5999):
        ids = topk_logprobs(x, k, impl=each_cpu).ids[0].tolist()
        top = [17, 1023, 1024, 2047, 4096, 5999]
        assert ids == (top + [i for i in range(6000) if i not in top])[:k]


@pytest.fixture(scope="module")
def everywhere() -> tuple[Tensor, Tensor]:
    """Rows of which the i-th has its best token at i, and the order of all of them."""
    v = 2 * 1024 + 77
    x = torch.randn(v, v, generator=torch.Generator().manual_seed(0))
    x[torch.arange(v), torch.arange(v)] = 30.0
    return x, torch.sort(x, dim=-1, descending=True, stable=True).indices


@pytest.mark.parametrize("k", [1, 3, 64, 500])
def test_every_place_of_the_best(k: int, everywhere: tuple[Tensor, Tensor], each_cpu: str) -> None:
    """No lane, block or group of them is passed over."""
    x, order = everywhere
    ids = topk_logprobs(x, k, impl=each_cpu).ids
    assert torch.equal(ids[:, 0], torch.arange(len(x))) and torch.equal(ids, order[:, :k])


def test_best_spread_over_every_group(each_cpu: str) -> None:
    """A first bar made of fewer groups than K would lie above the K-th best."""
    for k in range(2, 70):
        for high in {8, 16, 32, 64, k - 1}:
            x = torch.rand(1, 1300)
            x[0, :high] = 9.0
            ids = topk_logprobs(x, k, impl=each_cpu).ids
            assert torch.equal(ids, torch.sort(x, descending=True, stable=True).indices[:, :k])


@pytest.mark.parametrize("rise", [5.0, 30.0, 60.0, 95.0, 200.0, 5000.0, 1e30])
def test_tails_beyond_the_range_of_exp(rise: float, each_cpu: str) -> None:
    x = torch.randn(4, 2500)
    x[1] = 0.25  # a tail of tokens equal to the last chosen
    x[2, 100:] = -math.inf
    x[:, [7, 2400]] = rise
    x[3, [7, 2400]] = torch.tensor([rise, 2 * rise])
    for k in (1, 2, 3, 40):
        found = topk_logprobs(x, k, impl=each_cpu)
        want = topk_logprobs(x.double(), k, impl="reference")
        assert torch.equal(found.ids, want.ids)
        close(found.tail_logprob.double(), want.tail_logprob, rtol=1e-6, atol=1e-6)
        close(found.logprobs.double(), want.logprobs, rtol=1e-6, atol=1e-6)


def test_near_certain_tokens_keep_their_digits(each_cpu: str) -> None:
    """log P(top) = -log1p(rest) down to where fp64 sums would round to 1."""
    gap = torch.tensor([5.0, 15.0, 20.0, 40.0, 60.0])
    x = torch.zeros(5, 1100)
    x[:, 500] = gap
    found = topk_logprobs(x, 1, impl=each_cpu)
    want = -torch.log1p(1099 * torch.exp(-gap.double()))
    # 3.7e-6 by the scalar kernel, which adds 512 equal terms in a row
    close(found.logprobs[:, 0].double(), want, rtol=5e-6, atol=0)


def test_mass_is_one(impl: str) -> None:
    found = topk_logprobs(3 * torch.randn(50, 700), 20, impl=impl)
    total = torch.logsumexp(torch.cat([found.logprobs, found.tail_logprob[:, None]], 1), 1)
    close(total, torch.zeros(50), rtol=0, atol=2e-6)


def test_subnormals_as_zeros(each_cpu: str) -> None:
    x = torch.zeros(1, 1024)
    x[0, 0::2] = -0.0
    torch.set_flush_denormal(True)
    try:
        found = topk_logprobs(x, 5, impl=each_cpu)
    finally:
        torch.set_flush_denormal(False)
    assert found.ids.tolist() == [[0, 1, 2, 3, 4]]


def test_the_largest_numbers(impl: str) -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([[largest, -largest, largest, 0.0]]).repeat(1, 500)
    found = topk_logprobs(x, 3, impl=impl)
    assert found.ids.tolist() == [[0, 2, 4]]
    close(found.logprobs, torch.full((1, 3), -math.log(1000)))
    close(found.tail_logprob, torch.tensor([math.log(997 / 1000)]))
    assert found.lse.item() == largest


def test_rows_without_a_softmax(impl: str) -> None:
    x = torch.randn(7, 1500)
    good = topk_logprobs(x, 4, impl=impl)
    x[1, 1499], x[2, 3], x[3], x[4], x[5, 700] = math.nan, math.inf, -math.inf, math.nan, -math.nan
    found = topk_logprobs(x, 4, impl=impl)
    for got, before in zip(found, good, strict=True):
        assert torch.equal(got[[0, 6]], before[[0, 6]])
        bad = got[1:6]
        assert (bad == -1).all() if got is found.ids else bad.isnan().all()


def test_feeds_topk_divergence(impl: str) -> None:
    student, teacher = torch.randn(6, 300), 2 * torch.randn(6, 300)
    t = topk_logprobs(teacher, 300, impl=impl)
    got = topk_divergence(
        student, t.logprobs, t.ids, tail_logprob=t.tail_logprob, reduction="none", impl=impl
    )
    close(got, divergence(student, teacher, reduction="none", impl=impl), rtol=1e-5, atol=1e-6)
    teacher[2, 5:] = -math.inf  # empty slots, and a tail of no mass
    teacher[3, 0] = math.nan
    t = topk_logprobs(teacher, 20, impl=impl)
    assert t.ids[2, 5:].eq(-1).all() and t.tail_logprob[2] == -math.inf
    options: dict[str, Any] = {"reduction": "none", "impl": impl}
    got = topk_divergence(student, t.logprobs, t.ids, tail_logprob=t.tail_logprob, **options)
    assert got.isnan().tolist() == [False, False, False, True, False, False]
    full = divergence(student, teacher, **options)
    close(got[2], full[2], rtol=1e-5, atol=1e-6)


def test_rows_alone_and_on_more_threads(each_cpu: str) -> None:
    x = torch.randn(40, 2100)
    whole = topk_logprobs(x, 30, impl=each_cpu)
    torch.set_num_threads(3)
    for a, b in zip(topk_logprobs(x, 30, impl=each_cpu), whole, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(topk_logprobs(x[4:5], 30, impl=each_cpu), whole, strict=True):
        assert torch.equal(a, b[4:5])


X = torch.randn(4, 9)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "none": ({"k": 0}, ValueError, "k=0 is outside 1 to 9"),
    "too many": ({"k": 10}, ValueError, "k=10 is outside 1 to 9"),
    "k of float": ({"k": 2.0}, TypeError, "k is a float"),
    "k of bool": ({"k": True}, TypeError, "k is a bool"),
    "temperature": (
        {"temperature": 0.0},
        ValueError,
        r"temperature=0 is outside \(1e-30, 1e\+30\)",
    ),
    "infinite": ({"temperature": math.inf}, ValueError, "temperature=inf is outside"),
    "not a number": ({"temperature": math.nan}, ValueError, "temperature=nan is outside"),
    "tensor": ({"temperature": torch.ones(4)}, TypeError, "temperature is a Tensor"),
    "integers": ({"logits": X.long()}, TypeError, "logits has dtype torch.int64"),
    "scalar": ({"logits": X[0, 0]}, ValueError, r"logits has shape \(\)"),
    "no tokens": ({"logits": X[:, :0]}, ValueError, r"logits has shape \(4, 0\)"),
    "list": ({"logits": [1.0]}, TypeError, "logits is a list"),
    "unknown impl": ({"impl": "cudnn"}, ValueError, "impl='cudnn' is not known"),
    "another device": ({"impl": "triton"}, ValueError, "impl='triton' cannot run topk_logprobs"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str, impl: str) -> None:
    arguments, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        topk_logprobs(**{"logits": X, "k": 3, "impl": impl, **arguments})


def test_kernels_flag_a_temperature_they_cannot_use(native_impl: str) -> None:
    for temperature in (0.0, -1.0, math.inf, math.nan):
        ids, logprobs = torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3)
        tail, lse = torch.zeros(4), torch.zeros(4)
        op = _registry.overload("topk_logprobs_fwd", native_impl)
        op(X, 3, temperature, ids, logprobs, tail, lse)
        assert (ids == -1).all() and all(x.isnan().all() for x in (logprobs, tail, lse))


def test_memory_safety_is_checked_below_python(native_impl: str) -> None:
    op = _registry.overload("topk_logprobs_fwd", native_impl)
    good = {
        "k": 3, "ids": torch.zeros(4, 3).long(), "logprobs": torch.zeros(4, 3),
        "tail": torch.zeros(4), "lse": torch.zeros(4),
    }  # fmt: skip
    bad = {
        "k": 10, "ids": torch.zeros(4, 2).long(), "logprobs": torch.zeros(3, 4).T,
        "tail": torch.zeros(3), "lse": torch.zeros(4).double(),
    }  # fmt: skip
    for name in bad:
        call = {**good, name: bad[name]}
        with pytest.raises(RuntimeError, match=f"{name} (is|must be)"):
            op(X, call["k"], 1.0, *(call[n] for n in ("ids", "logprobs", "tail", "lse")))


def test_no_gradient(impl: str) -> None:
    x = torch.randn(3, 19, requires_grad=True)
    found = topk_logprobs(x, 4, impl=impl)
    assert not any(y.requires_grad for y in found)
    plain = topk_logprobs(x.detach(), 4, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    slope = torch.func.grad(lambda s: topk_logprobs(s, 4, impl=impl).logprobs.sum() + s.sum())
    close(slope(x.detach()), torch.ones(3, 19))


def test_a_tangent_is_never_dropped(impl: str) -> None:
    x, tangent = torch.randn(2, 3, 19)
    f = lambda s: topk_logprobs(s, 4, impl=impl).logprobs
    with pytest.raises(RuntimeError, match="has no derivatives"):
        torch.func.jvp(f, (x,), (tangent,))
    with pytest.raises(RuntimeError, match="has no derivatives"):
        torch.func.jvp(torch.vmap(f), (x[None],), (tangent[None],))
    with pytest.raises(RuntimeError, match="has no derivatives"):
        torch.func.jacfwd(f)(x)
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="has no derivatives"):
            f(forward_ad.make_dual(x, tangent))
        close(f(x), topk_logprobs(x, 4, impl=impl).logprobs)  # no tangent, no complaint


def test_one_row_without_a_prefix(impl: str) -> None:
    found, want = topk_logprobs(X[2], 3, impl=impl), topk_logprobs(X, 3, impl=impl)
    assert all(torch.equal(a, b[2]) for a, b in zip(found, want, strict=True))
    assert found.lse.shape == () and found.ids.shape == (3,)


def test_vmap(impl: str) -> None:
    batch = torch.randn(5, 6, 19)
    for dim in range(3):
        f = lambda s: topk_logprobs(s, 4, impl=impl)
        got = torch.vmap(f, in_dims=dim)(batch)
        want = [f(x) for x in batch.movedim(dim, 0)]
        for i, y in enumerate(got):
            assert torch.equal(y, torch.stack([w[i] for w in want]))
    nested = torch.vmap(torch.vmap(lambda s: topk_logprobs(s, 4, impl=impl)))(batch)
    for a, b in zip(nested, topk_logprobs(batch, 4, impl=impl), strict=True):
        assert torch.equal(a, b)


def test_opcheck() -> None:
    out = (torch.zeros(4, 3).long(), torch.zeros(4, 3), torch.zeros(4), torch.zeros(4))
    op = _registry.overload("topk_logprobs_fwd", "cpu")
    tests = (
        "test_schema",
        "test_faketensor",
        "test_aot_dispatch_static",
        "test_aot_dispatch_dynamic",
    )
    torch.library.opcheck(op, (X, 3, 1.5, *out), test_utils=tests)
