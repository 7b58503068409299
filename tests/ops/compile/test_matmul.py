"""`matmul` under `torch.compile`."""

import pytest
import torch
from torch import Tensor

from pydistill.ops.matmul import matmul

OP = "matmul"


@pytest.mark.parametrize("accumulate", [False, True])
def test_fullgraph(accumulate: bool, impl: str) -> None:
    a, b = torch.randn(9, 20).bfloat16(), torch.randn(20, 30)

    def f(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        product = matmul(a * 2, b, impl=impl)
        matmul(a, b, out=out, accumulate=accumulate, impl=impl)
        return product + out

    before = torch.randn(9, 30)
    got, want = before.clone(), before.clone()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b, got), f(a, b, want))
    torch.testing.assert_close(got, want)
