"""The definition of `pydistill.linear_divergence`: `divergence` of the logits of two heads."""

from __future__ import annotations

import torch
from torch import Tensor

from pydistill.reference.divergence import Inputs, Options, divergence_reference
from pydistill.reference.linear_head import Head, head_logits


def linear_divergence_reference(
    student: Head,
    teacher: Head,
    counted: Tensor | None,
    labels: Tensor | None,
    params: Tensor | None,
    options: Options,
) -> Tensor:
    """Row losses `[R]`, differentiable in the student's hidden states, weight and bias."""
    with torch.no_grad():
        theirs = head_logits(teacher, counted)
    inputs = Inputs(head_logits(student, counted), theirs, None, None, counted, labels, params)
    return divergence_reference(inputs, options)[0]
