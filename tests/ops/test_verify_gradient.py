"""`verify_with_gradient`: divergence and gradient of every evaluated row against autograd on the
formulas written out once more in fp64, and what happens to the other rows."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pydistill import VerifyGradient, _registry, verify, verify_with_gradient
from pydistill.ops.verify import BAD_DRAFT, BAD_TARGET
from verify_law import by_hand

OP = "verify"
KINDS = ("forward_kl", "reverse_kl", "jsd", "tvd")
close = torch.testing.assert_close
inf, nan = math.inf, math.nan
WARPERS = ("temperature", "top_k", "top_p", "min_p")


def divergence_of(kind: str, p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """sum over tokens, of p and of log q, -inf where it is cut."""
    q = log_q.exp()

    def kl(a: Tensor, b: Tensor) -> Tensor:
        kept = a > 0
        return (a[kept] * (a[kept].log() - b[kept].log())).sum()

    if kind == "forward_kl":
        return kl(p, q)
    if kind == "reverse_kl":
        return kl(q, p)
    if kind == "tvd":
        return (p - q).abs().sum(-1) / 2
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def by_autograd(
    kind: str, target: Tensor, draft: Tensor, beta: float, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Divergences [B, K] and gradients [B, K, V] of all rows."""
    batch, slots = draft.shape[:2]
    x, leaf = target[:, :slots].double(), draft.double().requires_grad_()
    if "logit_bias" in options:
        x = x + options["logit_bias"].double()
    each = {n: o.tolist() for n, o in options.items() if isinstance(o, Tensor) and "bias" not in n}
    rows = []
    for b in range(batch):
        own = {n: each[n][b] if n in each else o for n, o in options.items()}
        ours = {n: own[n] for n in WARPERS if n in own}
        theirs = {n: own.get("draft_" + n, own.get(n)) for n in WARPERS}
        theirs = {n: o for n, o in theirs.items() if o is not None}
        t = theirs.get("temperature", 1.0)
        for i in range(slots):
            p = torch.tensor(by_hand(x[b, i].tolist(), **ours), dtype=torch.float64)
            kept = torch.tensor(by_hand(draft[b, i].tolist(), **theirs)) > 0
            log_q = torch.where(kept, leaf[b, i] / t, -inf).log_softmax(-1)
            rows.append(divergence_of(kind, p, log_q, beta))
    found = torch.stack(rows).reshape(batch, slots)
    return found.detach(), torch.autograd.grad(found.sum(), leaf)[0]


BIAS = torch.linspace(-1, 1, 90)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tempered": {"temperature": 0.7},
    "tempers apart": {"temperature": 0.8, "draft_temperature": 1.3},
    "bias": {"logit_bias": BIAS},
    "target's filters": {"top_k": 40, "top_p": 0.9, "draft_top_k": 0, "draft_top_p": 1.0},
    "filters": {"temperature": 1.2, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
    "each": {"temperature": torch.linspace(0.6, 1.4, 6), "draft_top_p": torch.linspace(0.5, 1, 6)},
}
FINITE = {"target's filters": ("forward_kl", "jsd", "tvd"), "filters": ("jsd", "tvd"),
          "each": ("reverse_kl", "jsd", "tvd")}  # fmt: skip


def inputs(dtype: torch.dtype, vocab: int = 90) -> tuple[Tensor, Tensor, Tensor]:
    target = (2 * torch.randn(6, 5, vocab)).to(dtype)
    draft = (target[:, :-1].float() + torch.randn(6, 4, vocab)).to(dtype)
    ids = draft.float().argmax(-1)
    return target, draft, ids


@pytest.mark.parametrize(("kind", "name"), [(k, n) for n in SETTINGS for k in FINITE.get(n, KINDS)])
def test_against_autograd(kind: str, name: str, impl: str) -> None:
    dtypes = (torch.float64,) if impl == "reference" else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        target, draft, ids = inputs(dtype)
        call: dict[str, Any] = {**SETTINGS[name], "seed": 3, "position": 0, "impl": impl}
        beta = {"beta": 0.3} if kind == "jsd" else {}
        found = verify_with_gradient(target, draft, ids, kind, **beta, method="block", **call)
        for got, want in zip(
            found.result, verify(target, draft, ids, method="block", **call), strict=True
        ):
            close(got, want, rtol=0, atol=0, equal_nan=True)
        assert not found.result.overlap.isnan().any()
        value, gradient = by_autograd(kind, target, draft, 0.3, SETTINGS[name])
        tight = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6}[dtype]
        loose = 2**-8 if dtype == torch.bfloat16 else tight
        close(found.divergence.double(), value, rtol=tight, atol=tight)
        close(found.gradient.double(), gradient, rtol=loose, atol=tight)
        assert found.gradient.dtype == dtype
        if kind == "tvd":
            close(found.divergence, 1 - found.result.overlap, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["token", "block", "tree", "traversal"])
