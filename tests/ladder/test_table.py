"""The ladder's table: its rows, its Markdown and its comparison."""

import json

import pytest

from pydistill.reference.divergence import KINDS
from tools.ladder.cuda.nvcc import TARGETS
from tools.ladder.dry_run import GATE
from tools.ladder.table import (
    DIRECTIONS,
    DTYPES,
    JSON,
    MARKDOWN,
    _cuda_name,
    bytes_row,
    compiled_row,
    differences,
    markdown,
)

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
    compiled = {key: row for key, row in table.items() if not key.endswith(" bytes")}
    assert [key for key, row in compiled.items() if not row["compiles"] or row["spills"]] == []


def test_tracked_text_is_canonical() -> None:
    table = json.loads(JSON.read_text())
    assert JSON.read_text() == json.dumps(table, indent=1, sort_keys=True) + "\n"
    assert MARKDOWN.read_text() == markdown(table)


def test_differences_name_new_gone_and_changed_rows() -> None:
    same, old, new = compiled_row(32, 0, 0, 1.0), compiled_row(40, 0, 0, 0.75), {"compiles": False}
    lines = differences({"a": same, "b": old, "c": old}, {"a": same, "b": new, "d": old})
    assert [line.partition(":")[0] for line in lines] == ["b", "c", "d"]
    assert differences({"a": same}, {"a": dict(same)}) == []


def test_rows_and_cells() -> None:
    # 1 x 4096 bf16 logits: two streams forward, three backward.
    assert bytes_row("forward", 24576, 2) == {"bytes": 24576, "floor": 16384, "ratio": 1.5}
    assert bytes_row("backward", 24576, 2)["ratio"] == 1.0
    table = {
        "triton forward jsd fp32 sm_100": compiled_row(64, 3, 128, 0.5),
        "triton forward jsd fp32 sm_80": {"compiles": False},
        "triton forward jsd fp32 bytes": bytes_row("forward", 65536, 4),
        "triton forward jsd fp32 gfx942": compiled_row(32, 0, 0, 1 / 3),
    }
    assert "| kernel | sm_80 | sm_100 | gfx942 | bytes / floor |" in markdown(table)
    cells = "does not compile | 64, 50%, 128, 3 spills | 32, 33%, 0 | 2.000"
    assert f"| `forward jsd fp32` | {cells} |" in markdown(table)


def test_cuda_names() -> None:
    assert _cuda_name("divergence_forward<2, float>") == "forward jsd fp32"
    assert _cuda_name("divergence_backward<0, __nv_bfloat16>") == "backward forward_kl bf16"
    assert _cuda_name("row_sum<float, 128>") == "row_sum<float,128>"
