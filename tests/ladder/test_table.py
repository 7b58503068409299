"""The ladder's table: its rows, its Markdown and its comparison."""

import json
from pathlib import Path

import pytest

from pydistill.reference.divergence import KINDS
from tools.ladder import linear_table, topk_divergence_table, topk_logprobs_table, verify_table
from tools.ladder.cuda.nvcc import TARGETS
from tools.ladder.divergence_table import LONG, STREAMS
from tools.ladder.dry_run import GATE
from tools.ladder.rows import DIRECTIONS, DTYPES, VOCAB, bytes_row, compiled_row
from tools.ladder.table import JSON, MARKDOWN, _cuda_name, differences, markdown

pytestmark = pytest.mark.ladder


def test_tracked_table_has_every_row() -> None:
    table = json.loads(JSON.read_text())
    for backend, targets in (("triton", GATE), ("cuda", TARGETS)):
        for direction in DIRECTIONS:
            for kind in KINDS:
                for dtype in DTYPES:
                    for column in (*targets, "bytes"):
                        assert f"{backend} {direction} {kind} {dtype} {column}" in table


def test_tracked_table_spills_nowhere() -> None:
    table = json.loads(JSON.read_text())
    compiled = {key: row for key, row in table.items() if "compiles" in row}
    assert len(compiled) > len(DIRECTIONS) * len(KINDS) * len(DTYPES) * len(GATE + TARGETS)
    assert [key for key, row in compiled.items() if not row["compiles"] or row["spills"]] == []


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("kind", KINDS)
def test_tracked_bytes_keep_their_budgets(backend: str, kind: str) -> None:
    """Exactly one sweep, or two where terms need the normalisers first, and little else."""
    table = json.loads(JSON.read_text())
    # Eight saved values and a loss; six of them and an upstream, or each thread's reads of them.
    small = {"forward": 36, "backward": {"triton": 28, "cuda": 256 * 40}[backend]}
    for dtype in DTYPES:
        forward, backward = (table[f"{backend} {d} {kind} {dtype} bytes"] for d in DIRECTIONS)
        assert {"forward": forward["small"], "backward": backward["small"]} == small
        assert backward["sweeps"] == [1, 1, 1]
        assert backward["logits"] == backward["floor"] and backward["ratio"] <= 1.1
        sweeps = 1 if kind in ("forward_kl", "reverse_kl") else 2
        kept = (backend, kind) == ("cuda", "adaptive_kl")  # the teacher's row, for the terms too
        assert forward["sweeps"] == [sweeps, 1 if kept else sweeps]
        assert forward["logits"] * 2 == sum(forward["sweeps"]) * forward["floor"]
        assert forward["ratio"] <= {1: 1.1, 2: 2.05}[sweeps]


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_tracked_bytes_of_rows_too_long_to_keep(backend: str) -> None:
    """The search for adaptive_kl's head reads the teacher's row again, and the student's never."""
    table = json.loads(JSON.read_text())
    for dtype, most in (("fp32", 12), ("bf16", 8)):
        row = table[f"{backend} forward adaptive_kl {dtype} V={LONG} bytes"]
        student, teacher = row["sweeps"]
        assert row["small"] == 36 and student == 2 and 2 < teacher <= most


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tracked_bytes_of_topk_divergence(backend: str, dtype: str) -> None:
    """The row and the gradient once; K ids, logits and log-probabilities a few times each."""
    table, k = json.loads(JSON.read_text()), topk_divergence_table.SLOTS
    item = {"fp32": 4, "bf16": 2}[dtype]
    forward, backward = (table[f"{backend} topk_divergence {d} {dtype} bytes"] for d in DIRECTIONS)
    assert forward["logits"] == VOCAB * item + 2 * k * item
    again = 2 if backend == "triton" else 1  # Triton writes over what it has swept
    assert backward["logits"] == 2 * VOCAB * item + again * k * item
    # Ids of 8 bytes, twice or three times, and in order 4; log p; saved values and the like.
    small = {"triton": (1596, 1844), "cuda": (2604, 1312)}[backend]
    assert (forward["small"], backward["small"]) == small
    assert forward["ratio"] <= 1.05 and backward["ratio"] <= 1.05


def test_tracked_table_has_every_row_of_topk_divergence() -> None:
    table = json.loads(JSON.read_text())
    for dtype in DTYPES:
        for target in GATE:
            for form in topk_divergence_table.FORMS:
                for part in ("forward", "support"):
                    key = f"triton topk_divergence {part} {form[0]} {form[1]} {dtype} {target}"
                    assert table[key]["spills"] == 0
            for part in ("outside", "backward", "place"):
                assert f"triton topk_divergence {part} {dtype} {target}" in table
        for target in TARGETS:
            for part in ("outside", "forward", "backward"):
                assert f"cuda topk_divergence {part} {dtype} {target}" in table


