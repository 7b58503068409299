"""`python -m tools.ladder [--check] [--full | --changed | --defer]`: a GPU kernel's cost, without a
GPU.

Writes tools/ladder/table.json and docs/ladder.md. With --full it first runs the ladder's tests on
every case and every mutant, and records in the table that these kernels passed; with --changed only
those of kernels of which the tracked record is not, and of these only the cases where nothing but
the reference or the table of cases has changed. --defer records such kernels as not climbed yet,
and the table's page says so until someone runs --full. With --check it writes nothing, prints the
rows that differ from the tracked table, among them the records of what has changed since, and exits
with 1 if there are any; with --changed, too, it makes no rows anew while all that they are made of
is as it was.
"""

from __future__ import annotations

import argparse
import json
import sys

from tools.ladder.proof import climb, deferred, records, same_kernels
from tools.ladder.rows import Table
from tools.ladder.table import JSON, MARKDOWN, ROOT, collect, differences, inputs, markdown


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.ladder", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the tracked table")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="run the ladder's full tests first")
    which.add_argument("--changed", action="store_true", help="the same, of changed kernels")
    which.add_argument("--defer", action="store_true", help="record changed kernels as not climbed")
    arguments = parser.parse_args()

    tracked: Table = json.loads(JSON.read_text()) if JSON.exists() else {}
    failed = False
    proofs: Table | None = None
    now = records()
    stale = {key for key, row in now.items() if tracked.get(key) not in (row, deferred(row))}
    if arguments.full or (arguments.changed and stale):
        again = {key for key in stale if same_kernels(tracked.get(key), now[key])}
        proofs = climb(None) if arguments.full else climb(stale - again, again)
        failed = proofs is None
    elif arguments.defer:
        proofs = {key: deferred(now[key]) for key in stale}
    same = tracked.get("inputs") == {"fingerprint": inputs()}
    if arguments.check and arguments.changed and same:
        print("nothing that the rows are made of has changed since they were")
        found = tracked | (proofs or {})
    else:
        found = collect(tracked) | (proofs or {})
    if arguments.check:
        waiting = {
            key: tracked[key] for key, row in now.items() if tracked.get(key) == deferred(row)
        }
        print("".join(f"{key}: these kernels have not climbed yet\n" for key in waiting), end="")
        changed = differences(tracked, found | now | waiting)
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
