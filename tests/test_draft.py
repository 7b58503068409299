"""`pydistill draft` on a tiny target: it learns, resumes exactly, and names what is wrong."""

import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="drafts need the extra `hf`")

import pydistill
from pydistill import cli
from pydistill.recipes import (
    UsageError,
    draft,
    draft_compare,
    draft_files,
    draft_training,
    models,
)


def options(tiny: Path, output: Path, **changes: Any) -> draft.Options:
    few = {"draft": "layers:2", "steps": 2, "batch": 4, "answers": 1, "length": 6}
    return draft.Options(**{"output": output, "model": str(tiny), **few, **changes})


@pytest.fixture(autouse=True)
def _answers(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target's answers are kept among tests, and not in the user's cache."""
    monkeypatch.setenv("PYDISTILL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def trained(target: Any, tokenizer: Any, chosen: draft.Options) -> draft_training.Training:
    with torch.random.fork_rng():
        data = draft.make_data(target, tokenizer, chosen)
        small = draft.make_draft(target, tokenizer, data, chosen)
        training = draft_training.Training(target, small, data, chosen)
        training.run(chosen.output.with_name("state.pt"))
    return training


@pytest.mark.slow
def test_acceptance_improves_and_the_draft_serves(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "draft"
    command = ["draft", "--model", str(tiny), "--draft", "layers:0,3", "--output", str(folder)]
    command += ["--steps", "30", "--answers", "1", "--length", "12", "--learning-rate", "3e-3"]
    assert cli.main([*command, "--divergence", "acceptance", "--on-policy", "0.3", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    before, after = result["before"], result["after"]
    assert before["acceptance"] + 0.05 < after["acceptance"] <= 1
    assert 1 <= after["block_efficiency"] <= 5
    assert len(result["losses"]) == 30
    assert "%" not in err  # no bars
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]  # no checkpoint

    command = ["generate", "hello", "--model", str(tiny), "--draft", str(folder), "--json"]
    assert cli.main([*command, "--max-new-tokens", "5", "--num-draft-tokens", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] > 0


def test_minus_log_acceptance_and_its_gradient() -> None:
    """Against fp64 autograd, and against the formula of docs/draft.md."""
    torch.manual_seed(0)
    q, p = torch.randn(2, 3, 4, 33) * 2
    mask = torch.rand(3, 4) < 0.7
    q.requires_grad_()
    found = draft_training.loss(q[mask], p[mask], "acceptance", temperature=0.7)
    (grad,) = torch.autograd.grad(found, q)

    exact = q.detach().double().requires_grad_()
    log_q, log_p = (x / 0.7 for x in (exact, p.double()))
    probs, wanted = log_q.softmax(-1), log_p.softmax(-1)
    overlap = torch.minimum(probs, wanted).sum(-1)
    value = -overlap.log()[mask].mean()
    (want,) = torch.autograd.grad(value, exact)
    torch.testing.assert_close(found.double(), value.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-6)

    share = probs * (probs < wanted) / overlap[..., None]
    formula = (probs * share.sum(-1, keepdim=True) - share) / 0.7 * mask[..., None] / mask.sum()
    torch.testing.assert_close(formula.detach(), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", ["acceptance", "tvd", "jsd"])
def test_filters_leave_what_verify_would_keep(divergence: str) -> None:
    torch.manual_seed(0)
    q, p = torch.randn(2, 1, 6, 33) * 2
    q.requires_grad_()
    kept = draft.filtered(p[0], 0.8, 5, 0.9, 0.0)
    assert 1 <= int((kept > -torch.inf).sum(-1).max()) <= 5
    q.data[0, 0] = -p[0, 0]  # disjoint: no token is accepted
    draft_training.loss(q[0], p[0], divergence, temperature=0.8, top_k=5, top_p=0.9).backward()
    assert q.grad is not None
    assert bool(q.grad.isfinite().all())
    assert int((q.grad != 0).sum(-1).max()) <= 5


@pytest.mark.parametrize(
    "changes",
    [
        *({"divergence": kind} for kind in draft_training.DIVERGENCES),
        {"on_policy": 1.0, "top_k": 20, "divergence": "tvd"},
        {"on_policy": 0.5, "source": "text"},
        {"source": "text", "text": "text.txt"},
        {"prompts": "text.txt", "temperature": 0.7},
        {"draft_vocab": "40"},
        {"draft_vocab": "40", "divergence": "acceptance", "top_k": 20},
        {"draft_vocab": "40", "divergence": "tvd", "on_policy": 0.5},
        {"draft": "feature:1"},
        {"draft": "feature:1+1", "unroll": 3, "draft_vocab": "40", "divergence": "acceptance"},
        {"draft": "feature:1", "width": 16, "source": "text", "schedule": "cosine"},
        {"signal": "verify", "divergence": "acceptance"},
        {"signal": "verify", "divergence": "forward_kl", "train_embeddings": True},
    ],
    ids=str,
)
def test_every_divergence_and_source_runs(
    tiny: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    (tmp_path / "text.txt").write_text("the first line\nand the second, which is longer\n")
    paths = {k: tmp_path / v for k, v in changes.items() if k in ("text", "prompts")}
    target, tokenizer = models.load(str(tiny), torch.float32)
    chosen = options(tiny, tmp_path / "draft", **{**changes, **paths})
    draft.check(chosen)
    training = trained(target, tokenizer, chosen)
    assert len(training.losses) == 2
    assert training.tokens > 0


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_killed_runs_go_on_to_the_same_losses(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """`--kills N` of them, of a draft for `--kill-model FOLDER`: every other one soon after a
    checkpoint; between these, from the third on, at any moment of the time that a run takes to its
    next checkpoint."""
    kills: int = request.config.getoption("--kills")
    model = request.config.getoption("--kill-model") or tiny
    steps = (25 if model is tiny else 8) * kills  # a tiny model takes many before a kill arrives
    arguments = "--draft layers:2 --batch 4 --answers 1 --length 6 --on-policy 0.5"
    command = ["draft", "--model", str(model), *arguments.split(), "--checkpoint-every", "3"]
    command += ["--steps", str(steps), "--json", "--output"]

    state, seen, reach = tmp_path / "killed.unfinished" / "state.pt", 0.0, math.inf
    for number in range(kills):
        begun = time.monotonic()
        run = subprocess.Popen(
            [sys.executable, "-m", "pydistill", *command, str(tmp_path / "killed")],
            stdout=subprocess.DEVNULL, cwd=Path(pydistill.__file__).parents[1],
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )  # fmt: skip
        if number < 2 or number % 2 == 0:
            while run.poll() is None and (not state.exists() or state.stat().st_mtime == seen):
                time.sleep(0.005)
            reach = min(reach, time.monotonic() - begun)  # the first run made the answers, too
            time.sleep(random.random() * 0.15)
        else:
            time.sleep(random.random() * reach)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, "it ended before it was killed; take more steps"
        seen = state.stat().st_mtime

    def result(folder: str) -> Any:
        assert cli.main([*command, str(tmp_path / folder)]) == 0
        return json.loads(capsys.readouterr().out)

    again, want = result("killed"), result("whole")
    assert 3 * ((kills + 2) // 2) <= again["resumed_at"] <= steps
    for part in ("losses", "before", "after"):
        assert again[part] == want[part]


def test_a_checkpoint_of_other_options_is_refused(tiny: Path, tmp_path: Path) -> None:
    first = options(tiny, tmp_path / "draft")
    with draft_files.working_folder(first.output) as folder:
        draft_files.store(folder / "state.pt", first, losses=[])
        other = options(tiny, tmp_path / "draft", seed=1)
        with pytest.raises(UsageError, match=r"begun with seed=0.*name a new --output"):
            draft_files.load(folder / "state.pt", other)
        with (
            pytest.raises(UsageError, match="another run writes to"),
            draft_files.working_folder(first.output),
        ):
            pass
        (folder / "state.pt").write_bytes(b"half")
        with pytest.raises(UsageError, match=r"cannot be read.*delete .*draft\.unfinished"):
            draft_files.load(folder / "state.pt", first)


@pytest.mark.parametrize("kind", ["layers:2", "feature:1"])
def test_recorded_states_teach_as_a_live_target_does(tiny: Path, tmp_path: Path, kind: str) -> None:
    """Also on a sub-vocabulary, where the target's rows come from a part of its head."""
    target, tokenizer = models.load(str(tiny), torch.float32)
    losses = {}
    for divergence in ("acceptance", "forward_kl"):
        chosen = options(
            tiny, tmp_path / "draft", draft=kind, draft_vocab="60", divergence=divergence
        )
        data = draft.make_data(target, tokenizer, chosen)
        assert data.seen is not None and data.seen.states is not None
        bare = replace(data, seen=replace(data.seen, states=None, lse=None))
        for name, used in (("recorded", data), ("live", bare)):
            small = draft.make_draft(target, tokenizer, used, chosen)
            training = draft_training.Training(target, small, used, chosen)
            losses[name] = [training.step(i) for i in range(3)]
        assert losses["recorded"] == pytest.approx(losses["live"], rel=2e-2)


def test_a_step_is_the_sum_over_processes(tiny: Path, tmp_path: Path) -> None:
    """The parts of a batch, as two processes take them, have the gradient of the whole."""
    target, tokenizer = models.load(str(tiny), torch.float32)
    chosen = options(tiny, tmp_path / "draft")
    data = draft.make_data(target, tokenizer, chosen)
    gradients = []
    for size, rank in ((1, 0), (2, 0), (2, 1)):
        small = draft.make_draft(target, tokenizer, data, chosen)
        training = draft_training.Training(target, small, data, chosen)
        training.team.size, training.team.rank = size, rank
        torch.manual_seed(0)
        value, count = training._taught(0)
        gradients.append([torch.tensor([value, count]), *(w.grad for w in training.weights)])
    for whole, first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first + second, whole, rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_two_processes_train_as_one(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By gloo, as `accelerate launch` starts them; on the target's answers, since rounding may
    give a draft's own another token."""
    arguments = "--draft layers:2 --steps 4 --batch 4 --answers 1 --length 6"
    command = ["draft", "--model", str(tiny), *arguments.split(), "--json", "--output"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "pydistill", *command, str(tmp_path / "two")],
            stdout=subprocess.PIPE, cwd=Path(pydistill.__file__).parents[1],
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
        )
        for rank in "01"
    ]  # fmt: skip
    outs = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert outs[1] == b""
    two = json.loads(outs[0])
    assert cli.main([*command, str(tmp_path / "one")]) == 0
    one = json.loads(capsys.readouterr().out)
    assert two["losses"] == pytest.approx(one["losses"], rel=0.02)
    assert two["tokens"] == one["tokens"]
    assert one["after"]["acceptance"] == pytest.approx(two["after"]["acceptance"], abs=0.02)


