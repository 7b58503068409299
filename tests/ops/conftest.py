"""The backends of this machine, for the tests of one operator (the module's `OP`).

`impl` runs a test on the reference and on the native kernels as they are chosen by default, which
is enough for what does not hang on the instruction set; `each_cpu` on every instruction set. Where
the native kernels are missing, impl="cpu" still runs: through the whole torch layer, with the
reference in the kernels' place, so that autograd, vmap and compile are tested without a compiler.
"""

from collections.abc import Iterator

import pytest
import torch

from pydistill import _native, _registry


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


@pytest.fixture(params=_native.supported_capabilities() or ["cpu"])
def each_cpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native kernels alone, in each instruction set."""
    if not native(request.module.OP):
        pytest.skip(f"the native library has no kernel of {request.module.OP}; run `make build`")
    with _native.use_capability(request.param):
        yield "cpu"
