"""`token_logprob`: the formulas written out once more, the table of cases, and what is peculiar to
one token a row."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydistill import TokenLogprob, _registry, token_logprob, token_logprob_jvp
from pydistill.ops.token_logprob import _forward_out, backward_reference
from pydistill.reference.token_logprob import DEPTH, LOG_Z, LOGPROB, MAX, SAVED, STATUS
from pydistill.testing import Case, load

OP = "token_logprob"
TABLE = [case for case in load(OP) if "bench" not in case.marks]
close = torch.testing.assert_close


def plain(logits: Tensor, ids: Tensor, t: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    log_q = torch.log_softmax(logits / t, -1)
    chosen = log_q.gather(-1, ids.long()[..., None]).squeeze(-1)
    return chosen, -torch.special.xlogy(log_q.exp(), log_q.exp()).sum(-1)


def pull(out: TokenLogprob | tuple[Tensor, ...], logits: Tensor, *ups: Tensor) -> Tensor:
    return torch.autograd.grad(tuple(out), logits, ups, retain_graph=True)[0]


@pytest.mark.parametrize("t", [1.0, 0.7, torch.tensor([[0.5], [1.0], [2.0], [3.0]])])
def test_reference_against_the_formulas(t: float | Tensor) -> None:
    logits = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 11, 5, 7])
    given = t.squeeze(1).double() if isinstance(t, Tensor) else t
    got, want = token_logprob(logits, ids, temperature=given), plain(logits, ids, t)
    ups = torch.randn(2, 4, dtype=torch.float64).unbind()
    close(tuple(got), want, rtol=1e-9, atol=1e-12)
    close(pull(got, logits, *ups), pull(want, logits, *ups), rtol=1e-8, atol=1e-11)


def test_gradients_of_the_maths_page() -> None:
    logits = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    ids, k = torch.tensor([2, 0, 8]), 1 / 0.8
    out = token_logprob(logits, ids, temperature=0.8)
    q = torch.softmax(k * logits, -1)
    one, zero = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    close(pull(out, logits, one, zero), k * (torch.nn.functional.one_hot(ids, 9) - q))
    close(pull(out, logits, zero, one), -k * q * (q.log() + out.entropy[:, None]))


@pytest.mark.parametrize("case", TABLE, ids=repr)
def test_case(case: Case, check_everywhere: Callable[[Case], None]) -> None:
    check_everywhere(case)


def test_table_covers_what_it_should() -> None:
    assert len({case.id for case in load(OP)}) == len(load(OP))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        widths = {case.shape[1] for case in TABLE if case.dtypes == (dtype,)}
        assert {1, 2, 31, 1000, 3000, 4096} <= widths


@pytest.mark.parametrize("rest", [-3.0, -12.0, -20.0, -50.0, -80.0])
@pytest.mark.parametrize("at", [0, 1500, 4999])
def test_peaked_rows_keep_their_digits(rest: float, at: int, impl: str) -> None:
    """logprob = -1e-5 or -1e-22: 1 + 1e-22 is 1, and yet both outputs and the gradient hold."""
    logits = torch.randn(3, 5000)
    logits[:, at] = torch.logsumexp(logits, 1) - rest
    ids = torch.tensor([at, at, (at + 1) % 5000])
    exact = logits.double().requires_grad_()
    leaf = logits.clone().requires_grad_()
    got = token_logprob(leaf, ids, impl=impl)
    # fp64 has too few digits for the plain formula too.
    d = exact.detach() - exact.detach()[:, at : at + 1]
    d[:, at] = -math.inf
    others = d.exp().sum(1)
    log_z = torch.log1p(others)
    entropy = log_z - (d.exp() * d.nan_to_num(neginf=0)).sum(1) / (1 + others)
    token = torch.where(ids == at, 0, d.gather(1, ids[:, None]).squeeze(1))
    close(got.logprob.double(), token - log_z, rtol=2e-6, atol=0)
    close(got.entropy.double(), entropy, rtol=2e-6, atol=0)
    one, zero = torch.ones(3), torch.zeros(3)
    slope = pull(got, leaf, one, zero).double()[0]
    close(slope[at], others[0] / (1 + others[0]), rtol=2e-6, atol=0)
    soft = pull(got, leaf, zero, one).double()[0]
    close(soft[at], -(entropy - log_z)[0] / (1 + others[0]), rtol=2e-6, atol=0)


def test_confident_rows_of_two_tokens(impl: str) -> None:
    """The whole range, against closed forms: q of the other token is sigmoid(-gap)."""
    gap = torch.linspace(0, 85, 341)
    logits = torch.stack([gap, torch.zeros_like(gap)], 1)
    got = token_logprob(logits, torch.zeros(341, dtype=torch.long), impl=impl)
    x = gap.double()
    close(got.logprob.double(), -torch.log1p((-x).exp()), rtol=2e-6, atol=0)
    entropy = torch.log1p((-x).exp()) + x * torch.sigmoid(-x)
    close(got.entropy.double(), entropy, rtol=2e-6, atol=0)


def test_uniform_rows(impl: str) -> None:
    for v in (1, 7, 1024, 5000):
        got = token_logprob(torch.full((2, v), -3.25), torch.tensor([0, v - 1]), impl=impl)
        close(got.entropy, torch.full((2,), math.log(v)), rtol=1e-6, atol=0)
        close(got.logprob, torch.full((2,), -math.log(v)), rtol=1e-6, atol=0)


def test_a_token_of_minus_infinity(impl: str) -> None:
    """Its probability is 0, its log-probability -inf, and the gradient is that of every other
    token: what raises it."""
    logits = torch.randn(2, 1030)
    logits[0, 1028] = logits[1, 3] = -math.inf
    logits.requires_grad_()
    ids = torch.tensor([1028, 0])
    out = token_logprob(logits, ids, impl=impl)
    assert out.logprob[0] == -math.inf and out.logprob[1].isfinite()
    close(out.entropy, plain(logits.nan_to_num(neginf=-1e30), ids)[1])
    one, zero = torch.ones(2), torch.zeros(2)
    want = torch.nn.functional.one_hot(ids, 1030) - torch.softmax(logits, -1)
    close(pull(out, logits, one, zero), want, rtol=1e-5, atol=1e-9)
    soft = pull(out, logits, zero, one)
    assert soft.isfinite().all() and soft[0, 1028] == 0 and soft[1, 3] == 0


def test_masked_rows_are_not_read(impl: str) -> None:
    logits, ids = torch.randn(4, 300), torch.tensor([5, -100, 299, 10**6])
    mask = torch.tensor([True, False, True, False])
    want = token_logprob(logits[mask], ids[mask], impl=impl)
    logits[~mask] = math.nan
    logits.requires_grad_()
    got = token_logprob(logits, ids, mask=mask, temperature=torch.ones(4), impl=impl)
    close(tuple(x[mask] for x in got), tuple(want))
    assert all(x[~mask].tolist() == [0, 0] for x in got)
    grad = pull(got, logits, torch.ones(4), torch.ones(4))
    assert (grad[~mask] == 0).all() and grad[mask].isfinite().all()


def test_shapes_strides_and_dtypes(impl: str) -> None:
    base = torch.randn(3, 50, 2)
    ids = torch.randint(0, 50, (3, 2))
    want = token_logprob(base.transpose(1, 2).contiguous(), ids, impl=impl)
    leaf = base.requires_grad_()
    got = token_logprob(leaf.transpose(1, 2), ids.int(), impl=impl)
    assert got.logprob.shape == (3, 2) and got.entropy.dtype == torch.float32
    assert torch.equal(got.logprob, want.logprob) and torch.equal(got.entropy, want.entropy)
    up = torch.randn(3, 2)
    spread = up[:, :, None].expand(3, 2, 5)[..., 0]  # an upstream that is not contiguous
    reference = plain(leaf.transpose(1, 2), ids)
    close(pull(got, leaf, spread, up), pull(reference, leaf, up, up), rtol=1e-4, atol=1e-6)
    alone = token_logprob(base[0, :, 0].detach(), ids[0, 0], impl=impl)
    assert alone.logprob.shape == () and torch.equal(alone.logprob, want.logprob[0, 0])
    wide = token_logprob(base.double().transpose(1, 2), ids)
    assert wide.logprob.dtype == torch.float64
    sliced = torch.randn(3, 70)[:, 5:55]
    ours = token_logprob(sliced, ids[:, 0], impl=impl)
    close(tuple(ours), plain(sliced, ids[:, 0]), rtol=1e-5, atol=1e-6)


Z = torch.randn(4, 9)
IDS = torch.tensor([0, 8, 3, 3])
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "id too large": (
        {"ids": torch.tensor([0, 9, 3, 3])},
        ValueError,
        "ids holds 9, outside the 9 tokens of logits; use 0 to 8, and mask=ids != 9",
    ),
    "id negative": ({"ids": torch.tensor([0, 1, -100, 3])}, ValueError, "ids holds -100, outside"),
    "ids of floats": ({"ids": IDS.float()}, TypeError, "ids is torch.float32"),
    "ids of a list": ({"ids": [0, 1, 2, 3]}, TypeError, "ids is list"),
    "ids of another shape": ({"ids": IDS[:3]}, ValueError, r"ids has shape \(3,\), logits the pre"),
    "ids like one-hot": ({"ids": IDS[:, None]}, ValueError, r"ids has shape \(4, 1\)"),
    "logits of integers": ({"logits": IDS[:, None]}, TypeError, "logits has dtype torch.int64"),
    "no vocabulary": ({"logits": Z[:, :0]}, ValueError, r"logits has shape \(4, 0\)"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature=0 is outside"),
    "temperature infinite": ({"temperature": math.inf}, ValueError, "temperature=inf is outside"),
    "temperature of a row": (
        {"temperature": torch.tensor([1.0, 1.0, -2.0, 1.0])},
        ValueError,
        "temperature=-2 is outside",
    ),
    "temperatures of two": ({"temperature": torch.ones(2)}, ValueError, "temperature has shape"),
    "temperature learned": (
        {"temperature": torch.ones(4, requires_grad=True)},
        ValueError,
        "temperature requires grad",
    ),
    "mask": ({"mask": torch.ones(4)}, TypeError, "mask is torch.float32"),
    "mask of another shape": ({"mask": torch.ones(3).bool()}, ValueError, "mask has shape"),
    "unknown impl": ({"impl": "cudnn"}, ValueError, "impl='cudnn' is not known"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str, impl: str) -> None:
    given, error, message = WRONG[name]
    call = {"logits": Z.clone(), "ids": IDS, "impl": impl, **given}
    with pytest.raises(error, match=message):
        token_logprob(**call)


def raw(name: str, impl: str) -> Callable[..., None]:
    """A kernel as it is registered; torch would dispatch the reference's to native code."""
    if impl == "reference":
        return {"fwd": _forward_out, "bwd": backward_reference}[name]
    return _registry.overload(f"token_logprob_{name}", impl)