def test_cpu_on_every_instruction_set(method: str, each_cpu: str) -> None:
    """Rows of more than a block, some not evaluated; over the draft's memory, bit for bit."""
    tree = {"tree": torch.tensor([-1, -1, 0, 1])} if method in ("tree", "traversal") else {}
    for dtype, options in ((torch.float32, {"top_k": 900, "draft_temperature": 0.9}),
                           (torch.bfloat16, {}), (torch.float16, {"top_p": 0.99})):  # fmt: skip
        target, draft, ids = inputs(dtype, 2100)
        call: dict[str, Any] = {"method": method, "seed": 1, "position": 5, **tree, **options}
        want = verify_with_gradient(
            target.double(), draft.double(), ids, "tvd", **call, impl="reference"
        )
        got = verify_with_gradient(target, draft, ids, "tvd", **call, impl=each_cpu)
        seen = ~want.divergence.isnan()
        if method != "block":
            assert not seen.all() and seen.any()
            assert (got.gradient[~seen] == 0).all() and got.divergence[~seen].isnan().all()
        close(got.divergence.double(), want.divergence, rtol=2e-6, atol=2e-6, equal_nan=True)
        rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
        close(got.gradient.double(), want.gradient, rtol=rounding, atol=3e-7)
        over = draft.clone()
        same = verify_with_gradient(
            target, over, ids, "tvd", overwrite_logits=True, **call, impl=each_cpu
        )
        assert same.gradient is over and torch.equal(over, got.gradient)
        close(same.divergence, got.divergence, rtol=0, atol=0, equal_nan=True)


def test_rows_without_a_signal(impl: str) -> None:
    target, draft, ids = inputs(torch.float32)
    draft = target[:, :-1].clone()  # accepted to the end
    target[1, 1, 4], draft[2, 0, 3], ids[3, 2] = nan, inf, -1
    temperature = torch.tensor([1.0, 1, 1, 1, 0, 1])
    drafted = torch.tensor([4, 4, 4, 4, 4, 2])
    found = verify_with_gradient(
        target, draft, ids, "reverse_kl", temperature=temperature, num_drafted=drafted, seed=0,
        position=0, impl=impl,
    )  # fmt: skip
    assert found.result.flags[1, 1] == BAD_TARGET and found.result.flags[2, 0] == BAD_DRAFT
    empty = torch.zeros(6, 4, dtype=torch.bool)
    empty[1, 1:] = empty[2] = empty[3, 2:] = empty[4] = empty[5, 2:] = True
    assert torch.equal(found.divergence.isnan(), empty)
    bad = torch.zeros_like(empty)
    bad[1, 1] = bad[2, 0] = True
    assert found.gradient[bad].isnan().all()
    assert (found.gradient[empty & ~bad] == 0).all()
    assert found.gradient[~empty].isfinite().all()


def test_infinite_divergences(impl: str) -> None:
    target, draft, ids = inputs(torch.float32)
    for kind, cut in (("reverse_kl", {"top_k": 3, "draft_top_k": 0}),
                      ("forward_kl", {"draft_top_k": 3})):  # fmt: skip
        found = verify_with_gradient(target, draft, ids, kind, **cut, seed=0, position=0, impl=impl)
        assert found.divergence[:, 0].isinf().all()
        finite = found.gradient[:, 0].isfinite().all()
        assert bool(finite) == (kind == "forward_kl")


