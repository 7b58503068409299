"""Writes the skeleton of a new operator's room: the parts that need no native code.

    make new-op NAME=my_op

The skeleton is a row-wise operator, `[..., V] -> [...]`, whose reference raises; its tests fail
until the maths page, the reference and the case table are written. CONTRIBUTING.md has the order of
work. An existing file is never touched.
"""

import keyword
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

TEMPLATES = {
    "docs/ops/{op}.md": """\
# `{op}`: the maths

UNWRITTEN: the formula, its gradient and tangent, the limits (zero, infinity, empty rows), the
conventions of other projects, and the source of each.
""",
    "pydistill/reference/{op}.py": '''\
"""The definition of `{op}`: plain torch, differentiable by autograd."""

from torch import Tensor


def {op}_reference(x: Tensor) -> Tensor:
    """One value a row: `[R, V]` -> `[R]`."""
    raise NotImplementedError("write the formula of docs/ops/{op}.md")


def {op}_fwd(x: Tensor, out: Tensor) -> None:
    """The same as an `out` kernel, for torch's dispatcher."""
    out.copy_({op}_reference(x))
''',
    "pydistill/ops/{op}.py": '''\
"""UNWRITTEN: what `{op}` computes (formula, shapes, dtypes, cost), and why it has this shape."""

import torch
from torch import Tensor

from pydistill import _registry
from pydistill.reference.{op} import {op}_fwd, {op}_reference

OP = _registry.operator("{op}", {{torch.float32, torch.bfloat16, torch.float16}})
_registry.kernel(OP, "{op}_fwd", "(Tensor x, Tensor(a!) out) -> ()", {op}_fwd)


def {op}(x: Tensor, *, impl: str = "auto") -> Tensor:
    """UNWRITTEN: one sentence.

    Args:
        x: `[..., V]`, any strides.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; an explicit choice never falls back.

    Returns:
        One value a row, fp32.

    Raises:
        ValueError: `x` has no last dimension.
    """
    if x.ndim == 0:
        raise ValueError("{op} got a scalar; x needs a last dimension, [..., V].")
    backend = _registry.resolve("{op}", impl, x.device.type, x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    if backend == "reference":
        return {op}_reference(rows).reshape(x.shape[:-1])
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("{op} has no gradient on kernels yet; pass impl='reference'.")
    out = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    _registry.overload("{op}_fwd", backend)(rows, out)
    return out.reshape(x.shape[:-1])
''',
    "pydistill/testing/cases/{op}.py": '''\
"""The cases of `{op}`: a case is written once and drives tests, benchmarks and the ladder."""

from typing import Any

from torch import Tensor

from pydistill.ops.{op} import {op}
from pydistill.reference.{op} import {op}_reference
from pydistill.testing.case import Case, Expected

CASES: list[Case] = []


def run(case: Case, inputs: dict[str, Any], impl: str, seed: int) -> dict[str, Tensor]:
    return {{"value": {op}(**inputs, impl=impl)}}


def truth(case: Case, inputs: dict[str, Any], seed: int) -> dict[str, Expected]:
    x = inputs["x"].double()
    rows = {op}_reference(x.reshape(-1, x.shape[-1]))
    return {{"value": Expected(rows.reshape(x.shape[:-1]))}}
''',
    "tests/ops/test_{op}.py": '''\
"""`{op}`: its reference against closed forms, its backends against the case table."""

from pathlib import Path

import pytest
import torch

from pydistill.ops.{op} import OP, {op}
from pydistill.reference.{op} import {op}_reference
from pydistill.testing import check, load

ROOT = Path(__file__).parents[2]
ROOM = ("docs/ops/{op}.md", "pydistill/ops/{op}.py", "tests/ops/test_{op}.py")


@pytest.mark.parametrize("path", ROOM)
def test_the_room_is_written(path: str) -> None:
    assert "UNWRITTEN" + ":" not in (ROOT / path).read_text()


def test_closed_form() -> None:
    want = torch.tensor([float("nan")])  # UNWRITTEN: a value worked out by hand
    torch.testing.assert_close({op}(torch.tensor([[1.0, 2.0]]), impl="reference"), want)


def test_gradcheck() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck({op}_reference, (x,))


def test_there_are_cases_of_every_dtype() -> None:
    assert {{dtype for case in load("{op}") for dtype in case.dtypes}} >= OP.dtypes


@pytest.mark.parametrize("case", load("{op}"), ids=repr)
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_case(case, impl: str) -> None:
    report = check(case, impl)
    assert report.ok, report.message
''',
}


def write(op: str, root: Path = ROOT) -> list[Path]:
    """Writes the skeleton of `op` under `root`; ValueError for a name that cannot be used."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", op) or keyword.iskeyword(op):
        raise ValueError(f"{op!r} cannot name an operator; use lower-case words joined by _.")
    files = {root / path.format(op=op): text.format(op=op) for path, text in TEMPLATES.items()}
    taken = [path for path in files if path.exists()]
    if taken:
        raise ValueError(f"{op!r} is taken: {taken[0].relative_to(root)} exists; choose another.")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return list(files)


def main() -> int:
    try:
        paths = write(sys.argv[1] if len(sys.argv) == 2 else "")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(*(path.relative_to(ROOT) for path in paths), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