def raw_forward(
    impl: str, logits: Tensor, ids: Tensor, *, counted: Any = None, params: Any = None, t: Any = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    out = (torch.full((rows,), 7.0), torch.full((rows,), 7.0), torch.full((rows, SAVED), 7.0))
    raw("fwd", impl)(logits, ids, counted, params, t, *out)
    return out


def test_flagged_rows(impl: str) -> None:
    """Where values are not read: ids and temperatures out of range make their row NaN. The rows are
    whole vectors: padding of -inf would be NaN by itself at such a temperature."""
    logits, ids = torch.randn(6, 128), torch.tensor([3, 128, -1, 0, 8, 1200])
    params = torch.tensor([1.0, 1.0, 1.0, -1.0, 2.0, 1.0])
    counted = torch.tensor([True, True, True, True, True, False])
    logprob, entropy, saved = raw_forward(impl, logits, ids, counted=counted, params=params)
    flagged = [False, True, True, True, False, False]
    assert logprob.isnan().tolist() == entropy.isnan().tolist() == flagged
    assert saved[:, STATUS].tolist() == [0, 1, 1, 0, 0, 0]
    assert logprob[5] == entropy[5] == 0 and (saved[5] == 0).all()
    sound = raw_forward(impl, logits, ids.clamp(0, 127), params=params)[2]
    statistics = [MAX, LOG_Z, DEPTH]  # of the row alone, so that those of tiles can be merged
    assert torch.equal(saved[1:3, statistics], sound[1:3, statistics])
    grad = torch.full((6, 128), 7.0)
    ups = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    backward = raw("bwd", impl)
    backward(logits, ids, params, saved, ups, 0 * ups, 1.0, grad)
    assert grad.isnan().all(1).tolist() == flagged and (grad[5] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_place", [False, True])
def test_backward_of_column_tiles(dtype: torch.dtype, in_place: bool, impl: str) -> None:
    """Tiles of columns, of any width and in place, give the whole row's gradient: what the fused
    linear operator is made of."""
    rows, v = 6, 4100
    logits = 2 * torch.randn(rows, v)
    logits[:3, 2100] += 25.0
    logits[5, 17] = -math.inf
    logits = logits.to(dtype)
    ids = torch.tensor([2100, 0, 2100, v - 1, 1023, 17])
    params = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.5, 1.0])
    saved = raw_forward(impl, logits, ids, params=params)[2]
    up, up_entropy = torch.randn(rows), torch.randn(rows)
    up_entropy[1] = 0.0
    up[4] = 0.0
    backward = raw("bwd", impl)
    whole = torch.full((rows, v), 7.0, dtype=dtype)
    backward(logits, ids, params, saved, up, up_entropy, 1.0, whole)
    bounds = [0, 1, 65, 1024, 2048, 2100, 2101, 4099, v]
    tiled = logits.clone() if in_place else torch.full((rows, v), 7.0, dtype=dtype)
    for begin, end in itertools.pairwise(bounds):
        source = tiled if in_place else logits
        tile, out = source[:, begin:end], tiled[:, begin:end]
        backward(tile, ids - begin, params, saved, up, up_entropy, 1.0, out)
    assert not whole.isnan().any()
    if impl == "cpu":
        assert torch.equal(tiled, whole)
    eps = torch.finfo(dtype).eps  # torch's exp of a vector is not its exp of a number
    close(tiled, whole, rtol=4 * eps, atol=1e-7)
    exact = logits.double().requires_grad_()
    out = token_logprob(exact, ids, temperature=params.double())
    want = pull(out, exact, up.double(), up_entropy.double())
    size = want.abs().amax(1, keepdim=True)
    assert ((whole.double() - want).abs() <= (1e-5 + eps) * size + 1e-7).all()


