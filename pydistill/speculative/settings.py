"""What of transformers' generation configuration is honoured, in the form that the loop uses.

Values are found as `generate` of transformers finds them: the caller's, then the model's
`generation_config`, then transformers' defaults (20 new tokens; 50 for `top_k` when sampling). A
field that is set to something that would change the output and is not served raises.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_WARPERS = ("temperature", "top_k", "top_p", "min_p")
_WARPERS_OFF = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
_SERVED = {
    *_WARPERS, "do_sample", "max_new_tokens", "max_length", "min_new_tokens", "min_length",
    "eos_token_id", "pad_token_id", "stop_strings", "max_time", "repetition_penalty",
    "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
}  # fmt: skip
# Without effect on one greedy or sampled sequence, here and in transformers.
_WITHOUT_EFFECT = {
    "bos_token_id", "decoder_start_token_id", "early_stopping", "length_penalty",
    "renormalize_logits", "return_dict_in_generate", "compile_config", "disable_compile",
    "continuous_batching_config", "transformers_version", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
    "target_lookbehind", "assistant_ensemble_weight", "max_matching_ngram_size",
}  # fmt: skip
_NEUTRAL: dict[str, Any] = {
    "use_cache": True, "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1,
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0, "guidance_scale": 1,
}  # fmt: skip
_FIX = {
    "num_return_sequences": "repeat the rows of input_ids",
    "prompt_lookup_num_tokens": 'pass draft="ngram"',
    "use_cache": "leave it True",
}

Processor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    max_new_tokens: int
    warpers: dict[str, Any]  # of `verify`; temperature 0 without sampling
    ends: frozenset[int]
    pad: int
    pad_is_padding: bool  # wherever it stands in a prompt
    criteria: tuple[Callable[..., Any], ...]  # of transformers, asked after each token
    _config: Any
    _more: tuple[Processor, ...]

    def processors(self, prompt_length: int) -> list[Processor]:
        """What changes the logits of a request before they are warped, in transformers' order."""
        hf = importlib.import_module("transformers")
        config, found = self._config, list[Processor]()
        if config.repetition_penalty not in (None, 1.0):
            found.append(hf.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
        if config.no_repeat_ngram_size:
            found.append(hf.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
        ends = sorted(self.ends)
        if config.bad_words_ids is not None:
            found.append(hf.NoBadWordsLogitsProcessor(config.bad_words_ids, ends or None))
        if ends and config.min_new_tokens:
            found.append(
                hf.MinNewTokensLengthLogitsProcessor(prompt_length, config.min_new_tokens, ends)
            )
        if config.suppress_tokens is not None:
            found.append(hf.SuppressTokensLogitsProcessor(config.suppress_tokens))
        return [*found, *self._more]


def read(
    model: Any,
    width: int,
    generation_config: Any,
    changes: dict[str, Any],
    tokenizer: Any,
    logits_processor: Sequence[Processor] | None,
    stopping_criteria: Sequence[Callable[..., Any]] | None,
) -> Settings:
    """The settings for prompts of at most `width` tokens; raises for what cannot be served."""
    hf = importlib.import_module("transformers")
    blank = hf.GenerationConfig()
    config = copy.deepcopy(blank if generation_config is None else generation_config)
    for name, value in vars(model.generation_config).items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    for name, value in changes.items():
        if not hasattr(blank, name):
            raise TypeError(
                f"{name}={value!r} is neither an argument of generate nor a field of transformers'"
                " GenerationConfig; mend the name, or leave it out."
            )
        setattr(config, name, value)
    for name in vars(blank):
        _check_served(name, getattr(config, name, None))

    criteria = list(stopping_criteria or ())
    if config.stop_strings:
        if tokenizer is None:
            raise ValueError(
                f"stop_strings={config.stop_strings!r} are compared with text; pass tokenizer=."
            )
        criteria.append(hf.StopStringCriteria(tokenizer, config.stop_strings))
    if config.max_time is not None:
        criteria.append(hf.MaxTimeCriteria(config.max_time))
    end = config.eos_token_id
    ends = [] if end is None else torch.as_tensor(end).flatten().tolist()
    pad = config.pad_token_id
    if config.min_new_tokens is None and config.min_length:
        config.min_new_tokens = max(0, config.min_length - width)
    return Settings(
        max_new_tokens=_new_tokens(config, changes, width),
        warpers=_warpers(config),
        ends=frozenset(ends),
        pad=int(pad) if pad is not None else ends[0] if ends else 0,
        pad_is_padding=pad is not None and pad not in ends,
        criteria=tuple(criteria),
        _config=config,
        _more=tuple(logits_processor or ()),
    )


def _check_served(name: str, value: Any) -> None:
    if value is None or name.startswith("_") or name in _SERVED | _WITHOUT_EFFECT:
        return
    if name == "cache_implementation" and value in ("dynamic", "hybrid"):
        return
    if value is False or (name in _NEUTRAL and value == _NEUTRAL[name]):
        if name != "use_cache" or value is True:
            return
    fix = _FIX.get(name, f"pass {name}=None")
    raise ValueError(
        f"the generation configuration has {name}={value!r}, which speculative decoding does not"
        f" serve; {fix}, or use the model's own generate."
    )


def _new_tokens(config: Any, changes: dict[str, Any], width: int) -> int:
    """`max_new_tokens`, else what `max_length` leaves, which counts the padded prompt."""
    longest = config.max_length
    if changes.get("max_length") is not None and changes.get("max_new_tokens") is None:
        found = longest - width  # the caller's goes before the model's max_new_tokens
    elif config.max_new_tokens is not None:
        found = config.max_new_tokens
    else:
        found = 20 if longest is None else longest - width
    if isinstance(found, bool) or not isinstance(found, int):
        raise TypeError(f"max_new_tokens={found!r} is not a whole number; pass a positive int.")
    if found < 1:
        limit = "" if config.max_new_tokens is not None else f" (max_length={longest})"
        raise ValueError(
            f"{found} new tokens are asked for after a prompt of {width}{limit}; pass a positive"
            " max_new_tokens."
        )
    return found


def _warpers(config: Any) -> dict[str, Any]:
    if not config.do_sample:
        return {"temperature": 0.0}
    given = {name: getattr(config, name) for name in _WARPERS}
    return {name: _WARPERS_OFF[name] if x is None else x for name, x in given.items()}
