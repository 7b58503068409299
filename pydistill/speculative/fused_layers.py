"""A Llama-like model's layers on a few new tokens, each in one call of `decoder_layer`.

On a CPU a step of decoding is bound by reading the weights, of which a framework's linear layers on
one token reach a part, and by the dozen calls that each layer is made of. Models whose layers are
those of transformers' Llama, Mistral, Qwen2 or Qwen3, as they were made (no adapters, quantised
weights or hooks), run here; all others, long prompts, and other devices run as they are. Both write
the same cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from pydistill.ops.decoder_layer import LayerWeights, decoder_layer, has_kernel
from pydistill.ops.matmul import matmul

_KINDS = ("Llama", "Mistral", "Qwen2", "Qwen3")
_LAYERS = {f"{x}DecoderLayer" for x in _KINDS}
_MODELS = {f"{x}ForCausalLM" for x in _KINDS}
_FEW = 16  # tokens of a request, whatever is before them
_SCORES = 1 << 17  # of a head: with more, the framework's attention, in blocks of tokens, is faster


class FusedLayers:
    """The layers of a base model (`LlamaModel`, ...) and its final norm."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self._layers = [(_weights(x), _window(x)) for x in base.layers]
        attention = base.layers[0].self_attn
        self._scale, self._eps = attention.scaling, base.layers[0].input_layernorm.variance_epsilon

    def __call__(
        self,
        embedded: Tensor,
        positions: Tensor,
        starts: Tensor,
        cache: Any,
        between: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """The last hidden states `[B, T, H]` of new tokens, added to a cache of `GrowingLayer`s.

        `embedded [B, T, H]`, `positions [B, T]`, `starts [B]`: each request's first column.
        `between` is what happens to the states below a layer.
        """
        cos, sin = self.base.rotary_emb(embedded, positions)
        shape = (*embedded.shape[:2], cos.shape[-1])
        cos, sin = cos.expand(shape), sin.expand(shape)
        hidden = embedded.contiguous()
        for at, (weights, window) in enumerate(self._layers):
            if between and at in between:
                hidden = between[at](hidden).contiguous()
            columns, keys, values = _room(cache, at, weights, hidden, shape[-1])
            hidden = decoder_layer(
                hidden, weights, cos, sin, keys, values, starts, columns,
                eps=self._eps, scale=self._scale, window=window,
            )  # fmt: skip
        found: Tensor = self.base.norm(hidden)
        return found


def fused_layers(model: Any) -> FusedLayers | None:
    """Of a causal model, or a draft with a `step`, if layers and head are what this file runs."""
    known = type(model).__name__ in _MODELS and type(model).__module__.startswith("transformers.")
    if not (known or hasattr(model, "step")) or not _as_made(model):
        return None
    layers, head = getattr(model.base_model, "layers", ()), model.get_output_embeddings()
    if type(head) is not nn.Linear or not layers:
        return None
    if any(type(x).__name__ not in _LAYERS or not _plain(x) for x in layers):
        return None
    if 2 * model.base_model.rotary_emb.inv_freq.numel() != layers[0].self_attn.head_dim:
        return None  # a part of each head is turned
    kinds = {(x.device.type, x.dtype) for x in (*layers.parameters(), head.weight)}
    return FusedLayers(model.base_model) if len(kinds) == 1 and has_kernel(*kinds.pop()) else None


def few(tokens: int, columns: int) -> bool:
    """Whether so many tokens of each request, behind `columns` of the cache, gain by it."""
    return tokens <= _FEW or tokens * (columns + tokens) <= _SCORES


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer of `[B, T, H]`, in its dtype, without a gradient, at the speed of memory."""
    rows = x.reshape(-1, x.shape[-1])
    found = matmul(rows, layer.weight.t(), out_dtype=x.dtype)
    if layer.bias is not None:
        found += layer.bias
    return found.view(*x.shape[:-1], -1)


def _as_made(model: nn.Module) -> bool:
    """Nobody listens to a module, or runs another forward."""
    return not any(
        x._forward_hooks or x._forward_pre_hooks or "forward" in vars(x) for x in model.modules()
    )


def _plain(layer: Any) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    inner = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    every = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, *inner)
    return (
        all(type(x) is nn.Linear for x in every)
        and all(x.bias is None for x in inner)
        and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
    )


def _weights(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    outer = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    q, k, v, o = (x.weight for x in outer)
    norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return LayerWeights(
        layer.input_layernorm.weight, q, k, v, o, layer.post_attention_layernorm.weight,
        mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight,
        *(x.bias for x in outer), *(None if x is None else x.weight for x in norms),
    )  # fmt: skip


def _window(layer: Any) -> int:
    """Columns that a token sees; 0: all."""
    attention = layer.self_attn
    owner = attention if hasattr(attention, "sliding_window") else attention.config
    mistral = type(layer).__name__ == "MistralDecoderLayer"
    found = getattr(owner, "sliding_window", None) if owner is attention or mistral else None
    return int(found or 0)


def _room(
    cache: Any, at: int, weights: LayerWeights, hidden: Tensor, size: int
) -> tuple[int, Tensor, Tensor]:
    """How many columns layer `at` of the cache holds, and its memory, with room for more."""
    batch, tokens, _ = hidden.shape
    while len(cache.layers) <= at:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[at]
    if not layer.is_initialized:
        layer.begin(hidden.new_empty(batch, weights.k.shape[0] // size, 0, size))
    columns = layer.get_seq_length()
    layer.extend(tokens)
    return columns, *layer.buffers