def test_overwriting_is_seen_by_autograd(impl: str) -> None:
    target, draft, ids = inputs(torch.float32)
    leaf = torch.randn(6, 4, 90, requires_grad=True)
    logits = leaf * 1.0
    loss = logits.logsumexp(-1).sum()
    found = verify_with_gradient(
        target, logits, ids, overwrite_logits=True, seed=0, position=0, impl=impl
    )
    assert found.gradient is logits
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    call: dict[str, Any] = {"overwrite_logits": True, "seed": 0, "position": 0, "impl": impl}
    with pytest.raises(ValueError, match=r"memory of their own.*pass draft_logits.contiguous"):
        verify_with_gradient(target, draft[:, :1].expand(6, 4, 90), ids, **call)
    with pytest.raises(ValueError, match=r"shares memory with .* pass draft_logits\.clone"):
        verify_with_gradient(target, target[:, :-1], ids, **call)


def test_transforms(impl: str) -> None:
    target, draft = torch.randn(3, 2, 3, 9), torch.randn(3, 2, 2, 9)
    ids = torch.randint(9, (3, 2, 2))
    t = torch.tensor([0.7, 1.0, 1.3])

    def f(x: Tensor, y: Tensor, i: Tensor, t: Tensor) -> VerifyGradient:
        return verify_with_gradient(
            x, y, i, "jsd", temperature=t, logit_bias=BIAS[:9], seed=1, position=2, impl=impl
        )

    want = [f(*row) for row in zip(target, draft, ids, t, strict=True)]
    got = torch.vmap(f)(target, draft, ids, t)
    close(got.gradient, torch.stack([w.gradient for w in want]), rtol=0, atol=0)
    close(got.divergence, torch.stack([w.divergence for w in want]), rtol=0, atol=0, equal_nan=True)
    with pytest.raises(RuntimeError, match="has no derivatives"):
        g = lambda y: f(target[0], y, ids[0], t[0]).divergence
        torch.func.jvp(g, (draft[0],), (draft[0],))


T, D = torch.randn(2, 4, 9), torch.randn(2, 3, 9)
IDS = torch.zeros(2, 3, dtype=torch.int64)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "kind": ({"kind": "chi2"}, ValueError, "kind='chi2' is not known; use one of forward_kl, rev"),
    "beta of tvd": ({"kind": "tvd", "beta": 0.5}, ValueError, "beta=0.5 belongs to kind='jsd'"),
    "beta": ({"kind": "jsd", "beta": 1.0}, ValueError, "beta=1 is outside"),
    "beta of text": ({"kind": "jsd", "beta": "1"}, TypeError, "beta is a str"),
    "no draft": ({"draft_logits": None}, ValueError, "draft_logits is None, and the gradient is"),
    "support": ({"draft_topk_ids": IDS}, ValueError, "known on the tokens of draft_topk_ids, and"),
    "an id": ({"draft_ids": IDS + 9}, ValueError, "draft_ids holds 9"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    arguments, error, message = WRONG[name]
    call = {"target_logits": T, "draft_logits": D, "draft_ids": IDS, "seed": 0, "position": 0}
    with pytest.raises(error, match=message):
        verify_with_gradient(**{**call, **arguments})


def test_memory_safety_is_checked_below_python(native_impl: str) -> None:
    def arguments() -> dict[str, Any]:
        warpers = torch.tensor([[1.0, 0.0, 1.0, -inf] * 2], dtype=torch.float64)
        return {
            "target": T, "draft": D.clone(), "warpers": warpers, "logit_bias": None,
            "overlap": torch.zeros(2, 3), "flags": torch.zeros(2, 4).int(), "kind": 0, "beta": 0.5,
            "divergence": torch.zeros(2, 3), "gradient": torch.zeros(2, 3, 9),
        }  # fmt: skip

    op = _registry.overload("verify_gradient", native_impl)
    over = _registry.overload("verify_gradient_overwrite", native_impl)
    op(*arguments().values())
    over(*list(arguments().values())[:-1])
    bad = {
        "target": T[0], "draft": D[:, :2], "warpers": torch.zeros(1, 8), "logit_bias": BIAS[:8],
        "overlap": torch.zeros(2, 2), "flags": torch.zeros(2, 4), "kind": 4,
        "divergence": torch.zeros(6).double(), "gradient": torch.zeros(2, 3, 8),
    }  # fmt: skip
    for name, value in bad.items():
        with pytest.raises(RuntimeError, match=f"{name} (is|must)"):
            op(*{**arguments(), name: value}.values())
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, tuple(arguments().values()), test_utils=checks)
    torch.library.opcheck(over, tuple(list(arguments().values())[:-1]), test_utils=checks)
