"""The definition of `decoder_layer`: plain torch, rounded where the kernel rounds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LayerWeights(NamedTuple):
    """The weights of a decoder layer, `[out, in]` as in `nn.Linear`; see docs/ops/decoder_layer.md.

    With N heads of D numbers of a hidden state of H, G of keys and values, and I inner numbers.
    """

    input_norm: Tensor  # [H]
    q: Tensor  # [N D, H]
    k: Tensor  # [G D, H]
    v: Tensor  # [G D, H]
    o: Tensor  # [H, N D]
    post_norm: Tensor  # [H]
    gate: Tensor  # [I, H]
    up: Tensor  # [I, H]
    down: Tensor  # [H, I]
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None  # [D]
    k_norm: Tensor | None = None  # [D]


def decoder_layer_reference(
    hidden: Tensor,
    weights: LayerWeights,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    columns: int,
    *,
    eps: float,
    scale: float,
    window: int,
    exact: torch.dtype | None = None,
) -> Tensor:
    """The layer's output; writes the new columns of `keys` and `values`. Computes in `exact`, fp32
    or the dtype of fp64 tensors."""
    exact = exact or torch.promote_types(hidden.dtype, torch.float32)
    w = LayerWeights._make(None if x is None else x.to(exact) for x in weights)
    batch, tokens, _ = hidden.shape
    size, dtype = keys.shape[-1], hidden.dtype

    def stored(x: Tensor) -> Tensor:
        return x.to(dtype).to(exact)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()

    def heads(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x @ weight.t()
        x = x if bias is None else x + bias
        return x.view(batch, tokens, len(weight) // size, size).transpose(1, 2)

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x if weight is None else norm(x, weight)
        low, high = x.chunk(2, -1)
        return x * cos[:, None].to(exact) + torch.cat([-high, low], -1) * sin[:, None].to(exact)

    x = hidden.to(exact)
    normed = stored(norm(x, w.input_norm))
    q = turned(heads(normed, w.q, w.q_bias), w.q_norm)
    new = slice(columns, columns + tokens)
    keys[:, :, new] = turned(heads(normed, w.k, w.k_bias), w.k_norm).to(dtype)
    values[:, :, new] = heads(normed, w.v, w.v_bias).to(dtype)

    at = torch.arange(columns + tokens, device=hidden.device)
    here = at[new, None]
    seen = (at <= here) & (at >= starts[:, None, None])
    if window:
        seen = seen & (at > here - window)
    seen = seen[:, None, None]  # [B, 1, 1, T, columns + T]
    # What is not seen may be anything, NaN as well.
    there = seen.any(-2)[..., None]
    k, v = (
        torch.where(there, x[:, :, None, : columns + tokens].to(exact), 0) for x in (keys, values)
    )
    grouped = q.unflatten(1, (keys.shape[1], q.shape[1] // keys.shape[1]))
    scores = (grouped @ k.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    mixed = torch.where(seen.any(-1, keepdim=True), scores.softmax(-1) @ v, 0)
    attended = stored(mixed.flatten(1, 2).transpose(1, 2).flatten(2))

    summed = attended @ w.o.t()
    middle = stored(x + (summed if w.o_bias is None else summed + w.o_bias))
    normed = stored(norm(middle, w.post_norm))
    gated = stored(torch.nn.functional.silu(normed @ w.gate.t()) * (normed @ w.up.t()))
    return (middle + gated @ w.down.t()).to(dtype)


def decoder_layer_out(
    hidden: Tensor,
    input_norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    post_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    o_bias: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    columns: int,
    eps: float,
    scale: float,
    window: int,
    out: Tensor,
) -> None:
    """`decoder_layer_reference` as an `out` kernel, for torch's dispatcher."""
    weights = LayerWeights(
        input_norm, q, k, v, o, post_norm, gate, up, down, q_bias, k_bias, v_bias, o_bias,
        q_norm, k_norm,
    )  # fmt: skip
    out.copy_(
        decoder_layer_reference(
            hidden, weights, cos, sin, keys, values, starts, columns,
            eps=eps, scale=scale, window=window,
        )
    )  # fmt: skip
