"""bfloat16 in NumPy, which has no such type: the upper 16 bits of a float32, held as uint16."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint16]
Floats = NDArray[Any]


def to_float32(bits: Bits) -> NDArray[np.float32]:
    wide: NDArray[np.uint32] = bits.astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32)


def from_float32(values: Floats, *, truncate: bool = False) -> Bits:
    """Round to nearest even, or toward zero; a NaN stays a (quiet) NaN of the same sign."""
    floats = np.ascontiguousarray(values, dtype=np.float32).reshape(np.shape(values))
    bits = floats.view(np.uint32)
    lowest_kept = (bits >> np.uint32(16)) & np.uint32(1)
    bias = np.uint32(0) if truncate else lowest_kept + np.uint32(0x7FFF)
    with np.errstate(over="ignore"):
        rounded = ((bits + bias) >> np.uint32(16)).astype(np.uint16)
    sign = ((bits >> np.uint32(16)) & np.uint32(0x8000)).astype(np.uint16)
    result: Bits = np.where(np.isnan(floats), sign | np.uint16(0x7FC0), rounded)
    return result


def from_float64(values: NDArray[np.float64]) -> Bits:
    """One rounding from float64 to bfloat16, as a fused multiply-add makes.

    Going through float32 would round twice. Rounding to odd on the way keeps, in the last bit, the
    news that something was cut off, and the second rounding then decides as if it had seen it all.
    """
    with np.errstate(over="ignore"):
        floats = np.ascontiguousarray(values.astype(np.float32)).reshape(np.shape(values))
    bits = floats.view(np.uint32)
    inexact = floats.astype(np.float64) != values
    away = np.abs(floats.astype(np.float64)) > np.abs(values)
    odd = (bits - (away & inexact).astype(np.uint32)) | np.uint32(1)
    keep = ~inexact | np.isnan(values)
    return from_float32(np.where(keep, bits, odd).astype(np.uint32).view(np.float32))
