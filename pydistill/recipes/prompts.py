"""The shipped prompts, and prompts as a model's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor

HELD_OUT = "# held out"


def shipped() -> tuple[list[str], list[str]]:
    """Questions: those to train on, and those held out."""
    train, held_out = (_lines(part) for part in _read("prompts.txt").split(HELD_OUT))
    return train, held_out


def copying() -> list[str]:
    """Requests whose answers repeat much of them: corrections, replacements, summaries."""
    return _lines(_read("copy_prompts.txt"))


def encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The texts' tokens, each a user's message where the tokenizer has a chat template, else the
    beginning of a text."""
    chat = tokenizer.chat_template is not None
    if chat:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            for text in texts
        ]
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=not chat)["input_ids"]
    return found


def padded(ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """A batch `[N, P]`, padded on the left, and where it is not padding."""
    longest = max(map(len, ids))
    rows = [[0] * (longest - len(x)) + list(x) for x in ids]
    attended = [[0] * (longest - len(x)) + [1] * len(x) for x in ids]
    return torch.tensor(rows), torch.tensor(attended)


def _read(name: str) -> str:
    return resources.files("pydistill.recipes").joinpath(f"data/{name}").read_text("utf-8")


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]
