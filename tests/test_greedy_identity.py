"""The comparison of speculative with plain text, on a tiny model: it agrees, and it can fail."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="models need the extra `hf`")

import pydistill
from benchmarks import greedy_identity
from pydistill.recipes import models

FEW = ["--prompts", "3", "--new-tokens", "12", "--draft", "layers:3", "--draft", "ngram"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_texts_agree(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    out = tmp_path / "out.json"
    command = ["--model", str(tiny), "--dtype", dtype, "--json", str(out), *FEW]
    assert greedy_identity.main(command) == 0
    found = json.loads(out.read_text())
    ways = [(x["draft"], x["sampled"], x["batched"]) for x in found]
    assert ways == [
        ("layers:3", False, False), ("layers:3", False, True),
        ("ngram", False, False), ("ngram", False, True),
        ("layers:3", True, True), ("ngram", True, True),
    ]  # fmt: skip
    assert all(x["tokens"] == 36 and x["texts"] == 3 for x in found)
    if dtype != "bf16":
        assert not any(x["divergences"] for x in found)
    assert "layers:3, greedy, one by one against transformers" in capsys.readouterr().out


@pytest.mark.slow
def test_a_wrong_token_is_found(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sixth of a text becomes the token that the target likes least."""
    target = models.load(str(tiny), torch.float64)[0]
    generate = pydistill.generate

    def wrong(*args: Any, **settings: Any) -> Any:
        found = generate(*args, **settings)
        if not settings["do_sample"] and len(found.tokens) == 1:
            text = found.sequences[:, : found.sequences.shape[1] - 12 + 5]
            with torch.no_grad():
                found.tokens[0, 5] = target(text).logits[0, -1].argmin()
        return found

    monkeypatch.setattr(pydistill, "generate", wrong)
    command = ["--model", str(tiny), "--dtype", "bf16", *FEW]
    assert greedy_identity.main(command) == 1
    out = capsys.readouterr().out
    assert "layers:3, greedy, one by one against transformers: 0 of 3 texts the same" in out
    assert out.count("prompt 1, token 5") >= 2
    assert "WRONG" in out


def test_a_near_tie_is_told_from_an_error() -> None:
    class Fixed:
        """Logits of two tokens, whatever the text."""

        def __init__(self, *logits: float) -> None:
            self.logits = torch.tensor([[logits]])

        def __call__(self, text: torch.Tensor) -> "Fixed":
            return self

    referee = object.__new__(greedy_identity.Referee)
    referee.target, referee.exact = Fixed(2.0, 2.0), Fixed(2.03, 1.98)
    assert referee.judge(0, [1], [0, 1], [0, 1]) is None
    found = referee.judge(4, [1], [0, 0], [0, 1])
    assert found is not None
    assert (found.prompt, found.token, found.expected, found.found) == (4, 1, 0, 1)
    assert found.margin == pytest.approx(0.05, abs=1e-6)
    assert found.rounding == pytest.approx(0.03, abs=1e-6)
    assert found.near_tie  # 0.05 <= 2 * 0.03
    referee.exact = Fixed(2.5, 2.0)
    referee.target = Fixed(2.3, 2.0)
    found = referee.judge(0, [1], [0], [1])
    assert found is not None and not found.near_tie
    short = referee.judge(0, [1], [0, 1], [0])
    assert short is not None and short.found is None and not short.near_tie


def test_wrong_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert greedy_identity.main(["--model", "/none"]) == 2
    assert "model folder '/none' does not exist" in capsys.readouterr().err