@pytest.mark.parametrize("dtype", DTYPES)
def test_tracked_rows_of_verify(dtype: str) -> None:
    """Both rows twice, what a draw opens, and a few logits that every thread reads; with a filter
    a few times more."""
    table = json.loads(JSON.read_text())
    plain, filtered = (table[f"cuda verify {n} {dtype} bytes"] for n in verify_table.FORMS)
    assert all(2 < sweeps < 2.2 for sweeps in plain["sweeps"])
    assert all(4 < sweeps < 8 for sweeps in filtered["sweeps"])
    for target in TARGETS:
        for part in ("chain", "tree"):
            assert table[f"cuda verify {part} {dtype} {target}"]["spills"] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_tracked_rows_of_verify_in_triton(dtype: str) -> None:
    """All nine rows, those of the tested slots again, and the blocks that a draw opens; the drafted
    tokens' logits twice."""
    table, item = json.loads(JSON.read_text()), {"fp32": 4, "bf16": 2}[dtype]
    accepted, rejected = (
        table[f"triton verify {n} {dtype} bytes"] for n in ("accepted", "rejected")
    )
    assert accepted["logits"] == ((9 + 8) * VOCAB + 4096 + 16) * item
    assert rejected["logits"] == ((9 + 2) * VOCAB + 2 * 4096 + 16) * item
    assert accepted["ratio"] <= 1.93 and rejected["ratio"] <= 1.27
    for part in verify_table.TRITON_PARTS:
        for target in GATE:
            assert table[f"triton verify {part} {dtype} {target}"]["spills"] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_tracked_rows_of_token_logprob(dtype: str) -> None:
    """The row once forward, and the token's logit once more; the row and the gradient backward."""
    table, item = json.loads(JSON.read_text()), {"fp32": 4, "bf16": 2}[dtype]
    forward, backward = (table[f"triton token_logprob {d} {dtype} bytes"] for d in DIRECTIONS)
    assert forward["logits"] == VOCAB * item + item and forward["small"] == 8 + 4 * 7
    assert backward["logits"] == 2 * VOCAB * item and backward["small"] == 8 + 4 * 7
    assert forward["ratio"] <= 1.1 and backward["ratio"] <= 1.1
    for direction in DIRECTIONS:
        for target in GATE:
            assert table[f"triton token_logprob {direction} {dtype} {target}"]["spills"] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_tracked_rows_of_topk_logprobs(dtype: str) -> None:
    """A row once, and twice the tokens of 64 groups; a row in registers twice."""
    table, item = json.loads(JSON.read_text()), {"fp32": 4, "bf16": 2}[dtype]
    forward, row = (table[f"triton topk_logprobs {n} {dtype} bytes"] for n in ("forward", "row"))
    assert forward["logits"] == (VOCAB + 2 * topk_logprobs_table.SLOTS * 32) * item
    assert row["logits"] == 2 * topk_logprobs_table.SHORT * item
    assert forward["ratio"] <= 1.5 and row["ratio"] <= 2.05
    for parts in topk_logprobs_table.PARTS.values():
        for part, _ in parts:
            for target in GATE:
                assert table[f"triton topk_logprobs {part} {dtype} {target}"]["spills"] == 0


def test_tracked_rows_of_linear_operators_are_those_of_their_rows() -> None:
    """The driver launches what a caller with fp32 logits does, on every target."""
    table = json.loads(JSON.read_text())
    rooms = {
        "linear_divergence": "",
        "linear_topk_divergence": "topk_divergence ",
        "linear_token_logprob": "token_logprob ",
        "topk_logprobs_from_hidden": "topk_logprobs ",
    }
    seen = set()
    for form in linear_table.forms(1):
        seen.add(form.op)
        for name in form.kernels:
            for target in GATE:
                row = table[f"triton {form.op} {name} fp32 {target}"]
                assert row == table[f"triton {rooms[form.op]}{name} fp32 {target}"]
    assert seen == rooms.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_tracked_bytes_of_linear_divergence(kind: str) -> None:
    """Forward as the rows' own; backward once, which reads what is saved."""
    table = json.loads(JSON.read_text())
    forward, backward, both = (
        table[f"triton linear_divergence {d} {kind} fp32 bytes"] for d in linear_table.DIRECTIONS
    )
    assert forward == table[f"triton forward {kind} fp32 bytes"]
    assert backward["sweeps"] == [1, 1, 1] and backward["small"] == 28
    assert both["logits"] == forward["logits"] + backward["logits"]
    assert both["small"] == 36 + 28
    assert backward["ratio"] <= 1.01 and both["ratio"] <= 2.34


