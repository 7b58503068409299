"""The comparison of ways to write, on a tiny model: what it prints is what it measured."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="models need the extra `hf`")

from benchmarks import generation
from pydistill.recipes import models, prompts, speed
from pydistill.recipes.write import plain, prompt_ids


def tables(out: str) -> dict[str, list[list[str]]]:
    """The cells of each table's rows, by the line above it."""
    found: dict[str, list[list[str]]] = {}
    for line in filter(None, out.splitlines()):
        if not line.startswith("|"):
            rows = found[line] = []
        elif not line.startswith(("| way", "|---")):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def command(tiny: Path, *more: str) -> list[str]:
    return ["--model", str(tiny), "--dtype", "fp32", "--prompts", "2", *more]


def test_the_figures_are_of_the_texts(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "figures.json"
    more = ("--draft", "layers:4", "ngram", "--max-new-tokens", "5", "--output", str(output))
    assert generation.main(command(tiny, *more)) == 0
    shown = tables(capsys.readouterr().out)
    kinds = {"held-out": prompts.shipped()[1], "copying": prompts.copying()}
    found = json.loads(output.read_text("utf-8"))
    assert list(found) == [f"{kind} prompts, temperature {t}" for kind in kinds for t in (0, 1)]
    assert list(shown) == [f"{label}, fp32" for label in found]

    target, tokenizer = models.load(str(tiny), torch.float32)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    for kind, texts in kinds.items():
        asked = [prompt_ids(tokenizer, text) for text in texts[:2]]
        greedy = sum(plain(target, ids, settings).shape[1] for ids in asked)
        for temperature in (0, 1):
            label = f"{kind} prompts, temperature {temperature}"
            assert [x["way"] for x in found[label]] == [
                speed.PLAIN, "none", "layers:4", "layers:4, transformers", "ngram",
                "ngram, transformers",
            ]  # fmt: skip
            for x, cells in zip(found[label], shown[f"{label}, fp32"], strict=True):
                assert (x["texts"], x["temperature"]) == (2, temperature)
                rate, base = (y["tokens"] / y["seconds"] for y in (x, found[label][0]))
                assert cells[:3] == [x["way"], f"{rate:.1f}", f"{rate / base:.2f}"]
                assert cells[3] == ("-" if x["per_run"] is None else f"{x['per_run']:.2f}")
                if temperature == 0:
                    assert (x["tokens"], x["same"], cells[4]) == (greedy, 2, "2 of 2")
                else:
                    assert 2 <= x["tokens"] <= 10 and cells[4] == "-"
            runs = {x["way"]: x["per_run"] for x in found[label]}
            assert runs[speed.PLAIN] == runs["none"] == 1
            assert 1 <= runs["layers:4"] <= 5  # whether it pays to draft is for the loop to say
            assert runs["ngram, transformers"] is None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that `speed` measures, which passes where a test says so."""
    now = [1000.0]
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_ratios_are_of_the_times(
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    clock: list[float],
) -> None:
    """Of constructed ways: the first text, which warms up, counts for nothing."""

    def way(seconds: float, tokens: list[int], runs: int | None) -> speed.Way:
        def write(ids: torch.Tensor, settings: dict[str, Any], seed: int) -> speed.Written:
            assert settings["max_new_tokens"] == 7
            clock[0] += seconds if seed else 100.0
            return speed.Written(torch.full((tokens[seed],), 3), runs)

        return write

    def ways(target: Any, drafts: Mapping[str, Any], assisted: bool) -> dict[str, speed.Way]:
        assert list(drafts.items()) == [("none", None), ("ngram", "ngram")] and assisted
        return {
            "slow": way(2.0, [9, 5, 3], 4),  # 8 tokens in 4 s, of 8 runs
            "fast": way(0.5, [9, 5, 7], 3),  # 12 in 1 s, of 6
            "assisted": way(4.0, [9, 4, 3], None),  # 7 in 8 s
        }

    monkeypatch.setattr(speed, "ways", ways)
    more = ("--max-new-tokens", "7", "--temperature", "0")
    assert generation.main(command(tiny, *more)) == 0
    shown = tables(capsys.readouterr().out)
    assert list(shown) == [f"{x} prompts, temperature 0, fp32" for x in ("held-out", "copying")]
    for rows in shown.values():
        assert rows == [
            ["slow", "2.0", "1.00", "1.00", "2 of 2"],
            ["fast", "12.0", "6.00", "2.00", "1 of 2"],
            ["assisted", "0.9", "0.44", "-", "1 of 2"],
        ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--model", "/none"], "model folder '/none' does not exist"),
        (["--prompts", "0"], "--prompts 0 is no positive number; pass 1."),
        (["--max-new-tokens", "-3"], "--max-new-tokens -3 is no positive number; pass 1."),
        (["--temperature", "0", "-1"], "--temperature -1 is outside 0 to infinity; pass 0"),
        (["--temperature", "nan"], "--temperature nan is outside 0 to infinity"),
        (["--output", "/none/figures.json"], "--output /none/figures.json is no file in a folder"),
        (["--output", "/"], "--output / is no file in a folder"),
        (["--draft", "layers:9"], "layers=9 is outside 1..4"),
        (["--draft", "layers:none"], "layers:none"),
        (["--max-new-tokens", "2048"], "2048 do not fit into the model's context of 2048"),
        (["--draft", "OTHER"], "vocab"),
    ],
)
def test_wrong_arguments_are_named(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    words: str,
) -> None:
    if "OTHER" in changes:
        from transformers import LlamaForCausalLM

        model, tokenizer = models.load(str(tiny), torch.float32)
        config = model.config
        config.vocab_size = 300
        models.save(tmp_path, LlamaForCausalLM(config), tokenizer)
        changes = ["--draft", str(tmp_path)]
    assert generation.main(command(tiny, *changes)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("benchmarks.generation: ") and words in last
