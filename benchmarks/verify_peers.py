"""What others do where `pydistill.verify` is called, for `bench_verify.py`.

Each takes the logits of one block of B requests, `target [B, K + 1, V]` and `draft [B, K, V]`, and
the drafted tokens `ids [B, K]`, warps and normalises the rows, verifies, and returns tokens
`[B, K + 1]`, -1 behind the last, and how many were accepted `[B]`. With `top_p` the target's rows
are filtered first, by a sort, as all of them do; the draft's are given as they were sampled from.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Found = tuple[Tensor, Tensor]


def filtered(z: Tensor, top_p: float | None) -> Tensor:
    """Rows as transformers' TopPLogitsWarper leaves them."""
    if top_p is None:
        return z
    ordered, index = torch.sort(z, descending=False)
    removed = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    removed[..., -1:] = False
    return z.masked_fill(removed.scatter(-1, index, removed), -torch.inf)


def eager(target: Tensor, draft: Tensor, ids: Tensor, top_p: float | None = None) -> Found:
    """transformers' `_speculative_sampling`, of a batch."""
    p, q = filtered(target.float(), top_p).softmax(-1), draft.float().softmax(-1)
    px, qx = (y.gather(-1, ids[..., None])[..., 0] for y in (p[:, :-1], q))
    n = (torch.rand(ids.shape) * qx < px).long().cumprod(-1).sum(-1)
    at = n.clamp(max=ids.shape[1] - 1)[:, None, None].expand(-1, 1, p.shape[-1])
    last = p.gather(1, n[:, None, None].expand(-1, 1, p.shape[-1]))[:, 0]
    residual = (last - q.gather(1, at)[:, 0]).clamp(min=0)
    weights = torch.where((n < ids.shape[1])[:, None], residual, last)
    y = torch.multinomial(weights, 1)
    slot = torch.arange(ids.shape[1] + 1)
    tokens = torch.cat([ids, y], 1)
    return torch.where(slot < n[:, None], tokens, torch.where(slot == n[:, None], y, -1)), n


def compiled(target: Tensor, draft: Tensor, ids: Tensor, top_p: float | None = None) -> Found:
    """`eager` under `torch.compile`, for each shape anew."""
    found: Found = _graph(target.shape, target.dtype, top_p)(target, draft, ids, top_p)
    return found


@functools.lru_cache(1)
def _graph(*shape: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(eager, dynamic=False)


def transformers(target: Tensor, draft: Tensor, ids: Tensor, top_p: float | None = None) -> Found:
    """`_speculative_sampling` itself, one request at a time, as it takes no more."""
    from transformers.generation.utils import _speculative_sampling

    target, draft = filtered(target.float(), top_p), draft.float()
    tokens = torch.full((len(ids), ids.shape[1] + 1), -1)
    accepted = torch.zeros(len(ids), dtype=torch.int64)
    for i in range(len(ids)):
        valid, n = _speculative_sampling(
            ids[i : i + 1], draft[i : i + 1], ids.shape[1], target[i : i + 1]
        )
        tokens[i, : valid.shape[1]], accepted[i] = valid[0], n
    return tokens, accepted


def vllm(target: Tensor, draft: Tensor, ids: Tensor, top_p: float | None = None) -> Found:
    """vLLM's `RejectionSampler` and the bonus token's `Sampler` as they run on the CPU, at
    temperature 1 and without log-probabilities, with the softmax that its drafter takes."""
    ops = _vllm_kernels()
    (batch, slots), vocab = ids.shape, target.shape[-1]
    rows = target.flatten(0, 1)
    bonus_at = torch.arange(slots, len(rows), slots + 1)
    target_at = torch.arange(len(rows)).reshape(batch, -1)[:, :-1].flatten()
    draft_probs = draft.softmax(-1, dtype=torch.float32).flatten(0, 1)

    bonus = _vllm_top_p(rows[bonus_at].float().div_(1.0), top_p)
    bonus_ids = ops.fused_gumbel_argmax(bonus, torch.randint(0, 2**31, (batch,)))
    logits = rows[target_at].float().clone().div_(1.0)  # the clone keeps those of log-probabilities
    target_probs = _vllm_top_p(logits, top_p).softmax(-1, dtype=torch.float32)
    inverse = torch.empty(batch, vocab).exponential_().reciprocal()
    ends, drafted = torch.arange(slots, batch * slots + 1, slots), ids.flatten()
    recovered = torch.empty_like(drafted)
    ops.sample_recovered_tokens_kernel_impl(
        recovered, ends, drafted, draft_probs, target_probs, inverse, vocab, False
    )
    tokens = torch.full((batch, slots + 1), -1)
    uniform = torch.rand(len(drafted), dtype=torch.float64).float()
    ops.rejection_random_sample_kernel_impl(
        tokens, ends, drafted, draft_probs, target_probs, bonus_ids, recovered, uniform,
        torch.zeros(batch, dtype=torch.bool), slots, vocab, False,
    )  # fmt: skip
    return tokens, (tokens >= 0).sum(-1) - 1


def _vllm_top_p(logits: Tensor, top_p: float | None) -> Tensor:
    """`apply_top_k_top_p_pytorch`, which writes over the logits."""
    if top_p is None:
        return logits
    ordered, index = logits.sort(dim=-1, descending=False)
    probs = ordered.softmax(-1)
    torch.cumsum(probs, -1, out=probs)
    removed = probs <= 1 - top_p
    removed[:, -1] = False
    ordered.masked_fill_(removed, -torch.inf)
    return logits.scatter_(-1, index, ordered)


@functools.cache
def _vllm_kernels() -> Any:
    """The kernels alone: vLLM's Python, which would want all that it depends on, stays out. The
    library is the one that vLLM would choose."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("vllm is not installed; see benchmarks/requirements.txt")
    name = "_C_AVX2"
    if torch.cpu._is_avx512_supported():
        name = "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"
    torch.ops.load_library(Path(spec.submodule_search_locations[0]) / f"{name}.abi3.so")
    return torch.ops._C


def eager_tree(target: Tensor, draft: Tensor, ids: Tensor, tree: Tensor) -> Found:
    """Recursive rejection without replacement down a tree, a request at a time."""
    p_rows, q_rows = target.float().softmax(-1), draft.float().softmax(-1)
    tokens, accepted = torch.full((len(ids), ids.shape[1] + 1), -1), []
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.tolist()):
        children.setdefault(parent, []).append(node)
    for request, drafted in enumerate(ids.tolist()):
        node, depth = -1, 0
        while True:
            p, chosen = p_rows[request, node + 1], None
            for child in children.get(node, ()):
                if child == children[node][0]:
                    q = q_rows[request, node + 1].clone()
                token = drafted[child]
                if torch.rand(()) * q[token] < p[token]:
                    chosen = child
                    break
                p = (p - q).clamp(min=0)
                p /= p.sum()
                q[token] = 0
                q /= q.sum()
            if chosen is None:
                break
            tokens[request, depth] = drafted[chosen]
            node, depth = chosen, depth + 1
        tokens[request, depth] = torch.multinomial(p, 1)
        accepted.append(depth)
    return tokens, torch.tensor(accepted)
