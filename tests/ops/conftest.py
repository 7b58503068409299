"""The backends of this machine, for the tests of one operator (the module's `OP`).

`backend` runs a test on the reference and on every instruction set; `impl` on the reference and on
the native kernels as they are chosen by default, for what does not hang on the instruction set.
Where the native kernels are missing, impl="cpu" still runs: through the whole torch layer, with the
reference in the kernels' place, so that autograd, vmap and compile are tested without a compiler.
"""

from collections.abc import Iterator

import pytest

from pydistill import _native, _registry


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


@pytest.fixture(params=["reference", *(_native.supported_capabilities() or ["cpu"])])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "reference":
        yield "reference"
    elif not native(request.module.OP):
        pytest.skip(f"the native library has no kernel of {request.module.OP}; run `make build`")
    else:
        with _native.use_capability(request.param):
            yield "cpu"
