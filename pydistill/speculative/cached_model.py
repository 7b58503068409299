"""A causal model with the key-value cache of a batch, rolled back row by row.

The layout is that of left padding: the columns of a row's tokens end at the cache's last column,

    row 0   . . a b c d          lengths = [4, 6]
    row 1   e f g h i j

so the mask and the positions that a model is given are those of an ordinary batch padded on the
left, and every model that serves such batches serves here. A row that rolls back further than
another is moved to the right edge again; nothing rejected stays, and there are no holes.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydistill.speculative.fused_layers import few, fused_layers, linear

_ATTENTION = {"full_attention", "sliding_attention"}


class StepOutput(NamedTuple):
    logits: Tensor  # [B, rows, V]
    states: Tensor  # [B, T, H]


class CachedModel:
    """`lengths` are the tokens that each row of the cache holds.

    With `keep_states` the last hidden states of these tokens are kept like keys and rolled back
    with them, `[B, columns, H]`.
    """

    def __init__(self, model: Any, batch: int, keep_states: bool = False) -> None:
        from transformers.cache_utils import Cache

        from pydistill.speculative.growing_cache import GrowingLayer

        self.model = model
        # Sliding layers keep everything, too: their mask is made from the columns' distances.
        self.cache: Any = Cache(layer_class_to_replicate=GrowingLayer)
        self._states: Any = GrowingLayer() if keep_states else None
        self.lengths = [0] * batch
        self.context = context_of(model)
        accepted = inspect.signature(model.forward).parameters
        self._positions = "position_ids" in accepted
        self._keep = "logits_to_keep" in accepted
        self._cache = cache_argument(model)
        self._fused: Any = fused_layers(model)

    @property
    def fused(self) -> bool:
        """Whether its layers run by `decoder_layer` where tokens are few."""
        return self._fused is not None

    def extend(self, ids: Tensor, counts: Sequence[int], rows: int) -> Tensor:
        """Runs the model on tokens `ids [B, T]`, of which row i's are the last `counts[i]`, and
        caches them; the logits `[B, rows, V]` of the last ones."""
        logits: Tensor = self.run(ids, counts, rows).logits[:, -rows:]
        return logits

    def run(self, ids: Tensor, counts: Sequence[int], rows: int, **more: Any) -> Any:
        """As `extend`, all that the model returns; `more` is passed to it."""
        lengths = [have + new for have, new in zip(self.lengths, counts, strict=True)]
        behind, width = max(self.lengths), max(self.lengths) + ids.shape[1]
        keywords: dict[str, Any] = {}
        starts = torch.tensor([width - length for length in lengths])
        padded = any(length != width for length in lengths)
        if padded or self._positions:
            columns = torch.arange(width)[None] - starts[:, None]
            if padded:
                keywords["attention_mask"] = (columns >= 0).long().to(ids.device)
            if self._positions:
                # Slots that no one looks at may lie beyond the context, of padding before 0.
                last = None if self.context is None else self.context - 1
                keywords["position_ids"] = columns[:, behind:].clamp(0, last).to(ids.device)
        if self._fused is not None and few(ids.shape[1], behind):
            found = self._few(ids, keywords["position_ids"], starts, rows, **more)
        else:
            if self._keep:
                keywords["logits_to_keep"] = rows
            keywords[self._cache or ""] = self.cache
            found = self._call(input_ids=ids, use_cache=True, **keywords, **more)
        self.lengths = lengths
        if behind + ids.shape[1] > max(lengths):  # columns of padding alone
            self.rollback(lengths)
        return found

    def _few(
        self, ids: Tensor, positions: Tensor, starts: Tensor, rows: int, **more: Any
    ) -> StepOutput:
        """As `_call`, by `decoder_layer`."""
        step = getattr(self.model, "step", None)
        if step is not None:  # a draft that is more than its layers
            found: StepOutput = step(self._fused, ids, positions, starts, self.cache, rows, **more)
            return found
        states = self._fused(self.model.get_input_embeddings()(ids), positions, starts, self.cache)
        if self._states is not None:
            self._states.update(states[:, None], states[:, None, :, :0])
        return StepOutput(linear(self.model.get_output_embeddings(), states[:, -rows:]), states)

    def _call(self, **keywords: Any) -> Any:
        if self._states is None:
            return self.model(**keywords)
        seen = []
        hook = self.model.base_model.register_forward_hook(
            lambda module, given, output: seen.append(output.last_hidden_state[:, None])
        )
        try:
            found = self.model(**keywords)
        finally:
            hook.remove()
        self._states.update(seen[0], seen[0][..., :0])
        return found

    def states(self, count: int) -> Tensor:
        """`[B, count, H]`: of the last `count` tokens of each row, 0 before its first one."""
        columns: Tensor = self._states.keys[:, 0, -count:]
        columns = torch.nn.functional.pad(columns, (0, 0, count - columns.shape[1], 0))
        lengths = torch.tensor(self.lengths, device=columns.device)
        there = torch.arange(count, 0, -1, device=columns.device) <= lengths[:, None]
        return torch.where(there[..., None], columns, 0)

    def rollback(self, lengths: Sequence[int]) -> None:
        """Keeps the first `lengths[i]` tokens of row i."""
        width, new = self.cache.get_seq_length(), max(lengths)
        ends = [width - (have - kept) for have, kept in zip(self.lengths, lengths, strict=True)]
        moves = [
            (row, end - kept, new - kept, kept)
            for row, (end, kept) in enumerate(zip(ends, lengths, strict=True))
            if end != new and kept
        ]
        self.lengths = list(lengths)
        if moves:
            for layer in [*self.cache.layers, *([] if self._states is None else [self._states])]:
                layer.realign(moves, new)
        elif width != new:
            self.cache.crop(new - width)
            if self._states is not None:
                self._states.crop(new - width)

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows of the batch."""
        index = torch.tensor(rows, device=self.model.device)
        self.cache.batch_select_indices(index)
        if self._states is not None:
            self._states.batch_select_indices(index)
        kept = [self.lengths[row] for row in rows]
        self.lengths = kept
        self.rollback(kept)


