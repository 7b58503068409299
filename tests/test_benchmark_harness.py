"""The benchmark harness, on contestants that only move an injected clock: nothing is timed here."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import memory, report, roof, run
from benchmarks.harness import (
    Case,
    Claim,
    Contestant,
    Gate,
    Result,
    Step,
    measure,
    measure_again,
)
from pydistill import _registry

ROOT = Path(__file__).parents[1]
QUIET_RATES = {"add": 20.0, "copy": 10.0, "mm_fp32": 200.0, "mm_bf16": 1000.0}


class World:
    """A clock, and a log of who ran when."""

    def __init__(self) -> None:
        self.now = 100.0
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now

    def contestant(
        self, name: str, times: list[float], error: float = 0.0, **extra: Any
    ) -> Contestant:
        """Takes `times` in turn; its error against the truth is `error`, its limit 1e-3."""

        def setup(inputs: Any) -> Step:
            left = iter(times)

            def go() -> str:
                self.log.append(name)
                self.now += next(left)
                return name

            def refresh() -> None:
                self.log.append(f"refresh {name}")
                self.now += 1000.0  # would show in any timing

            def check(output: Any) -> Gate:
                assert output == name
                return Gate({"loss": error}, {"loss": 1e-3})

            return Step(go, refresh, check)

        return Contestant(name, setup, **extra)

    def take_roof(self, rates: dict[str, float] | None = None) -> Callable[[], roof.Roof]:
        def take() -> roof.Roof:
            self.log.append("roof")
            return roof.Roof(dict(rates or QUIET_RATES))

        return take

    def measure(self, case: Case, **changes: Any) -> Result:
        options: dict[str, Any] = {
            "rounds": 2,
            "warmup": 1,
            "clock": self.clock,
            "take_roof": self.take_roof(),
            "update_quiet": lambda seen: roof.Quiet("a machine", dict(QUIET_RATES), []),
        }
        return measure(case, **{**options, **changes})


def a_case(world: World, *, error: float = 0.0, peer_error: float = 0.0) -> Case:
    # The first two times of each are the gate's run and the warm-up.
    return Case(
        "case",
        bytes=6e9,
        flops=1e9,
        inputs=lambda: None,
        contestants=(
            world.contestant("ours", [9, 9, 1.0, 0.5], error, against=("eager",)),
            world.contestant("eager", [9, 9, 4.0, 5.0], peer_error, role="peer"),
            world.contestant("floor", [9, 9, 0.25, 0.5], role="floor"),
        ),
        claims=(Claim("ours", "eager", at_least=6.0), Claim("ours", "floor", at_most=1.9)),
    )


def test_the_contestants_take_turns() -> None:
    world = World()
    world.measure(a_case(world))
    turn = ["refresh ours", "ours", "refresh eager", "eager", "refresh floor", "floor"]
    assert world.log == [*turn, "roof", *turn, *turn, *turn, "roof"]


@pytest.mark.parametrize(("retries", "disturbed", "runs"), [(0, 2, 1), (3, 2, 3), (1, 2, 2)])
def test_a_void_case_is_measured_again(retries: int, disturbed: int, runs: int) -> None:
    """Until its roofs are those of a quiet machine, or the retries are used up."""
    seen: list[bool] = []

    def take() -> roof.Roof:
        low = len(seen) < 2 * disturbed  # two roofs a run
        seen.append(low)
        return roof.Roof({m: rate / 2 if low else rate for m, rate in QUIET_RATES.items()})

    world = World()
    times = [9.0] * (4 * runs)
    case = Case(
        "case", bytes=1.0, flops=1.0, inputs=lambda: None,
        contestants=(world.contestant("floor", times, role="floor"),),
    )  # fmt: skip
    result = measure_again(
        case, retries, rounds=2, warmup=1, clock=world.clock, take_roof=take,
        update_quiet=lambda _: roof.Quiet("a machine", dict(QUIET_RATES), []),
    )  # fmt: skip
    assert len(seen) == 2 * runs
    assert bool(result.void()) == (runs <= disturbed)
    assert result.notes.get("void runs before this one") == (str(runs - 1) if runs > 1 else None)


def test_only_the_run_itself_is_timed() -> None:
    world = World()
    result = world.measure(a_case(world))
    assert [t.samples for t in result.timings] == [[1.0, 0.5], [4.0, 5.0], [0.25, 0.5]]
    ours = result.timing("ours")
    assert (ours.minimum, ours.median, ours.spread) == (0.5, 0.75, 2.0)


def test_ratios_rates_and_roof() -> None:
    world = World()
    result = world.measure(a_case(world))
    ratio = result.ratio("ours", "eager")
    assert ratio is not None
    assert ratio.of_minima == pytest.approx(0.5 / 4.0)
    assert ratio.of_medians == pytest.approx(0.75 / 4.5)
    assert result.rate("ours") == pytest.approx(12.0)  # 6 GB in 0.5 s
    assert result.roof_share("ours") == pytest.approx(12.0 / 20.0)
    result.roof = "mm_fp32"
    assert result.rate("ours") == pytest.approx(2.0)  # 1 GFLOP in 0.5 s
    assert result.roof_share("ours") == pytest.approx(2.0 / 200.0)


def test_a_claim_must_hold_for_minima_and_medians() -> None:
    world = World()
    result = world.measure(a_case(world))
    # 8 and 6 times faster than eager; 2 and 2 times the floor.
    assert [result.verdict(claim) for claim in result.claims] == ["held", "missed"]
    assert result.verdict(Claim("ours", "eager", at_least=6.5)) == "missed"  # minima alone hold
    assert result.verdict(Claim("ours", "floor", at_most=2.0)) == "held"


@pytest.mark.parametrize("metric", list(QUIET_RATES))
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_low_roof_voids_the_run(metric: str, when: str) -> None:
    for share, void in ((0.84, True), (0.86, False)):
        low = {**QUIET_RATES, metric: share * QUIET_RATES[metric]}
        rates = iter([low, QUIET_RATES] if when == "before" else [QUIET_RATES, low])
        world = World()
        result = world.measure(a_case(world), take_roof=lambda rates=rates: roof.Roof(next(rates)))
        assert bool(result.void()) == void
        assert result.verdict(result.claims[0]) == ("void" if void else "held")
        assert ("VOID" in report.markdown([result])) == void
    assert roof.void_reasons(
        roof.Roof({"add": float("nan")}), roof.Roof({"add": 1.0}), roof.Quiet("m", {"add": 1.0}, [])
    )


@pytest.mark.parametrize("error", [2e-3, float("nan"), float("inf")])
def test_no_speed_up_of_a_wrong_contestant(error: float) -> None:
    world = World()
    result = world.measure(a_case(world, error=error))
    assert result.ratio("ours", "eager") is None
    assert result.ratio("ours", "floor") is None
    assert result.verdict(result.claims[0]) == "refused"
    (row,) = [x for x in report.markdown([result]).splitlines() if x.startswith("| ours ")]
    assert "WRONG" in row and "refused" in row
    assert "8.00" not in row and "12.0 GB/s" not in row


def test_no_speed_up_over_a_wrong_peer() -> None:
    world = World()
    result = world.measure(a_case(world, peer_error=1.0))
    assert result.ratio("ours", "eager") is None
    assert result.verdict(result.claims[0]) == "refused"
    ratio = result.ratio("ours", "floor")
    assert ratio is not None and ratio.of_minima == 2.0
    assert "none reported over eager" in report.markdown([result])


def test_a_peer_that_raises_is_left_out_and_named() -> None:
    def missing(inputs: Any) -> Step:
        raise ModuleNotFoundError("No module named 'peer'")

    world = World()
    case = a_case(world)
    peer = Contestant("eager", missing, "peer")
    broken = Case("case", 1.0, 1.0, case.inputs, (case.contestants[0], peer, case.contestants[2]))
    result = world.measure(broken)
    assert result.timing("eager").absent == "ModuleNotFoundError: No module named 'peer'"
    assert result.ratio("ours", "eager") is None
    assert "left out: ModuleNotFoundError" in report.markdown([result])

    ours = Case("case", 1.0, 1.0, case.inputs, (Contestant("ours", missing), case.contestants[2]))
    with pytest.raises(ModuleNotFoundError):
        world.measure(ours)


def test_a_case_is_checked() -> None:
    world = World()
    ours, eager, floor = a_case(world).contestants
    with pytest.raises(ValueError, match="exactly one contestant with role='floor'"):
        Case("case", 1.0, 1.0, lambda: None, (ours, eager))
    with pytest.raises(ValueError, match="two contestants of one name"):
        Case("case", 1.0, 1.0, lambda: None, (eager, eager, floor))
    with pytest.raises(ValueError, match="compares with 'eager'"):
        Case("case", 1.0, 1.0, lambda: None, (ours, floor))
    with pytest.raises(ValueError, match="roof='l2' is not known"):
        Case("case", 1.0, 1.0, lambda: None, (floor,), roof="l2")
    with pytest.raises(ValueError, match="either at_most or at_least"):
        Claim("ours", "floor")
    with pytest.raises(ValueError, match="of='beauty'"):
        Claim("ours", "floor", at_most=1.0, of="beauty")
    wrongs: list[dict[str, Any]] = [
        {"against": "floor", "at_least": 2.0, "of": "memory"},
        {"at_most": 2.0, "of": "memory"},
        {"against": "floor", "at_least": 2.0, "of": "rate"},
        {"at_most": 2.0, "of": "rate"},
        {"at_least": 2.0},
    ]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="memory needs at_most and a contestant"):
            Claim("ours", **wrong)
    with pytest.raises(ValueError, match="role='friend'"):
        Contestant("ours", lambda inputs: Step(lambda: None), "friend")


def test_the_quiet_roof_only_rises(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "roofs.json"
    first = roof.update_quiet(roof.Roof({"add": 10.0, "copy": 5.0}), path=path, key="m")
    assert first == roof.Quiet("m", {"add": 10.0, "copy": 5.0}, ["add", "copy"])
    second = roof.update_quiet(roof.Roof({"add": 12.0, "copy": 4.0}), path=path, key="m")
    assert second == roof.Quiet("m", {"add": 12.0, "copy": 5.0}, [])
    assert roof.update_quiet(roof.Roof({"add": 1.0}), path=path, key="other").first_seen == ["add"]
    assert json.loads(path.read_text())["m"] == {"add": 12.0, "copy": 5.0}
    assert [p.name for p in path.parent.iterdir()] == ["roofs.json"]
    path.write_text("{ half a fi")
    assert roof.update_quiet(roof.Roof({"add": 3.0}), path=path, key="m").first_seen == ["add"]


def test_a_roof_measured_for_the_first_time_says_so() -> None:
    world = World()
    quiet = roof.Quiet("a machine", dict(QUIET_RATES), ["add"])
    text = report.markdown([world.measure(a_case(world), update_quiet=lambda seen: quiet)])
    assert "first measured in this very run (add)" in text


@pytest.mark.parametrize(("small", "bf16"), [(1.0, 1.6e-8), (1e-3, 8.192e-6)])
def test_the_roof_counts_bytes_and_flops(small: float, bf16: float) -> None:
    """Every run takes a second of this clock, but small bf16 products `small`: where those are
    slow, they are the rate."""
    takes = iter([1.0] * 6 + [small] * 2 + [1.0] * 2)
    now = [0.0]
    running = [False]

    def clock() -> float:
        now[0] += next(takes) if running[0] else 0.0
        running[0] = not running[0]
        return now[0]

    found = roof.take(clock, repeats=2, numel=1000, mm=16)
    assert found.rates == pytest.approx(
        {"add": 12e-6, "copy": 8e-6, "mm_fp32": 8.192e-6, "mm_bf16": bf16}
    )


BENCH = """
import pytest
from benchmarks.conftest import played_back
from benchmarks.harness import Case, Claim, Contestant, Gate, Step

