"""Markdown and a picture from the JSON of a run.

Nothing here measures, so an old run can be rendered again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import roof
from benchmarks.harness import Claim, Result, Timing


def load(path: Path) -> tuple[list[Result], dict[str, Any]]:
    """The cases in a `--benchmark-json` file, each once, and the file's other contents.

    A later case may have raised the quiet roof; every case is judged against the highest of them.
    """
    data = json.loads(path.read_text())
    found: dict[str, Result] = {}
    for entry in data["benchmarks"]:
        result = Result.from_json(entry["extra_info"]["result"])
        found.setdefault(result.case, result)
    results = list(found.values())
    for metric in roof.UNITS:
        best = max((r.quiet.rates.get(metric, 0.0) for r in results), default=0.0)
        for result in results:
            if metric in result.quiet.rates:
                result.quiet.rates[metric] = best
    return results, data


def markdown(results: list[Result], memory: list[dict[str, Any]] | None = None) -> str:
    """One section a case: verdict on the run, table, claims."""
    sections = [_section(result) for result in results]
    if memory:
        sections.append(_memory(memory, results))
    return "\n\n".join(sections) + "\n"


def _section(result: Result) -> str:
    lines = [f"## {result.case}", ""]
    if reasons := result.void():
        lines += [f"**VOID, run again on a quiet machine:** {'; '.join(reasons)}.", ""]
    lines += [f"{key}: {value}  " for key, value in result.notes.items()]
    if result.quiet.first_seen:
        lines += [
            "The quiet roof of this machine was first measured in this very run"
            f" ({', '.join(result.quiet.first_seen)}): a disturbance that lasted throughout"
            " would not have been noticed. Run again to confirm.  "
        ]
    lines += [
        f"Roof before / after / quiet: {_roofs(result)}.  ",
        (f"Floor: {_amount(result.bytes)}B moved; m" if result.bytes else "M")
        + f"achine: {result.quiet.machine}.",
        "",
        "| contestant | min ms | median ms | max / min | rate | of the roof | x floor: min (median)"
        " | speed-up: min (median) | errors |",
        "|---|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    lines += [_row(result, timing) for timing in result.timings]
    if claims := [claim for claim in result.claims if claim.of != "memory"]:
        lines += ["", *(_claim(result, claim) for claim in claims)]
    return "\n".join(lines)


def _roofs(result: Result) -> str:
    return ", ".join(
        f"{metric} {result.before[metric]:.1f} / {result.after[metric]:.1f} / {quiet:.1f}"
        f" {roof.UNITS[metric]}"
        for metric, quiet in result.quiet.rates.items()
    )


def _row(result: Result, timing: Timing) -> str:
    if timing.absent:
        return f"| {timing.name} | | | | | | | | left out: {timing.absent} |"
    cells = [
        f"{timing.minimum * 1e3:.2f}",
        f"{timing.median * 1e3:.2f}",
        f"{timing.spread:.2f}",
    ]
    if timing.refused:
        cells += ["", "", "", "refused", f"**WRONG:** {timing.gate}"]
    else:
        ups = [_speed_up(result, timing.name, other) for other in timing.against]
        cells += [
            f"{result.rate(timing.name):.1f} {roof.UNITS[result.roof]}",
            f"{result.roof_share(timing.name):.0%}",
            _times(result, timing.name),
            "; ".join(ups),
            str(timing.gate or ""),
        ]
    return f"| {timing.name} | " + " | ".join(cells) + " |"


def _times(result: Result, name: str) -> str:
    ratio = result.ratio(name, result.floor.name)
    return f"{ratio.of_minima:.2f} ({ratio.of_medians:.2f})" if ratio else "refused"


def _speed_up(result: Result, name: str, other: str) -> str:
    ratio = result.ratio(name, other)
    if ratio is None:
        return f"none reported over {other}"
    return f"{1 / ratio.of_minima:.2f} ({1 / ratio.of_medians:.2f}) x {other}"


def _claim(result: Result, claim: Claim) -> str:
    ratio = result.ratio(claim.subject, claim.against or claim.subject, claim.beyond)
    seen = ""
    if ratio and claim.of == "rate":
        unit = roof.UNITS[result.roof]
        seen = f": {result.rate(claim.subject):.2f} {unit} at best,"
        seen += f" {result.median_rate(claim.subject):.2f} in the median"
    elif ratio and claim.at_most is not None:
        seen = f": {ratio.of_minima:.2f} of minima, {ratio.of_medians:.2f} of medians"
    elif ratio:
        seen = f": {1 / ratio.of_minima:.2f} of minima, {1 / ratio.of_medians:.2f} of medians"
    return f"- **{result.verdict(claim)}**: {claim}{seen}"


def _amount(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} "


def _memory(rows: list[dict[str, Any]], results: list[Result]) -> str:
    lines = [
        "## Peak extra memory",
        "",
        "Above the resident inputs, in a fresh process each. *Peak* is that of a second call;"
        " *returned* is the gradients it gave back, *extra* the rest of the peak, */ eager* its"
        " share of the eager path's. *Kept* is what stayed resident after the first call: code,"
        " threads, workspaces.",
        "",
        "| case | contestant | peak MB | returned MB | extra MB | / eager | kept MB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    extra = {(row["case"], row["contestant"]): _extra(row) for row in rows if "error" not in row}
    for row in rows:
        name = f"| {row['case']} | {row['contestant']} |"
        if "error" in row:
            lines.append(f"{name} left out: {row['error']} | | | | |")
            continue
        eager = row.get("eager")
        share = _share(extra, row["case"], row["contestant"], eager)
        over = "" if share is None else f"{share:.2f}" + (f" ({eager})" if eager != "eager" else "")
        lines.append(
            f"{name} {row['peak'] / 1e6:.1f} | {row.get('returned', 0) / 1e6:.1f}"
            f" | {_extra(row) / 1e6:.1f} | {over} | {row['kept'] / 1e6:.1f} |"
        )
    verdicts = [
        f"- **{verdict}**: {result.case}: {claim}{seen}"
        for result in results
        for claim in result.claims
        if claim.of == "memory"
        for verdict, seen in [_memory_verdict(result, claim, extra)]
    ]
    return "\n".join([*lines, *(["", *verdicts] if verdicts else [])])


def _extra(row: dict[str, Any]) -> int:
    return max(0, int(row["peak"]) - int(row.get("returned", 0)))


def _share(
    extra: dict[tuple[str, str], int], case: str, name: str, against: str | None
) -> float | None:
    """Extra memory over that of `against`; None where either was not measured, or that is none."""
    over = extra.get((case, against)) if against else None
    return extra[case, name] / over if over and (case, name) in extra else None


def _memory_verdict(
    result: Result, claim: Claim, extra: dict[tuple[str, str], int]
) -> tuple[str, str]:
    """`held`, `missed`, or `refused` (a gate failed, or a contestant is absent); and the share."""
    share = _share(extra, result.case, claim.subject, claim.against)
    if share is None or result.ratio(claim.subject, claim.against) is None:
        return "refused", ""
    assert claim.at_most is not None
    return "held" if share <= claim.at_most else "missed", f": {share:.3f}"


_LABELS = {"subject": "pydistill", "peer": "peer", "floor": "floor"}
COLOURS = {"subject": "#1f6f8b", "peer": "#c9a227", "floor": "#8a8a8a"}


def plot(results: list[Result], path: Path) -> None:
    """One panel a case: median time over the floor's on a logarithmic scale, and in ms."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    shown = [[t for t in r.timings if not t.absent] for r in results]
    figure, panels = plt.subplots(
        len(results),
        1,
        figsize=(9, sum(1.1 + 0.32 * len(timings) for timings in shown) + 0.6),
        gridspec_kw={"height_ratios": [1.0 + 0.32 * len(timings) for timings in shown]},
        squeeze=False,
        layout="constrained",
    )
    for result, timings, panel in zip(results, shown, panels[:, 0], strict=True):
        floor = result.floor
        ratios = [t.median / floor.median for t in timings]
        bars = panel.barh(
            [t.name for t in timings],
            ratios,
            color=["white" if t.refused else COLOURS[t.role] for t in timings],
            edgecolor=["#b03030" if t.refused else "none" for t in timings],
            hatch=["///" if t.refused else "" for t in timings],
        )
        labels = [
            "wrong result, not reported" if t.refused else f"{r:.2f}x   {t.median * 1e3:.1f} ms"
            for t, r in zip(timings, ratios, strict=True)
        ]
        panel.bar_label(bars, labels, padding=4, fontsize=8)
        panel.axvline(1, color=COLOURS["floor"], linewidth=1)
        panel.set_xscale("log")
        panel.set_xlim(min(0.8, *ratios), max(ratios) * 3)
        ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500) if t <= max(ratios) * 1.5]
        panel.set_xticks(ticks, [str(t) for t in ticks])
        panel.minorticks_off()
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
        void = "VOID (disturbed run): " if result.void() else ""
        panel.set_title(
            void + result.case, loc="left", fontsize=10, color="#b03030" if void else "black"
        )
    panels[-1, 0].set_xlabel(
        "median time over the floor's (in-place add over the same bytes), log scale"
    )
    legend = [Patch(color=colour, label=_LABELS[role]) for role, colour in COLOURS.items()]
    figure.legend(handles=legend, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
