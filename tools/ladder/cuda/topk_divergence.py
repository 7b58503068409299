"""The CUDA kernels of `topk_divergence` under cusim, behind the public operator.

    with simulated(CudaSim.build(SOURCE, hooks=True), order="reverse") as calls:
        report = pydistill.testing.case.check(case, impl="cuda")
    calls[0].report.buffers["student"].bytes_loaded

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
from tools.ladder.cuda.divergence import Call
from tools.ladder.cuda.sim import CudaSim, struct_argument

SOURCE = Path(__file__).parents[3] / "csrc" / "cuda" / "topk_divergence.cu"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INPUTS = ("student", "ids", "log_p", "log_tail", "counted", "params")
_OPTIONS = ("kind", "mode", "temperature", "beta", "scale_t2")


class Simulator:
    """Kernels with the operator's schemas, run by `sim` in one thread order."""

    def __init__(self, sim: CudaSim, order: str) -> None:
        self.sim = sim
        self.order = order
        self.calls: list[Call] = []

    def topk_divergence_fwd(self, *args: Any) -> None:
        inputs, options, (loss, saved) = args[:6], args[6:11], args[11:]
        self._call("forward", inputs, options, loss=loss, saved=saved)

    def topk_divergence_bwd(self, *args: Any) -> None:
        (*teacher, params, saved, grad_rows), options, grad = args[:7], args[7:12], args[12]
        inputs = (*teacher, None, params)
        self._call("backward", inputs, options, saved=saved, grad_rows=grad_rows, grad=grad)

    def topk_divergence_overwrite(self, *args: Any) -> None:
        inputs, scale_rows, options, (loss, saved) = args[:6], args[6], args[7:12], args[12:]
        self._call("forward", inputs, options, loss=loss, saved=saved)
        self._call("backward", inputs, options, saved=saved, grad_rows=scale_rows, grad=inputs[0])

    def _call(
        self,
        direction: str,
        inputs: tuple[Tensor | None, ...],
        options: tuple[Any, ...],
        **results: Tensor,
    ) -> None:
        tensors = dict(zip(_INPUTS, inputs, strict=True)) | results
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        student = present["student"]
        call = struct_argument(
            SOURCE.with_suffix(".h"),
            "TopkDivergenceCall",
            **present,
            **dict(zip(_OPTIONS, options, strict=True)),
            rows=student.shape[0],
            vocab=student.shape[1],
            slots=present["ids"].shape[1],
            student_stride=student.stride(0),
            student_dtype=_DTYPES[student.dtype],
            grad_stride=results["grad"].stride(0) if "grad" in results else 0,
        )
        name = f"pyd_topk_divergence_{direction}"
        report = self.sim.call(name, call, buffers=present, order=self.order)
        self.calls.append(Call(name, report, present))


_library = torch.library.Library("pydistill_cuda", "IMPL")
_active: list[Simulator] = []


def _register() -> None:
    for name in ("topk_divergence_fwd", "topk_divergence_bwd", "topk_divergence_overwrite"):

        def run(*args: Any, name: str = name) -> None:
            getattr(_active[-1], name)(*args)

        _library.impl(name, run, "CPU")


@contextmanager
def simulated(sim: CudaSim, order: str = "forward") -> Iterator[list[Call]]:
    """`impl="cuda"` runs `sim` on CPU tensors inside the block; gives the list of kernel calls."""
    import pydistill  # noqa: F401  the operators' schemas come first

    if not torch._C._dispatch_has_kernel_for_dispatch_key(
        "pydistill_cuda::topk_divergence_fwd", "CPU"
    ):
        _register()
    resolve = _registry.resolve

    def resolve_cuda(name: str, impl: str, device: str, dtype: torch.dtype) -> str:
        return impl if impl == "cuda" else resolve(name, impl, device, dtype)

    simulator = Simulator(sim, order)
    _active.append(simulator)
    try:
        with mock.patch.object(_registry, "resolve", resolve_cuda):
            yield simulator.calls
    finally:
        _active.pop()
