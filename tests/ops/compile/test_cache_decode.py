"""`cache_decode`, and a loss on what it returns, under `torch.compile`."""

import torch
from torch import Tensor

from pydistill import TopkTeacher, cache_decode, topk_divergence
from pydistill.testing import load

OP = "cache_decode"


def test_fullgraph(impl: str) -> None:
    inputs = next(case for case in load(OP) if "chosen" in case.id).inputs("cpu", 0)

    def f(packed: Tensor, rows: Tensor, student: Tensor) -> tuple[TopkTeacher, Tensor]:
        teacher = cache_decode(packed, 4096, 16, rows=rows, temperature=2.0, impl=impl)
        return teacher, topk_divergence(student, teacher, kind="jsd", temperature=2.0)

    arguments = inputs["packed"], inputs["rows"], torch.randn(3, 5, 4096)
    want, loss = f(*arguments)
    got, compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(*arguments)
    for a, b in zip(want[:3], got[:3], strict=True):
        assert torch.equal(a, b)
    assert got[3:] == want[3:]
    torch.testing.assert_close(compiled, loss)
