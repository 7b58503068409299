"""`pydistill.divergence`, forward and backward, against eager PyTorch and `torch.compile` of it.

Every step takes the same logits and returns the loss and a freshly allocated gradient, as in a
trainer that sets its gradients to None; `overwrite_logits=True` writes it over logits that are
restored outside the timed region. The floor is `s += t` over the same buffers: it reads both and
writes one, as no loss with a gradient can avoid.

Peers that start from hidden states (Liger's chunked losses, TRL's chunked divergence) are not here:
they fuse the vocabulary projection, and belong beside `linear_divergence`. TRL's loss on logits is,
if TRL is installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.conftest import played_back
from benchmarks.harness import Case, Claim, Contestant, Gate, Step
from pydistill import _registry, divergence
from pydistill.reference.divergence import KINDS
from pydistill.testing.cases.divergence import CASES

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
AT_MOST = {  # overwrite_logits=True over the floor, by (rows, vocabulary)
    (torch.float32, (1024, 32000)): 2.1, (torch.bfloat16, (1024, 32000)): 2.4,
    (torch.float32, (256, 151936)): 2.4, (torch.bfloat16, (256, 151936)): 2.6,
}  # fmt: skip
# Allowed relative error of the loss and (2-norms) of the gradient. Eager bf16 rounds its
# log-probabilities: 2^-9 of about 12.
LIMITS = {torch.float32: {"loss": 1e-5, "grad": 1e-5}, torch.bfloat16: {"loss": 1e-5, "grad": 4e-3}}
EAGER_LIMITS = {
    torch.float32: {"loss": 1e-3, "grad": 1e-3},
    torch.bfloat16: {"loss": 0.1, "grad": 0.1},
}
Loss = Callable[[Tensor, Tensor], Tensor]


def forward_kl(s: Tensor, t: Tensor) -> Tensor:
    return F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="batchmean", log_target=True)


def reverse_kl(s: Tensor, t: Tensor) -> Tensor:
    return F.kl_div(t.log_softmax(-1), s.log_softmax(-1), reduction="batchmean", log_target=True)


def jsd(s: Tensor, t: Tensor) -> Tensor:
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    kl = partial(F.kl_div, log_m, reduction="batchmean", log_target=True)
    return (kl(log_p) + kl(log_q)) / 2


def tvd(s: Tensor, t: Tensor) -> Tensor:
    return (t.softmax(-1) - s.softmax(-1)).abs().sum(-1).mean() / 2


class Inputs:
    """The logits of a case, and on a few of their rows the truth in fp64."""

    def __init__(self, case: Any, rows: int) -> None:
        logits = case.inputs("cpu", 0)
        self.student, self.teacher = (logits[f"{s}_logits"][:rows] for s in ("student", "teacher"))
        self.sample = torch.linspace(0, rows - 1, min(rows, 8)).long()
        self.few = self.student[self.sample], self.teacher[self.sample]

    def gate(
        self, kind: str, loss: Loss, limits: dict[str, float], output: tuple[Tensor, Tensor]
    ) -> Gate:
        """The gradient of the timed call on those rows, and the loss of a call on them alone."""
        exact = partial(divergence, kind=kind, impl="reference")
        student, teacher = self.few
        want, slope = forward_backward(exact, student.double().requires_grad_(), teacher.double())
        found, _ = forward_backward(loss, student.clone().requires_grad_(), teacher)
        slope *= len(student) / len(self.student)  # both are means, over few rows and over all
        off = output[1][self.sample].double() - slope
        return Gate(
            {"loss": float(abs(found - want) / want), "grad": float(off.norm() / slope.norm())},
            limits,
        )


def forward_backward(loss: Loss, leaf: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    value = loss(leaf, teacher)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def step(
    x: Inputs, *, loss: Loss, kind: str, limits: dict[str, float], overwrite: bool = False
) -> Step:
    leaf = (x.student.clone() if overwrite else x.student.detach()).requires_grad_()
    restore = partial(leaf.detach().copy_, x.student) if overwrite else lambda: None
    return Step(
        partial(forward_backward, loss, leaf, x.teacher),
        restore,
        partial(x.gate, kind, loss, limits),
    )


def compiled_step(x: Inputs, *, loss: Loss, **arguments: Any) -> Step:
    torch.compiler.reset()
    return step(x, loss=torch.compile(loss, dynamic=False), **arguments)


def trl_step(x: Inputs, **arguments: Any) -> Step:
    from trl.experimental.gkd import GKDTrainer

    return step(x, loss=GKDTrainer.generalized_jsd_loss, **arguments)  # beta 0.5, mean over rows


def floor(x: Inputs) -> Step:
    s = x.student.clone()
    return Step(partial(s.add_, x.teacher), partial(s.copy_, x.student))


FLOOR = Contestant("floor: s += t", floor, "floor")


def forward_kl_contestants(ours: dict[str, float], theirs: dict[str, float]) -> list[Contestant]:
    default = partial(step, loss=divergence, kind="forward_kl", limits=ours)
    over = partial(default, loss=partial(divergence, overwrite_logits=True), overwrite=True)
    eager = {"loss": forward_kl, "kind": "forward_kl", "limits": theirs}
    return [
        Contestant("pydistill", default, against=("eager", "torch.compile")),
        Contestant("pydistill, overwrite_logits", over, against=("eager", "torch.compile")),
        Contestant("eager", partial(step, **eager), "peer"),
        Contestant("torch.compile", partial(compiled_step, **eager), "peer"),
        FLOOR,
    ]


def kinds_contestants(ours: dict[str, float], theirs: dict[str, float]) -> list[Contestant]:
    peers = {
        "reverse_kl": ["eager reverse_kl"],
        "jsd": ["eager jsd", "TRL jsd"],
        "tvd": ["eager tvd"],
    }
    eagers = {"reverse_kl": reverse_kl, "jsd": jsd, "tvd": tvd}
    return [
        *(
            Contestant(
                kind,
                partial(step, loss=partial(divergence, kind=kind), kind=kind, limits=ours),
                against=tuple(peers.get(kind, ())),
            )
            for kind in KINDS
        ),
        *(
            Contestant(f"eager {kind}", partial(step, loss=f, kind=kind, limits=theirs), "peer")
            for kind, f in eagers.items()
        ),
        Contestant("TRL jsd", partial(trl_step, kind="jsd", limits=theirs), "peer"),
        FLOOR,
    ]


def cases(quick: bool = False) -> list[Case]:
    """Forward KL at each shape and dtype of the case table, every kind at the smaller shape."""
    out = []
    for table in CASES:
        if "bench" not in table.marks or table.kind != "forward_kl":
            continue
        (rows, vocab), dtype = table.shape, table.dtypes[0]
        count = min(rows, 32) if quick else rows
        label = f"{DTYPES[dtype]} ({count}, {vocab})"
        limits = LIMITS[dtype], EAGER_LIMITS[dtype]
        chosen = _registry.explain(_registry.OPERATORS["divergence"], "cpu", dtype)
        build = partial(
            Case,
            bytes=table.bytes["overwrite"] * count / rows,
            flops=table.flops["overwrite"] * count / rows,
            inputs=partial(Inputs, table, count),
            notes={"backend": f"{chosen.backend} ({chosen.reason})"},
        )
        claims = (
            Claim("pydistill", "eager", at_least=8.0),
            Claim("pydistill", "torch.compile", at_least=4.0),
            Claim("pydistill, overwrite_logits", FLOOR.name, at_most=AT_MOST[dtype, table.shape]),
        )
        contestants = tuple(forward_kl_contestants(*limits))
        out.append(build(f"forward_kl {label}", contestants=contestants, claims=claims))
        if vocab == 32000:
            claims = tuple(Claim(k, "forward_kl", at_most=2.0) for k in KINDS if k != "forward_kl")
            contestants = tuple(kinds_contestants(*limits))
            out.append(build(f"kinds {label}", contestants=contestants, claims=claims))
    return out


@pytest.mark.benchmark(timer=played_back)
def test_divergence(entry: tuple[Case, str], record: Callable[[tuple[Case, str]], None]) -> None:
    record(entry)
