"""Prompts, answers to them that a model samples, and a model's logits on those answers.

Prompts are padded on the left, so the answers of a batch fill the same columns, and the head runs
on those columns only.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from pydistill.recipes import UsageError

HELD_OUT = "# held out"


@dataclass(frozen=True)
class Answers:
    """Prompts and answers; an answer is not counted after its end token."""

    ids: Tensor  # int64 [N, P + T]
    attended: Tensor  # int64 [N, P + T]
    counted: Tensor  # bool [N, T]

    def __getitem__(self, rows: Tensor | slice) -> Answers:
        return Answers(self.ids[rows], self.attended[rows], self.counted[rows])


def prompts() -> tuple[list[str], list[str]]:
    """The shipped prompts: those to train on, and those held out."""
    text = resources.files("pydistill.recipes").joinpath("data/prompts.txt").read_text("utf-8")
    parts = text.split(HELD_OUT)
    train, held_out = (
        [line for line in part.splitlines() if line and not line.startswith("#")] for part in parts
    )
    return train, held_out


def encode(tokenizer: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """The prompts' tokens as `[N, P]`, padded on the left, and where they are: each prompt a
    user's message where the tokenizer has a chat template, else the beginning of a text."""
    chat = tokenizer.chat_template is not None
    if chat:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            for text in texts
        ]
    batch = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not chat
    )
    return batch["input_ids"], batch["attention_mask"]


@torch.no_grad()
def sample(
    model: Any,
    ids: Tensor,
    attended: Tensor,
    *,
    new_tokens: int,
    pad: int,
    dtype: torch.dtype,
    answers: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    bar: Any = None,
) -> Answers:
    """`answers` sampled answers to each prompt, in the prompts' order, all in one batch.

    Coins are of torch's global generator; `bar` advances by one a token.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Tick(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            if bar is not None:
                bar.update()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    try:
        with _autocast(dtype):
            out = model.generate(
                input_ids=ids,
                attention_mask=attended,
                do_sample=True,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p or None,
                num_return_sequences=answers,
                max_new_tokens=new_tokens,
                pad_token_id=pad,
                stopping_criteria=StoppingCriteriaList([Tick()]),
            )
    except RuntimeError as error:
        if "probability tensor" not in str(error):  # torch.multinomial's words for NaN
            raise
        raise UsageError(
            "a model's logits have no softmax (NaN or infinity), so nothing can be sampled; mend"
            " its weights, or name another model."
        ) from error
    answer = out[:, ids.shape[1] :]
    attended = attended.repeat_interleave(answers, 0)
    attended = torch.cat([attended, torch.ones_like(answer)], -1)
    return Answers(out, attended, counted(answer, model.generation_config.eos_token_id))


def counted(answer: Tensor, end: int | list[int] | None) -> Tensor:
    """Which tokens of `answer [N, T]` were written: all up to an end token, and that one."""
    ended = torch.isin(answer, torch.tensor([] if end is None else end, dtype=answer.dtype))
    return ended.cumsum(-1) - ended.long() == 0


def answer_logits(model: Any, texts: Answers, dtype: torch.dtype) -> Tensor:
    """The logits `[N, T, V]` from which each token of the answers was or would be drawn."""
    attended = texts.attended[:, :-1]
    with _autocast(dtype):
        logits: Tensor = model(
            input_ids=texts.ids[:, :-1],
            attention_mask=attended,
            position_ids=(attended.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=texts.counted.shape[1],
        ).logits
    return logits


def _autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