ERROR = {error}

def cases(quick=False):
    def step(inputs):
        gate = Gate({{"sum": ERROR}}, {{"sum": 0.0}})
        return Step(lambda: sum(range(1000)), check=lambda out: gate)

    def absent(inputs):
        raise ImportError("not here")

    ours = Contestant("ours", step, against=("peer",))
    peers = Contestant("peer", step, "peer"), Contestant("gone", absent, "peer")
    all_of_them = (ours, *peers, Contestant("floor", step, "floor"))
    claims = (Claim("ours", "floor", at_most=1e9),)
    notes = {{"backend": "none"}}
    return [Case("sums", 12.0, 1.0, lambda: None, all_of_them, claims=claims, notes=notes)]

@pytest.mark.benchmark(timer=played_back)
def test_sums(entry, record):
    record(entry)
"""


@pytest.mark.slow
@pytest.mark.parametrize("error", [0.0, 1.0])
def test_pytest_benchmark_writes_the_interleaved_samples(tmp_path: Path, error: float) -> None:
    pytest.importorskip("pytest_benchmark", reason="needs the extra `bench`")
    bench = tmp_path / "bench_sums.py"
    bench.write_text(BENCH.format(error=error))
    (tmp_path / "conftest.py").write_text(
        "from benchmarks import roof\nroof._NUMEL, roof._MM = 64, 8\n"
    )
    out = tmp_path / "out.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.conftest", str(bench)),
            *(f"--benchmark-json={out}", "--rounds=3", f"--rootdir={tmp_path}"),
        ],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == (0 if error == 0.0 else 1), done.stdout + done.stderr

    entries = {e["extra_info"]["contestant"]: e for e in json.loads(out.read_text())["benchmarks"]}
    (result,), _ = report.load(out)
    assert set(entries) == {"ours", "peer", "floor"}
    for name, entry in entries.items():
        timing = result.timing(name)
        assert len(timing.samples) == 3
        assert entry["stats"]["data"] == timing.samples
        assert entry["stats"]["min"] == timing.minimum
        assert entry["group"] == "sums"
    assert result.timing("gone").absent == "ImportError: not here"
    assert result.notes == {"backend": "none"}
    assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result
    assert (result.ratio("ours", "peer") is None) == (error != 0.0)
    assert (result.verdict(result.claims[0]) == "refused") == (error != 0.0)


def test_an_old_run_is_rendered_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World()
    entries = []
    for name, best in (("first", 20.0), ("second", 30.0)):
        quiet = roof.Quiet("a machine", {**QUIET_RATES, "add": best}, [])
        case = a_case(world)
        result = world.measure(case, update_quiet=lambda seen, quiet=quiet: quiet)
        result.case = name
        entries.append({"extra_info": {"contestant": "ours", "result": result.to_json()}})
    path = tmp_path / "old.json"
    rows = [
        {"case": "first", "contestant": "ours", "peak": 3_000_000, "returned": 1_000_000, "kept": 0,
         "eager": "eager"},
        {"case": "first", "contestant": "eager", "peak": 8_000_000, "returned": 0, "kept": 0,
         "eager": "eager"},
        {"case": "first", "contestant": "floor", "error": "killed"},
    ]  # fmt: skip
    path.write_text(json.dumps({"benchmarks": entries, "memory": rows}))

    picture, text = tmp_path / "old.png", tmp_path / "old.md"
    pytest.importorskip("matplotlib", reason="needs the extra `bench`")
    assert run.main([f"--load={path}", f"--plot={picture}", f"--markdown={text}"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert printed == text.read_text()
    assert "| first | ours | 3.0 | 1.0 | 2.0 | 0.25 | 0.0 |" in printed
    assert "| first | eager | 8.0 | 0.0 | 8.0 | 1.00 | 0.0 |" in printed
    assert "| first | floor | left out: killed |" in printed
    # The second case saw a higher roof, so the first one was disturbed as well.
    assert printed.count("VOID") == 2


@pytest.mark.parametrize(
    ("at_most", "error", "ours", "verdict"),
    [
        (0.3, 0.0, 3, "held**: case: ours takes at most 0.3x the extra memory of eager: 0.250"),
        (0.2, 0.0, 3, "missed**: case: ours takes at most 0.2x the extra memory of eager: 0.250"),
        (0.3, 1.0, 3, "refused**: case: ours takes at most 0.3x the extra memory of eager\n"),
        (0.3, 0.0, None, "refused**: case: ours takes at most 0.3x the extra memory of eager\n"),
    ],
)
def test_a_claim_on_memory(at_most: float, error: float, ours: int | None, verdict: str) -> None:
    """Of the peak without what was returned; a wrong result and an absent row have no verdict."""
    world = World()
    case = a_case(world, error=error)
    case = replace(case, claims=(Claim("ours", "eager", at_most=at_most, of="memory"),))
    rows: list[dict[str, Any]] = [
        {"contestant": "ours", "peak": ours, "returned": 1, "kept": 0}
        if ours
        else {"contestant": "ours", "error": "killed"},
        {"contestant": "eager", "peak": 10, "returned": 2, "kept": 0},
    ]
    rows = [{"case": "case", "eager": case.eager(row["contestant"]), **row} for row in rows]
    result = Result.from_json(json.loads(json.dumps(world.measure(case).to_json())))
    text = report.markdown([result], rows)
    assert f"- **{verdict}" in text
    assert text.count("- **") == 1


def test_the_eager_path_of_a_contestant() -> None:
    """The one that it is compared with, else the case's first; none where there is none."""
    world = World()
    peers = [world.contestant(n, [], role="peer") for n in ("compiled", "eager a", "eager b")]
    floor = world.contestant("floor", [], role="floor")
    ours = world.contestant("ours", [], against=("compiled", "eager b"))
    other = world.contestant("other", [])
    case = Case("case", 1.0, 1.0, lambda: None, (ours, other, *peers, floor))
    found = [case.eager(c.name) for c in case.contestants]
    assert found == ["eager b", "eager a", "eager a", "eager a", "eager a", "eager a"]
    assert Case("case", 1.0, 1.0, lambda: None, (other, floor)).eager("other") is None


