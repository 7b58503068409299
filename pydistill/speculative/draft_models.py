"""Draft models made of a target: some of its layers, or a head over some of its tokens.

A head over V tokens is much of what a small draft costs. `reduced` keeps the S rows of a chosen
sub-vocabulary, so that the head is a product of H x S, and the draft proposes these tokens alone:
q is 0 elsewhere, which `verify` is told, and the text keeps the target's law. What is lost is the
target's mass on the other tokens.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pydistill.speculative.cached_model import vocabulary_of, vocabulary_of_head

_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


def truncated(
    target: Any,
    layers: int | Sequence[int],
    *,
    draft_vocab: int | Sequence[int] | Tensor | None = None,
) -> Any:
    """A draft made of some of the target's layers, copied, with its embeddings, norm and head.

    Args:
        target: a causal model of transformers that keeps its layers in a list named `layers`.
        layers: their indices in order, or how many, evenly spaced from the first to the last.
        draft_vocab: the tokens that the draft's head knows, as in `reduced`; None: all.

    Returns:
        A new model of the target's class, dtype and device, in eval mode, ready to be trained.
    """
    total = target.config.num_hidden_layers
    if isinstance(layers, int):
        if not 1 <= layers <= total:
            raise ValueError(f"layers={layers} is outside 1..{total}, the layers of the target.")
        chosen = [round(i * (total - 1) / max(1, layers - 1)) for i in range(layers)]
    else:
        chosen = list(layers)
        if not chosen or sorted(set(chosen)) != chosen or not 0 <= chosen[0] <= chosen[-1] < total:
            raise ValueError(
                f"layers={chosen} are not layers of the target; pass increasing indices from 0 to"
                f" {total - 1}."
            )
    weights = target.state_dict()
    if not any(_LAYER.search(key) for key in weights):
        raise ValueError(
            f"{type(target).__name__} does not keep its layers in a list named `layers`; pass a"
            " draft model of its own."
        )
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = len(chosen)
    if getattr(config, "layer_types", None):
        config.layer_types = [target.config.layer_types[i] for i in chosen]
    draft = in_dtype(type(target)(config).to(device=target.device), target.dtype)
    kept = {}
    for key, value in weights.items():
        found = _LAYER.search(key)
        if found is None:
            kept[key] = value
        elif (old := int(found[0])) in chosen:
            kept[_LAYER.sub(str(chosen.index(old)), key, count=1)] = value
    draft.load_state_dict(kept)
    draft.generation_config = copy.deepcopy(target.generation_config)
    if draft_vocab is not None:
        _reduce(draft, draft_vocab)
    return draft.eval()


def reduced(draft: Any, draft_vocab: int | Sequence[int] | Tensor) -> Any:
    """A copy of a draft whose head knows the tokens of `draft_vocab` alone.

    Args:
        draft: a causal model of transformers, whose head is a linear layer.
        draft_vocab: their ids, in any order, as `frequent_tokens` chooses them by a text; or a
            number: so many of the lowest ids, which in a BPE vocabulary were merged first and are
            common, and the end tokens of the generation configuration among them.

    Returns:
        A model with the buffer `draft_vocab`, int64 `[S]` in order, whose logits are over these.
        `save_pretrained` writes it, and `load_draft` reads it.
    """
    new = copy.deepcopy(draft)
    _reduce(new, draft_vocab)
    return new.eval()


def frequent_tokens(
    texts: Iterable[Sequence[int] | Tensor], count: int, *, always: Sequence[int] = ()
) -> Tensor:
    """The `count` most frequent tokens of the texts and `always`, int64 in order of their ids.

    Equally frequent ones by their ids, so that a text with fewer different tokens is filled up
    with the lowest ids.
    """
    rows = [torch.as_tensor(x, dtype=torch.int64).flatten() for x in texts]
    seen = torch.bincount(torch.cat(rows)) if rows else torch.zeros(0, dtype=torch.int64)
    seen = nn.functional.pad(seen, (0, max(0, max([count, *(x + 1 for x in always)]) - len(seen))))
    seen[list(always)] = seen.max() + 1
    if count < len(set(always)):
        raise ValueError(
            f"count={count} is less than the {len(set(always))} tokens of always; raise it."
        )
    return seen.sort(descending=True, stable=True).indices[:count].sort().values


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The model with its parameters in `dtype`, in place.

    Buffers stay: rotary frequencies that are rounded to bf16 turn far positions to another place
    than those of a model that was loaded in bf16, which keeps them in fp32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def load_draft(folder: Path | str, dtype: torch.dtype, target: Any = None) -> Any:
    """The draft that `save_pretrained` wrote to `folder`, in eval mode; one on hidden states, and
    no other, needs its target."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    kind = kind_of_draft(folder)
    if kind == "feature":
        from pydistill.speculative.feature_draft import load_feature

        if target is None:
            raise ValueError(f"the draft in {folder} reads a target's states; pass target=.")
        return load_feature(folder, target, dtype)
    if kind is None:
        whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return whole.eval()
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    make: Any = AutoModelForCausalLM.from_config
    model = make(config, dtype=torch.float32)
    _set_head(model, torch.zeros(config.draft_vocab_size, dtype=torch.int64))
    weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights.update(load_file(path))
    model.load_state_dict(weights)
    return in_dtype(model, dtype).eval()