def check_model(name: str, model: Any) -> None:
    """Raises for a model whose cache cannot be rolled back."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise TypeError(
            f"{name} is a {type(model).__name__}; pass a causal language model of transformers."
        )
    kind = type(model).__name__
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} {kind} has an encoder; pass a decoder-only causal model.")
    others = sorted(set(getattr(text, "layer_types", None) or ()) - _ATTENTION)
    what = None
    if getattr(model, "_is_stateful", False):
        what = "recurrent state"
    elif others:
        what = f"layers of type {', '.join(others)}"
    elif cache_argument(model) is None:
        what = "no key-value cache"
    if what is not None:
        raise ValueError(
            f"{name} {kind} has {what}, and cannot be rolled back behind rejected tokens yet; pass"
            " a model whose layers are full or sliding attention."
        )
    if model.training:
        raise ValueError(f"{name} is in training mode, with dropout; call {name}.eval() first.")


def cache_argument(model: Any) -> str | None:
    """How the model's forward calls its cache: the later releases of transformers, the earlier."""
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in accepted), None)


def context_of(model: Any) -> int | None:
    """The largest number of tokens that the model was made for, if its configuration says so."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def vocabulary_of(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def vocabulary_of_head(model: Any) -> Tensor | None:
    """The tokens of a head that was reduced, int64 `[S]` in order; None: all of them."""
    found = getattr(model, "draft_vocab", None)
    return found if isinstance(found, Tensor) else None


def attention_mask(model: Any, seen: Tensor) -> Tensor:
    """Which positions attend to which, bool `[B, 1, T, S]`, as the model's attention takes it."""
    if model.config._attn_implementation == "sdpa":
        return seen
    dtype = model.dtype
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
