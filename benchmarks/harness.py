"""Times the contestants of a case against one another, in one process, in turn: A B C A B C ...

A case declares the bytes and flops that its result cannot do without, a contestant is one way to
get that result. Two processes, or all of A before all of B, would compare two moments of a shared
machine; in turn, a disturbance meets all of them. Each contestant is first checked against the
truth, and a speed-up of a wrong one is never computed. The roof of the machine (`benchmarks.roof`)
is taken before and after: a neighbour slows a chain of many small operations more than one fused
sweep, so a disturbed run flatters the fused one and is void.

What a contestant allocates it also frees inside the timed region, as a training step does. Ratios
compare minima (what the code costs when nothing disturbs it) and medians; a claim holds only if it
holds for both.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks import roof

ROLES = ("subject", "peer", "floor")
MEASURES = ("time", "memory", "rate")


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Gate:
    """Errors against the truth and what is allowed, by the name of what was compared."""

    errors: dict[str, float]
    limits: dict[str, float]

    @property
    def passed(self) -> bool:
        return all(error <= self.limits[name] for name, error in self.errors.items())  # NaN fails

    def __str__(self) -> str:
        return ", ".join(f"{k} {e:.3g} (limit {self.limits[k]:g})" for k, e in self.errors.items())


@dataclass(frozen=True)
class Step:
    """`run` is timed, `refresh` comes before it untimed, `check` judges what `run` returned."""

    run: Callable[[], Any]
    refresh: Callable[[], None] = _nothing
    check: Callable[[Any], Gate] | None = None


@dataclass(frozen=True)
class Contestant:
    """One way to compute a case; `setup` takes the case's inputs.

    A peer whose set-up or first run raises is left out, with the reason; an error of anyone else
    ends the run.
    """

    name: str
    setup: Callable[[Any], Step]
    role: str = "subject"
    against: tuple[str, ...] = ()  # the contestants over which its speed-up is reported

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role={self.role!r} is not known; use one of {', '.join(ROLES)}.")


@dataclass(frozen=True)
class Claim:
    """`subject` takes `at_most` times as long as `against`, or is `at_least` times faster.

    `beyond` seconds of the subject's time do not count: what a call costs before it does anything.
    `of="memory"`: it takes `at_most` times the extra memory, returned gradients aside, which
    `--memory` measures. `of="rate"`: it moves the case's bytes (or computes its flops) at
    `at_least` so many G a second, against nothing.
    """

    subject: str
    against: str = ""
    at_most: float | None = None
    at_least: float | None = None
    of: str = "time"
    beyond: float = 0.0

    def __post_init__(self) -> None:
        if self.of not in MEASURES:
            raise ValueError(f"of={self.of!r} is not known; use one of {', '.join(MEASURES)}.")
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError(f"the claim about {self.subject!r} needs either at_most or at_least.")
        needs = {"memory": self.at_most, "rate": self.at_least}.get(self.of, 0.0)
        if needs is None or (self.against == "") != (self.of == "rate"):
            raise ValueError(
                f"the claim about {self.subject!r} of {self.of} compares with {self.against!r};"
                " memory needs at_most and a contestant, a rate at_least and none."
            )

    def __str__(self) -> str:
        if self.of == "rate":
            return f"{self.subject} does at least {self.at_least:g} G a second"
        if self.of == "memory":
            return (
                f"{self.subject} takes at most {self.at_most:g}x the extra memory of {self.against}"
            )
        if self.at_most is not None:
            more = f"{self.beyond * 1e6:g} us and " if self.beyond else ""
            return (
                f"{self.subject} takes at most {more}{self.at_most:g}x the time of {self.against}"
            )
        return f"{self.subject} is at least {self.at_least:g}x faster than {self.against}"


@dataclass(frozen=True)
class Case:
    """Contestants over the same inputs.

    `bytes` and `flops` are the least that any of them must move and compute.
    """

    name: str
    bytes: float
    flops: float
    inputs: Callable[[], Any]
    contestants: tuple[Contestant, ...]
    claims: tuple[Claim, ...] = ()
    roof: str = "add"  # what limits it, one of `roof.UNITS`: a rate of bytes, or of flops
    notes: dict[str, str] = field(
        default_factory=dict
    )  # printed with the results: the backend that ran, and such

    def __post_init__(self) -> None:
        if self.roof not in roof.UNITS:
            raise ValueError(
                f"roof={self.roof!r} is not known; use one of {', '.join(roof.UNITS)}."
            )
        names = [c.name for c in self.contestants]
        if len(set(names)) != len(names):
            raise ValueError(f"case {self.name!r} has two contestants of one name: {names}.")
        if sum(c.role == "floor" for c in self.contestants) != 1:
            raise ValueError(f"case {self.name!r} needs exactly one contestant with role='floor'.")
        used = [n for c in self.contestants for n in c.against]
        used += [n for claim in self.claims for n in (claim.subject, claim.against) if n]
        if missing := sorted(set(used) - set(names)):
            raise ValueError(
                f"case {self.name!r} compares with {missing[0]!r}, which is not in it."
            )

    def eager(self, name: str) -> str | None:
        """The eager path to which the memory of contestant `name` is compared: the first peer named
        so that it is compared with, or that there is."""
        contestant = next(c for c in self.contestants if c.name == name)
        peers = [c.name for c in self.contestants if c.role == "peer"]
        return next((n for n in (*contestant.against, *peers) if n.startswith("eager")), None)


@dataclass
class Timing:
    """What one contestant showed: samples in seconds and its gate, or why it is absent."""

    name: str
    role: str
    against: list[str]
    samples: list[float] = field(default_factory=list)
    gate: Gate | None = None
    absent: str | None = None

    @property
    def minimum(self) -> float:
        return min(self.samples)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        return max(self.samples) / min(self.samples)

    @property
    def refused(self) -> bool:
        """Whether no speed of this contestant may be reported."""
        return self.gate is not None and not self.gate.passed


@dataclass
class Ratio:
    """Time of one contestant over that of another."""

    of_minima: float
    of_medians: float

    def holds(self, claim: Claim) -> bool:
        if claim.at_most is not None:
            return max(self.of_minima, self.of_medians) <= claim.at_most
        assert claim.at_least is not None
        return 1 / max(self.of_minima, self.of_medians) >= claim.at_least


@dataclass
class Result:
    """A measured case, all of it data: it survives JSON, and the report is made from it alone."""

    case: str
    bytes: float
    flops: float
    roof: str
    timings: list[Timing]
    before: roof.Roof
    after: roof.Roof
    quiet: roof.Quiet
    claims: list[Claim] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    def timing(self, name: str) -> Timing:
        return next(t for t in self.timings if t.name == name)

    @property
    def floor(self) -> Timing:
        return next(t for t in self.timings if t.role == "floor")

    def void(self) -> list[str]:
        """Why the run does not count; empty if it does."""
        return roof.void_reasons(self.before, self.after, self.quiet)

    def ratio(self, name: str, against: str, beyond: float = 0.0) -> Ratio | None:
        """None if either is absent or failed its gate: there is then nothing to report."""
        a, b = self.timing(name), self.timing(against)
        if a.absent or b.absent or a.refused or b.refused:
            return None
        over = (max(0.0, x - beyond) for x in (a.minimum, a.median))
        return Ratio(*(x / y for x, y in zip(over, (b.minimum, b.median), strict=True)))

    def rate(self, name: str) -> float:
        """The case's bytes or flops over the minimum time, in the unit of the case's roof."""
        amount = self.bytes if roof.UNITS[self.roof] == "GB/s" else self.flops
        return amount / self.timing(name).minimum / 1e9

    def median_rate(self, name: str) -> float:
        """`rate`, over the median time."""
        timing = self.timing(name)
        return self.rate(name) * timing.minimum / timing.median

    def roof_share(self, name: str) -> float:
        """`rate` over the roof of this run; above 1 only where the data fit the caches."""
        return self.rate(name) / self.before.best_of(self.after)[self.roof]

    def verdict(self, claim: Claim) -> str:
        """Of a time or a rate: `held`, `missed`, `void`, or `refused` (a gate failed, or a
        contestant is absent)."""
        ratio = self.ratio(claim.subject, claim.against or claim.subject, claim.beyond)
        if ratio is None:
            return "refused"
        if self.void():
            return "void"
        if claim.of == "rate":
            assert claim.at_least is not None
            return "held" if self.median_rate(claim.subject) >= claim.at_least else "missed"
        return "held" if ratio.holds(claim) else "missed"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Result:
        timings = [
            Timing(**{**t, "gate": Gate(**t["gate"]) if t["gate"] else None})
            for t in data["timings"]
        ]
        return Result(
            **{
                **data,
                "timings": timings,
                "before": roof.Roof(**data["before"]),
                "after": roof.Roof(**data["after"]),
                "quiet": roof.Quiet(**data["quiet"]),
                "claims": [Claim(**c) for c in data["claims"]],
            }
        )


def measure(
    case: Case,
    *,
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    take_roof: Callable[[], roof.Roof] = roof.take,
    update_quiet: Callable[[roof.Roof], roof.Quiet] = roof.update_quiet,
    tell: Callable[[str], None] = lambda line: None,
) -> Result:
    """Gates every contestant, then times `rounds` interleaved rounds of them between two roofs.

    `warmup` untimed rounds come right before the timed ones: memory that lay idle may have been
    taken back by the host of a virtual machine, and the first touch would then be paid by whoever
    comes first.
    """
    tell(f"{case.name}: inputs and gates")
    inputs = case.inputs()
    steps: dict[str, Step] = {}
    timings = [Timing(c.name, c.role, list(c.against)) for c in case.contestants]
    for contestant, timing in zip(case.contestants, timings, strict=True):
        try:
            step = contestant.setup(inputs)
            step.refresh()
            output = step.run()
            timing.gate = step.check(output) if step.check else None
            del output
        except Exception as error:
            if contestant.role != "peer":
                raise
            timing.absent = (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
        else:
            steps[contestant.name] = step

    tell(f"{case.name}: roof")
    before = take_roof()
    present = [(steps[t.name], t) for t in timings if t.absent is None]
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(warmup):
            for step, _timing in present:
                step.refresh()
                step.run()
        for index in range(rounds):
            tell(f"{case.name}: round {index + 1} of {rounds}")
            for step, timing in present:
                step.refresh()
                start = clock()
                step.run()  # the output is dropped here, so freeing it is timed as well
                timing.samples.append(clock() - start)
    finally:
        if collecting:
            gc.enable()
    after = take_roof()
    quiet = update_quiet(before.best_of(after))
    return Result(
        case.name, case.bytes, case.flops, case.roof, timings, before, after, quiet,
        list(case.claims), dict(case.notes),
    )  # fmt: skip


def measure_again(case: Case, retries: int, **arguments: Any) -> Result:
    """`measure`, and again while the result is void, at most `retries` times; the last result.

    Which run counts is decided by the roofs alone, never by a contestant's time.
    """
    voided = 0
    while (result := measure(case, **arguments)).void() and voided < retries:
        voided += 1
    if voided:
        result.notes["void runs before this one"] = str(voided)
    return result
