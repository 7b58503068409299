"""A draft on the target's own hidden states: EAGLE's, on the target's first layers.

At a position t whose token x_t is known, the target has left its last hidden state f_{t-1}, of the
run that led to x_t. With s_t what the target's first `stem` layers make of the tokens up to x_t,
its embedding where there are none, and W [H', 2H],

    g_t = N(layers(W [f_{t-1}; s_t]))        q(x_{t+1}) = softmax(head g_t),   f_{-1} = 0

layers being one or two of the target's architecture, which attend to those before as the target's
do, N its final norm, and the head the target's or some of its rows. g_t is meant to be like f_t:
for the next token it takes its place, and the state of a verified token in turn takes g's.

    step            1           2           3
    at              t           t + 1       t + 2       the last committed token, and two drafted
    its feature     f_{t-1}     g_t         g_{t+1}

So a draft costs a few layers and a head, and reads what the target found out. What f_{t-1} lacks is
x_t; one or two layers of the target put it into its context, exactly, before W, and so are worth
more than as many behind it. The draft learns one step at every position at once; `unroll` also
gives the further steps, each position's on the steps before it, as they will be met (EAGLE-3's
training-time test).

Sources: EAGLE, Li et al. 2024, arXiv 2401.15077; EAGLE-3, Li et al. 2025, arXiv 2503.01840; a
target's first layers as a draft, Kangaroo, Liu et al. 2024, arXiv 2404.18911.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pydistill.speculative.cached_model import StepOutput, attention_mask, cache_argument
from pydistill.speculative.draft_models import chosen_tokens, in_dtype
from pydistill.speculative.fused_layers import FusedLayers, linear

_FORMAT = "pydistill_draft"


class FeatureDraft(nn.Module):
    """Made for one target, whose embeddings, and head unless it is reduced, it shares."""

    def __init__(
        self,
        target: Any,
        layers: int = 1,
        stem: int = 0,
        width: int | None = None,
        draft_vocab: int | Sequence[int] | Tensor | None = None,
    ) -> None:
        super().__init__()
        base, size = target.base_model, target.get_output_embeddings().in_features
        self.config, self.stem = _config(base.config, layers, stem, width), stem
        inner = self.config.hidden_size
        small = copy.deepcopy(self.config)
        small.vocab_size, small.pad_token_id = 1, None  # its own embeddings are not used
        self.fc = nn.Linear(2 * size, inner, bias=False)
        self.model = type(base)(small)
        self.model.set_input_embeddings(None)
        self.out = None if inner == size else nn.Linear(inner, size, bias=False)
        self.head: nn.Linear | None = None
        # In a tuple, which keeps them out of this module's parameters.
        self._target = (target.get_input_embeddings(), target.get_output_embeddings())
        self.generation_config = copy.deepcopy(target.generation_config)
        self._cache = cache_argument(self.model)
        if draft_vocab is not None:
            self._reduce(chosen_tokens(draft_vocab, target))

    def _reduce(self, ids: Tensor) -> None:
        whole = self._target[1]
        self.head = nn.Linear(whole.in_features, len(ids), bias=whole.bias is not None)
        self.register_buffer("draft_vocab", ids)
        with torch.no_grad():
            self.head.weight.copy_(whole.weight[ids])
            if whole.bias is not None:
                self.head.bias.copy_(whole.bias[ids])

    @property
    def base_model(self) -> Any:
        return self.model

    def get_output_embeddings(self) -> Any:
        return self._target[1] if self.head is None else self.head

    @property
    def layers(self) -> int:
        """Behind W."""
        return int(self.config.num_hidden_layers) - self.stem

    @property
    def features(self) -> int:
        """H, of the target's hidden states."""
        return self.fc.in_features // 2

    @property
    def dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.fc.weight.device

    def num_parameters(self) -> int:
        """Of its own: without those of the target that it shares."""
        return sum(x.numel() for x in self.parameters())

    def forward(
        self,
        input_ids: Tensor,
        features: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> StepOutput:
        """`features [B, T, H]`: of each token, the state before it. The logits are of the last
        `logits_to_keep` positions, 0 for all."""
        states = self.states(input_ids, features, attention_mask, position_ids, cache, use_cache)
        return StepOutput(self.logits(states[:, -logits_to_keep:]), states)

    def states(
        self,
        input_ids: Tensor,
        features: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
    ) -> Tensor:
        """g `[B, T, H]`."""
        keywords = {} if cache is None else {self._cache or "": cache}

        def join(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            below, *rest = given
            return self.fc(torch.cat([features.to(below.dtype), below], -1)), *rest

        hook = self.model.layers[self.stem].register_forward_pre_hook(join)
        try:
            found: Tensor = self.model(
                inputs_embeds=self._target[0](input_ids).to(self.dtype),
                attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache,
                **keywords,
            ).last_hidden_state  # fmt: skip
        finally:
            hook.remove()
        return found if self.out is None else self.out(found)

    def step(
        self,
        layers: FusedLayers,
        input_ids: Tensor,
        positions: Tensor,
        starts: Tensor,
        cache: Any,
        logits_to_keep: int,
        features: Tensor,
    ) -> StepOutput:
        """`forward` on a few tokens, with its layers run by `layers`, which says what the rest is;
        without a gradient."""
        embedded = self._target[0](input_ids).to(self.dtype)

        def join(below: Tensor) -> Tensor:
            return linear(self.fc, torch.cat([features.to(below.dtype), below], -1))

        states = layers(embedded, positions, starts, cache, {self.stem: join})
        if self.out is not None:
            states = linear(self.out, states)
        head = self.get_output_embeddings()
        return StepOutput(linear(head, states[:, -logits_to_keep:]), states)

    def logits(self, states: Tensor) -> Tensor:
        """Of states `[..., H]`, over `draft_vocab` or all tokens."""
        head = self.get_output_embeddings()
        found: Tensor = head(states.to(head.weight.dtype))
        return found

    def unroll(
        self, input_ids: Tensor, features: Tensor, seen: Tensor, position_ids: Tensor, steps: int
    ) -> list[Tensor]:
        """g of steps 1 ... `steps` at all positions, `[B, T, H]` each, differentiable.

        Args:
            input_ids, features, position_ids: as in `forward`; position 0 begins a text.
            seen: bool `[B, T, T]`: which earlier positions each position attends to, and itself.
        """
        from transformers import DynamicCache

        count, device = input_ids.shape[1], input_ids.device
        cache, found = DynamicCache(), list[Tensor]()
        seen = seen | torch.eye(count, dtype=torch.bool, device=device)  # no row is empty
        apart = torch.arange(count, device=device)
        apart = apart[:, None] - apart
        begins = (position_ids == 0)[..., None]
        for step in range(steps):
            # A block's own features begin `step` positions before: what is before them attends as
            # to the first step's keys, of the target's features, and each later one is of its step.
            blocks = [seen & (apart >= step)]
            blocks += [seen & (apart == step - other) for other in range(1, step + 1)]
            mask = attention_mask(self.model, torch.cat(blocks, -1)[:, None])
            states = self.states(input_ids, features, mask, position_ids, cache, True)
            found.append(states)
            features = states.roll(1, 1).masked_fill(begins, 0)
        return found

    def save_pretrained(self, folder: Path | str) -> None:
        """Weights and form, without what is the target's; `load_draft` reads it."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        form = {
            _FORMAT: "feature", "layers": self.layers, "stem": self.stem,
            "width": self.config.hidden_size, "features": self.features,
            "draft_vocab_size": None if self.head is None else self.head.out_features,
        }  # fmt: skip
        save_file({k: v.contiguous() for k, v in self.state_dict().items()},
                  folder / "model.safetensors")  # fmt: skip
        (folder / "config.json").write_text(json.dumps(form, indent=2) + "\n", "utf-8")


def feature(
    target: Any,
    layers: int = 1,
    *,
    stem: int = 0,
    width: int | None = None,
    draft_vocab: int | Sequence[int] | Tensor | None = None,
) -> FeatureDraft:
    """A draft of a few layers that reads the target's hidden states.

    Args:
        target: a causal model of transformers, with a base model of layers in a list and a linear
            head.
        layers: how many, copied from the target's last ones, with its final norm.
        stem: how many of the target's first layers, copied, stand below.
        width: H', of the layers; another one than the target's H makes random layers with heads of
            the target's size, and a product back to H, and has no stem.
        draft_vocab: the tokens that its head knows, as in `reduced`; None: the target's head.

    Returns:
        A module in the target's dtype, in eval mode, to be trained, for `generate` with this
        target. It shares the target's embeddings, and its head if that is not reduced.
    """
    base, head = target.base_model, target.get_output_embeddings()
    if base is target or type(head) is not nn.Linear or not hasattr(base, "layers"):
        raise ValueError(
            f"{type(target).__name__} does not keep its layers in a list named `layers` with a"
            " linear head behind them; pass a draft model of its own."
        )
    total = base.config.num_hidden_layers
    if not 1 <= layers <= total:
        raise ValueError(f"layers={layers} is outside 1..{total}, the layers of the target.")
    if not 0 <= stem <= total - layers:
        raise ValueError(
            f"stem={stem} is outside 0..{total - layers}, the layers that the target has beside"
            f" layers={layers}."
        )
    draft = FeatureDraft(target, layers, stem, width, draft_vocab)
    if draft.out is None:
        # What is below stands where the layer below stood; the feature begins small.
        nn.init.normal_(draft.fc.weight, std=0.02)
        with torch.no_grad():
            draft.fc.weight[:, draft.features :] += torch.eye(draft.features)
        kept = [*base.layers[:stem], *base.layers[-layers:]]
        for new, old in zip(draft.model.layers, kept, strict=True):
            new.load_state_dict(old.state_dict())
        if hasattr(base, "norm"):
            draft.model.norm.load_state_dict(base.norm.state_dict())
    return in_dtype(draft.to(target.device), target.dtype).eval()  # type: ignore[no-any-return]


def load_feature(folder: Path, target: Any, dtype: torch.dtype) -> FeatureDraft:
    """What `FeatureDraft.save_pretrained` wrote, for the target that it was made for."""
    from safetensors.torch import load_file

    form = json.loads((folder / "config.json").read_text("utf-8"))
    size = target.get_output_embeddings().in_features
    if form["features"] != size:
        raise ValueError(
            f"the draft in {folder} reads hidden states of {form['features']} numbers, the target"
            f" has {size}; load it with the target that it was trained for."
        )
    width = None if form["width"] == size else form["width"]
    weights = load_file(folder / "model.safetensors")
    draft = FeatureDraft(
        target, form["layers"], form.get("stem", 0), width, weights.get("draft_vocab")
    )
    draft.load_state_dict(weights)
    return in_dtype(draft.to(target.device), dtype).eval()  # type: ignore[no-any-return]


def _config(config: Any, layers: int, stem: int, width: int | None) -> Any:
    """The target's, of its first and last layers' kinds, and of another width."""
    new = copy.deepcopy(config)
    new.num_hidden_layers = stem + layers
    if getattr(config, "layer_types", None):
        new.layer_types = [*config.layer_types[:stem], *config.layer_types[-layers:]]
    if width is None or width == config.hidden_size:
        return new
    if stem:
        raise ValueError(
            f"stem={stem}, the target's layers, goes with the target's width of"
            f" {config.hidden_size}; drop width={width}."
        )
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if width < 1 or width % size:
        raise ValueError(f"width={width} is not a multiple of {size}, the target's size of a head.")
    new.hidden_size, new.head_dim, new.num_attention_heads = width, size, width // size
    shared = heads // groups
    new.num_key_value_heads = (
        new.num_attention_heads // shared if new.num_attention_heads % shared == 0
        else new.num_attention_heads
    )  # fmt: skip
    new.intermediate_size = round(config.intermediate_size * width / config.hidden_size)
    return new