def test_tiles_read_no_column_beside_them(impl: str) -> None:
    logits, ids = torch.randn(3, 300), torch.tensor([10, 150, 299])
    saved = raw_forward(impl, logits, ids)[2]
    backward = raw("bwd", impl)
    out = []
    for fill in (math.nan, 1e30):
        padded = torch.full((3, 302), fill)
        padded[:, 100:200] = logits[:, 100:200]
        grad = torch.full((3, 302), 5.0)
        backward(
            padded[:, 100:200], ids - 100, None, saved, torch.ones(3), torch.ones(3), 1.0,
            grad[:, 100:200],
        )  # fmt: skip
        assert (grad[:, :100] == 5).all() and (grad[:, 200:] == 5).all()
        out.append(grad)
    assert torch.equal(*out) and not out[0].isnan().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("v", [1, 2050])
def test_rows_without_a_distribution(v: int, bad: float, impl: str) -> None:
    """NaN or +inf somewhere, or -inf everywhere: all is NaN, also in the tiles that look sound."""
    logits, ids = torch.randn(2, v), torch.tensor([0, 0])
    logits[0, slice(None) if bad == -math.inf else v // 2] = bad
    logprob, entropy, saved = raw_forward(impl, logits, ids)
    for x in (logprob, entropy, saved[:, LOG_Z], *token_logprob(logits, ids, impl=impl)):
        assert x.isnan().tolist() == [True, False]
    grad, one = torch.zeros(2, v), torch.ones(2)
    tile = slice(0, min(v, 100))
    for ups in ((one, one), (one, 0 * one), (0 * one, one)):
        raw("bwd", impl)(logits[:, tile], ids, None, saved, *ups, 1.0, grad[:, tile])
        assert grad[:, tile].isnan().all(1).tolist() == [True, False]


@pytest.mark.parametrize("t", [1.0, 0.6])
def test_saved_statistics(t: float, impl: str) -> None:
    logits, ids = torch.randn(5, 2000), torch.randint(0, 2000, (5,))
    logprob, entropy, saved = raw_forward(impl, logits, ids, t=t)
    close(saved[:, MAX], logits.amax(1), rtol=0, atol=0)
    close(saved[:, LOG_Z], torch.logsumexp((logits - logits.amax(1, keepdim=True)) / t, 1))
    close(saved[:, LOG_Z] + saved[:, DEPTH], entropy)
    assert torch.equal(saved[:, LOGPROB], logprob)


@pytest.mark.parametrize("t", [1.0, 0.7])
def test_gradcheck(t: float) -> None:
    logits = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([3, 0, 7])
    logits.data[0, 3] += 4  # one token is the maximum, the others are not
    f = lambda z: tuple(token_logprob(z, ids, temperature=t))
    assert torch.autograd.gradcheck(f, logits, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, logits)


def call(impl: str) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    ids = torch.tensor([3, 18, 0, 7])

    def f(z: Tensor) -> Tensor:
        out = token_logprob(z, ids, temperature=0.8, impl=impl)
        return (out.logprob * torch.arange(1.0, 5.0)).sum() + (out.entropy**2).sum()

    return torch.randn(4, 19, requires_grad=True), ids, f


def test_every_way_to_a_derivative(impl: str) -> None:
    logits, _, f = call(impl)
    value = f(logits)
    (grad,) = torch.autograd.grad(value, logits, retain_graph=True)
    close(torch.autograd.grad(3 * value, logits)[0], 3 * grad)
    close(torch.func.grad(f)(logits.detach()), grad)
    tangent = torch.randn_like(logits)
    want = (grad * tangent).sum()
    again, along = torch.func.jvp(f, (logits.detach(),), (tangent,))
    close(along, want, rtol=1e-4, atol=1e-6), close(again, value.detach())
    with forward_ad.dual_level():
        dual = f(forward_ad.make_dual(logits.detach(), tangent))
        close(forward_ad.unpack_dual(dual).tangent, want, rtol=1e-4, atol=1e-6)
    batch = torch.randn(3, 4, 19)
    close(torch.vmap(f)(batch), torch.stack([f(x) for x in batch]))
    close(
        torch.vmap(torch.func.grad(f))(batch), torch.stack([torch.func.grad(f)(x) for x in batch])
    )
    jvp = lambda x: torch.func.jvp(f, (x,), (tangent,))[1]
    close(torch.vmap(jvp)(batch), torch.stack([jvp(x) for x in batch]))


def test_one_output_alone(impl: str) -> None:
    logits, ids, _ = call(impl)
    out, want = token_logprob(logits, ids, impl=impl), plain(logits, ids)
    for ours, theirs in zip(out, want, strict=True):
        a, b = (torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (ours, theirs))
        close(a, b, rtol=1e-4, atol=1e-6)


def test_vmap_over_everything(impl: str) -> None:
    logits, ids = torch.randn(3, 4, 19), torch.randint(0, 19, (3, 4))
    t, mask = 0.5 + torch.rand(3, 4), torch.rand(3, 4) < 0.6
    f = lambda z, i, t, m: tuple(token_logprob(z, i, temperature=t, mask=m, impl=impl))
    got = torch.vmap(f)(logits, ids, t, mask)
    want = [f(*row) for row in zip(logits, ids, t, mask, strict=True)]
    close(got, tuple(torch.stack(x) for x in zip(*want, strict=True)))
    shared = torch.vmap(f, in_dims=(None, 0, None, None))(logits[0], ids, t[0], mask[0])
    rows = [f(logits[0], i, t[0], mask[0]) for i in ids]
    close(shared, tuple(torch.stack(x) for x in zip(*rows, strict=True)))
    wrong = torch.vmap(lambda z, i: token_logprob(z, i, impl=impl).logprob)(logits, ids + 19)
    assert wrong.isnan().all()


def test_explicit_tangent(impl: str) -> None:
    logits, ids, _ = call(impl)
    tangent, mask = torch.randn_like(logits), torch.tensor([True, True, False, True])
    options: dict[str, Any] = {"temperature": 1.3, "mask": mask, "impl": impl}
    values, tangents = token_logprob_jvp(logits, tangent, ids, **options)
    out = token_logprob(logits, ids, **options)
    close(tuple(values), tuple(x.detach() for x in out))
    for along, x in zip(tangents, out, strict=True):
        (grad,) = torch.autograd.grad(x.sum(), logits, retain_graph=True)
        close(along, (grad * tangent).sum(-1), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"tangent has shape \(4, 3\)"):
        token_logprob_jvp(logits, tangent[:, :3], ids, impl=impl)
    with pytest.raises(TypeError, match="kind"):
        token_logprob_jvp(logits, tangent, ids, kind="jsd", impl=impl)


def test_second_derivatives_raise(kernel_impl: str) -> None:
    logits, _, f = call(kernel_impl)
    (grad,) = torch.autograd.grad(f(logits), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.func.jvp(torch.func.grad(f), (logits.detach(),), (torch.randn_like(logits),))


def test_rows_alone_and_on_more_threads(each_cpu: str) -> None:
    logits, ids = torch.randn(40, 2100), torch.randint(0, 2100, (40,))

    def both(rows: slice, z: Tensor) -> tuple[Tensor, ...]:
        leaf = z[rows].clone().requires_grad_()
        out = token_logprob(leaf, ids[rows], impl=each_cpu)
        return (
            out.logprob.detach(),
            out.entropy.detach(),
            torch.autograd.grad(sum(out).sum(), leaf)[0],
        )

    whole = both(slice(None), logits)
    torch.set_num_threads(3)
    assert all(torch.equal(a, b) for a, b in zip(both(slice(None), logits), whole, strict=True))
    assert all(
        torch.equal(a, b[4:5]) for a, b in zip(both(slice(4, 5), logits), whole, strict=True)
    )
    logits[3] = math.nan
    others = torch.arange(40) != 3
    for a, b in zip(both(slice(None), logits), whole, strict=True):
        assert a[3].isnan().all() and torch.equal(a[others], b[others])


@pytest.mark.parametrize("rise", [5.0, 20.0, 95.0, 3000.0])
def test_maximum_far_from_the_beginning(rise: float, each_cpu: str) -> None:
    """Blocks are summed about the maximum so far: one far above it costs time and nothing else."""
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(3, 5000)
        logits[:, 3000:3003] += rise
        logits = logits.to(dtype)
        ids = torch.tensor([3001, 7, 4000])
        exact, leaf = logits.double().requires_grad_(), logits.clone().requires_grad_()
        want, got = token_logprob(exact, ids), token_logprob(leaf, ids, impl=each_cpu)
        close(tuple(x.double() for x in got), tuple(want), rtol=2e-6, atol=1e-30)
        ups = torch.rand(2, 3)
        a, b = pull(got, leaf, *ups), pull(want, exact, *ups.double())
        limit = 1e-5 if dtype == torch.float32 else 4e-3
        assert ((a.double() - b).abs() <= limit * b.abs().amax(1, keepdim=True) + 1e-30).all()


@pytest.mark.parametrize("name", ["fwd", "bwd"])
def test_opcheck(name: str) -> None:
    logits, ids = torch.randn(4, 12), torch.randint(0, 12, (4,))
    counted, params = torch.tensor([True, False, True, True]), 0.5 + torch.rand(4)
    outputs = raw_forward("cpu", logits, ids, counted=counted, params=params)
    if name == "fwd":
        arguments: tuple[Any, ...] = (logits, ids, counted, params, 1.0, *outputs)
    else:
        ups = (torch.rand(4) * counted, torch.rand(4) * counted)
        arguments = (logits, ids, params, outputs[2], *ups, 1.0, torch.zeros(4, 12))
    tests = (
        "test_schema",
        "test_faketensor",
        "test_aot_dispatch_static",
        "test_aot_dispatch_dynamic",
    )
    op = _registry.overload(f"token_logprob_{name}", "cpu")
    torch.library.opcheck(op, arguments, test_utils=tests)
