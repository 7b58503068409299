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


def warps_for(block: int, elements_per_thread: int) -> int:
    """Warps of a program whose threads hold `elements_per_thread` of each block of `block`
    elements.
    """
    if triton.knobs.runtime.interpret:
        return 1
    warp = triton.runtime.driver.active.get_current_target().warp_size
    return max(1, min(16, block // (warp * elements_per_thread)))
