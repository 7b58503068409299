"""`pydistill.causal_conv1d` with a SiLU, forward and backward, and one token from a state, against
`torch.nn.Conv1d` as transformers calls it, and `torch.compile` of the taps written out.

A training step returns the output and the gradients of x, weight and bias under a fixed upstream.
Its floor is what it must move: `y = x * 1` into memory that is there, forward, and twice backward.
A decoding step takes one token and the last three, and returns its row and the next three; its
floor is the same of one token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.conftest import played_back
from benchmarks.harness import Case, Claim, Contestant, Gate, Step
from pydistill import _registry, causal_conv1d
from pydistill.testing.cases.causal_conv1d import CASES

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
THEIR_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
Conv = Callable[[Tensor, Tensor, Tensor], Tensor]
Token = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return causal_conv1d(x, weight, bias, activation="silu")[0]


def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    channels, width = weight.shape
    out = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=width - 1, groups=channels)
    return F.silu(out[..., : x.shape[1]].transpose(1, 2))


def taps(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    length, width = x.shape[1], weight.shape[1]
    given = F.pad(x, (0, 0, width - 1, 0)).float()
    out = sum(given[:, j : j + length] * weight[:, j].float() for j in range(width)) + bias
    return F.silu(out).to(x.dtype)


def our_token(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    out, after = causal_conv1d(
        x, weight, bias, activation="silu", initial_state=state, output_final_state=True
    )
    assert after is not None
    return out, after


def conv1d_token(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state lies channels first, as those keep it."""
    given = torch.cat([state.transpose(1, 2), x.transpose(1, 2)], -1)
    out = F.conv1d(given, weight[:, None], bias, groups=weight.shape[0])
    return F.silu(out).transpose(1, 2), given[..., 1:].transpose(1, 2)


class Inputs:
    """The tensors of a case; `token` and `state` for one step of decoding."""

    def __init__(self, case: Any, length: int) -> None:
        given = case.inputs("cpu", 0)
        self.x, self.weight, self.bias = given["x"][:, :length], given["weight"], given["bias"]
        self.up = torch.randn(self.x.shape).to(self.x.dtype)
        width = self.weight.shape[1]
        self.token = self.x[:, width - 1 : width].contiguous()
        self.state = self.x[:, : width - 1].contiguous()

    def gate(self, limit: float, output: tuple[Tensor, ...]) -> Gate:
        """Everything the timed call returned, against fp64."""
        exact = [t.double().requires_grad_() for t in (self.x, self.weight, self.bias)]
        want = causal_conv1d(*exact, activation="silu", impl="reference")[0]
        slopes = torch.autograd.grad(want, exact, self.up.double())
        names = ("out", "x", "weight", "bias")
        truth = (want.detach(), *slopes)
        return _gate(names, output, truth, limit)

    def gate_token(self, limit: float, output: tuple[Tensor, ...]) -> Gate:
        out, after = causal_conv1d(
            self.token.double(), self.weight.double(), self.bias.double(), activation="silu",
            initial_state=self.state.double(), output_final_state=True, impl="reference",
        )  # fmt: skip
        assert after is not None
        return _gate(("out", "state"), output, (out, after), limit)


def _gate(
    names: tuple[str, ...], got: tuple[Tensor, ...], want: tuple[Tensor, ...], limit: float
) -> Gate:
    errors = {
        name: float((a.double() - b).norm() / b.norm())
        for name, a, b in zip(names, got, want, strict=True)
    }
    return Gate(errors, dict.fromkeys(errors, limit))


def train(x: Inputs, *, conv: Conv, limits: dict[torch.dtype, float]) -> Step:
    leaves = [t.detach().requires_grad_() for t in (x.x, x.weight, x.bias)]

    def run() -> tuple[Tensor, ...]:
        out = conv(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, x.up)

    return Step(run, check=partial(x.gate, limits[x.x.dtype]))


def train_compiled(x: Inputs, *, conv: Conv, limits: dict[torch.dtype, float]) -> Step:
    torch.compiler.reset()
    return train(x, conv=torch.compile(conv, dynamic=False), limits=limits)


def decode(x: Inputs, *, token: Token, limits: dict[torch.dtype, float]) -> Step:
    run = partial(token, x.token, x.weight, x.bias, x.state)
    return Step(torch.no_grad()(run), check=partial(x.gate_token, limits[x.x.dtype]))


def train_floor(x: Inputs) -> Step:
    out = torch.empty_like(x.x)

    def run() -> None:
        torch.mul(x.x, 1.0, out=out)
        torch.mul(x.x, x.up, out=out)

    return Step(run)


def decode_floor(x: Inputs) -> Step:
    out = torch.empty_like(x.token)
    return Step(partial(torch.mul, x.token, 1.0, out=out))


def cases(quick: bool = False) -> list[Case]:
    """The shape and the dtypes of the case table."""
    found = []
    for table in CASES:
        if "bench" not in table.marks:
            continue
        (_, tokens, channels), dtype = table.shape, table.dtypes[0]
        length = min(tokens, 64) if quick else tokens
        chosen = _registry.explain(_registry.OPERATORS["causal_conv1d"], "cpu", dtype)
        notes = {"backend": f"{chosen.backend} ({chosen.reason})"}
        share, theirs = length / tokens, THEIR_LIMITS
        found.append(
            Case(
                f"{DTYPES[dtype]} T = {length}, D = {channels}",
                bytes=(table.bytes["forward"] + table.bytes["backward"]) * share,
                flops=(table.flops["forward"] + table.flops["backward"]) * share,
                inputs=partial(Inputs, table, length),
                notes=notes,
                contestants=(
                    Contestant(
                        "ours", partial(train, conv=ours, limits=LIMITS),
                        against=("Conv1d", "compiled taps"),
                    ),
                    Contestant("Conv1d", partial(train, conv=conv1d, limits=theirs), "peer"),
                    Contestant(
                        "compiled taps", partial(train_compiled, conv=taps, limits=theirs), "peer"
                    ),
                    Contestant("floor: y = x u", train_floor, "floor"),
                ),
                claims=(Claim("ours", "Conv1d", at_least=5.0),),
            )
        )  # fmt: skip
        found.append(
            Case(
                f"{DTYPES[dtype]} one token, D = {channels}",
                bytes=2 * channels * dtype.itemsize,
                flops=2 * channels * table.options["width"],
                inputs=partial(Inputs, table, 8),
                notes=notes,
                contestants=(
                    Contestant(
                        "ours", partial(decode, token=our_token, limits=LIMITS), against=("Conv1d",)
                    ),
                    Contestant(
                        "Conv1d", partial(decode, token=conv1d_token, limits=theirs), "peer"
                    ),
                    Contestant("floor: y = x", decode_floor, "floor"),
                ),
                claims=(Claim("ours", "Conv1d", at_least=1.0),),
            )
        )  # fmt: skip
    return found


@pytest.mark.benchmark(timer=played_back)
def test_causal_conv1d(entry: tuple[Case, str], record: Callable[[tuple[Case, str]], None]) -> None:
    record(entry)
