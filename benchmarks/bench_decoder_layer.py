"""`decoder_layer`: one step of SmolLM2-135M's 30 layers over 1, 5 and 16 new tokens, 256 before
them, against the same layers as a framework runs them.

All contestants read the same random weights, 212 MB in bf16, so that every layer's have left the
second-level cache when their turn comes again, and write the same columns of their caches. The
peers are transformers' own layers, and the least that eager PyTorch needs: its linear layers, RMS
norm, attention and a cache written in place. The floor reads the weights once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.conftest import played_back
from benchmarks.harness import Case, Claim, Contestant, Gate, Step
from pydistill import _registry
from pydistill.ops.decoder_layer import LayerWeights, decoder_layer
from pydistill.testing.cases.decoder_layer import CASES

LAYERS = 30
FLOOR, EAGER, MODEL = "floor: read the weights", "eager PyTorch", "transformers"
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the last state's norm


class Model:
    """`layers` layers, their caches, and what `decoder_layer`'s reference makes of the tokens."""

    def __init__(self, table: Any, layers: int) -> None:
        self.given = [table.inputs("cpu", seed) for seed in range(layers)]
        first = self.given[0]
        for x in self.given:
            for name in ("keys", "values"):  # room that nobody reads is NaN
                x[name].nan_to_num_(0)
            x["hidden"], x["cos"], x["sin"] = (first[n] for n in ("hidden", "cos", "sin"))
        self.dtype = first["hidden"].dtype
        self.columns, self.tokens = first["columns"], first["hidden"].shape[1]
        self.want: Tensor | None = None

    def gate(self, got: Tensor) -> Gate:
        if self.want is None:
            self.want = fused(self, "reference").double()
        error = (got.double() - self.want).norm() / self.want.norm()
        return Gate({"state": float(error)}, {"state": LIMITS[self.dtype]})


def fused(x: Model, impl: str) -> Tensor:
    hidden = x.given[0]["hidden"]
    for layer in x.given:
        hidden = decoder_layer(**{**layer, "hidden": hidden}, impl=impl)
    return hidden


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]


def eager_layer(hidden: Tensor, given: dict[str, Any]) -> Tensor:
    w: LayerWeights = given["weights"]
    keys, values, columns = given["keys"], given["values"], given["columns"]
    tokens, size = hidden.shape[1], keys.shape[-1]
    end = columns + tokens
    n = functional.rms_norm(hidden, w.input_norm.shape, w.input_norm, given["eps"])
    q, k, v = (
        functional.linear(n, x).unflatten(-1, (-1, size)).transpose(1, 2) for x in (w.q, w.k, w.v)
    )
    keys[:, :, columns:end] = turned(k, given["cos"], given["sin"])
    values[:, :, columns:end] = v
    seen = None
    if tokens > 1:
        seen = torch.ones(tokens, end, dtype=torch.bool).tril(columns)
    mixed = functional.scaled_dot_product_attention(
        turned(q, given["cos"], given["sin"]), keys[:, :, :end], values[:, :, :end], seen,
        enable_gqa=True,
    )  # fmt: skip
    middle = hidden + functional.linear(mixed.transpose(1, 2).flatten(2), w.o)
    n = functional.rms_norm(middle, w.post_norm.shape, w.post_norm, given["eps"])
    gated = functional.silu(functional.linear(n, w.gate)) * functional.linear(n, w.up)
    return middle + functional.linear(gated, w.down)


def eager(x: Model) -> Tensor:
    hidden = x.given[0]["hidden"]
    for layer in x.given:
        hidden = eager_layer(hidden, layer)
    return hidden


def step(x: Model, run: Callable[[Model], Tensor]) -> Step:
    def timed() -> Tensor:
        with torch.no_grad():
            return run(x)

    return Step(timed, check=x.gate)


def transformers_layers(x: Model) -> Step:
    from transformers import LlamaConfig, LlamaModel
    from transformers.cache_utils import Cache

    from pydistill.speculative.cached_model import cache_argument
    from pydistill.speculative.growing_cache import GrowingLayer

    w, keys = x.given[0]["weights"], x.given[0]["keys"]
    config = LlamaConfig(
        vocab_size=2, hidden_size=w.q.shape[1], intermediate_size=w.gate.shape[0],
        num_hidden_layers=len(x.given), num_attention_heads=w.q.shape[0] // keys.shape[-1],
        num_key_value_heads=keys.shape[1], rms_norm_eps=x.given[0]["eps"],
    )  # fmt: skip
    made = LlamaModel(config).to(x.dtype).eval()
    cache: Any = Cache(layer_class_to_replicate=GrowingLayer)
    for at, (layer, given) in enumerate(zip(made.layers, x.given, strict=True)):
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                 "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
        w = given["weights"]
        for name, value in zip(names, (w.q, w.k, w.v, w.o, w.gate, w.up, w.down), strict=True):
            layer.get_submodule(name).weight.data = value
        layer.input_layernorm.weight.data = w.input_norm
        layer.post_attention_layernorm.weight.data = w.post_norm
        cache.update(*(given[n][:, :, : x.columns] for n in ("keys", "values")), at)
    name, rotary = cache_argument(made) or "", (x.given[0]["cos"], x.given[0]["sin"])
    seen = torch.ones(x.tokens, x.columns + x.tokens, dtype=torch.bool).tril(x.columns)[None, None]

    def run(x: Model) -> Tensor:
        hidden = x.given[0]["hidden"]
        for layer in made.layers:
            hidden = layer(hidden, attention_mask=seen, position_embeddings=rotary, **{name: cache})
        for held in cache.layers:
            held.crop(-x.tokens)
        return hidden

    return step(x, run)


def read(x: Model) -> Step:
    numbers = [
        w.view(torch.float32) for layer in x.given for w in layer["weights"] if w is not None
    ]
    return Step(lambda: [w.sum() for w in numbers])


def cases(quick: bool = False) -> list[Case]:
    layers, out = 2 if quick else LAYERS, []
    chosen = _registry.explain(_registry.OPERATORS["decoder_layer"], "cpu")
    for table in CASES:
        if "bench" not in table.marks or table.dtypes[0] == torch.float16:
            continue
        name = "bf16" if table.dtypes[0] == torch.bfloat16 else "fp32"
        out.append(
            Case(
                f"{layers} layers of SmolLM2-135M, {name}, {table.shape[1]} tokens behind 256",
                bytes=float(layers * table.bytes["forward"]),
                flops=float(layers * table.flops["forward"]),
                inputs=partial(Model, table, layers),
                contestants=(
                    Contestant("decoder_layer", partial(step, run=partial(fused, impl="auto")),
                               against=(EAGER, MODEL, FLOOR)),
                    Contestant(EAGER, partial(step, run=eager), "peer"),
                    Contestant(MODEL, transformers_layers, "peer"),
                    Contestant(FLOOR, read, "floor"),
                ),
                notes={"backend": f"{chosen.backend} ({chosen.reason})"},
                claims=(Claim("decoder_layer", EAGER, at_least=1.5),),
            )
        )  # fmt: skip
    return out


@pytest.mark.benchmark(timer=played_back)
def test_decoder_layer(entry: tuple[Case, str], record: Callable[[tuple[Case, str]], None]) -> None:
    record(entry)