def test_small_files_are_replaced_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.md"
    for text in ("one", "two"):
        draft_files.write(path, text)
        assert path.read_text() == text
    with pytest.raises(UsageError, match=r"table\.md/x\.md cannot be written .*free some space"):
        draft_files.write(path / "x.md", "three")
    path.with_suffix(".part").mkdir()  # which cannot be written to
    with pytest.raises(UsageError, match="cannot be written"):
        draft_files.write(path, "three")
    assert path.read_text() == "two"


def test_a_comparison_is_one_table(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "all"
    command = ["draft", "--model", str(tiny), "--output", str(folder), "--compare", "--draft"]
    command += ["layers:1", "feature:1", "--divergence", "forward_kl", "tvd", "--source", "target"]
    command += ["text", "--steps", "2", "--batch", "2", "--answers", "1", "--length", "4", "--json"]
    command += ["--short-steps", "1"]
    assert cli.main(command) == 0
    result = json.loads(capsys.readouterr().out)
    named = [(x["draft"], x["divergence"], x["source"], x["steps"]) for x in result["rows"]]
    assert named == [
        ("layers:1", "forward_kl", "target", 1), ("feature:1", "forward_kl", "target", 1),
        ("layers:1", "tvd", "target", 1), ("layers:1", "forward_kl", "text", 1),
        ("layers:1", "forward_kl", "target", 2),
    ]  # fmt: skip
    assert result == json.loads((folder / "table.json").read_text())
    lines = (folder / "table.md").read_text().splitlines()
    acceptance = result["rows"][1]["after"]["acceptance"]
    assert lines[5].startswith("| feature:1 | forward_kl | target |")
    assert f"-> {acceptance:.1%} |" in lines[5]
    target, _ = models.load(str(tiny), torch.float32)
    made = Path(result["rows"][1]["folder"])
    assert models.draft_of(target, str(made), torch.float32)[0].features == 32

    (folder / "table.md").unlink()
    assert cli.main(command) == 0  # all rows are there
    assert json.loads(capsys.readouterr().out) == result
    assert cli.main([*command, "--seed", "1"]) == 2
    assert "was begun with other options" in capsys.readouterr().err


def test_rows_that_begin_alike_are_fitted_and_judged_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are, bit for bit, what runs of each alone are."""
    calls: Counter[str] = Counter()

    def count(name: str) -> None:
        real = getattr(draft, name)

        def counted(*args: Any) -> Any:
            calls[name] += 1
            return real(*args)

        monkeypatch.setattr(draft, name, counted)

    count("evaluate")
    count("fit_input")
    base = options(tiny, tmp_path / "all")
    varied = ["feature:1", "layers:1"], ["forward_kl", "tvd"], ["target", "text"]
    rows = draft_compare.run(base, *varied, progress=False, short_steps=1).rows
    assert len(rows) == 5
    # Before: feature:1 on the target's answers, on texts, which give another W, and layers:1.
    assert calls == {"evaluate": 3 + 5, "fit_input": 2}

    target, tokenizer = models.load(str(tiny), models.compute_dtype())
    chosen = draft_compare.variants(base, *varied, short_steps=1)
    for number in (2, 3):  # the other divergence, the other source
        name, of_row = chosen[number]
        alone = draft.train(replace(of_row, output=tmp_path / name), target, tokenizer, False)
        assert (rows[number].before, rows[number].after) == (alone.before, alone.after)
        weights = [(x / name / "model.safetensors").read_bytes() for x in (base.output, tmp_path)]
        assert weights[0] == weights[1]

    calls.clear()
    (base.output / f"{chosen[-1][0]}.json").unlink()  # as if it had ended before the last row
    shutil.rmtree(base.output / chosen[-1][0])
    assert draft_compare.run(base, *varied, progress=False, short_steps=1).rows == rows
    assert calls == {"evaluate": 1, "fit_input": 1}


def test_which_rows_begin_alike(tiny: Path, tmp_path: Path) -> None:
    sources = ["target", "mixed", "text", "draft"]

    def beginnings(**changes: Any) -> list[Any]:
        base = options(tiny, tmp_path, **changes)
        found = draft_compare.variants(base, ["layers:1"], ["jsd"], sources)
        return [draft_compare._beginning(x) for _, x in found]

    assert len(set(beginnings())) == 1
    first, second, *others = beginnings(draft_vocab="40")  # the most frequent of what is learnt
    assert first == second and len({first, *others}) == 3


def test_a_teacher_cache_teaches(tiny: Path, tmp_path: Path) -> None:
    """With all of its tokens kept, its rows give the loss of the target's own."""
    from pydistill.recipes import build_cache

    (tmp_path / "text.txt").write_text("the first line\nand the second, which is longer\n")
    build_cache.run(
        build_cache.Options(
            tmp_path / "cache", str(tiny), tmp_path / "text.txt", k=255, length=32
        ),
        progress=False,
    )  # fmt: skip
    target, tokenizer = models.load(str(tiny), torch.float32)
    text = {"source": "text", "text": tmp_path / "text.txt", "length": 31}
    found = [
        trained(target, tokenizer, options(tiny, tmp_path / "draft", divergence="tvd", **more))
        for more in ({"teacher_cache": tmp_path / "cache"}, text)
    ]
    assert found[0].losses == pytest.approx(found[1].losses, rel=0.03)
    assert found[0].tokens == found[1].tokens


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--divergence", "kl"], "--divergence kl is not known; use one of forward_kl"),
        (["--source", "web"], "--source web is not known; use one of target, text"),
        (["--on-policy", "1.5"], "--on-policy 1.5 is outside 0 to 1"),
        (["--top-p", "0"], "--top-p 0.0 is outside 0 to 1"),
        (["--top-k", "-1"], "--top-k -1 is negative"),
        (["--temperature", "0"], "--temperature 0.0 has no gradient"),
        (["--learning-rate", "-1"], "--learning-rate -1.0 is not positive"),
        (["--text", "a.txt"], "--text a.txt is not read; add --source text"),
        (["--steps", "0"], "'0' is not a positive whole number"),
        (["--signal", "none"], "--signal none is not known; use one of teacher, verify"),
        (["--schedule", "step"], "--schedule step is not known; use one of linear, cosine"),
        (["--width", "16"], "--width 16 is of a feature draft; add --draft feature:1"),
        (["--short-steps", "2"], "--short-steps 2 is of a comparison; add --compare"),
        (["--unroll", "2"], "--unroll 2 is of a feature draft"),
        (["--draft", "feature:1", "--on-policy", "1"], "writes no text alone; use --unroll 3"),
        (
            ["--draft", "feature:1,2"],
            "names no layers; use layers:6, layers:0,1,29, feature:1",
        ),
        (["--draft", "feature:1+1+1"], "--draft feature:1+1+1 names no layers; use layers:6"),
        (["--draft", "feature:1", "--width", "12"], "width=12 is not a multiple of 8"),
        (["--draft-vocab", "1"], "--draft-vocab 1 is outside 2..257"),
        (["--draft-vocab", "/none"], "--draft-vocab /none is no number and no JSON list"),
        (["--signal", "verify", "--draft-vocab", "9"], "does not go with --draft-vocab 9"),
        (["--teacher-cache", "/none", "--top-k", "3"], "does not go with filters"),
        (["--teacher-cache", "/none"], "/none"),
        (["--draft", "layers:1", "layers:2"], "--draft has 2 values; pass one, or add --compare"),
        (["--compare", "--source", "web"], "--source web is not known; use one of target, text"),
        (["--draft", "layers:five"], "--draft layers:five names no layers"),
        (["--draft", "layers:9"], "layers=9 is outside 1..4"),
        (
            ["--draft", "layers:2", "--length", "9999"],
            "do not fit into the target's context of 2048",
        ),
        (["--draft", "layers:2", "--prompts", "/none"], "/none cannot be read"),
    ],
)
def test_wrong_arguments_are_named(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    words: str,
) -> None:
    command = ["draft", "--model", str(tiny), "--output", str(tmp_path / "draft"), *changes]
    try:
        code = cli.main(command)
    except SystemExit as stop:  # argparse's way
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert words in err
    assert not (tmp_path / "draft").exists()
