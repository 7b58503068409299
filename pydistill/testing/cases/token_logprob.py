"""The cases of `pydistill.token_logprob`.

`run` gives, for one case and backend, both outputs, the gradients of each alone and of both under
random upstreams, and the tangents along a random direction. `truth` is the reference in fp64 on the
same, already rounded, numbers.

Both outputs are sums of terms of one sign and have relative tolerances only. A gradient is a
difference of terms: its size in a row is that of its largest element.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from pydistill.ops.token_logprob import token_logprob, token_logprob_jvp
from pydistill.testing.case import Case, Expected, Tolerance

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
_SHORT = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}

# The outputs' atol only admits what fp32 cannot hold: exponentials below its normal range.
TOLERANCES = {
    "logprob": Tolerance(2e-6, 1e-37),
    "entropy": Tolerance(2e-6, 1e-37),
    "grad": Tolerance(5e-6, 5e-6),
    "tangent": Tolerance(1e-5, 1e-5),
}

# An exponential is off by what rounding makes of its argument: at k (m - z) = 85, 1.8e-6 on the
# CPU, 2.1e-6 in Triton's interpreter, and up to 1e-5 on GPUs, whose exp rounds it once more.
PEAKED = {"logprob": Tolerance(1e-5, 1e-37), "entropy": Tolerance(1e-5, 1e-37)}


def _rows(pattern: str, rows: int, v: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """fp32 logits [rows, v] of a named pattern, and ids."""
    z = 2 * torch.randn(rows, v, generator=g)
    ids = torch.randint(0, v, (rows,), generator=g)
    if pattern == "peaked":  # log-probabilities of -1e-2 to -1e-22, and of their complements
        z[:, v // 2] = torch.linspace(12, 60, rows)
        ids[::2] = v // 2
    elif pattern == "ties":  # several maxima, in different blocks
        z[:, :: max(v // 4, 1)] = 9.0
        z[0] = 1.5
    elif pattern == "rising":  # every block lifts the maximum
        z += torch.arange(v) * 0.03
    elif pattern == "late":  # whole blocks of nothing before the first token, and after it
        z[:, : v // 2] = -torch.inf
        z[0, v // 2 + 40 :] = -torch.inf
        ids[:] = v // 2 + 3
    elif pattern == "infinite":
        z[:, -2:] = -torch.inf  # a padded vocabulary
        z[1, 0], z[2, 3] = -torch.inf, -torch.inf
        ids[1] = 0  # a token that cannot be
        z[3], ids[3] = -torch.inf, 5
        z[3, 5] = 1.0  # and one that must
    elif pattern == "poisoned":  # the first and last rows must not notice
        z[1, 3], z[2, 0], z[3] = torch.nan, torch.inf, -torch.inf
    elif pattern != "normal":
        raise ValueError(f"pattern={pattern!r} is not known.")
    return z, ids


def _case(
    name: str,
    rows: int,
    v: int,
    *,
    dtype: torch.dtype = FP32,
    pattern: str = "normal",
    per_row: bool = False,
    masked: str | None = None,
    prefix: tuple[int, ...] | None = None,
    marks: tuple[str, ...] = (),
    gate: Case | None = None,
    **options: Any,
) -> Case:
    case_id = f"{name}-{_SHORT[dtype]}-{rows}x{v}"
    shape = (rows,) if prefix is None else prefix

    def inputs(device: torch.device | str, seed: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed + zlib.crc32(case_id.encode()))
        z, ids = _rows(pattern, rows, v, g)
        kwargs: dict[str, Any] = dict(options)
        kwargs["logits"] = z.to(dtype).reshape(*shape, v).to(device)
        kwargs["ids"] = ids.reshape(shape).to(device)
        if per_row:
            kwargs["temperature"] = (0.5 + 1.5 * torch.rand(shape, generator=g)).to(device)
        if masked:
            mask = torch.arange(rows) % 3 != 1 if masked == "third" else torch.zeros(rows).bool()
            kwargs["mask"] = mask.reshape(shape).to(device)
            kwargs["ids"][~kwargs["mask"]] = -100
        return kwargs

    row = rows * v * dtype.itemsize
    return Case(
        op="token_logprob",
        id=case_id,
        inputs=inputs,
        shape=(rows, v),
        dtypes=(dtype,),
        options=options,
        tolerances={**TOLERANCES, **(PEAKED if pattern == "peaked" else {})},
        bytes={"forward": row, "backward": 2 * row},
        flops={"forward": 5 * rows * v, "backward": 5 * rows * v},
        marks=frozenset(marks),
        gate=gate,
    )


def _table() -> list[Case]:
    cases = []
    for dtype in (FP32, BF16, FP16):
        cases += [
            _case("plain", 5, 1000, dtype=dtype, marks=("ladder",)),
            _case("blocks", 4, 3000, dtype=dtype),
            _case("whole_blocks", 3, 4096, dtype=dtype),
            _case("odd", 3, 31, dtype=dtype, marks=("ladder",)),
            _case("one_token", 3, 1, dtype=dtype, marks=("ladder",)),
            _case("two_tokens", 3, 2, dtype=dtype),
            _case("peaked", 9, 2000, pattern="peaked", dtype=dtype, marks=("ladder",)),
            _case("peaked_in_a_whole_block", 9, 4096, pattern="peaked", dtype=dtype),
            _case("ties", 4, 4100, pattern="ties", dtype=dtype),
            _case("rising", 3, 5000, pattern="rising", dtype=dtype),
            _case("late", 3, 4100, pattern="late", dtype=dtype),
            _case("infinite", 5, 67, pattern="infinite", dtype=dtype, marks=("ladder",)),
            _case("poisoned", 6, 67, pattern="poisoned", dtype=dtype, marks=("ladder",)),
            _case("poisoned_blocks", 6, 2500, pattern="poisoned", dtype=dtype),
            _case("tempered", 5, 200, temperature=0.6, dtype=dtype, marks=("ladder",)),
            _case("per_row", 6, 1100, per_row=True, dtype=dtype, marks=("ladder",)),
            _case("masked", 7, 90, masked="third", dtype=dtype, marks=("ladder",)),
        ]  # fmt: skip
    for dtype in (FP32, BF16):
        gate = _case("bench", 8, 151936, dtype=dtype)
        cases += [
            _case("huge", 2, 151936, dtype=dtype, marks=("slow",)),
            _case("bench", 256, 151936, dtype=dtype, marks=("bench", "slow"), gate=gate),
        ]
    cases += [
        _case("peaked_cold", 9, 2000, pattern="peaked", temperature=0.7),
        _case("poisoned_and_masked", 6, 67, pattern="poisoned", masked="third"),
        _case("prefix", 6, 90, prefix=(2, 3), masked="third", per_row=True),
        _case("one_row", 1, 300, prefix=()),
        _case("all_masked", 4, 90, masked="all"),
        _case("no_rows", 0, 90),
    ]
    return cases


def run(case: Case, inputs: dict[str, Any], impl: str, seed: int) -> dict[str, Tensor]:
    """Every output of the case on backend `impl`."""
    logits = inputs.pop("logits").detach().requires_grad_()
    out = token_logprob(logits, impl=impl, **inputs)
    ups, tangent = _directions(case, logits, seed)
    values, tangents = token_logprob_jvp(logits.detach(), tangent, impl=impl, **inputs)
    return {
        "logprob": out.logprob,
        "entropy": out.entropy,
        "grad": _pull(out, logits, ups),
        "grad.logprob": _pull(out[:1], logits, ups[:1]),
        "grad.entropy": _pull(out[1:], logits, ups[1:]),
        "logprob.with_tangent": values.logprob,
        "entropy.with_tangent": values.entropy,
        "tangent.logprob": tangents.logprob,
        "tangent.entropy": tangents.entropy,
    }


def _pull(out: tuple[Tensor, ...], logits: Tensor, ups: tuple[Tensor, ...]) -> Tensor:
    ups = tuple(up.to(x.dtype) for up, x in zip(ups, out, strict=True))
    return torch.autograd.grad(out, logits, ups, retain_graph=True)[0]


def truth(case: Case, inputs: dict[str, Any], seed: int) -> dict[str, Expected]:
    """What `run` should give: the reference in fp64."""
    exact = {k: v.double() if _is_float(v) else v for k, v in inputs.items()}
    given = inputs["logits"]
    found = run(case, exact, "reference", seed)
    longest = _directions(case, given, seed)[1].double().abs().amax(-1)
    tangent_size = longest / torch.as_tensor(exact.get("temperature", 1.0))
    sizes: dict[str, Tensor | float] = {"logprob": 1.0, "entropy": 1.0, "tangent": tangent_size}
    out = {}
    for name, value in found.items():
        kind = name.split(".")[0]
        largest = value.abs().nan_to_num(0, 0, 0).amax(-1, keepdim=True) if kind == "grad" else None
        out[name] = Expected(value.detach(), sizes[kind] if largest is None else largest)
    return out


def _directions(case: Case, logits: Tensor, seed: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Random upstreams of both outputs, and a random tangent in the table's dtype."""
    g = torch.Generator().manual_seed(seed + 1 + zlib.crc32(case.id.encode()))
    ups = [torch.randn(logits.shape[:-1], generator=g).to(logits.device) for _ in range(2)]
    tangent = torch.randn(logits.shape, generator=g).to(case.dtypes[0]).to(logits)
    return (ups[0], ups[1]), tangent


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and bool(value.dtype.is_floating_point)


CASES: list[Case] = _table()
