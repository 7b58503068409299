"""Who may import whom, read from the sources (DESIGN.md, section 2)."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
MODEL_LEVEL = {
    "losses", "mixers", "conversion", "speculative", "flow", "weights", "cache", "distributed",
}  # fmt: skip
STDLIB = sys.stdlib_module_names


class Import(NamedTuple):
    module: str
    lazy: bool
    line: int


def imports(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """Every import of a module, absolute: `from a import b` counts as `a.b`."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    tree = ast.parse(source)
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            yield Import(name, id(node) in lazy, node.lineno)


def within(module: str, *roots: str) -> bool:
    return any(module == root or module.startswith(root + ".") for root in roots)


def fault(importer: str, imported: Import) -> str | None:
    """The rule that this import breaks, if any."""
    name, part = imported.module, [*importer.split("."), ""][1]
    top = name.split(".")[0]
    if within(name, "pydistill.recipes") and part not in ("recipes", "cli"):
        return "nothing but the command line imports recipes"
    if part == "kernels":
        own = name.startswith(importer + "_")
        shared = within(name, "torch", "triton", "pydistill.kernels._common")
        if top not in STDLIB and not shared and not own:
            return "a kernel imports torch, triton, kernels._common and its own parts only"
    elif within(name, "triton") and part != "testing":
        return "triton is imported by kernels only"
    if part == "ops":
        if within(name, "pydistill.kernels"):
            return None if imported.lazy else "an op imports its kernel inside a function"
        allowed = ("torch", "pydistill._registry", "pydistill.ops", "pydistill.reference")
        if top not in STDLIB and not within(name, *allowed):
            return "an op imports the registry, references, other ops and, lazily, its kernel"
    if part == "reference" and top not in STDLIB:
        if not within(name, "torch", "pydistill.reference"):
            return "a reference imports torch only"
    if part in MODEL_LEVEL:
        private = ("pydistill.kernels", "pydistill._registry", "pydistill._native")
        if within(name, *private, "pydistill.integrations", "pydistill.testing"):
            return "model-level code calls ops, never what is below or above them"
    return None


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / "pydistill").rglob("*.py")) + sorted(
        (ROOT / "kernels").rglob("*.py")
    ):
        relative = path.relative_to(ROOT)
        if relative.parts[:2] == ("pydistill", "kernels"):
            continue
        parts = [*relative.parts[:-1], relative.stem]
        if parts[0] == "kernels":
            parts.insert(0, "pydistill")
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def test_every_import_is_allowed() -> None:
    faults = []
    for module, path in modules():
        for imported in imports(path.read_text(), module, path.name == "__init__.py"):
            if broken := fault(module, imported):
                faults.append(f"{path}:{imported.line}: {imported.module}: {broken}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("importer", "source", "legal"),
    [
        ("pydistill.ops.a", "def f():\n    from pydistill.kernels import a", True),
        ("pydistill.ops.a", "def f():\n    from ..kernels.a import launch", True),
        ("pydistill.ops.a", "from pydistill.kernels import a", False),
        ("pydistill.ops.a", "def f():\n    import triton", False),
        ("pydistill.ops.a", "import transformers", False),
        ("pydistill.ops.a", "from pydistill import losses", False),
        ("pydistill.ops.a", "from pydistill import _registry", True),
        ("pydistill.ops.a", "from pydistill.reference.a import a_reference", True),
        ("pydistill.reference.a", "import torch", True),
        ("pydistill.reference.a", "from pydistill.ops import _rows", False),
        ("pydistill.kernels.a", "from pydistill.kernels._common import math", True),
        ("pydistill.kernels.a", "from ._common import math", True),
        ("pydistill.kernels.a", "from . import b", False),
        ("pydistill.kernels.a", "from pydistill.kernels.a_rows import f", True),
        ("pydistill.kernels.a", "from pydistill.reference.a import a_reference", False),
        ("pydistill.losses", "from pydistill.ops import a", True),
        ("pydistill.losses", "def f():\n    import pydistill.kernels.a", False),
        ("pydistill.mixers.gla", "from pydistill.integrations import transformers", False),
        ("pydistill.integrations.trl", "from pydistill.recipes import draft", False),
        ("pydistill.recipes.draft", "from pydistill import losses, divergence", True),
    ],
)  # fmt: skip
def test_the_rules_tell_right_from_wrong(importer: str, source: str, legal: bool) -> None:
    faults = [fault(importer, imported) for imported in imports(source, importer)]
    assert (faults == [None] * len(faults)) is legal


def test_no_module_has_the_name_of_a_public_function() -> None:
    import pydistill

    children = {path.stem for path in (ROOT / "pydistill").iterdir()} - {"__init__"}
    functions = {
        name for name in dir(pydistill)
        if callable(getattr(pydistill, name)) and not name.startswith("_")
    }  # fmt: skip
    assert not children & functions


def test_importing_the_package_loads_no_optional_dependency() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import pydistill;"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    new = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).split()
    assert "pydistill" in new
    assert not set(new) & {"triton", "transformers", "trl", "flash_attn", "tqdm", "gguf"}


UNSTABLE = r"ATen/|c10/|torch/(?!csrc/stable/|headeronly/|csrc/inductor/aoti_torch/c/)|Python\.h"
INCLUDES = {
    # Kernels take pointers and sizes, so that NumPy, the C++ tests and torch share them.
    "csrc/cpu/*": r"torch/|ATen/|c10/|Python\.h|pybind11/",
    "csrc/tests/*": r"torch/|ATen/|c10/",
    "csrc/cuda/*.cu": r"torch/|ATen/|c10/|Python\.h",
    "csrc/ops/*": UNSTABLE,
    "csrc/common/*": UNSTABLE,
}


@pytest.mark.parametrize("files", INCLUDES)
def test_native_includes(files: str) -> None:
    forbidden = re.compile(rf'^\s*#\s*include\s*[<"]({INCLUDES[files]})', re.MULTILINE)
    assert forbidden.search("#include <ATen/ATen.h>")
    for path in ROOT.glob(files):
        if path.is_file():
            found = forbidden.search(path.read_text())
            assert found is None, f"{path}: {found and found.group()}"
