"""`pydistill draft` on a tiny target: it learns, resumes exactly, and names what is wrong."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="drafts need the extra `hf`")

import pydistill
from pydistill import cli
from pydistill.recipes import UsageError, draft, models


def options(tiny: Path, output: Path, **changes: Any) -> draft.Options:
    few = {"draft": "layers:2", "steps": 2, "batch": 4, "answers": 1, "length": 6}
    return draft.Options(**{"output": output, "model": str(tiny), **few, **changes})


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
    found = draft.loss(q, p, "acceptance", mask=mask, temperature=0.7)
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
    mask = torch.ones(1, 6, dtype=torch.bool)
    kept = draft.filtered(p[0], 0.8, 5, 0.9, 0.0)
    assert 1 <= int((kept > -torch.inf).sum(-1).max()) <= 5
    q.data[0, 0] = -p[0, 0]  # disjoint: no token is accepted
    draft.loss(q, p, divergence, mask=mask, temperature=0.8, top_k=5, top_p=0.9).backward()
    assert q.grad is not None
    assert bool(q.grad.isfinite().all())
    assert int((q.grad != 0).sum(-1).max()) <= 5


@pytest.mark.parametrize(
    "changes",
    [
        *({"divergence": kind} for kind in draft.DIVERGENCES),
        {"on_policy": 1.0, "top_k": 20, "divergence": "tvd"},
        {"on_policy": 0.5, "source": "text"},
        {"source": "text", "text": "text.txt"},
        {"prompts": "text.txt", "temperature": 0.7},
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
    draft._check(chosen)
    small = models.draft_of(target, chosen.draft, torch.float32)[0]
    with torch.random.fork_rng():
        training = draft.Training(target, small, draft.make_data(target, tokenizer, chosen), chosen)
        training.run(tmp_path / "state.pt")
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
    """`--kills N` of them: every other one soon after a checkpoint; between these, from the third
    on, at any moment of the time that the first run took to its first checkpoint."""
    kills: int = request.config.getoption("--kills")
    arguments = "--draft layers:2 --batch 4 --answers 1 --length 6 --on-policy 0.5"
    command = ["draft", "--model", str(tiny), *arguments.split(), "--checkpoint-every", "3"]
    command += ["--steps", str(25 * kills), "--json", "--output"]

    state, seen, reach = tmp_path / "killed.unfinished" / "state.pt", 0.0, 0.0
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
            reach = reach or time.monotonic() - begun
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
    assert 3 * ((kills + 2) // 2) <= again["resumed_at"] <= 25 * kills
    for part in ("losses", "before", "after"):
        assert again[part] == want[part]


def test_a_checkpoint_of_other_options_is_refused(tiny: Path, tmp_path: Path) -> None:
    first = options(tiny, tmp_path / "draft")
    with draft._working_folder(first.output) as folder:
        draft._store(folder / "state.pt", first, losses=[])
        other = options(tiny, tmp_path / "draft", seed=1)
        with pytest.raises(UsageError, match=r"begun with seed=0.*name a new --output"):
            draft._load(folder / "state.pt", other)
        with (
            pytest.raises(UsageError, match="another run writes to"),
            draft._working_folder(first.output),
        ):
            pass
        (folder / "state.pt").write_bytes(b"half")
        with pytest.raises(UsageError, match=r"cannot be read.*delete .*draft\.unfinished"):
            draft._load(folder / "state.pt", first)


def test_batches_take_every_row_once_an_epoch() -> None:
    found = torch.cat([draft.batch_rows(10, 4, number, seed=3) for number in range(5)])
    assert found[:10].sort().values.tolist() == list(range(10))
    assert found[10:].sort().values.tolist() == list(range(10))
    assert found[:10].tolist() != found[10:].tolist()
    assert len(draft.batch_rows(3, 8, 1, seed=0)) == 8


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
