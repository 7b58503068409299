"""`decoder_layer` under `torch.compile`."""

from typing import Any

import torch
from torch import Tensor

from pydistill.ops.decoder_layer import decoder_layer
from pydistill.testing import load

OP = "decoder_layer"


def test_fullgraph(impl: str) -> None:
    case = next(case for case in load(OP) if case.id.startswith("few-fp32"))

    def f(inputs: dict[str, Any]) -> Tensor:
        return decoder_layer(**inputs, impl=impl) * 2

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    eager, traced = case.inputs("cpu", 0), case.inputs("cpu", 0)
    with torch.no_grad():
        torch.testing.assert_close(compiled(traced), f(eager))
    torch.testing.assert_close(traced["keys"], eager["keys"], equal_nan=True)
