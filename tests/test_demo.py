"""The demo on a tiny model made here, and the model cache; the real model is for `make demo`."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the demo needs the extra `hf`")

from pydistill import cli
from pydistill.recipes import UsageError, demo, models, prompts, speed
from pydistill.speculative import truncated


def options(tiny: Path, **changes: Any) -> demo.Options:
    small = {"model": str(tiny), "draft": "feature:1+1", "draft_vocab": "40", "new_tokens": 8}
    return demo.Options(**{**small, **changes})


@pytest.mark.slow
def test_the_table_and_the_bars(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = demo.run(options(tiny, steps=12, divergence="jsd"))
    assert "draft learns: 100%" in capsys.readouterr().err
    text = demo.table(result)
    for words in ("12 steps of jsd", "acceptance", "transformers' generate", "prompt lookup"):
        assert words in text
    assert "Of 16 greedy texts with a draft 16 are those of the model alone." in text
    assert max(map(len, text.splitlines()[1:])) <= 100
    assert "The draft is in" not in text
    trained = result.trained
    assert trained.before.acceptance < trained.after.acceptance <= 1
    for rates in (result.greedy, result.sampled, result.copying):
        assert [x.way for x in rates] == [speed.PLAIN, "the draft", "prompt lookup"]
        assert all(x.texts == 4 and x.seconds > 0 for x in rates)
        assert rates[0].per_run == 1


@pytest.mark.slow
def test_the_draft_is_kept_where_it_is_asked_for(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "draft"
    result = demo.run(options(tiny, steps=2, output=output), progress=False)
    assert f"The draft is in {output}." in demo.table(result)
    target, _ = models.load(str(tiny), torch.float32)
    draft, _ = models.draft_of(target, str(output), torch.float32)
    assert (draft.stem, draft.layers, len(draft.draft_vocab)) == (1, 1, 40)
    assert {path.name for path in tmp_path.iterdir()} == {"draft"}
    found = json.loads(json.dumps(result.to_json()))
    assert found["trained"]["options"]["steps"] == 2
    again = demo.run(options(tiny, steps=2), progress=False)
    assert again.trained.losses == result.trained.losses


def test_rates_count_what_every_way_wrote(tiny: Path) -> None:
    """Greedy texts are the target's with any draft, right or wrong, and the same as transformers'
    assisted generation; the tokens of a run of the target are what its runs gave."""
    target, tokenizer = models.load(str(tiny), torch.float32)
    drafts = {"two layers": truncated(target, 2), "lookup": "ngram", "itself": truncated(target, 4)}
    contestants = speed.ways(target, drafts, assisted=True)
    assert list(contestants) == [
        speed.PLAIN, "two layers", "two layers, transformers", "lookup", "lookup, transformers",
        "itself", "itself, transformers",
    ]  # fmt: skip
    settings = {"new_tokens": 12, "temperature": 0.0}
    rates = speed.measure(tokenizer, ["a", "b"], contestants, **settings)
    tokens = rates[0].tokens
    assert 2 <= tokens <= 24
    for x in rates:
        assert (x.tokens, x.same, x.texts) == (tokens, 2, 2)
    by_way = {x.way: x for x in rates}
    assert by_way["itself, transformers"].per_run is None
    assert 1 <= (by_way["two layers"].per_run or 0)
    lines = speed.table(rates)
    assert len(lines) == 9 and lines[2].startswith(f"| {speed.PLAIN} |")
    assert "| 1.00 | 1.00 | 2 of 2 |" in lines[2] and "| - | 2 of 2 |" in lines[4]

    def wrong(ids: torch.Tensor, settings: dict[str, Any], seed: int) -> speed.Written:
        return speed.Written(torch.full((12,), 7), 3)

    found = speed.measure(tokenizer, ["a"], {**contestants, "wrong": wrong}, **settings)[-1]
    assert (found.same, found.per_run) == (0, 4)
    sampled = speed.measure(
        tokenizer, ["a"], speed.ways(target, {}), new_tokens=6, temperature=1.0, seed=3
    )
    assert speed.table(sampled)[2].endswith("| 1.00 | - |")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing"])
def test_a_missing_model_gets_one_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--model", name]) == 2
    err = capsys.readouterr().err
    assert f"model folder {name!r} does not exist" in err
    assert err.count("\n") == 1


def test_a_folder_without_a_model_gets_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--model", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "cannot be loaded" in err
    assert err.count("\n") == 1


def test_an_output_that_exists_is_refused_before_the_work(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("keep")
    assert cli.main(["demo", "--model", str(tiny), "--output", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "keep"


def test_shipped_prompts_are_split_and_distinct() -> None:
    train, held_out = prompts.shipped()
    assert (len(train), len(held_out)) == (40, 8)
    assert len({*train, *held_out, *prompts.copying()}) == 48 + 6


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("PYDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_shipped", lambda: (tmp_path, "0.0"))
    return tmp_path / "cache"


def folders(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.is_dir()]


def test_the_second_load_uses_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def convert(source: Path, folder: Path) -> None:
        calls.append(folder)
        (folder / "weights").write_text("all of them")

    monkeypatch.setattr(models, "_convert", convert)
    first = models.converted()
    assert models.converted() == first
    assert (first / "weights").read_text() == "all of them"
    assert len(calls) == 1
    assert folders(cache) == [first.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
def test_an_interrupted_conversion_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def convert(source: Path, folder: Path) -> None:
        (folder / "weights").write_text("half of")
        raise error

    monkeypatch.setattr(models, "_convert", convert)
    with pytest.raises(type(error)):
        models.converted()
    assert folders(cache) == []


def test_what_a_killed_run_left_is_swept_away(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = cache / f".{models.DEFAULT}-0.0-bf16.part-killed"
    left.mkdir(parents=True)
    monkeypatch.setattr(models, "_convert", lambda source, folder: None)
    assert folders(cache) == [left.name]
    assert folders(models.converted().parent) == [f"{models.DEFAULT}-0.0-bf16"]


def test_two_first_runs_at_once_convert_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def convert(source: Path, folder: Path) -> None:
        calls.append(folder)
        time.sleep(0.2)
        (folder / "weights").write_text("all of them")

    monkeypatch.setattr(models, "_convert", convert)
    runs = [threading.Thread(target=models.converted) for _ in range(3)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join()
    assert len(calls) == 1
    assert (models.converted() / "weights").exists()


def test_a_full_disk_is_explained(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(source: Path, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "_convert", convert)
    with pytest.raises(UsageError, match=r"No space left on device.*PYDISTILL_CACHE"):
        models.converted()
    assert folders(cache) == []


def test_a_cache_that_cannot_be_made_is_explained(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(UsageError, match="PYDISTILL_CACHE"):
        models.converted()
