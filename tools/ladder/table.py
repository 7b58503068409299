"""The table of what every GPU kernel costs on every target, from compilers and simulators alone.

    rows = collect(tracked)      # {"triton forward jsd bf16 sm_90": {"registers": ...}, ...}

`rows.py` says what a row of the compilers and one of the simulators hold; `<op>_table.py` makes
those of an operator. The row `versions` names the compilers, and a row that ends in `proof` the
sources that passed the full ladder (`proof.py`). The row `inputs` is a fingerprint of what the
others were made of: while it is the same, so are they. Rows are flat and keyed by one string, so
that two tables differ by keys and values and nothing else. Every job has a process of its own:
Triton decides at import whether it interprets or compiles, and only a few kernels' compilers should
live at once.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from tools.ladder import (
    divergence_table,
    linear_table,
    token_logprob_table,
    topk_divergence_table,
    topk_logprobs_table,
    verify_table,
)
from tools.ladder.proof import fingerprint
from tools.ladder.rows import BYTES_ROWS, VOCAB, Row, Table, compiled_row

ROOT = Path(__file__).parents[2]
JSON = Path(__file__).with_name("table.json")
MARKDOWN = ROOT / "docs" / "ladder.md"


def versions() -> Row:
    """The compilers that a table belongs to; without nvcc there is no entry for it."""
    from importlib.metadata import version

    from tools.ladder.cuda.nvcc import release

    nvcc = release()
    return {"triton": version("triton"), **({} if nvcc is None else {"nvcc": nvcc})}


def inputs() -> str:
    """A fingerprint of all that rows are made of: kernels, launchers, operators and references,
    the ladder itself, and the compilers."""
    from tools.ladder.cuda.sim import CSRC, source_closure

    found: set[Path] = set()
    for folder in ("kernels", "tools/ladder", "pydistill/ops", "pydistill/reference"):
        found |= set((ROOT / folder).rglob("*.py"))
    for source in (CSRC / "cuda").glob("*.cu"):
        found |= set(source_closure(source, [CSRC]))
    named = json.dumps(versions(), sort_keys=True)
    return hashlib.sha256(f"{fingerprint(found)} {named}".encode()).hexdigest()[:16]


def cuda_rows(source: str, target: str) -> Table:
    """Every kernel of one CUDA file compiled by nvcc for `target`."""
    from tools.ladder.cuda.nvcc import compile_targets
    from tools.ladder.cuda.sim import CudaBuildError

    try:
        kernels = compile_targets(source, [target])[target]
    except CudaBuildError as error:
        print(f"{source} {target}: {error}", file=sys.stderr)
        return {f"cuda {Path(source).stem} {target}": {"compiles": False}}
    rows: Table = {}
    for name, kernel in kernels.items():
        used = kernel.resources
        spills = used.spill_loads + used.spill_stores
        rows[f"cuda {_cuda_name(name)} {target}"] = compiled_row(
            used.registers, spills, used.shared, kernel.occupancy.fraction
        )
    return rows


def _cuda_name(name: str) -> str:
    """`forward jsd fp32` for `divergence_forward<2, float>`, `topk_divergence outside fp32` for
    `topk_divergence_outside<float>`; other names without spaces."""
    from pydistill.reference.divergence import KINDS

    scalars = {"float": "fp32", "__nv_bfloat16": "bf16", "__half": "fp16"}
    topk = re.fullmatch(r"(topk_divergence|verify)_(\w+)<(\w+)>", name)
    if topk is not None:
        return f"{topk[1]} {topk[2]} {scalars[topk[3]]}"
    found = re.fullmatch(r"divergence_(\w+)<(\d+), (\w+)>", name)
    if found is None or found[3] not in scalars:
        return name.replace(" ", "")
    kinds = {spec.id: kind for kind, spec in KINDS.items()}
    return f"{found[1]} {kinds[int(found[2])]} {scalars[found[3]]}"


def collect(tracked: Table) -> Table:
    """All rows, sorted; the proofs of `tracked` stand, and without nvcc its CUDA rows."""
    from tools.ladder.cuda.nvcc import TARGETS, find_nvcc

    row_operators = (
        divergence_table, token_logprob_table, topk_divergence_table, topk_logprobs_table,
        verify_table,
    )  # fmt: skip
    jobs: list[tuple[Callable[..., Table], tuple[str, ...]]] = []
    rows: Table = {key: row for key, row in tracked.items() if key.endswith(" proof")}
    rows["versions"] = tracked.get("versions", {}) | versions()
    rows["inputs"] = {"fingerprint": inputs()}
    if find_nvcc() is None:
        print("nvcc is not installed: the tracked CUDA rows are kept", file=sys.stderr)
        rows |= {key: row for key, row in tracked.items() if key.startswith("cuda ")}
    else:
        sources = sorted(str(path) for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
        jobs += [(cuda_rows, (source, target)) for source in sources for target in TARGETS]
        jobs += [
            (room.cuda_bytes, ())
            for room in (divergence_table, topk_divergence_table, verify_table)
        ]
    # Those from hidden states last: they launch the row operators' kernels, which Triton then finds
    # in its cache. GATE is spelled out: importing dry_run would import triton into this process.
    for rooms in (row_operators, (linear_table,)):
        for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
            jobs += [(room.triton_rows, (target,)) for room in rooms]
        jobs += [(room.triton_bytes, ()) for room in rooms]
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        for result in [pool.apply_async(job, arguments) for job, arguments in jobs]:
            rows |= result.get()
    return dict(sorted(rows.items()))


def differences(tracked: Table, found: Table) -> list[str]:
    """One line per row that is new, gone or different; what rows are made of is none of them."""
    return [
        f"{key}: tracked {tracked.get(key)}, now {found.get(key)}"
        for key in sorted((tracked.keys() | found.keys()) - {"inputs"})
        if tracked.get(key) != found.get(key)
    ]


def markdown(table: Table) -> str:
    """The table for readers: one section a backend, one line a kernel, one column a target."""
    lines = [
        "# What the GPU kernels cost",
        "",
        "Written by `make ladder` from `tools/ladder/table.json`. No kernel ran on a GPU for it:",
        "compilers give registers and occupancy, simulators count bytes. A cell under a target is",
        "registers, occupancy and shared memory in bytes (Triton: temperature 1, no labels;",
        "CUDA: static shared memory), and names the spills if there are any. Beside it, the CUDA",
        "forward of `adaptive_kl` takes as much as a teacher's row where a block may have that.",
        "",
        "Bytes are all that the kernel's threads ask for, small tensors too, over their floor:",
        "every logit read once and the gradient written once, for",
        f"{BYTES_ROWS} row of {VOCAB} logits.",
        "A forward that needs the normalisers before its terms reads twice. `adaptive_kl` searches",
        "the teacher's row for its head in between, on the chip: in registers up to 32,768 tokens",
        "(Triton), in shared memory as long as the row fits (CUDA, which then takes the terms from",
        "there too). A longer row is read again for every step of the search; how often stands in",
        f"brackets, for a row of {divergence_table.LONG} logits and a limit of 227 KB.",
        "`topk_divergence` has 64 tokens as support, and its floor is the row alone: once forward,",
        "once read and once written backward; sorting the ids, in torch, is not counted.",
        "`token_logprob` has that floor too. `topk_logprobs` looks for 64 tokens; its floor is the",
        "row and the results, and sorting the 64, in torch, is not counted. `topk_logprobs row` is",
        "the way of a row of 16384 logits, which its program keeps in registers.",
        "`verify` in CUDA is one request of one drafted token, which is rejected: a row of target",
        "and draft, read, compared in a second sweep, and drawn from; the floor is both rows. A",
        "filter searches each row in three to five further sweeps. In brackets are its two rows.",
        "In Triton it is one request of four drafted tokens, and the floor all of its nine rows:",
        "`accepted` reads them again but for the last, `rejected` only the first two.",
        "The operators from hidden states launch these kernels on fp32 logits: `forward` on whole",
        "rows, `backward` in place, on whole rows where these are one block, as here, else on",
        "tiles of at most 2048 columns, `in_forward` both on whole rows. Their rows are what their",
        "driver launches; its matrix products are not counted.",
    ]
    if "versions" in table:
        named = (f"{name} {version}" for name, version in table["versions"].items())
        lines += ["", f"Compilers: {', '.join(sorted(named))}."]
    proofs = {key: table[key] for key in sorted(table) if key.endswith(" proof")}
    if proofs:
        lines += [
            "",
            "The full ladder (`python -m tools.ladder --full`) passed on these sources: every case",
            "agrees with the reference, and every mutant of every part fails a check that the",
            "untouched kernel passes.",
            "",
            "| kernels | sources | reference and cases | cases | mutants, all killed |",
            "| --- | --- | --- | --- | --- |",
        ]
    for key, row in proofs.items():
        mutants = ", ".join(f"{part} {count}" for part, count in sorted(row["mutants"].items()))
        name = key.removesuffix(" proof")
        mutants = mutants if row.get("climbed", True) else f"**not climbed yet** ({mutants})"
        hashes = f"`{row['sources']}` | `{row['definition']}`"
        lines.append(f"| `{name}` | {hashes} | {row['cases']} | {mutants} |")
    for backend in ("triton", "cuda"):
        cells: dict[str, dict[str, str]] = defaultdict(dict)
        for key, row in table.items():
            if key.startswith(f"{backend} ") and key not in proofs:
                name, column = key.removeprefix(f"{backend} ").rsplit(" ", 1)
                cells[name][column] = _cell(row)
        columns = sorted({column for row in cells.values() for column in row} - {"bytes"})
        columns = sorted(columns, key=lambda name: (not name.startswith("sm_"), len(name), name))
        columns.append("bytes")
        heads = {"triton": "Triton", "cuda": "CUDA"}
        lines += ["", f"## {heads[backend]}", ""]
        lines.append(f"| kernel | {' | '.join([*columns[:-1], 'bytes / floor'])} |")
        lines.append("| --- " * (len(columns) + 1) + "|")
        for name in sorted(cells):
            values = " | ".join(cells[name].get(column, "") for column in columns)
            lines.append(f"| `{name}` | {values} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    if "ratio" in row:
        cell = f"{row['ratio']:.3f}"
        if row["ratio"] > 2.05:
            student, teacher = row["sweeps"][:2]
            cell += f" (student {student:g}, teacher {teacher:g})"
        return cell
    if not row["compiles"]:
        return "does not compile"
    cell = f"{row['registers']}, {row['occupancy']:.0%}, {row['shared']}"
    return f"{cell}, {row['spills']} spills" if row["spills"] else cell
