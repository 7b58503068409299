"""The command line: exit codes, one JSON document, one sentence for a wrong request."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pydistill
from pydistill import _native, _registry, cli
from pydistill.reference.divergence import KINDS
from pydistill.testing import Report, selftest

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(arguments)
        except SystemExit as stop:  # argparse's way
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


def test_env_names_the_backend_of_every_operator_and_why(run: Run) -> None:
    code, out, _ = run("env", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["threads"] == torch.get_num_threads()
    assert found["native"]["available"] is _native.available()
    assert found["native"]["capability"] == _native.capability()
    choice = found["operators"]["divergence"]["cpu"]
    assert choice["backend"] == ("cpu" if _native.available() else "reference")
    code, out, _ = run("env")
    assert code == 0
    assert f"divergence on cpu: {choice['backend']} ({choice['reason']})" in out


def test_env_gives_the_reason_when_native_code_is_missing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pydistill", "env"],
        cwd=Path(pydistill.__file__).parents[1],
        env={**os.environ, "PYDISTILL_NO_NATIVE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "absent: PYDISTILL_NO_NATIVE is set" in done.stdout
    assert "divergence on cpu: reference" in done.stdout


def test_ops_lists_kernels_kinds_and_backends(run: Run) -> None:
    code, out, _ = run("ops", "--json")
    found = json.loads(out)["divergence"]
    assert code == 0
    assert found["kinds"] == list(KINDS)
    assert "divergence_fwd" in found["kernels"]
    assert "reference" in found["backends"]
    assert ("cpu" in found["backends"]) is _native.available()
    code, out, _ = run("ops")
    assert code == 0
    assert "todi" in out


def test_internal_operators_are_not_listed(run: Run) -> None:
    """`env` and `ops` speak of what a user can call, and of all of it."""
    exported = {name for name in _registry.OPERATORS if hasattr(pydistill, name)}
    assert "matmul" in _registry.OPERATORS
    assert set(json.loads(run("env", "--json")[1])["operators"]) == exported
    assert set(json.loads(run("ops", "--json")[1])) == exported


def test_ops_lists_the_kinds_that_an_operator_takes(run: Run) -> None:
    """Its own and none but those; none where it has no such argument."""
    found = json.loads(run("ops", "--json")[1])
    taken = {name: parts["kinds"] for name, parts in found.items() if parts["kinds"]}
    some = ["forward_kl", "reverse_kl", "jsd", "tvd"]
    assert taken == {
        "divergence": list(KINDS),
        "linear_divergence": list(KINDS),
        "topk_divergence": some,
        "linear_topk_divergence": some,
    }
    operators = {name: getattr(pydistill, name) for name in found if hasattr(pydistill, name)}
    with_kind = {n for n, f in operators.items() if "kind" in inspect.signature(f).parameters}
    assert with_kind == set(taken)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["nothing"], "'nothing'"),
        (["selftest", "attention_to_detail"], "'attention_to_detail'"),
        (["bench", "nothing"], "'nothing'"),
        (["demo", "--steps", "0"], "'0' is not a positive whole number"),
        (["demo", "--steps", "two"], "'two' is not a positive whole number"),
        (["demo", "--divergence", "kl"], "--divergence kl is not known; use one of forward_kl,"),
    ],
)
def test_a_wrong_request_gets_one_sentence(run: Run, arguments: list[str], words: str) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_ctrl_c_ends_with_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Iterator[None]:
        raise KeyboardInterrupt

    monkeypatch.setattr(selftest, "groups", interrupted)
    code, out, err = run("selftest")
    assert (code, out) == (130, "")
    assert err.strip() == "pydistill selftest: interrupted."


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case for case in selftest.load("divergence") if "odd" in case.id]
    assert cases
    monkeypatch.setattr(selftest, "load", lambda op: cases[:2])


@pytest.mark.usefixtures("few_cases")
def test_selftest_runs_every_backend_present(run: Run) -> None:
    code, out, _ = run("selftest", "divergence", "--json")
    found = json.loads(out)
    assert (code, found["failed"]) == (0, 0)
    backends = {group["backend"] for group in found["groups"] if group["device"] == "cpu"}
    assert backends == ({"reference", "cpu"} if _native.available() else {"reference"})
    assert all(0 < group["worst"] <= 1 for group in found["groups"])
    assert found["cases"] == 2 * len(backends)
    code, out, _ = run("selftest")
    assert code == 0
    assert out.splitlines()[-1] == f"{len(_registry.OPERATORS) * found['cases']} cases, all right"


@pytest.mark.skipif(not _native.available(), reason="no native kernels; run `make build`")
@pytest.mark.parametrize("op", _registry.public())
def test_selftest_gives_the_kernels_every_case(op: str) -> None:
    """Of every dtype: an operator declares those of its tensors, whatever it computes in."""
    assert [case for case in selftest.load(op) if not selftest._serves(case, "cpu", "cpu")] == []


@pytest.mark.usefixtures("few_cases")
def test_selftest_fails_for_a_wrong_result_and_for_an_exception(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(case: Any, backend: str, device: str, want: Any) -> Report:
        if backend != "reference":
            raise RuntimeError("no luck")
        return Report(case.id, backend, {"loss": 7.0}, f"{case.id} is off")

    monkeypatch.setattr(selftest, "check", wrong)
    code, out, _ = run("selftest")
    assert code == 1
    assert "is off" in out
    assert not _native.available() or "no luck" in out
    assert out.splitlines()[-1].endswith("failed")
    code, out, _ = run("selftest", "--json")
    assert code == 1
    assert "Infinity" not in out
    assert json.loads(out)["failed"] > 0


def test_bench_says_where_the_benchmarks_are(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pydistill, "__file__", str(tmp_path / "pydistill" / "__init__.py"))
    code, out, err = run("bench", "divergence")
    assert (code, out) == (2, "")
    assert "make bench" in err


def test_bench_hands_over_to_the_harness(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def harness(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        Path(command[-1]).write_text('{"benchmarks": []}')
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", harness)
    code, out, _ = run("bench", "divergence", "--quick", "--json")
    assert code == 0
    assert json.loads(out) == {"benchmarks": []}
    assert seen[0][1:5] == ["-m", "benchmarks", "divergence", "--quick"]
