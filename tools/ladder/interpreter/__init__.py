"""Run Triton kernels on the CPU and fail on what a GPU would let pass.

    guards = Guards()
    x, y = guards(x), guards(torch.empty_like(x))
    with strict() as meter:
        launcher(x, y)                          # unmodified host code on CPU tensors
    guards.check()                              # nothing written outside a tensor
    assert meter.bytes["x"].loaded == x.nbytes  # exact, by kernel parameter

Triton's interpreter executes programs one after another in NumPy. On its own it accepts reads
beyond a tensor, races between programs, and computes bfloat16 wrongly. Within `strict()`:

* bfloat16 arithmetic, casts, comparisons and dots are computed in float32 and rounded to nearest
  even; reductions and scans of raw bfloat16 raise (upcast first, as a kernel should);
* a load or store through a parameter's pointer must hit an element of the tensor passed for it,
  by its sizes and strides: not merely its storage, nor a neighbour;
* two programs of one launch may not touch an element if one of them writes it without atomics;
* requested bytes, sectors, flops and transcendentals are counted;
* `torch.empty` is filled with NaN, so that an unwritten output cannot look right.

Not modelled: TF32 (computed in float32), the order of summation on a GPU, memory ordering within a
launch, libdevice, inline assembly, and autotuning over more than one configuration.
`lanes()` gives up the checks and runs thousands of programs at once, for laws of what they draw.
The process must have started with TRITON_INTERPRET=1; `tools.ladder.isolation` sees to that in
tests.
"""

from tools.ladder.interpreter.errors import (
    LadderError,
    OutOfBoundsError,
    RaceError,
    UnsupportedError,
)
from tools.ladder.interpreter.guards import Guarded, Guards, guarded
from tools.ladder.interpreter.lanes import lanes
from tools.ladder.interpreter.meter import Conflict, Launch, Meter, Traffic
from tools.ladder.interpreter.session import require_interpreter, strict

__all__ = [
    "Conflict",
    "Guarded",
    "Guards",
    "LadderError",
    "Launch",
    "Meter",
    "OutOfBoundsError",
    "RaceError",
    "Traffic",
    "UnsupportedError",
    "guarded",
    "lanes",
    "require_interpreter",
    "strict",
]
