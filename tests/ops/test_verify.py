"""`verify`: the table of cases, coins against the published generator, warpers written out once
more, and what is peculiar to a call of it. Its law is in test_verify_law.py and
test_verify_sampling.py."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydistill import VerifyResult, _registry, verify
from pydistill.ops.verify import BAD_DRAFT, BAD_ID, BAD_TARGET, IMPOSSIBLE
from pydistill.reference import verify as reference
from pydistill.testing import Case, expected, load
from verify_law import by_hand

OP = "verify"
TABLE = [case for case in load(OP) if "bench" not in case.marks]
close = torch.testing.assert_close
inf, nan = math.inf, math.nan


def same(a: VerifyResult, b: VerifyResult) -> bool:
    return all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(a, b, strict=True))


def words(seed: int, position: int, slot: int, stream: int) -> float:
    """The coin of arguments given as words of 64 and 32 bits."""
    signed = [x - 2**64 if x >= 2**63 else x for x in (seed, position)]
    arguments = [torch.tensor([x]) for x in (*signed, slot)]
    return float(reference.coins(*arguments, stream))


def coin(w0: int, w1: int) -> float:
    return ((w0 >> 5) * 2**26 + (w1 >> 6)) / 2**53


def test_coins_are_philox() -> None:
    """The known answers of Random123's kat_vectors for philox4x32-10: two words of each."""
    assert words(0, 0, 0, 0) == coin(0x6627E8D5, 0xE169C58D) == 0.39904647231489565
    ones = 2**64 - 1
    assert words(ones, ones, 2**32 - 1, 2**32 - 1) == coin(0x408F276D, 0x41C83B0E)
    assert words(
        0x299F31D0A4093822, 0x85A308D3243F6A88, 0x13198A2E, 0x03707344
    ) == coin(0xD16CFE09, 0x94FDCCEB)  # fmt: skip


@pytest.mark.parametrize("case", TABLE, ids=repr)
def test_case(case: Case, check_everywhere: Callable[[Case], None]) -> None:
    check_everywhere(case)


def test_table_covers_what_it_should() -> None:
    assert len({case.id for case in load(OP)}) == len(load(OP))
    for method in reference.METHODS:
        mine = [case for case in TABLE if case.kind == method]
        assert {d for case in mine for d in case.dtypes} == _registry.OPERATORS[OP].dtypes
        counts = expected(next(case for case in mine if "plain" in case.id))["num_accepted"].value
        deepest = 4 if method in reference.CHAINS else 1 if method == "tree_target_only" else 2
        wanted = set(range(deepest + 1))
        assert wanted <= set(counts.tolist())


