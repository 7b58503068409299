"""The CUDA kernels of `verify` under cusim, behind the public operator.

    with simulated(CudaSim.build(SOURCE, hooks=True), order="reverse") as calls:
        report = pydistill.testing.case.check(case, impl="cuda")
    calls[0].report.buffers["target"].bytes_loaded

As `tools.ladder.cuda.divergence` does it for its operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pydistill import _registry
from pydistill.reference.verify import WARPERS, Inputs, Outputs, Rule
from tools.ladder.cuda.divergence import Call
from tools.ladder.cuda.sim import CudaSim, struct_argument

SOURCE = Path(__file__).parents[3] / "csrc" / "cuda" / "verify.cu"
# A request's threads. The kernels have 512, of which a table's rows would leave most idle, and
# the simulator takes its time by the thread.
FEW_THREADS = ["PYD_VERIFY_BLOCK=64"]
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Simulator:
    """The kernel with the operator's schema, run by `sim` in one thread order."""

    def __init__(self, sim: CudaSim, order: str) -> None:
        self.sim = sim
        self.order = order
        self.calls: list[Call] = []

    def verify_fwd(self, *args: Any) -> None:
        inputs, rule, outputs = Inputs(*args[:10]), Rule(*args[10:14]), Outputs(*args[15:])
        tensors = inputs._asdict() | outputs._asdict()
        present: dict[str, Tensor] = {n: x for n, x in tensors.items() if x is not None}
        fields = present | sizes(inputs) | {"method": rule.method, "lenience": rule.lenience}
        fields |= {"strength": rule.strength, "alpha": rule.alpha}
        header = SOURCE.with_suffix(".h")
        size = torch.zeros(1, dtype=torch.int64)
        self.sim.call("pyd_verify_scratch", struct_argument(header, "VerifyCall", **fields), size)
        present["scratch"] = torch.empty(int(size) // 4, dtype=torch.int32)
        call = struct_argument(header, "VerifyCall", **fields, scratch=present["scratch"])
        report = self.sim.call("pyd_verify", call, buffers=present, order=self.order)
        self.calls.append(Call("pyd_verify", report, present))


def sizes(inputs: Inputs) -> dict[str, Any]:
    """Sizes and strides, as csrc/cuda/ops/verify.cpp reads them off the tensors."""
    target, draft, support = inputs.target, inputs.draft, inputs.support
    batch, rows, vocab = target.shape
    found = {
        "batch": batch,
        "slots": rows - 1,
        "vocab": vocab,
        "target_request_stride": target.stride(0),
        "target_row_stride": target.stride(1),
        "dtype": _DTYPES[target.dtype],
        "drafted_step": _step(inputs.num_drafted, 1),
        "warper_step": _step(inputs.warpers, 2 * WARPERS),
        "seed_step": _step(inputs.seed, 1),
        "position_step": _step(inputs.position, 1),
        "bias_step": _step(inputs.logit_bias, vocab),
        "parent_step": _step(inputs.parent, rows - 1),
    }
    if draft is not None:
        found |= {"draft_request_stride": draft.stride(0), "draft_row_stride": draft.stride(1)}
    if support is not None:
        requests, each, size = support.shape
        found["support_size"] = size
        found["support_row_step"] = size if each == rows - 1 else 0
        found["support_request_step"] = each * size if requests == batch else 0
    return found


def _step(x: Tensor | None, width: int) -> int:
    return 0 if x is None or x.shape[0] == 1 else width


_library = torch.library.Library("pydistill_cuda", "IMPL")
_active: list[Simulator] = []


@contextmanager
def simulated(sim: CudaSim, order: str = "forward") -> Iterator[list[Call]]:
    """`impl="cuda"` runs `sim` on CPU tensors inside the block; gives the list of kernel calls."""
    import pydistill  # noqa: F401  the operators' schemas come first

    if not torch._C._dispatch_has_kernel_for_dispatch_key("pydistill_cuda::verify_fwd", "CPU"):
        _library.impl("verify_fwd", lambda *args: _active[-1].verify_fwd(*args), "CPU")
    resolve = _registry.resolve

    def resolve_cuda(name: str, impl: str, device: str, dtype: torch.dtype, part: str = "") -> str:
        lacking = part in _registry.OPERATORS[name].lacks.get("cuda", ())
        return impl if impl == "cuda" and not lacking else resolve(name, impl, device, dtype, part)

    simulator = Simulator(sim, order)
    _active.append(simulator)
    try:
        with mock.patch.object(_registry, "resolve", resolve_cuda):
            yield simulator.calls
    finally:
        _active.pop()
