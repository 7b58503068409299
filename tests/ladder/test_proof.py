"""The record of the full ladder: when it is given, and what it depends on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.ladder import proof
from tools.ladder.mutants import (
    divergence_cuda,
    divergence_triton,
    token_logprob_triton,
    topk_divergence_cuda,
    topk_divergence_triton,
    topk_logprobs_triton,
    verify_cuda,
    verify_triton,
)

pytestmark = pytest.mark.ladder


Climb = Callable[..., tuple[dict[str, dict[str, Any]] | None, list[str]]]


@pytest.fixture
def climb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Climb:
    """`proof.climb` with test functions of these names, which pass but for the `failing` one: the
    records, and the tests that ran."""
    monkeypatch.setattr(proof, "NOTES", tmp_path / "build" / "passed.json")

    def climb(
        tests: list[str], *arguments: Any, failing: str | None = None
    ) -> tuple[dict[str, dict[str, Any]] | None, list[str]]:
        ran: list[str] = []

        def run(test: str) -> bool:
            ran.append(test)
            return test != failing

        monkeypatch.setattr(proof, "_test_functions", lambda: tests)
        monkeypatch.setattr(proof, "_run", run)
        return proof.climb(*arguments), sorted(ran)

    return climb


@pytest.mark.parametrize("failing", [None, "first", "last"])
def test_one_failure_gives_no_record(failing: str | None, climb: Climb) -> None:
    found, ran = climb(["first", "middle", "last"], None, failing=failing)
    assert found == (proof.records() if failing is None else None)
    assert ran == ["first", "last", "middle"]


def test_a_climb_that_was_ended_goes_on(climb: Climb, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = ["first", "middle", "last"]
    assert climb(tests, None, failing="middle")[0] is None
    assert climb(tests, None) == (proof.records(), ["middle"])
    assert climb(tests, None) == (proof.records(), [])
    monkeypatch.setattr(proof, "everything", lambda: {proof.TESTS / "test_proof.py"})
    assert climb(tests, None)[1] == ["first", "last", "middle"]


@pytest.mark.parametrize("text", ["", "[]", '{"sources": 1}', '{"passed": ["first"]}'])
def test_notes_that_cannot_be_read_are_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "passed.json"
    path.write_text(text)
    notes = proof.Notes(path, "1")
    assert "first" not in notes
    notes.add("first")
    assert "first" in proof.Notes(path, "1") and "first" not in proof.Notes(path, "2")


def test_every_source_counts() -> None:
    names = {path.relative_to(proof.ROOT).as_posix() for path in proof.everything()}
    assert names >= {
        "csrc/cuda/verify.cu", "kernels/verify.py", "pydistill/ops/verify.py", "tests/conftest.py",
        "tests/ladder/test_proof.py", "tools/ladder/mutants/verify_cuda.py",
    }  # fmt: skip


def test_sources_that_change_meanwhile_give_no_record(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(proof, "NOTES", tmp_path / "passed.json")
    versions = iter([{"a": {"sources": "1"}}, {"a": {"sources": "2"}}])
    monkeypatch.setattr(proof, "_test_functions", lambda: [])
    monkeypatch.setattr(proof, "records", lambda: next(versions))
    assert proof.climb(None) is None


def test_the_full_ladder_has_cases_and_mutants_of_both_backends() -> None:
    names = {test.rpartition("/")[2] for test in proof._test_functions()}
    assert names >= {
        "test_divergence_cuda.py::test_every_case",
        "test_divergence_cuda.py::test_mutants_die",
        "test_divergence_triton.py::test_table",
        "test_divergence_triton_mutants.py::test_all_mutants_die",
        "test_linear_triton.py::test_table",
        "test_topk_divergence_cuda.py::test_every_case",
        "test_topk_divergence_cuda.py::test_mutants_die",
        "test_topk_divergence_triton.py::test_table",
        "test_topk_divergence_triton_mutants.py::test_all_mutants_die",
        "test_topk_logprobs_triton.py::test_table",
        "test_topk_logprobs_triton_mutants.py::test_all_mutants_die",
        "test_verify_cuda.py::test_every_case",
        "test_verify_cuda.py::test_mutants_die",
        "test_verify_triton.py::test_every_case",
        "test_verify_triton_compile.py::test_compiles_without_spills",
        "test_verify_triton_law.py::test_joint_law",
        "test_verify_triton_law.py::test_mutants_have_another_law",
        "test_verify_triton_mutants.py::test_all_mutants_die",
    }


def test_every_kernel_has_ten_mutants() -> None:
    for module in (
        divergence_triton, divergence_cuda, token_logprob_triton, topk_divergence_triton,
        topk_divergence_cuda, topk_logprobs_triton, verify_cuda,
        verify_triton,
    ):  # fmt: skip
        for part, mutants in module.PARTS.items():
            assert len(set(mutants)) == len(mutants)
            assert len(mutants) >= 10 or part == "numerics"  # helpers, no kernel


def test_records_are_of_every_operator_with_mutants() -> None:
    records = proof.records()
    assert records.keys() == {
        f"{backend} {path.stem.removesuffix('_' + backend)} proof"
        for backend in ("triton", "cuda")
        for path in proof.MUTANTS.glob(f"*_{backend}.py")
    }
    assert {"cuda topk_divergence proof", "triton divergence proof"} <= records.keys()
    assert len({row["sources"] for row in records.values()}) == len(records)


def test_fingerprint_sees_names_and_contents(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(proof, "ROOT", tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("text")
    two.write_text("text")
    both = proof.fingerprint([one, two])
    assert both == proof.fingerprint([two, one])
    assert len({both, proof.fingerprint([one]), proof.fingerprint([two])}) == 3
    two.write_text("other text")
    assert proof.fingerprint([one, two]) != both


def test_only_the_changed_kernels_climb(climb: Climb) -> None:
    tests = [
        "tests/ladder/test_cusim.py::a",
        "tests/ladder/test_divergence_cuda.py::a",
        "tests/ladder/test_divergence_triton_compile.py::a",
        "tests/ladder/test_topk_divergence_cuda.py::a",
    ]
    found, ran = climb(tests, {"cuda divergence proof"})
    assert found is not None and found.keys() == {"cuda divergence proof"}
    assert ran == tests[:2]


def test_a_changed_definition_climbs_without_mutants(climb: Climb) -> None:
    tests = [
        "tests/ladder/test_cusim.py::a",
        "tests/ladder/test_divergence_cuda.py::test_every_case",
        "tests/ladder/test_divergence_cuda.py::test_mutants_die",
        "tests/ladder/test_topk_divergence_cuda.py::test_every_case",
        "tests/ladder/test_topk_divergence_cuda.py::test_mutants_die",
        "tests/ladder/test_topk_logprobs_triton.py::test_table",
    ]
    keys = ["cuda divergence proof", "cuda topk_divergence proof"]
    found, ran = climb(tests, {keys[0]}, {keys[1]})
    assert found is not None and sorted(found) == keys
    assert ran == tests[:4]


def test_what_asks_for_the_mutants_again() -> None:
    new = proof.records()["cuda divergence proof"]
    assert proof.same_kernels({**new, "definition": "other", "cases": 3}, new)
    assert not proof.same_kernels(None, new)
    assert not proof.same_kernels(proof.deferred(new), new)
    for changed in ({"sources": "other"}, {"mutants": {**new["mutants"], "sweeps": 3}}):
        assert not proof.same_kernels({**new, **changed}, new)


def test_a_definition_is_the_reference_the_cases_and_what_they_import() -> None:
    names = {str(path.relative_to(proof.ROOT / "pydistill"))
             for path in proof.definition("topk_divergence")}  # fmt: skip
    assert names == {
        "reference/divergence.py",  # the kinds
        "reference/hard_terms.py",
        "reference/topk_divergence.py",
        "testing/case.py",
        "testing/cases/topk_divergence.py",
    }
    for op in ("divergence", "token_logprob", "topk_logprobs"):
        own = {proof.ROOT / "pydistill" / "reference" / f"{op}.py",
               proof.ROOT / "pydistill" / "testing" / "cases" / f"{op}.py"}  # fmt: skip
        assert own <= proof.definition(op)


def test_a_deferred_record_says_so() -> None:
    from tools.ladder.table import markdown

    key = "cuda divergence proof"
    row = proof.deferred(proof.records()[key])
    assert row != proof.records()[key] and "not climbed yet" in markdown({key: row})
    assert "not climbed yet" not in markdown({key: proof.records()[key]})
