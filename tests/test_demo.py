"""The demo on a tiny model made here, and the model cache; the real model is for `make demo`."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the demo needs the extra `hf`")

from pydistill import _native, cli
from pydistill.recipes import UsageError, answers, compare, demo, models


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares a test the fresh processes in which memory is measured."""
    monkeypatch.setattr(compare, "_peaks", lambda *_: dict.fromkeys(compare.WAYS))


def options(tiny: Path, **changes: Any) -> demo.Options:
    return demo.Options(**{"model": str(tiny), "layers": 2, "new_tokens": 8, **changes})


@pytest.mark.slow
def test_end_to_end(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "student"
    arguments = ["demo", "--model", str(tiny), "--layers", "2", "--steps", "12", "--json"]
    assert cli.main([*arguments, "--output", str(output)]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert "learns" not in err and "answers" not in err and "%" not in err  # no bars
    assert result["student_layers"] == [0, 3]
    assert len(result["losses"]) == 12
    before, after = result["before"], result["after"]
    assert after["loss"] < before["loss"]
    assert before["acceptance"] < after["acceptance"] <= 1
    assert [m["way"] for m in result["compared"]] == list(compare.WAYS)
    assert all(m["minimum"] <= m["median"] for m in result["compared"])
    assert (
        all(m["peak_bytes"] is not None for m in result["compared"])
        is Path("/proc/self/clear_refs").exists()
    )

    student, _ = models.load(str(output), torch.float32)
    assert student.config.num_hidden_layers == 2
    assert {path.name for path in tmp_path.iterdir()} == {"student"}


@pytest.mark.slow
@pytest.mark.usefixtures("no_memory")
def test_the_same_seed_gives_the_same_run(tiny: Path) -> None:
    def losses(seed: int) -> list[float]:
        return demo.run(options(tiny, steps=3, seed=seed), progress=False).losses

    first = losses(1)
    assert losses(1) == first
    assert losses(2) != first


@pytest.mark.usefixtures("no_memory")
def test_the_table_and_the_bars(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = demo.table(demo.run(options(tiny, steps=2, kind="jsd")))
    assert "student learns: 100%" in capsys.readouterr().err
    for words in ("2 steps of jsd", "acceptance", "teacher answering", "eager PyTorch"):
        assert words in text
    assert max(map(len, text.splitlines()[1:])) <= 100


@pytest.mark.slow
@pytest.mark.usefixtures("no_memory")
def test_a_wrong_loss_gets_no_ratio(tiny: Path) -> None:
    from dataclasses import replace

    result = demo.run(options(tiny, steps=1), progress=False)
    assert "times as fast" in demo.table(result)
    eager, ours, *rest = result.compared
    wrong = replace(result, compared=[eager, replace(ours, loss=2 * eager.loss), *rest])
    assert "times as fast" not in demo.table(wrong)


def test_answers_count_up_to_the_end_token(tiny: Path) -> None:
    """And the logits kept for column t are those that token t was drawn from."""
    teacher, tokenizer = models.load(str(tiny), torch.float32)
    torch.manual_seed(0)
    texts = answers.sample(
        teacher, *answers.encode(tokenizer, ["a", "long prompt"]), answers=2, new_tokens=8, pad=0,
        dtype=torch.float32,
    )  # fmt: skip
    width = texts.ids.shape[1] - 8
    assert texts.counted.shape == (4, 8)
    ids = texts.ids.clone()
    ids[0, width + 2] = 0  # as if the third token had ended the answer
    ended = (ids[:, width:] == 0).long()
    found = answers.counted(ids[:, width:], teacher.generation_config.eos_token_id)
    assert found[0, :4].tolist() == [True, True, True, False]
    assert bool((found == (ended.cumsum(-1) - ended == 0)).all())

    got = answers.answer_logits(teacher, texts, torch.float32)
    row = texts.ids[2:3]  # the longer prompt has no padding
    assert bool(texts.attended[2].all())
    want = teacher(row).logits[:, width - 1 : -1]
    torch.testing.assert_close(got[2:3], want, rtol=1e-4, atol=1e-4)
    short = texts.ids[0:1, texts.attended[0].bool()]
    want = teacher(short).logits[:, -9:-1]
    torch.testing.assert_close(got[0:1], want, rtol=1e-4, atol=1e-4)


def test_the_student_is_the_chosen_layers_of_the_teacher(tiny: Path) -> None:
    teacher, _ = models.load(str(tiny), torch.float32)
    student, chosen = models.shallow_copy(teacher, 3)
    assert chosen == [0, 2, 3]
    for new, old in enumerate(chosen):
        for key, value in student.model.layers[new].state_dict().items():
            assert torch.equal(value, teacher.model.layers[old].state_dict()[key])
    assert student.lm_head.weight is student.model.embed_tokens.weight
    whole, chosen = models.shallow_copy(teacher, 4)
    ids = torch.arange(1, 9)[None]
    assert torch.equal(whole.eval()(ids).logits, teacher(ids).logits)
    with pytest.raises(UsageError, match=r"--layers 5 is outside 1\.\.4"):
        models.shallow_copy(teacher, 5)


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


@pytest.mark.slow
def test_memory_is_what_a_way_allocates_above_its_inputs() -> None:
    logits = torch.randn(64, 50_000)
    found = compare._peaks(logits, torch.randn(64, 50_000))
    eager, ours, overwriting = found.values()
    if eager is None or ours is None or overwriting is None:
        pytest.skip("this system does not report a process's peak memory")
    size = logits.numel() * 4
    assert eager > 2.9 * size  # two log-softmaxes and a gradient at least
    assert overwriting < eager
    if _native.available():
        assert ours < 1.3 * size  # the gradient
        assert overwriting < 0.3 * size


def test_shipped_prompts_are_split_and_distinct() -> None:
    train, held_out = answers.prompts()
    assert (len(train), len(held_out)) == (40, 8)
    assert len({*train, *held_out}) == 48


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
