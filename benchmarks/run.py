"""The command: runs `bench_<op>.py` under pytest in a process of its own, then reports."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import memory, report

ROOT = Path(__file__).parents[1]
OPS = sorted(p.stem.removeprefix("bench_") for p in Path(__file__).parent.glob("bench_*.py"))


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    out.add_argument("op", nargs="?", choices=OPS, help="operator to measure (all of them)")
    out.add_argument(
        "--quick", action="store_true", help="few rows and rounds: a check, no measurement"
    )
    out.add_argument("--rounds", type=int, help="interleaved rounds")
    out.add_argument(
        "--retries", type=int, default=0, help="how often a void case is measured again (0)"
    )
    out.add_argument("--threads", type=int, help="torch threads (torch's own default)")
    out.add_argument(
        "--memory", action="store_true", help="also peak extra memory, a process a contestant"
    )
    out.add_argument("--json", type=Path, metavar="FILE", help="write pytest-benchmark's JSON")
    out.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the tables, as well as printing them"
    )
    out.add_argument("--plot", type=Path, metavar="FILE", help="draw time over the floor as a PNG")
    out.add_argument("--load", type=Path, metavar="FILE", help="render this JSON; measure nothing")
    out.add_argument(
        "-k",
        metavar="EXPRESSION",
        help="measure only cases with a matching contestant, as pytest's -k",
    )
    return out


def main(argv: list[str]) -> int:
    """Measures, prints the tables, writes what is asked for.

    Returns 0 if everything was measured and every subject is right; a void run or a missed claim is
    reported and is no error.
    """
    options = parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        path, code = options.load, 0
        if path is None:
            path = Path(options.json or Path(scratch) / "run.json").absolute()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            code = _measure(options, path)
            if not path.exists():
                print("benchmarks: nothing was measured.", file=sys.stderr)
                return code or 1
            if options.memory:
                _add_memory(options, path)
        results, data = report.load(path)
    text = report.markdown(results, data.get("memory"))
    print(text, end="")
    if options.markdown:
        options.markdown.write_text(text)
    if options.plot:
        report.plot(results, options.plot)
    return code


def _measure(options: argparse.Namespace, path: Path) -> int:
    files = [f"benchmarks/bench_{op}.py" for op in ([options.op] if options.op else OPS)]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=",
        "-o",
        "timeout=0",
        "-p",
        "no:cacheprovider",
    ]
    command += [
        *files,
        f"--benchmark-json={path}",
        "--benchmark-columns=min,median,max,rounds",
        "--tb=short",
    ]
    command += ["--quick"] if options.quick else []
    command += [f"--rounds={options.rounds}"] if options.rounds else []
    command += [f"--retries={options.retries}"] if options.retries else []
    command += [f"--threads={options.threads}"] if options.threads else []
    command += ["-k", options.k] if options.k else []
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
    return done.returncode


def _add_memory(options: argparse.Namespace, path: Path) -> None:
    measured = {result.case for result in report.load(path)[0]}
    rows = []
    for op in [options.op] if options.op else OPS:
        module = importlib.import_module(f"benchmarks.bench_{op}")
        for case in module.cases(quick=options.quick):
            for contestant in case.contestants if case.name in measured else ():
                print(f"memory: {case.name}: {contestant.name}", file=sys.stderr)
                row = memory.peak(
                    op, case.name, contestant.name, quick=options.quick, threads=options.threads
                )
                rows.append({**row, "eager": case.eager(contestant.name)})
    data = json.loads(path.read_text())
    data["memory"] = rows
    path.write_text(json.dumps(data, indent=1))