WARPERS: list[dict[str, Any]] = [
    {}, {"temperature": 0.6}, {"top_k": 1}, {"top_k": 4}, {"top_k": 99}, {"top_p": 0.5},
    {"top_p": 1e-9}, {"top_p": 0.999}, {"min_p": 0.2}, {"min_p": 1.0}, {"temperature": 0.0},
    {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("warpers", WARPERS, ids=repr)
@pytest.mark.parametrize("decimals", [3, 0])
def test_warpers_by_hand(warpers: dict[str, Any], decimals: int, impl: str) -> None:
    """Probabilities of every token as the log-probability of a drafted one that is surely accepted:
    the ensemble of weight 0 accepts everything. `decimals=0` makes ties."""
    vocab = 14
    z = 2 * torch.randn(1, 1, vocab).round(decimals=decimals)
    found = verify(
        z.expand(vocab, 2, vocab), z.expand(vocab, 1, vocab), torch.arange(vocab)[:, None],
        draft_temperature=1.0, draft_top_k=0, draft_top_p=1.0, draft_min_p=0.0,
        lenience=("ensemble", 0.0), seed=0, position=0, impl=impl, **warpers,
    )  # fmt: skip
    assert (found.num_accepted == 1).all()
    want = torch.tensor(by_hand(z.flatten().tolist(), **warpers), dtype=torch.float64)
    close(found.logprobs[:, 0].double().exp(), want, rtol=2e-6, atol=0)
    kept = z.flatten()[want > 0].double()
    if warpers.get("temperature") == 0.0:
        assert found.target_lse.isnan().all()
    else:
        lse = torch.logsumexp(kept / warpers.get("temperature", 1.0), 0)
        close(found.target_lse[:, 0].double(), lse.expand(vocab), rtol=2e-6, atol=2e-6)


def test_top_p_at_a_cut_in_doubt(each_cpu: str) -> None:
    """Limits within 1e-9 of a cumulative mass, on both sides: fp32 sums could not tell."""
    z = torch.randn(1, 1, 3000)
    p = z.double().flatten().softmax(0).sort(descending=True).values
    for place in (3, 700, 2000):
        for side in (-1, 1):
            top_p = float(p[:place].sum()) + side * 1e-9
            call: dict[str, Any] = {"top_p": top_p, "seed": 0, "position": 0}
            none = torch.zeros(1, 0, dtype=torch.int64)
            found = verify(z, z[:, :0], none, impl=each_cpu, **call)
            kept = z.flatten().double().sort(descending=True).values[: place + (side > 0)]
            close(found.target_lse[0, 0].double(), kept.logsumexp(0), rtol=1e-7, atol=1e-7)


def test_a_draw_inverts_the_cumulative_distribution(impl: str) -> None:
    n = 500
    z = torch.randn(1, 1, 40).expand(n, 1, 40)
    ids = torch.zeros(n, 0, dtype=torch.int64)
    found = verify(z, None, ids, seed=5, position=torch.arange(n), impl=impl)
    sums = z[0, 0].double().softmax(0).cumsum(0)
    u = reference.coins(torch.tensor(5), torch.arange(n), torch.tensor(0), reference.RESAMPLE)
    assert torch.equal(found.tokens[:, 0], torch.searchsorted(sums, u, right=True))
    assert torch.equal(found.num_accepted, torch.zeros(n).long())


def test_greedy_is_the_argmax(impl: str) -> None:
    z = torch.randn(30, 5, 50).round()  # with ties: the lowest id
    best = z.argmax(-1)
    ids = best[:, :-1].clone()
    for request in range(30):
        if request % 5 < 4:
            ids[request, request % 5] = (ids[request, request % 5] + 1) % 50
    for method in reference.CHAINS:
        found = verify(z, None, ids, method=method, temperature=0, seed=0, position=0, impl=impl)
        assert found.num_accepted.tolist() == [request % 5 for request in range(30)]
        for request in range(30):
            n = request % 5
            assert found.tokens[request, : n + 1].tolist() == best[request, : n + 1].tolist()
            assert (found.tokens[request, n + 1 :] == -1).all()
        assert (found.logprobs[found.tokens >= 0] == 0).all()


@pytest.mark.parametrize("method", reference.CHAINS)
def test_faults_stay_in_their_row(method: str, impl: str) -> None:
    target, draft = 2 * torch.randn(2, 9, 4, 300)
    draft = draft[:, :3] * 0.2 + target[:, :3]
    ids = draft.argmax(-1)
    call: dict[str, Any] = {"method": method, "seed": 3, "position": 0, "impl": impl}
    before = verify(target, draft, ids, **call)
    target[1, 0, 7], target[2, 3, 1], target[3, 1] = nan, inf, -inf
    draft[4, 0, 299], draft[5, 1] = nan, -inf
    ids[6, 0] = -1
    draft[7, 0, ids[7, 0]] = -inf
    found = verify(target, draft, ids, **call)
    for x, y in zip(found, before, strict=True):
        assert torch.equal(x[[0, 8]].nan_to_num(7), y[[0, 8]].nan_to_num(7))
    assert found.flags[1].tolist() == [BAD_TARGET, 0, 0, 0]
    assert found.tokens[1].tolist() == [-1] * 4 and found.num_accepted[1] == 0
    for request, slot in ((2, 3), (3, 1)):
        reached = int(found.num_accepted[request]) == slot
        assert bool(found.flags[request, slot] & BAD_TARGET) >= reached
        assert reached == bool(found.tokens[request, slot] == -1 and (
            found.tokens[request, slot - 1] == ids[request, slot - 1]
        ))  # fmt: skip
    for request, flag in ((4, BAD_DRAFT), (6, 0), (7, IMPOSSIBLE)):
        assert found.num_accepted[request] == 0 and found.tokens[request, 0] >= 0
        assert found.flags[request].tolist() == [flag, 0, 0, 0]


def test_ids_out_of_range_are_flagged_where_they_cannot_be_read(kernel_impl: str) -> None:
    target, ids = torch.randn(2, 3, 20), torch.tensor([[3, 20], [-2, 1]])

    def call(t: Tensor, i: Tensor) -> VerifyResult:  # fmt: skip
        return verify(t, None, i, seed=0, position=0, lenience=("ensemble", 0.0), impl=kernel_impl)

    found = torch.vmap(call)(target[None], ids[None])
    assert found.flags[0].tolist() == [[0, BAD_ID, 0], [BAD_ID, 0, 0]]
    assert found.num_accepted[0].tolist() == [1, 0] and (found.tokens[0, :, 0] >= 0).all()


@pytest.mark.parametrize("method", reference.CHAINS)
def test_requests_alone_ragged_and_on_more_threads(method: str, each_cpu: str) -> None:
    """A request's result depends on nothing but it; 70,000 columns are spread over threads."""
    for batch, vocab in ((24, 2100), (2, 70_000)):
        target = 2 * torch.randn(batch, 4, vocab)
        draft = target[:, :3] + torch.randn(batch, 3, vocab)
        ids = torch.distributions.Categorical(logits=draft).sample()
        count, position = torch.arange(batch) % 4, 9 * torch.arange(batch)
        call: dict[str, Any] = {
            "method": method, "seed": 4, "top_p": 0.97, "top_k": 1500, "impl": each_cpu,
        }  # fmt: skip
        whole = verify(target, draft, ids, num_drafted=count, position=position, **call)
        torch.set_num_threads(3)
        again = verify(target, draft, ids, num_drafted=count, position=position, **call)
        torch.set_num_threads(1)
        assert same(whole, again)
        for i in range(batch):
            n = int(count[i])
            one = verify(target[i : i + 1, : n + 1], draft[i : i + 1, :n], ids[i : i + 1, :n],
                         position=9 * i, **call)  # fmt: skip
            for x, y in zip(one, whole, strict=True):
                kept = y[i : i + 1] if x.ndim == 1 else y[i : i + 1, : x.shape[1]]
                assert torch.equal(x.nan_to_num(7), kept.nan_to_num(7))
            assert (whole.tokens[i, n + 1 :] == -1).all()


T, D = torch.randn(2, 4, 9), torch.randn(2, 3, 9)
IDS, ALL = torch.zeros(2, 3, dtype=torch.int64), torch.arange(9)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown method": ({"method": "blocks"}, ValueError, "method='blocks' is not known; use one"),
    "no tree": ({"method": "tree"}, ValueError, "method='tree' needs a tree; pass tree=, int32"),
    "a tree": ({"tree": IDS}, ValueError, "tree is given, and method='token' is for chains; use"),
    "a pair": ({"draft_logits": (D, IDS)}, TypeError, "is a tuple; of a draft known on S"),
    "support alone": ({"draft_logits": None, "draft_topk_ids": IDS[..., None]}, ValueError,
                      "draft_topk_ids is given without draft_logits"),
    "support of float": ({"draft_topk_ids": D}, TypeError, "draft_topk_ids is torch.float32"),
    "support's shape": ({"draft_topk_ids": IDS}, ValueError, r"pass \(2, 3, 9\), a token for each"),
    "support's rows": ({"draft_logits": T, "draft_topk_ids": ALL.expand(2, 4, 9)}, ValueError,
                       r"asks for \(2, 3\) and S tokens a row"),
    "outside": ({"draft_topk_ids": ALL + 1}, ValueError, "draft_topk_ids holds 9, outside the 9"),
    "twice": ({"draft_topk_ids": ALL.expand(2, 3, 9) // 2}, ValueError, "names token 0 twice in a"),
    "two dimensions": ({"target_logits": T[0]}, ValueError, r"pass \[B, K \+ 1, V\]"),
    "integers": ({"target_logits": T.long()}, TypeError, "target_logits has dtype torch.int64"),
    "slots": ({"draft_logits": T}, ValueError, r"asks for \(2, 3, 9\); pass the row"),
    "vocabulary": ({"draft_logits": D[..., :8]}, ValueError, "slice both to the vocabulary"),
    "dtypes": ({"draft_logits": D.bfloat16()}, TypeError, "draft_logits has dtype torch.bfloat16"),
    "ids of float": ({"draft_ids": IDS.float()}, TypeError, "draft_ids is torch.float32"),
    "shape of ids": ({"draft_ids": IDS[:, :2]}, ValueError, r"draft_ids has shape \(2, 2\)"),
    "an id": ({"draft_ids": IDS + 9}, ValueError, "draft_ids holds 9, outside the 9 tokens"),
    "another id": ({"draft_ids": IDS - 2}, ValueError, "draft_ids holds -2"),
    "too many": ({"num_drafted": 4}, ValueError, "num_drafted=4 is no number of .* 0 to 3"),
    "drafted": ({"num_drafted": torch.tensor([1, -1])}, ValueError, "num_drafted=-1 is no"),
    "drafted of float": ({"num_drafted": 1.0}, TypeError, "num_drafted is a float"),
    "position": ({"position": -1}, ValueError, "position=-1 is no number of committed tokens"),
    "positions": ({"position": torch.zeros(3).long()}, ValueError, r"position has shape \(3,\)"),
    "seed": ({"seed": 2**63}, ValueError, "seed=9223372036854775808 does not fit"),
    "seed of float": ({"seed": torch.zeros(2)}, TypeError, "seed has dtype torch.float32"),
    "seed of bool": ({"seed": True}, TypeError, "seed is a bool"),
    "temperature": ({"temperature": -1}, ValueError, r"temperature=-1 is no .*0 \(greedy\), or"),
    "infinite": ({"draft_temperature": inf}, ValueError, "draft_temperature=inf is no"),
    "not a number": ({"temperature": nan}, ValueError, "temperature=nan is no"),
    "one": ({"temperature": torch.tensor([1.0, -3.0])}, ValueError, "temperature=-3 is no"),
    "top_k": ({"top_k": 1.5}, ValueError, "top_k=1.5 is no top_k; use a whole number"),
    "top_p": ({"top_p": 0.0}, ValueError, "top_p=0 is no top_p"),
    "min_p": ({"draft_min_p": 1.1}, ValueError, "draft_min_p=1.1 is no min_p; use from 0 to 1"),
    "warper of text": ({"top_p": "0.9"}, TypeError, "top_p is a str"),
    "warper's shape": ({"top_p": torch.ones(3)}, ValueError, r"top_p has shape \(3,\)"),
    "bias": ({"logit_bias": torch.zeros(8)}, ValueError, r"logit_bias has shape \(8,\)"),
    "bias of int": ({"logit_bias": IDS}, TypeError, "logit_bias is torch.int64"),
    "form": ({"lenience": ("cubic", 0.5)}, ValueError, "use one of linear, square, exponential"),
    "strength": ({"lenience": ("linear", 1.5)}, ValueError, "lenience linear=1.5 is outside 0"),
    "no strength": ({"lenience": ("linear", 0)}, ValueError, "accepts everything"),
    "no pair": ({"lenience": 0.3}, TypeError, "lenience is 0.3; pass a pair"),
    "block": ({"method": "block", "tv_budget": 0.1}, ValueError, "belong to method='token'"),
    "both": ({"lenience": ("linear", 0.5), "tv_budget": 0.1}, ValueError, "pass one of them"),
    "budget": ({"tv_budget": 2.0}, ValueError, "tv_budget=2 is outside 0 to 1"),
    "typical": ({"typical": (0.3, 0.1)}, ValueError, "belongs to method='typical'"),
    "epsilon": ({"method": "typical", "typical": (2.0, 0.1)}, ValueError, "epsilon=2 is outside"),
    "unknown impl": ({"impl": "cudnn"}, ValueError, "impl='cudnn' is not known"),
    "another device": ({"impl": "triton"}, ValueError, "impl='triton' cannot run verify"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str, impl_name: str) -> None:  # the kernel checks values
    arguments, error, message = WRONG[name]
    call = {"target_logits": T, "draft_logits": D, "draft_ids": IDS, "seed": 0, "position": 0}
    with pytest.raises(error, match=message):
        verify(**{**call, "impl": impl_name, **arguments})


def test_a_repeated_call_is_checked_again(native_impl: str) -> None:
    """What the first call made is kept; what differs, and what is wrong, is seen all the same."""
    target, draft = 2 * torch.randn(5, 4, 300), 2 * torch.randn(5, 3, 300)
    ids = draft.argmax(-1)
    call: dict[str, Any] = {"position": 3, "temperature": 1.0, "impl": native_impl}
    seeds = torch.arange(5)
    first = [verify(target, draft, ids, seed=s, **call) for s in (0, 1, seeds)]
    assert not same(first[0], first[1])
    for _ in range(2):
        again = [verify(target, draft, ids, seed=s, **call) for s in (0, 1, seeds)]
        assert all(same(*pair) for pair in zip(again, first, strict=True))
        assert same(verify(target, draft, ids, seed=0, **{**call, "temperature": 1}), first[0])
        other = verify(target, draft, ids, seed=0, **{**call, "position": torch.full((5,), 3)})
        assert same(other, first[0])
        assert not same(verify(target, draft, ids, seed=0, **{**call, "position": 4}), first[0])
        wide = torch.full((5, 4, 400), nan)
        wide[..., :300] = target
        assert same(verify(wide[..., :300], draft, ids, seed=0, **call), first[0])
        assert same(verify(target, draft, ids.int(), seed=0, **call), first[0])
        assert same(verify(target, draft, ids.T.contiguous().T, seed=0, **call), first[0])
        wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
            ({"temperature": True}, TypeError, "temperature is a bool"),
            ({"seed": False}, TypeError, "seed is a bool"),
            ({"seed": 0.0}, TypeError, "seed is a float"),
            ({"seed": seeds[:4]}, ValueError, "seed has shape"),
            ({"position": -1}, ValueError, "position=-1 is no number"),
            ({"position": 2**63}, ValueError, "does not fit in an int64"),
            ({"position": True}, TypeError, "position is a bool"),
            ({"num_drafted": 4}, ValueError, "num_drafted=4 is no number"),
            ({"draft_ids": ids + 300}, ValueError, "draft_ids holds"),
            ({"lenience": ("linear", True)}, TypeError, "lenience linear is a bool"),
            ({"lenience": ["linear", 1.0]}, TypeError, "pass a pair"),
            ({"top_k": [3]}, TypeError, "top_k is a list"),
        ]
        verify(target, draft, ids, seed=0, lenience=("linear", 1.0), **call)
        for change, error, message in wrong:
            given = {"draft_ids": ids, "seed": 0, **call, **change}
            with pytest.raises(error, match=message):
                verify(target, draft, **given)


def kernel_arguments() -> dict[str, Any]:
    drafted, rows = torch.zeros(2, 3), torch.zeros(2, 4)
    warpers = torch.tensor([[1.0, 0.0, 1.0, -inf] * 2], dtype=torch.float64)
    return {
        "target": T, "draft": D, "ids": IDS, "num_drafted": torch.tensor([3, 2]),
        "warpers": warpers, "seed": torch.zeros(1).long(), "position": torch.zeros(2).long(),
        "logit_bias": None, "parent": None, "support": None, "method": 0,
        "lenience": 0, "strength": 0.0, "alpha": 0.0, "check": False,
        "tokens": rows.long(), "num_accepted": torch.zeros(2).long(), "logprobs": rows.clone(),
        "overlap": drafted.clone(), "bias": drafted.clone(), "target_lse": rows.clone(),
        "draft_lse": drafted.clone(), "flags": rows.int(), "path": drafted.long(),
    }  # fmt: skip


def test_memory_safety_is_checked_below_python(native_impl: str) -> None:
    op = _registry.overload("verify_fwd", native_impl)
    op(*kernel_arguments().values())
    bad = {
        "target": T[0], "draft": D[:, :2], "ids": IDS[:, :2], "num_drafted": torch.zeros(3).long(),
        "warpers": torch.zeros(1, 8), "seed": torch.zeros(3).long(), "position": IDS[:, 0].int(),
        "logit_bias": torch.zeros(8), "parent": IDS, "support": IDS, "method": 6, "lenience": -1,
        "tokens": torch.zeros(2, 4), "num_accepted": IDS, "logprobs": torch.zeros(2, 3),
        "overlap": torch.zeros(3, 2).T,
        "bias": torch.zeros(2, 4), "target_lse": torch.zeros(2), "draft_lse": D,
        "flags": torch.zeros(2, 4).long(), "path": IDS[:, :2],
    }  # fmt: skip
    for name, value in bad.items():
        with pytest.raises(RuntimeError, match=f"{name} (is|must)"):
            op(*{**kernel_arguments(), name: value}.values())
    wild = {**kernel_arguments(), "num_drafted": torch.tensor([-5, 99])}
    op(*wild.values())  # held to 0 and K
    with pytest.raises(
        RuntimeError, match="a value of draft_ids, num_drafted, position, tree, draft"
    ):
        op(*{**wild, "check": True}.values())


@pytest.mark.parametrize("method", ["token", "block", "typical", "tree", "traversal"])
def test_a_support_is_a_row_of_nothing_else(method: str, each_cpu: str) -> None:
    """The same tokens as of dense rows that are -inf outside; tokens in any order, of each row or
    shared, in some blocks of the row and not in others."""
    batch, slots, vocab = 60, 3, 4500
    target = 2 * torch.randn(batch, slots + 1, vocab)
    noisy = target[:, :-1] + torch.randn(batch, slots, vocab)
    each = noisy.topk(12).indices[..., torch.randperm(12)]
    shared = torch.cat([torch.randperm(1000)[:700], 3000 + torch.randperm(1500)])
    target[..., shared] += 3
    call: dict[str, Any] = {
        "method": method, "seed": 4, "position": torch.arange(batch), "top_p": 0.97,
        "draft_top_p": 1.0, "impl": each_cpu,
    }  # fmt: skip
    row = [0, 1, 2]  # that each token is drawn from
    if method in reference.TREES:
        call["tree"], row = torch.tensor([-1, -1, 0]), [0, 0, 1]
    for ids in (each.int(), shared):
        tokens = ids.long().expand(batch, slots, -1)
        logits = noisy.gather(-1, tokens)
        dense = torch.full_like(noisy, -inf).scatter(-1, tokens, logits)
        drawn = torch.distributions.Categorical(logits=logits[:, row]).sample()
        drafted = tokens[:, row].gather(-1, drawn[..., None])[..., 0]
        want = verify(target, dense, drafted, **call)
        got = verify(target, logits, drafted, draft_topk_ids=ids, **call)
        assert len(set(want.num_accepted.tolist())) > 1 and (want.flags == 0).all()
        for x, y in zip(got, want, strict=True):
            close(x, y, rtol=0, atol=2e-6 if x.is_floating_point() else 0, equal_nan=True)


def test_faults_of_a_support(impl: str) -> None:
    """Under vmap no value is read: what cannot be a draft's row is flagged."""
    target, logits = torch.randn(6, 3, 2000), torch.randn(6, 2, 4)
    tokens = torch.tensor([5, 1999, 7, -1]).repeat(6, 2, 1)
    ids = tokens[..., 0].clone()
    logits[0, 0, 3] = nan  # in an empty slot
    ids[1, 0] = 6
    tokens[2, 0, 1], tokens[3, 0, 2], logits[4, 0, 1], tokens[5, 0] = 2000, 5, nan, -1

    def f(t: Tensor, d: Tensor, i: Tensor, s: Tensor) -> VerifyResult:
        return verify(t, d, i, draft_topk_ids=s, lenience=("ensemble", 0.0), seed=1, position=2,
                      impl=impl)  # fmt: skip

    found = torch.vmap(f)(target[:, None], logits[:, None], ids[:, None], tokens[:, None])
    bad = [0, IMPOSSIBLE, BAD_DRAFT, BAD_DRAFT, BAD_DRAFT, BAD_DRAFT]
    assert found.flags[:, 0, 0].tolist() == bad
    assert found.num_accepted[:, 0].tolist() == [2, 0, 0, 0, 0, 0]
    assert (found.tokens[:, 0, 0] >= 0).all()
    alike = torch.vmap(f, in_dims=(0, 0, 0, None))(
        target[:1, None], logits[:1, None], ids[:1, None], tokens[0, 0]
    )
    assert torch.equal(alike.tokens, found.tokens[:1])


def test_no_gradient(impl: str) -> None:
    target = T.clone().requires_grad_()
    found = verify(target, D, IDS, seed=0, position=0, impl=impl)
    assert not any(x.requires_grad for x in found)
    assert same(found, verify(T, D, IDS, seed=0, position=0, impl=impl))

    def f(t: Tensor) -> Tensor:
        return verify(t, D, IDS, seed=0, position=0, impl=impl).target_lse[:, 0].sum() + t.sum()

    close(torch.func.grad(f)(T), torch.ones_like(T))


def test_a_tangent_is_never_dropped(impl: str) -> None:
    f = lambda t, d: verify(t, d, IDS, seed=0, position=0, impl=impl).logprobs
    for arguments in ((T, D), (D.new_zeros(2, 4, 9), D)):
        with pytest.raises(RuntimeError, match="has no derivatives"):
            torch.func.jvp(f, arguments, tuple(torch.ones_like(x) for x in arguments))
    with pytest.raises(RuntimeError, match="has no derivatives"):
        torch.func.jvp(lambda d: f(T, d), (D,), (torch.ones_like(D),))
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="has no derivatives"):
            f(forward_ad.make_dual(T, torch.ones_like(T)), D)
        f(T, D)  # no tangent, no complaint


def test_vmap(impl: str) -> None:
    target, draft = torch.randn(5, 2, 4, 9), torch.randn(5, 2, 3, 9)
    ids = torch.randint(9, (5, 2, 3))
    seeds, positions = torch.arange(5), torch.randint(99, (5, 2))
    bias = torch.randn(5, 9)

    def f(t: Tensor, d: Tensor, i: Tensor, s: Tensor, p: Tensor, b: Tensor) -> VerifyResult:
        return verify(t, d, i, method="block", top_k=6, seed=s, position=p, logit_bias=b, impl=impl)

    want = [f(*row) for row in zip(target, draft, ids, seeds, positions, bias, strict=True)]
    got = torch.vmap(f)(target, draft, ids, seeds, positions, bias)
    assert same(got, VerifyResult(*(torch.stack(x) for x in zip(*want, strict=True))))
    moved = torch.vmap(f, in_dims=(2, 1, None, None, None, None))(
        target.movedim(0, 2), draft.movedim(0, 1), ids[0], seeds[0], positions[0], bias[0]
    )
    want = [
        f(t, d, ids[0], seeds[0], positions[0], bias[0]) for t, d in zip(target, draft, strict=True)
    ]
    assert same(moved, VerifyResult(*(torch.stack(x) for x in zip(*want, strict=True))))


def test_opcheck() -> None:
    tests = (
        "test_schema",
        "test_faketensor",
        "test_aot_dispatch_static",
        "test_aot_dispatch_dynamic",
    )
    op = _registry.overload("verify_fwd", "cpu")
    torch.library.opcheck(op, tuple(kernel_arguments().values()), test_utils=tests)


def test_kept_numbers_outlive_the_modes_they_were_made_in(impl: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    call: dict[str, Any] = {"seed": 12345, "position": 7, "temperature": 0.77, "impl": impl}
    with torch.inference_mode():
        first = verify(T, D, IDS, **call)
    want = verify(T, D, IDS, **call)
    assert same(first, want)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (T, D, IDS)]
        assert verify(*fake, **call).tokens.shape == (2, 4)
    assert same(verify(T, D, IDS, **call), want)
    with torch.inference_mode():
        torch.func.grad(lambda t: verify(t, D, IDS, **{**call, "seed": 54321}).logprobs.sum())
    assert verify(T.clone().requires_grad_(), D, IDS, **call).tokens.equal(want.tokens)
