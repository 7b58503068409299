"""`python -m tools.ladder [--check] [--full]`: what every GPU kernel costs, without a GPU.

Writes tools/ladder/table.json and docs/ladder.md. With --full it first runs the ladder's tests on
every case and every mutant, about ten minutes on two cores, and records in the table that these
kernels passed. With --check it writes nothing, prints the rows that differ from the tracked table,
among them the proof of a kernel that has changed since, and exits with 1 if there are any.
"""

from __future__ import annotations

import argparse
import json
import sys

from tools.ladder.proof import climb, records
from tools.ladder.table import JSON, MARKDOWN, ROOT, Table, collect, differences, markdown


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.ladder", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the tracked table")
    parser.add_argument("--full", action="store_true", help="run the ladder's full tests first")
    arguments = parser.parse_args()

    tracked: Table = json.loads(JSON.read_text()) if JSON.exists() else {}
    failed = False
    proofs: Table | None = None
    if arguments.full:
        proofs = climb()
        failed = proofs is None
    found = collect(tracked) | (proofs or {})
    if arguments.check:
        changed = differences(tracked, found | records())
        if not MARKDOWN.exists() or MARKDOWN.read_text() != markdown(tracked):
            changed.append(f"{MARKDOWN.relative_to(ROOT)} is not the table's: run `make ladder`")
        print("\n".join(changed) or f"all {len(found)} rows are as tracked")
        failed |= bool(changed)
    else:
        JSON.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        MARKDOWN.write_text(markdown(found))
        print(f"{len(found)} rows in {JSON.relative_to(ROOT)} and {MARKDOWN.relative_to(ROOT)}")
    failed |= any(row.get("compiles") is False for row in found.values())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