@pytest.mark.parametrize("op", sorted(_registry.OPERATORS))
def test_every_operator_has_a_benchmark(op: str) -> None:
    """Its cases are built without their inputs, every one of ours has somebody to be compared with
    and the subjects of claims are ours."""
    assert op in run.OPS
    module = importlib.import_module(f"benchmarks.bench_{op}")
    assert callable(getattr(module, f"test_{op}"))
    for quick in (True, False):
        found = module.cases(quick=quick)
        assert found and len({case.name for case in found}) == len(found)
        for case in found:
            ours = {c.name for c in case.contestants if c.role == "subject"}
            assert ours and {claim.subject for claim in case.claims} <= ours


def test_a_claim_leaves_out_what_a_call_costs() -> None:
    world = World()
    result = world.measure(a_case(world))  # 0.5 and 0.75 s, the floor 0.25 and 0.375
    for beyond, verdict in ((0.24, "missed"), (0.28, "held"), (0.9, "held")):
        claim = Claim("ours", "floor", at_most=1.3, beyond=beyond)
        assert result.verdict(claim) == verdict
    result.claims = [Claim("ours", "floor", at_most=1.3, beyond=0.25)]
    assert result.verdict(result.claims[0]) == "missed"  # of medians
    text = report.markdown([Result.from_json(json.loads(json.dumps(result.to_json())))])
    line = "takes at most 250000 us and 1.3x the time of floor: 1.00 of minima, 1.33 of medians"
    assert f"- **missed**: ours {line}" in text


