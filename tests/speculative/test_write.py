"""`pydistill generate` on a tiny model; the real one is for a user's machine."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="models need the extra `hf`")

from pydistill import cli


def test_the_same_text_whatever_the_draft(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = set()
    for draft in ("none", "ngram", "layers:2", str(tiny)):
        arguments = ["generate", "hello", "--model", str(tiny), "--draft", draft, "--json"]
        arguments += ["--max-new-tokens", "12", "--num-draft-tokens", "3"]
        assert cli.main([*arguments, *(["--compare"] if draft == "none" else [])]) == 0
        found = json.loads(capsys.readouterr().out)
        texts.add(found["text"])
        assert found["tokens"] <= 12
        assert (found["plain_tokens_per_second"] is None) == (draft != "none")
        if draft == str(tiny):
            assert found["acceptance"] == 1
    assert len(texts) == 1


def test_the_table_and_errors(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "hello", "--model", str(tiny), "--max-new-tokens", "12"]
    sampled = ["--draft", "layers:2", "--temperature", "0.8", "--top-p", "0.9", "--seed", "1"]
    assert cli.main([*arguments, *sampled, "--num-draft-tokens", "2", "--compare"]) == 0
    out = capsys.readouterr().out
    for words in ("runs of the target", "speed-up", "transformers' own generate"):
        assert words in out
    for wrong, words in (
        (["--draft", "layers:9"], "layers=9 is outside 1..4"),
        (["--draft", "layers:x"], "use layers:6"),
        (["--num-draft-tokens", "999"], "num_draft_tokens=999"),
        (["--temperature", "-1"], "temperature=-1"),
    ):
        assert cli.main([*arguments, *wrong]) == 2, wrong
        assert words in capsys.readouterr().err
    assert cli.main(["generate", "", *arguments[2:]]) == 2
    assert "empty" in capsys.readouterr().err