def kind_of_draft(folder: Path) -> str | None:
    """Which draft that transformers cannot load a folder holds: "feature", "reduced"; else None."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    kind: str | None = config.get("pydistill_draft")
    return kind or ("reduced" if "draft_vocab_size" in config else None)


def chosen_tokens(draft_vocab: int | Sequence[int] | Tensor, model: Any) -> Tensor:
    """int64 `[S]` in order, of what `reduced` takes."""
    total = vocabulary_of(model)
    if isinstance(draft_vocab, int):
        if not 1 <= draft_vocab <= total:
            raise ValueError(
                f"draft_vocab={draft_vocab} is outside 1..{total}, the tokens of the model."
            )
        return frequent_tokens([], draft_vocab, always=end_tokens(model)[:draft_vocab])
    ids = torch.as_tensor(draft_vocab).flatten()
    if ids.is_floating_point() or ids.dtype == torch.bool or not ids.numel():
        raise ValueError(f"draft_vocab is {ids.dtype} of {ids.numel()}; pass token ids.")
    ids = ids.long().sort().values
    wrong = [x for x in (int(ids[0]), int(ids[-1])) if not 0 <= x < total]
    if wrong:
        raise ValueError(f"draft_vocab holds {wrong[0]}, outside the model's {total} tokens.")
    if bool((ids[1:] == ids[:-1]).any()):
        twice = int(ids[1:][ids[1:] == ids[:-1]][0])
        raise ValueError(f"draft_vocab holds {twice} twice; pass each token once.")
    return ids


def end_tokens(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else sorted(set(ends))


@torch.no_grad()
def _reduce(model: Any, draft_vocab: int | Sequence[int] | Tensor) -> None:
    if vocabulary_of_head(model) is not None:
        raise ValueError("the draft's head is reduced already; reduce the whole draft.")
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ValueError(
            f"the head of {type(model).__name__} is a {type(head).__name__}; only that of a linear"
            " layer can be reduced."
        )
    ids = chosen_tokens(draft_vocab, model)
    _set_head(model, ids)
    new = model.get_output_embeddings()
    new.weight.copy_(head.weight[ids])
    if head.bias is not None:
        new.bias.copy_(head.bias[ids])


def _set_head(model: Any, ids: Tensor) -> None:
    """An empty head over `ids`, which is tied to nothing."""
    old = model.get_output_embeddings()
    weight = old.weight
    new = nn.Linear(
        old.in_features, len(ids), bias=old.bias is not None, dtype=weight.dtype,
        device=weight.device,
    )  # fmt: skip
    model.set_output_embeddings(new)
    model.config.tie_word_embeddings = False
    model.config.draft_vocab_size = len(ids)
    model.all_tied_weights_keys = {}
    model.register_buffer("draft_vocab", ids.to(weight.device))