def test_a_claim_on_a_rate() -> None:
    world = World()
    result = world.measure(a_case(world))  # 6 GB in 0.5 s at best, 0.75 s in the median
    assert result.verdict(Claim("ours", at_least=8.0, of="rate")) == "held"
    assert result.verdict(Claim("ours", at_least=8.1, of="rate")) == "missed"
    result.claims = [Claim("ours", at_least=8.0, of="rate")]
    line = "- **held**: ours does at least 8 G a second: 12.00 GB/s at best, 8.00 in the median"
    assert line in report.markdown([result])
    wrong = world.measure(a_case(World(), error=1.0))
    assert wrong.verdict(Claim("ours", at_least=8.0, of="rate")) == "refused"


@pytest.mark.parametrize(("over", "returned"), [(False, 1 << 24), (True, 0)])
def test_what_a_step_returns_is_told_from_what_was_there(over: bool, returned: int) -> None:
    """Two tensors of one storage count once, the logits' own memory not at all; the peak has the
    temporary and what is returned. The compiler's tensors, alive beside them, have no memory."""
    script = f"""
import sys, types, torch
from benchmarks import memory
from benchmarks.harness import Case, Contestant, Step

traced = torch._to_functional_tensor(torch.ones(8))

def setup(x):
    def run():
        temporary = torch.ones(1 << 21)
        out = x if {over} else torch.ones(1 << 22)
        out.add_(temporary.sum())
        return out[0], [(out, out.view(2, -1))]
    return Step(run)

case = Case("case", 1.0, 1.0, lambda: torch.ones(1 << 22), (Contestant("floor", setup, "floor"),))
sys.modules["benchmarks.bench_x"] = types.SimpleNamespace(cases=lambda quick: [case])
found = memory.measure_here("x", "case", "floor", False, 1)
print(found["peak"], found["returned"])
"""
    printed = subprocess.run(
        [sys.executable, "-c", script],
        cwd=memory.ROOT,
        env={**os.environ, **memory._MALLOC},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    peak, found = map(int, printed.split())
    assert found == returned
    assert peak == pytest.approx((1 << 23) + returned, abs=1 << 21)


def test_peak_memory_sees_a_temporary() -> None:
    """In a process of its own, as the harness does: this one has freed memory to hand out again."""
    script = (
        "import torch; from benchmarks import memory; memory.reset_high_water();"
        "before = memory.resident('VmRSS'); block = torch.ones(1 << 23); del block;"
        "print(memory.resident('VmHWM') - before)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script],
        cwd=memory.ROOT,
        env={**os.environ, **memory._MALLOC},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert (1 << 25) * 0.9 < int(printed) < (1 << 25) * 1.5  # 32 MiB
