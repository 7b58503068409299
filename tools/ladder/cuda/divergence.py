"""The CUDA kernels of `divergence` under cusim, behind the public operator.

    with simulated(CudaSim.build(SOURCE, hooks=True), order="reverse") as calls:
        report = pydistill.testing.case.check(case, impl="cuda")
    calls[0].report.buffers["student"].bytes_loaded

Inside the block `impl="cuda"` takes CPU tensors, and every kernel call runs the CUDA source: the
case table thus reaches the kernels by the way a user's call does. Every call is remembered.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pydistill import _registry
from pydistill.reference.divergence import SAVED
from tools.ladder.cuda.sim import CudaSim, Report

SOURCE = Path(__file__).parents[3] / "csrc" / "cuda" / "divergence.cu"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POINTERS = ("student", "teacher", "student_rows", "teacher_rows", "counted", "labels", "params")
_SIZES = ("pairs", "student_count", "student_stride", "teacher_count", "teacher_stride", "vocab")
_CODES = ("student_dtype", "teacher_dtype", "kind", "scale_t2")
_SCALARS = ("temperature", "alpha", "beta", "label_weight", "z_loss")
_RESULTS = ("loss", "saved", "stats", "row_start", "group", "grad_rows", "grad")


class DivergenceCall(ctypes.Structure):
    """csrc/cuda/divergence.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_int32) for name in _CODES),
        *((name, ctypes.c_float) for name in _SCALARS),
        *((name, ctypes.c_void_p) for name in _RESULTS),
        ("grad_stride", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    ]


@dataclass(frozen=True)
class Call:
    """One launcher call: its name, what the hooks saw, and its tensors by name."""

    name: str
    report: Report
    tensors: dict[str, Tensor]


class Simulator:
    """Kernels with the operator's schemas, run by `sim` in one thread order."""

    def __init__(self, sim: CudaSim, order: str, shared_limit: int | None) -> None:
        self.sim = sim
        self.order = order
        self.shared_limit = shared_limit
        self.calls: list[Call] = []

    def divergence_fwd(self, *args: Any) -> None:
        inputs, options, (loss, saved, stats) = args[:7], args[7:15], args[15:]
        results = {"loss": loss, "saved": saved, "stats": stats if stats.numel() else None}
        self._call("pyd_divergence_forward", inputs, options, loss.shape[0], results)

    def divergence_bwd(self, *args: Any) -> None:
        student, teacher, rows_s, rows_t, row_start, group, labels, params, saved, grad_rows = args[
            :10
        ]
        options, grad = args[10:18], args[18]
        inputs = (student, teacher, rows_s, rows_t, None, labels, params)
        results = {"saved": saved, "row_start": row_start, "group": group}
        results |= {"grad_rows": grad_rows, "grad": grad}
        self._call("pyd_divergence_backward", inputs, options, grad_rows.shape[0], results)

    def divergence_overwrite(self, *args: Any) -> None:
        inputs, scale_rows, options, loss = args[:7], args[7], args[8:16], args[16]
        saved = torch.empty(loss.shape[0], SAVED)
        results = {"loss": loss, "saved": saved}
        self._call("pyd_divergence_forward", inputs, options, loss.shape[0], results)
        results = {"saved": saved, "grad_rows": scale_rows, "grad": inputs[0]}
        self._call("pyd_divergence_backward", inputs, options, loss.shape[0], results)

    def _call(
        self,
        name: str,
        inputs: tuple[Tensor | None, ...],
        options: tuple[Any, ...],
        pairs: int,
        results: dict[str, Tensor | None],
    ) -> None:
        kind, temperature, alpha, beta, scale_t2, label_weight, z_loss, vocab = options
        student, teacher, grad = inputs[0], inputs[1], results.get("grad")
        assert student is not None and teacher is not None
        tensors = dict(zip(_POINTERS, inputs, strict=True)) | results
        present = {key: tensor for key, tensor in tensors.items() if tensor is not None}
        call = DivergenceCall(
            **{key: tensor.data_ptr() for key, tensor in present.items()},
            pairs=pairs,
            student_count=student.shape[0],
            student_stride=student.stride(0),
            teacher_count=teacher.shape[0],
            teacher_stride=teacher.stride(0),
            vocab=vocab,
            student_dtype=_DTYPES[student.dtype],
            teacher_dtype=_DTYPES[teacher.dtype],
            kind=kind,
            scale_t2=scale_t2,
            temperature=temperature,
            alpha=alpha,
            beta=beta,
            label_weight=label_weight,
            z_loss=z_loss,
            grad_stride=0 if grad is None else grad.stride(0),
            columns=student.shape[1],
        )
        report = self.sim.call(
            name,
            ctypes.c_void_p(ctypes.addressof(call)),
            buffers=present,
            order=self.order,
            shared_limit=self.shared_limit,
        )
        self.calls.append(Call(name, report, present))


_library = torch.library.Library("pydistill_cuda", "IMPL")
_active: list[Simulator] = []


def _register() -> None:
    for name in ("divergence_fwd", "divergence_bwd", "divergence_overwrite"):

        def run(*args: Any, name: str = name) -> None:
            getattr(_active[-1], name)(*args)

        _library.impl(name, run, "CPU")


@contextmanager
def simulated(
    sim: CudaSim, order: str = "forward", shared_limit: int | None = None
) -> Iterator[list[Call]]:
    """`impl="cuda"` runs `sim` on CPU tensors inside the block; gives the list of kernel calls.

    `shared_limit` is the device's, in bytes (`CudaSim.call`).
    """
    import pydistill  # noqa: F401  the operators' schemas come first

    if not torch._C._dispatch_has_kernel_for_dispatch_key("pydistill_cuda::divergence_fwd", "CPU"):
        _register()
    resolve = _registry.resolve

    def resolve_cuda(name: str, impl: str, device: str, dtype: torch.dtype) -> str:
        return impl if impl == "cuda" else resolve(name, impl, device, dtype)

    simulator = Simulator(sim, order, shared_limit)
    _active.append(simulator)
    try:
        with mock.patch.object(_registry, "resolve", resolve_cuda):
            yield simulator.calls
    finally:
        _active.pop()
