"""`verify` on trees: what is peculiar to them. Their cases are in the table of test_verify.py,
their law in test_verify_tree_law.py and test_verify_sampling.py."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pydistill import VerifyResult, verify
from pydistill.ops.verify import BAD_DRAFT, BAD_ID, BAD_PARENT, BAD_TARGET, IMPOSSIBLE
from pydistill.reference import verify as reference

OP = "verify"
inf, nan = math.inf, math.nan
close = torch.testing.assert_close
TREE = torch.tensor([-1, 0, 0, -1, 3, 1], dtype=torch.int32)


def same(a: VerifyResult, b: VerifyResult) -> bool:
    return all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(a, b, strict=True))


def drafted(target: Tensor, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """A draft of TREE for logits [B, 7, V]: its rows, and tokens without replacement."""
    draft = target[:, :-1] + noise * torch.randn_like(target[:, :-1])
    gumbel = -torch.empty(draft.shape).exponential_().log()
    order = (draft + gumbel).argsort(-1, descending=True)
    row = TREE.long() + 1
    rank = [int((row[:i] == row[i]).sum()) for i in range(6)]
    return draft, order[:, row, rank]


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("pair", [("token", "tree"), ("block", "traversal")])
def test_a_chain_is_a_tree(pair: tuple[str, str], one_hot: bool, impl: str) -> None:
    """The same coins, tokens and reports."""
    batch, slots, vocab = 300, 4, 60
    target = 2 * torch.randn(batch, slots + 1, vocab)
    draft = target[:, :-1] + torch.randn(batch, slots, vocab)
    ids = torch.distributions.Categorical(logits=draft).sample()
    call: dict[str, Any] = {
        "seed": 3, "position": torch.arange(batch), "num_drafted": torch.arange(batch) % 5,
        "impl": impl, "temperature": 0.9,
    }  # fmt: skip
    rows = None if one_hot else draft
    want = verify(target, rows, ids, method=pair[0], **call)
    got = verify(target, rows, ids, method=pair[1], tree=torch.arange(-1, 3), **call)
    assert set(want.num_accepted.tolist()) >= ({0, 1, 2} if one_hot else {0, 1, 2, 3, 4})
    for x, y in zip(got, want, strict=True):
        close(x, y, rtol=0, atol=0 if not x.is_floating_point() else 1e-6, equal_nan=True)
    if one_hot and pair[0] == "token":
        chain = torch.arange(-1, 3)
        only = verify(target, None, ids, method="tree_target_only", tree=chain, **call)
        assert same(only, got)


@pytest.mark.parametrize("method", reference.TREES)
def test_greedy_follows_the_argmax(method: str, impl: str) -> None:
    batch, vocab = 200, 5
    target = torch.randn(batch, 7, vocab).round()
    _, ids = drafted(target, 2.0)
    found = verify(target, None, ids, method=method, tree=TREE, temperature=0, seed=0, position=0,
                   impl=impl)  # fmt: skip
    best = target.argmax(-1)
    lengths = []
    for b in range(batch):
        node, path = -1, []
        while True:
            after = [i for i in range(6) if TREE[i] == node and ids[b, i] == best[b, node + 1]]
            if not after:
                break
            node = after[0]
            path.append(node)
        n = len(path)
        lengths.append(n)
        want = [*ids[b, path].tolist(), int(best[b, node + 1])]
        assert found.tokens[b].tolist() == want + [-1] * (6 - n)
        assert found.path[b].tolist() == path + [-1] * (6 - n)
    assert found.num_accepted.tolist() == lengths and set(lengths) == {0, 1, 2, 3}


@pytest.mark.parametrize("method", ["tree", "traversal"])
def test_faults_pass_over_a_node_and_what_is_below(method: str, impl: str) -> None:
    """Every drafted token is certain to be accepted where it can be tested."""
    vocab, n = 9, 10
    ids = torch.tensor([[0, 1, 2, 3, 4, 5]]).repeat(n, 1)
    z = torch.full((n, 7, vocab), -inf)
    for row, token in ((0, 0), (1, 1), (2, 5), (4, 4), (3, 7), (5, 7), (6, 7)):
        z[:, row, token] = 0.0  # root -> 0 -> 1 -> 5; below 3 -> 4
    q = z[:, :-1].clone()
    q[:, 0, 3] = q[:, 1, 2] = 0.0
    z[:, 0, 3] = -60.0
    ids[1, 0], ids[2, 1] = -1, -1  # 3 is accepted in place of 0: nothing else is left
    ids[3, 5] = 0
    q[3, 2, 0] = -inf
    q[4, 2] = -inf
    z[5, 2, 8] = nan
    z[6, 6, 0] = inf
    q[7, 1, 8] = nan
    found = verify(z, q, ids, method=method, tree=TREE, seed=1, position=0, impl=impl)
    paths = [[i for i in p if i >= 0] for p in found.path.tolist()]
    whole = [0, 1, 5]
    assert paths[0] == whole and found.tokens[0].tolist() == [0, 1, 5, 7, -1, -1, -1]
    assert found.flags[0].tolist() == [0] * 7
    assert paths[2] == [0] and found.flags[2].tolist() == [0] * 7
    assert paths[3] == [0, 1] and found.flags[3].tolist() == [0, 0, IMPOSSIBLE, 0, 0, 0, 0]
    assert paths[4] == [0, 1] and found.flags[4].tolist() == [0, 0, BAD_DRAFT, 0, 0, 0, 0]
    assert found.tokens[4].tolist() == [0, 1, 5, -1, -1, -1, -1]
    assert paths[5] == [0, 1] and found.flags[5].tolist() == [0, 0, BAD_TARGET, 0, 0, 0, 0]
    assert found.tokens[5].tolist() == [0, 1, -1, -1, -1, -1, -1]
    assert paths[6] == whole and found.flags[6].tolist() == [0, 0, 0, 0, 0, 0, BAD_TARGET]
    assert paths[7] == [0] and found.flags[7].tolist() == [0, BAD_DRAFT, 0, 0, 0, 0, 0]
    assert same(VerifyResult(*(x[:1] for x in found)), VerifyResult(*(x[9:] for x in found)))
    assert paths[1] in ([], [3, 4]) and found.flags[1].tolist() == [0] * 7


@pytest.mark.parametrize("method", reference.TREES)
def test_a_token_twice_among_siblings(method: str, impl: str) -> None:
    """The second is passed over."""
    n, vocab = 400, 6
    target, q = torch.zeros(n, 4, vocab), torch.zeros(n, 3, vocab)
    q[..., 2], target[..., 4] = 1.5, -0.3
    draft = None if method == "tree_target_only" else q
    ids = torch.tensor([[2, 2, 4]]).expand(n, 3)
    call: dict[str, Any] = {"method": method, "seed": 0, "position": torch.arange(n), "impl": impl}
    siblings = torch.tensor([-1, -1, -1])
    twice = verify(target, draft, ids, tree=siblings, **call)
    assert set(twice.path[:, 0].tolist()) == {-1, 0, 2}
    assert (twice.flags == 0).all()
    once = verify(target, draft, torch.tensor([[2, -1, 4]]).expand(n, 3), tree=siblings, **call)
    assert torch.equal(twice.tokens, once.tokens) and torch.equal(twice.path, once.path)
    close(twice.overlap, once.overlap, rtol=0, atol=0, equal_nan=True)
    below = verify(target, draft, ids, tree=torch.tensor([-1, -1, 1]), **call)
    assert set(below.path[:, 0].tolist()) == {-1, 0} and set(below.path[:, 1].tolist()) == {-1}


@pytest.mark.parametrize("method", reference.TREES)
def test_overlap_is_the_chance_of_a_child(method: str, impl: str) -> None:
    n, vocab = 20_000, 6
    g = torch.Generator().manual_seed(1)
    target = torch.randn(1, 7, vocab, generator=g).expand(n, 7, vocab)
    draft = torch.randn(1, 6, vocab, generator=g).expand(n, 6, vocab)
    ids = torch.arange(6).expand(n, 6)
    rows = None if method == "tree_target_only" else draft
    p, q = target[0].double().softmax(-1), draft[0].double().softmax(-1)
    for one_hot in (False, True):
        found = verify(target, None if one_hot else rows, ids, method=method, tree=TREE, seed=0,
                       position=torch.arange(n), impl=impl)  # fmt: skip
        pointed = one_hot or rows is None
        seen = found.overlap[:, 0]
        want = p[0, [0, 3]].sum() if pointed else torch.minimum(p[0], q[0]).sum()
        close(seen.double(), want.expand(n), rtol=1e-6, atol=1e-6)
        if pointed and method != "traversal":
            rate = float((found.num_accepted > 0).double().mean())
            assert abs(rate - float(want)) < 5 * math.sqrt(0.25 / n)
        assert set(found.bias[:, 0].tolist()) == {0.0}


@pytest.mark.parametrize("method", reference.TREES)
def test_requests_alone_ragged_and_on_more_threads(method: str, each_cpu: str) -> None:
    for batch, vocab in ((24, 2100), (2, 70_000)):
        target = 2 * torch.randn(batch, 7, vocab)
        draft, ids = drafted(target)
        rows = None if method == "tree_target_only" else draft
        count, position = torch.arange(batch) % 7, 9 * torch.arange(batch)
        trees = TREE.expand(batch, 6)
        call: dict[str, Any] = {
            "method": method, "seed": 4, "top_p": 0.97, "top_k": 1500, "impl": each_cpu,
        }  # fmt: skip
        whole = verify(target, rows, ids, tree=trees, num_drafted=count, position=position, **call)
        torch.set_num_threads(3)
        again = verify(target, rows, ids, tree=TREE, num_drafted=count, position=position, **call)
        torch.set_num_threads(1)
        assert same(whole, again)
        padded = torch.where(torch.arange(6) < count[:, None], ids, -1)
        parents = torch.where(padded >= 0, trees, 99)
        assert same(whole, verify(target, rows, padded, tree=parents, position=position, **call))
        for i in range(batch):
            n = int(count[i])
            one = verify(target[i : i + 1, : n + 1], None if rows is None else rows[i : i + 1, :n],
                         ids[i : i + 1, :n], tree=TREE[:n], position=9 * i, **call)  # fmt: skip
            for x, y in zip(one, whole, strict=True):
                kept = y[i : i + 1] if x.ndim == 1 else y[i : i + 1, : x.shape[1]]
                assert torch.equal(x.nan_to_num(7), kept.nan_to_num(7))


def test_rows_of_the_draft_where_nothing_hangs_are_not_read(impl: str) -> None:
    target = 2 * torch.randn(50, 7, 30)
    draft, ids = drafted(target)
    holed = draft.clone()
    holed[:, [3, 5]] = nan
    call: dict[str, Any] = {"tree": TREE, "seed": 0, "position": torch.arange(50), "impl": impl}
    for method in ("tree", "traversal"):
        whole = verify(target, draft, ids, method=method, **call)
        assert same(whole, verify(target, holed, ids, method=method, **call))
        assert (whole.flags == 0).all()


def test_vmap(impl: str) -> None:
    target = torch.randn(3, 2, 7, 9)
    draft, ids = (x.reshape(3, 2, 6, *x.shape[2:]) for x in drafted(target.reshape(6, 7, 9)))
    trees = torch.stack([TREE, torch.arange(-1, 5).int(), torch.full((6,), -1).int()])

    def f(t: Tensor, d: Tensor, i: Tensor, tree: Tensor) -> VerifyResult:
        return verify(t, d, i, method="traversal", tree=tree, seed=1, position=2, impl=impl)

    want = [f(*row) for row in zip(target, draft, ids, trees, strict=True)]
    got = torch.vmap(f)(target, draft, ids, trees)
    assert same(got, VerifyResult(*(torch.stack(x) for x in zip(*want, strict=True))))
    shared = torch.vmap(f, in_dims=(0, 0, 0, None))(target, draft, ids, TREE)
    want = [f(t, d, i, TREE) for t, d, i in zip(target, draft, ids, strict=True)]
    assert same(shared, VerifyResult(*(torch.stack(x) for x in zip(*want, strict=True))))


def test_values_that_cannot_be_read_are_flagged(kernel_impl: str) -> None:
    target, draft = torch.randn(1, 7, 9), torch.randn(1, 6, 9)
    ids, tree = torch.tensor([[0, 9, 2, -5, 4, 5]]), torch.tensor([0, -1, -1, -1, 3, 7])

    def f(t: Tensor, d: Tensor, i: Tensor) -> VerifyResult:
        return verify(t, d, i, method="tree", tree=tree, seed=1, position=2, impl=kernel_impl)

    found = torch.vmap(f)(target[None], draft[None], ids[None])
    assert found.flags[0, 0, 0] == BAD_ID | BAD_PARENT
    assert set(found.path[0, 0].tolist()) <= {2, -1}


T, D = torch.randn(2, 4, 9), torch.randn(2, 3, 9)
IDS = torch.zeros(2, 3, dtype=torch.int64)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tree": ({"tree": None}, ValueError, "method='tree' needs a tree"),
    "a list": ({"tree": [-1, 0, 1]}, TypeError, r"tree is list; pass int32 parents \[N\] or"),
    "floats": ({"tree": torch.zeros(3)}, TypeError, "tree is torch.float32"),
    "shape": ({"tree": torch.zeros(4).int()}, ValueError, r"tree has shape \(4,\); pass \(3,\)"),
    "own parent": (
        {"tree": torch.tensor([-1, 1, 0])}, ValueError,
        "tree gives node 1 the parent 1; a parent comes before its children: use -1 to 0,",
    ),
    "below the root": ({"tree": torch.tensor([-2, 0, 0])}, ValueError, "node 0 the parent -2"),
    "of a request": (
        {"tree": torch.tensor([[-1, 0, 0], [-1, 0, 2]])}, ValueError, "node 2 the parent 2",
    ),
    "target only": (
        {"method": "tree_target_only"}, ValueError,
        "draft_logits is given, and method='tree_target_only' asks the target alone; pass",
    ),
    "lenience": ({"tv_budget": 0.1}, ValueError, "belong to method='token', not 'tree'"),
    "typical": ({"typical": (0.3, 0.1)}, ValueError, "belongs to method='typical', not 'tree'"),
    "chain": ({"method": "block"}, ValueError, "method='block' is for chains; use one of tree_"),
    "an id": ({"draft_ids": IDS + 9}, ValueError, "draft_ids holds 9"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str, impl_name: str) -> None:  # the kernel checks values
    arguments, error, message = WRONG[name]
    call = {
        "target_logits": T, "draft_logits": D, "draft_ids": IDS, "seed": 0, "position": 0,
        "method": "tree", "tree": torch.tensor([-1, 0, 0]),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        verify(**{**call, "impl": impl_name, **arguments})
