"""`decoder_layer`: a layer of a Llama-like model on a few new tokens, with its cache.

    n  = norm(h) w_in                        q, k, v = heads of n W_q', n W_k', n W_v'
    a  = softmax(scale turn(q) K') V         K, V: what the cache holds, and turn(k), v behind it
    m  = h + a W_o'
    h' = m + (silu(n' W_gate') * n' W_up') W_down'         n' = norm(m) w_post

hidden `[B, T, H]` -> `[B, T, H]`. Internal: `generate` runs a model's layers by it, where on a CPU
a step over few tokens is bound by reading the weights once, and a framework's dozen calls a layer
cost as much again. Here the layer is one call; its weights are read where they lie, by the matrix
product of `matmul`, at the speed of memory. Nothing has a gradient. Cost: every weight once, the
cache's columns once a head, and 4 T products a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pydistill import _registry
from pydistill.ops._rows import has_tangent
from pydistill.reference.decoder_layer import (
    LayerWeights as LayerWeights,
)
from pydistill.reference.decoder_layer import (
    decoder_layer_out,
    decoder_layer_reference,
)

OP = _registry.operator(
    "decoder_layer", {torch.float32, torch.bfloat16, torch.float16}, internal=True
)
_registry.kernel(
    OP,
    "decoder_layer_out",
    "(Tensor hidden, Tensor input_norm, Tensor q, Tensor k, Tensor v, Tensor o, Tensor post_norm,"
    " Tensor gate, Tensor up, Tensor down, Tensor? q_bias, Tensor? k_bias, Tensor? v_bias,"
    " Tensor? o_bias, Tensor? q_norm, Tensor? k_norm, Tensor cos, Tensor sin, Tensor(a!) keys,"
    " Tensor(b!) values, Tensor starts, int columns, float eps, float scale, int window,"
    " Tensor(c!) out) -> ()",
    decoder_layer_out,
)


def decoder_layer(
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
    window: int = 0,
    impl: str = "auto",
) -> Tensor:
    """What a layer makes of new tokens, whose keys and values it adds to a cache.

    Args:
        hidden: `[B, T, H]`, fp32, bf16 or fp16, contiguous; all other tensors have its dtype.
        weights: of the layer, as `nn.Linear` has them: contiguous.
        cos, sin: `[B, T, D]`, of the new tokens' positions; the halves of a head are turned, as in
            Llama.
        keys, values: `[B, G, C, D]`, the cache's whole memory, C at least columns + T; columns
            `[columns, columns + T)` are written.
        starts: int64 `[B]`: the first column of each request; what is before is padding. A token
            that is padding itself attends to nothing.
        columns: how many the cache holds.
        eps: of the norms.
        scale: of the scores, usually 1/sqrt(D).
        window: how many columns a token sees, itself among them; 0: all.
        impl: "auto", "reference" or "cpu".

    Returns:
        `[B, T, H]`, a new tensor.

    Raises:
        RuntimeError: shapes, strides or dtypes do not agree; gradients are on, and a tensor needs
            one; or a tensor has a tangent.
    """
    backend = _registry.resolve("decoder_layer", impl, hidden.device.type, hidden.dtype)
    wanted = torch.is_grad_enabled()
    for x in (hidden, *weights, cos, sin, keys, values):
        if x is not None and wanted and x.requires_grad:
            raise RuntimeError("decoder_layer has no gradient; call it under torch.no_grad().")
        if x is not None and has_tangent(x):
            raise RuntimeError("decoder_layer drops tangents, and is given one; take it off.")
    if backend == "reference":
        with torch.no_grad():
            return decoder_layer_reference(
                hidden, weights, cos, sin, keys, values, starts, columns,
                eps=eps, scale=scale, window=window,
            )  # fmt: skip
    out = torch.empty_like(hidden)
    _registry.overload("decoder_layer_out", backend)(
        hidden, *weights, cos, sin, keys, values, starts, columns, eps, scale, window, out
    )
    torch.autograd.graph.increment_version((keys, values))
    return out


def has_kernel(device: str, dtype: torch.dtype) -> bool:
    """Whether "auto" is more than the reference for tensors of `dtype` on a device type."""
    return _registry.explain(OP, device, dtype).backend != "reference"
