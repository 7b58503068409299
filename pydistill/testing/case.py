"""A case of an operator, and the check of a backend against the fp64 truth.

An output of a backend is right where, element by element,

    |got - want| <= rtol |want| + atol scale + half an ulp of the output's dtype at want

with `want` the reference in fp64 on the very numbers the backend was given, and `scale` what the
operator's table says the output's size is there (for a gradient: the largest element of its row).
NaN and infinities must be where the truth has them. A report gives, for every output, the largest
error as a fraction of what is allowed: at most 1 passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    rtol: float
    atol: float


class Expected(NamedTuple):
    """The truth of one output and, where it broadcasts to it, its size."""

    value: Tensor
    scale: Tensor | float = 1.0


@dataclass(frozen=True)
class Case:
    """One call of a public operator.

    `inputs(device, seed)` gives the keyword arguments of the public function, without `impl`; the
    same seed gives the same numbers on every device. `bytes` and `flops` say, for each phase
    ("forward", "backward", ...), what any implementation must move and compute when every row
    counts. Marks: "ladder" is the subset small enough for emulated GPUs, "bench" the shapes whose
    speed is reported, "slow" those that take seconds. `gate` is a bench case with few rows.
    """

    op: str
    id: str
    inputs: Callable[[torch.device | str, int], dict[str, Any]]
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    options: Mapping[str, Any]
    tolerances: Mapping[str, Tolerance]
    bytes: Mapping[str, int] = field(default_factory=dict)
    flops: Mapping[str, int] = field(default_factory=dict)
    marks: frozenset[str] = frozenset()
    gate: Case | None = None

    @property
    def kind(self) -> str:
        """The operator's main variant, for those that have one."""
        return str(self.options.get("kind", ""))

    def __repr__(self) -> str:
        return self.id


@dataclass(frozen=True)
class Report:
    """`errors`: each output's largest error over what is allowed (inf: a misplaced NaN or inf)."""

    case: str
    impl: str
    errors: Mapping[str, float]
    message: str

    @property
    def ok(self) -> bool:
        return all(error <= 1 for error in self.errors.values())


def expected(case: Case, seed: int = 0) -> dict[str, Expected]:
    """The fp64 truth of every output of `case`, for several calls of `check`."""
    from pydistill.testing.cases import module

    found: dict[str, Expected] = module(case.op).truth(case, case.inputs("cpu", seed), seed)
    return found


def check(
    case: Case,
    impl: str = "auto",
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    want: Mapping[str, Expected] | None = None,
) -> Report:
    """Runs `case` on a backend and compares every output with the fp64 truth.

    `want` is `expected(case, seed)`, where the caller has it already. The plain reference, run in
    fp32, is allowed ten times the kernels' error and at least 1e-5 of each output's size: it
    cancels where the kernels are made not to.
    """
    from pydistill.testing.cases import module

    table = module(case.op)
    got: dict[str, Tensor] = table.run(case, case.inputs(device, seed), impl, seed)
    want = expected(case, seed) if want is None else want
    errors, lines = {}, []
    for name, value in got.items():
        tolerance = case.tolerances[name.split(".")[0]]
        if impl == "reference":
            tolerance = Tolerance(10 * tolerance.rtol, max(10 * tolerance.atol, 1e-5))
        errors[name], line = compare(name, value, want[name], tolerance)
        lines += [line] if errors[name] > 1 else []
    message = f"{case.op}[{case.id}] impl={impl}: " + ("; ".join(lines) or "ok")
    return Report(case.id, impl, errors, message)


def compare(name: str, got: Tensor, want: Expected, tolerance: Tolerance) -> tuple[float, str]:
    """The largest error over what is allowed, and a sentence that names the element."""
    truth = want.value.detach().double().cpu()
    if got.shape != truth.shape:
        return float("inf"), f"{name} has shape {tuple(got.shape)}, not {tuple(truth.shape)}"
    if not truth.numel():
        return 0.0, f"{name} is empty"
    value = got.detach().double().cpu()
    scale = torch.as_tensor(want.scale, dtype=torch.float64).cpu()
    allowed = tolerance.rtol * truth.abs() + tolerance.atol * scale + _half_ulp(truth, got.dtype)
    special = ~torch.isfinite(truth) | ~torch.isfinite(value)
    same = (value == truth) | (torch.isnan(value) & torch.isnan(truth))
    error = torch.where(same, 0.0, (value - truth).abs() / allowed)
    error = torch.where(special, torch.where(same, 0.0, torch.inf), error)
    worst = int(error.argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
    return float(error.flatten()[worst]), (
        f"{name}{list(at)} is {float(value[at]):.9g}, not {float(truth[at]):.9g}"
        f" ({float(error.flatten()[worst]):.3g} times the allowed error)"
    )


def _half_ulp(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the spacing of `dtype` at `truth`: what rounding once may cost, subnormals included."""
    info = torch.finfo(dtype)
    spacing = info.eps * truth.abs()
    return torch.clamp(spacing, min=info.smallest_normal * info.eps) / 2
