"""How launchers choose a device and the shape of a program."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """The device of `x` made current: Triton launches on the current device, whatever the tensors
    say.
    """
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def compiler_options(
    block: int, elements_per_thread: int, registers: int | None = None
) -> dict[str, int]:
    """Launch options of a program whose threads hold so many elements of each block.

    `registers` is a limit per thread for NVIDIA. Naming one, even a generous one, keeps ptxas from
    spilling a register or two to reach its next step of occupancy.
    """
    if triton.knobs.runtime.interpret:
        return {}
    target = triton.runtime.driver.active.get_current_target()
    warps = max(1, min(16, block // (target.warp_size * elements_per_thread)))
    limited = registers is not None and target.backend == "cuda"
    return {"num_warps": warps, "maxnreg": registers} if limited else {"num_warps": warps}
