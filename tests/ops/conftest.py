"""The backends of this machine, for the tests of one operator (the module's `OP`).

`impl` runs a test on the reference and on the native kernels as they are chosen by default, which
is enough for what does not hang on the instruction set; `each_cpu` on every instruction set, and
`check_everywhere` a case on all of these. Where the native kernels are
missing, impl="cpu" still runs: through the whole torch layer, with the reference in the kernels'
place, so that autograd, vmap and compile are tested without a compiler.
"""

from collections.abc import Callable, Iterator

import pytest
import torch

from pydistill import _native, _registry
from pydistill.testing import Case, check, expected


@pytest.hookimpl(tryfirst=True)  # before marks select
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A slow case makes a slow test."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        case = callspec and callspec.params.get("case")
        if isinstance(case, Case) and "slow" in case.marks:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The rows here are few, so threads only cost time; what hangs on them has its own test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def native(op: str) -> bool:
    return _registry.has_kernel(_registry.OPERATORS[op].kernels[0], "cpu")


@pytest.fixture(params=["reference", "cpu"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu" and not native(request.module.OP):
        monkeypatch.setattr(_registry, "has_kernel", lambda name, backend: True)
    chosen: str = request.param
    return chosen


@pytest.fixture
def kernel_impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """`impl` without the reference."""
    if not native(request.module.OP):
        monkeypatch.setattr(_registry, "has_kernel", lambda name, backend: True)
    return "cpu"


@pytest.fixture(params=["reference", "auto"])
def impl_name(request: pytest.FixtureRequest) -> str:
    """The reference, and what a caller gets who says nothing."""
    if request.param == "auto" and not native(request.module.OP):
        pytest.skip(
            f"the native library has no kernel of {request.module.OP}: impl='auto' is the"
            " reference; run `make build`"
        )
    chosen: str = request.param
    return chosen


def _skip_without_kernel(op: str) -> None:
    if not native(op):
        pytest.skip(f"the native library has no kernel of {op}; run `make build`")


@pytest.fixture
def native_impl(request: pytest.FixtureRequest) -> str:
    """`kernel_impl` for what only the native kernels do: skipped where they are missing."""
    _skip_without_kernel(request.module.OP)
    return "cpu"


def capabilities(op: str) -> list[str]:
    """The instruction sets of this machine for which an operator has code of its own: AMX has only
    tiles, for matrix products, and otherwise runs the code of AVX512-BF16 (foreach_target.h)."""
    multiplies = op.startswith("linear_") or op in ("matmul", "topk_logprobs", "decoder_layer")
    supported = _native.supported_capabilities()
    return [name for name in supported if multiplies or name != "amx"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "each_cpu" in metafunc.fixturenames:
        found = capabilities(metafunc.module.OP) or ["cpu"]
        metafunc.parametrize("each_cpu", found, indirect=True)


@pytest.fixture
def each_cpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native kernels alone, in each instruction set."""
    _skip_without_kernel(request.module.OP)
    with _native.use_capability(request.param):
        yield "cpu"


@pytest.fixture
def check_everywhere(request: pytest.FixtureRequest) -> Callable[[Case], None]:
    """Fails unless the reference, in the precision of its inputs, and the native kernels agree with
    the truth of a case, which is computed once; these in every instruction set."""
    found = capabilities(request.module.OP) if native(request.module.OP) else []

    def check_case(case: Case) -> None:
        want = expected(case)
        report = check(case, "reference", want=want)
        wrong = [] if report.ok else [f"reference: {report.message}"]
        for capability in found:
            with _native.use_capability(capability):
                report = check(case, "cpu", want=want)
            wrong += [] if report.ok else [f"{capability}: {report.message}"]
        assert not wrong, "\n".join(wrong)

    return check_case
