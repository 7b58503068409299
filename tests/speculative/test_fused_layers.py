"""A model's steps by `decoder_layer` against its own, and which models take them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tiny_models import llama

pytest.importorskip("transformers", reason="models need the extra `hf`")

import transformers

import pydistill
from pydistill.ops.decoder_layer import has_kernel
from pydistill.speculative import feature
from pydistill.speculative.cached_model import CachedModel
from pydistill.speculative.fused_layers import fused_layers, linear

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
needs_kernel = pytest.mark.skipif(
    not has_kernel("cpu", torch.float32),
    reason="the native library has no decoder_layer; run `make build`",
)


def model(kind: str, **more: Any) -> Any:
    """A random one whose biases and norms are not those that do nothing."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **more)
    made = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, x in made.named_parameters():
            if "norm" in name or "bias" in name:
                x.add_(0.3 * torch.randn_like(x))
    return made


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: model("Llama"),
    "llama with biases": lambda: model("Llama", attention_bias=True, head_dim=10),
    "mistral": lambda: model("Mistral", sliding_window=None),
    "mistral, sliding": lambda: model("Mistral", sliding_window=5),
    "qwen2": lambda: model("Qwen2"),
    "qwen2, half sliding": lambda: model(
        "Qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=2
    ),
    "qwen3": lambda: model("Qwen3", head_dim=16),
}


@needs_kernel
@pytest.mark.parametrize("kind", MODELS)
def test_steps_are_the_models_own(kind: str) -> None:
    """Logits, states and cache, of a batch with padding, with tokens taken back between."""
    target = MODELS[kind]()
    fused, own = (CachedModel(target, 2, keep_states=True) for _ in range(2))
    assert fused._fused is not None
    own._fused = None
    torch.manual_seed(1)
    with torch.no_grad():
        for tokens, counts, kept in (
            (9, [9, 4], [9, 4]), (3, [3, 3], [10, 7]), (1, [1, 1], [11, 8]), (4, [2, 4], [12, 12]),
        ):  # fmt: skip
            ids = torch.randint(0, 60, (2, tokens))
            got, want = (x.extend(ids, counts, tokens) for x in (fused, own))
            for row, count in enumerate(counts):
                torch.testing.assert_close(
                    got[row, -count:], want[row, -count:], rtol=1e-4, atol=1e-4
                )
            for x in (fused, own):
                x.rollback(kept)
            torch.testing.assert_close(fused.states(3), own.states(3), rtol=1e-4, atol=1e-4)
    for a, b in zip(fused.cache.layers, own.cache.layers, strict=True):
        for row, length in enumerate(own.lengths):
            for name in ("keys", "values"):
                x, y = (getattr(layer, name)[row, :, -length:] for layer in (a, b))
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@needs_kernel
def test_bf16_is_no_farther_from_fp32_than_the_models_own() -> None:
    exact = model("Llama")
    rounded = model("Llama").bfloat16()
    for x, y in zip(exact.parameters(), rounded.parameters(), strict=True):
        x.data = y.data.float()
    ids, errors = torch.randint(0, 60, (6, 5)), []
    with torch.no_grad():
        want = exact(ids).logits
        for own in (False, True):
            cached = CachedModel(rounded, 6)
            cached._fused = None if own else cached._fused
            errors.append((cached.extend(ids, [5] * 6, 5).float() - want).norm())
    assert errors[0] <= 1.05 * errors[1]


@needs_kernel
def test_the_layers_are_really_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    target = llama()
    ran = []
    monkeypatch.setattr(type(target.model.layers[0]), "forward", lambda *x, **y: ran.append(1))
    found = pydistill.generate(target, None, torch.tensor([[1, 2, 3]]), max_new_tokens=3, seed=0)
    assert found.tokens.shape == (1, 3) and not ran


@needs_kernel
def test_long_prompts_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """And their cache goes on here."""
    monkeypatch.setattr("pydistill.speculative.fused_layers._FEW", 2)
    monkeypatch.setattr("pydistill.speculative.fused_layers._SCORES", 40)
    target, calls = llama(), []
    cached = CachedModel(target, 1)
    target.register_forward_pre_hook(lambda *x: calls.append(1))
    ids = torch.randint(0, 61, (1, 17))
    with torch.no_grad():
        for part, so_far in ((ids[:, :7], 1), (ids[:, 7:9], 1), (ids[:, 9:], 2)):
            got = cached.extend(part, [part.shape[1]], 1)
            assert len(calls) == so_far
        want = target(ids).logits[:, -1:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def _adapter(target: Any) -> None:
    class Adapter(nn.Linear):
        pass

    old = target.model.layers[1].mlp.up_proj
    target.model.layers[1].mlp.up_proj = Adapter(old.in_features, old.out_features, bias=False)


def _hook(target: Any) -> None:
    target.model.layers[0].mlp.register_forward_hook(lambda *x: None)


def _another_forward(target: Any) -> None:
    target.model.layers[0].forward = lambda *x, **y: x[0]


def _mixed(target: Any) -> None:
    target.model.layers[0].mlp.double()


@pytest.mark.parametrize("change", [_adapter, _hook, _another_forward, _mixed])
def test_changed_models_run_as_they_are(change: Callable[[Any], None]) -> None:
    target = llama()
    change(target)
    assert fused_layers(target) is None


def test_other_models_run_as_they_are() -> None:
    assert fused_layers(model("Gemma", head_dim=8)) is None
    assert fused_layers(model("Llama", hidden_act="gelu")) is None
    assert fused_layers(model("Llama", mlp_bias=True)) is None
    assert fused_layers(model("Llama").double()) is None
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2))
    assert fused_layers(gpt2) is None


@needs_kernel
def test_feature_drafts_take_them_too() -> None:
    target = llama()
    assert fused_layers(feature(target, 1, stem=1)) is not None


def test_the_heads_product() -> None:
    head = nn.Linear(8, 5)
    states = torch.randn(2, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(linear(head, states), head(states))