def test_tracked_bytes_of_the_other_linear_operators() -> None:
    table = json.loads(JSON.read_text())
    limits = {
        "linear_topk_divergence forward": 1.02,
        "linear_topk_divergence backward": 1.02,  # reads 64 ids and log p
        "linear_topk_divergence in_forward": 1.52,
        "linear_token_logprob forward": 1.01,
        "linear_token_logprob backward": 1.01,
        "topk_logprobs_from_hidden forward": 1.31,
    }
    for name, limit in limits.items():
        assert 1 <= table[f"triton {name} fp32 bytes"]["ratio"] <= limit


def test_tracked_versions_are_those_required() -> None:
    row = json.loads(JSON.read_text())["versions"]
    required = JSON.with_name("requirements.txt").read_text()
    assert f"triton=={row['triton']}" in required and row["nvcc"]


def test_tracked_text_is_canonical() -> None:
    table = json.loads(JSON.read_text())
    assert JSON.read_text() == json.dumps(table, indent=1, sort_keys=True) + "\n"
    assert MARKDOWN.read_text() == markdown(table)
    assert markdown(dict(reversed(table.items()))) == markdown(table)


def test_differences_name_new_gone_and_changed_rows() -> None:
    same, old, new = compiled_row(32, 0, 0, 1.0), compiled_row(40, 0, 0, 0.75), {"compiles": False}
    lines = differences({"a": same, "b": old, "c": old}, {"a": same, "b": new, "d": old})
    assert [line.partition(":")[0] for line in lines] == ["b", "c", "d"]
    assert differences({"a": same}, {"a": dict(same)}) == []


def test_rows_and_cells() -> None:
    # One row of 32000 bf16 logits: two streams forward, three backward, 64,000 bytes each.
    seen = {"student": 64000, "teacher": 128000, "saved": 640}
    assert bytes_row(STREAMS["forward"], seen, 2) == {
        "logits": 192000,
        "small": 640,
        "floor": 128000,
        "ratio": 1.505,
        "sweeps": [1.0, 2.0],
    }
    seen |= {"teacher": 64000, "grad": 64000}
    assert (
        bytes_row(STREAMS["backward"], seen, 2)["logits"]
        == bytes_row(STREAMS["backward"], seen, 2)["floor"]
    )
    twice = dict.fromkeys(("student", "teacher"), 256000)
    table = {
        "triton forward jsd fp32 sm_100": compiled_row(64, 3, 128, 0.5),
        "triton forward jsd fp32 sm_80": {"compiles": False},
        "triton forward jsd fp32 bytes": bytes_row(STREAMS["forward"], twice, 4),
        "triton forward jsd fp32 gfx942": compiled_row(32, 0, 0, 1 / 3),
    }
    assert "| kernel | sm_80 | sm_100 | gfx942 | bytes / floor |" in markdown(table)
    cells = "does not compile | 64, 50%, 128, 3 spills | 32, 33%, 0 | 2.000"
    assert f"| `forward jsd fp32` | {cells} |" in markdown(table)


def test_cuda_names() -> None:
    assert _cuda_name("divergence_forward<2, float>") == "forward jsd fp32"
    assert _cuda_name("divergence_backward<0, __nv_bfloat16>") == "backward forward_kl bf16"
    assert _cuda_name("topk_divergence_outside<__half>") == "topk_divergence outside fp16"
    assert _cuda_name("verify_chain<__half>") == "verify chain fp16"
    assert _cuda_name("row_sum<float, 128>") == "row_sum<float,128>"


def test_rows_stand_while_what_they_are_made_of_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from tools.ladder import __main__ as command
    from tools.ladder import table

    tracked = json.loads(JSON.read_text())
    made = []
    monkeypatch.setattr(command, "collect", lambda tracked: made.append(1) or tracked)
    monkeypatch.setattr(command, "JSON", tmp_path / "table.json")
    monkeypatch.setattr("sys.argv", ["ladder", "--check", "--changed"])
    monkeypatch.setattr(command, "climb", lambda *x: pytest.fail("nothing is to be climbed here"))
    monkeypatch.setattr(
        command, "records", lambda: {k: x for k, x in tracked.items() if k.endswith(" proof")}
    )
    for fingerprint, times in ((table.inputs(), 0), ("another", 1)):
        tracked["inputs"] = {"fingerprint": fingerprint}
        command.JSON.write_text(json.dumps(tracked))
        assert command.main() == 0 and len(made) == times
    assert "nothing that the rows are made of" in capsys.readouterr().out


def test_the_fingerprint_is_of_every_source(monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.ladder import table

    named: list[set[str]] = []
    monkeypatch.setattr(
        table, "fingerprint", lambda x: named.append({p.name for p in x}) or str(len(named))
    )
    before = table.inputs()
    assert {"verify.cu", "verify.h", "verify.py", "rows.py", "_rows.py", "nvcc.py"} <= named[0]
    assert table.inputs() != before
    monkeypatch.setattr(table, "fingerprint", lambda x: "same")
    before = table.inputs()
    monkeypatch.setattr(table, "versions", lambda: {"triton": "0"})
    assert table.inputs() != before
