"""The divergences as modules, for trainers that hold their loss as an object, and losses on the
log-probabilities of sampled tokens.

Each module is `pydistill.divergence` with its kind fixed: options are given once, tensors at every
call.

    loss = ReverseKL(temperature=2.0)(student_logits, teacher_logits, mask=completion_mask)

They hold no parameters and no state. `kind`'s own parameters (`beta`, `alpha`) come first.

`opd_loss` is the reverse KL estimated on the student's own samples, where of the teacher only the
sampled tokens' log-probabilities are known.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pydistill.ops import _rows
from pydistill.ops.divergence import divergence


class Divergence(nn.Module):
    """`pydistill.divergence` of any `kind`; the classes below name one each.

    Args:
        kind: one of `divergence`'s kinds.
        beta, alpha: the kind's parameters, a scalar or one value a row; None is its default.
        temperature: divides both sides' logits, a scalar or one value a row.
        scale_t2: multiplies the divergence by temperature^2.
        label_weight: share of hard-label cross-entropy, in [0, 1]; needs `labels` at the call.
        ignore_index: rows with this label do not count.
        z_loss: coefficient of logsumexp(student_logits)^2.
        reduction: "mean" over counted rows, "sum" or "none".
        vocab: "equal", or "min" to compare the tokens that both sides have.
        convention: another project's reading of the kind, see `pydistill.CONVENTIONS`.
        overwrite_logits: writes the gradient over the student's logits during forward.
        group: the `torch.distributed` group over which the vocabulary is sharded.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Raises ValueError or TypeError at the call, as `pydistill.divergence` does.
    """

    def __init__(
        self,
        kind: str,
        *,
        beta: float | Tensor | None = None,
        alpha: float | Tensor | None = None,
        temperature: float | Tensor = 1.0,
        scale_t2: bool = False,
        label_weight: float = 0.0,
        ignore_index: int = -100,
        z_loss: float = 0.0,
        reduction: str = "mean",
        vocab: str = "equal",
        convention: str | None = None,
        overwrite_logits: bool = False,
        group: Any = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.kind = kind
        self.options: dict[str, Any] = {
            "beta": beta,
            "alpha": alpha,
            "temperature": temperature,
            "scale_t2": scale_t2,
            "label_weight": label_weight,
            "ignore_index": ignore_index,
            "z_loss": z_loss,
            "reduction": reduction,
            "vocab": vocab,
            "convention": convention,
            "overwrite_logits": overwrite_logits,
            "group": group,
            "impl": impl,
        }

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
        student_rows: Tensor | None = None,
        teacher_rows: Tensor | None = None,
    ) -> Tensor:
        """The loss of logits `[..., V]`: a scalar, or the prefix's shape for reduction="none"."""
        return divergence(
            student_logits,
            teacher_logits,
            self.kind,
            labels=labels,
            mask=mask,
            weight=weight,
            denominator=denominator,
            student_rows=student_rows,
            teacher_rows=teacher_rows,
            **self.options,
        )

    def extra_repr(self) -> str:
        """The options that differ from the defaults."""
        given = [f"{k}={v!r}" for k, v in self.options.items() if not _is_default(k, v)]
        named = [] if type(self) is not Divergence else [f"kind={self.kind!r}"]
        return ", ".join(named + given)


class ForwardKL(Divergence):
    """KL(teacher || student), the classic distillation loss: covers all of the teacher's modes."""

    def __init__(self, **options: Any) -> None:
        super().__init__("forward_kl", **options)


class ReverseKL(Divergence):
    """KL(student || teacher): keeps to the teacher's main modes (MiniLLM, arXiv 2306.08543)."""

    def __init__(self, **options: Any) -> None:
        super().__init__("reverse_kl", **options)


class JSD(Divergence):
    """Generalised Jensen-Shannon divergence; `beta` in (0, 1) is the teacher's share (GKD)."""

    def __init__(self, beta: float | Tensor | None = None, **options: Any) -> None:
        super().__init__("jsd", beta=beta, **options)


class TVD(Divergence):
    """Total variation distance; 1 - TVD is speculative decoding's acceptance of a draft."""

    def __init__(self, **options: Any) -> None:
        super().__init__("tvd", **options)


class SkewForwardKL(Divergence):
    """KL(p || alpha p + (1 - alpha) q) of teacher p and student q (DistiLLM, arXiv 2402.03898)."""

    def __init__(self, alpha: float | Tensor | None = None, **options: Any) -> None:
        super().__init__("skew_forward_kl", alpha=alpha, **options)


class SkewReverseKL(Divergence):
    """KL(q || (1 - alpha) p + alpha q) of teacher p and student q (DistiLLM)."""

    def __init__(self, alpha: float | Tensor | None = None, **options: Any) -> None:
        super().__init__("skew_reverse_kl", alpha=alpha, **options)


class AlphaBeta(Divergence):
    """Alpha-beta divergence, (1, 0) forward and (0, 1) reverse KL (ABKD, arXiv 2505.04560)."""

    def __init__(
        self,
        alpha: float | Tensor | None = None,
        beta: float | Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__("alpha_beta", alpha=alpha, beta=beta, **options)


class AdaptiveKL(Divergence):
    """Forward and reverse KL weighed by the error on the teacher's head and tail (2404.02657)."""

    def __init__(self, **options: Any) -> None:
        super().__init__("adaptive_kl", **options)


class Hellinger(Divergence):
    """Squared Hellinger distance without a factor: sum (sqrt p - sqrt q)^2, at most 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__("hellinger", **options)


class Chi2(Divergence):
    """Pearson's chi^2 of the teacher from the student: sum (p - q)^2 / q."""

    def __init__(self, **options: Any) -> None:
        super().__init__("chi2", **options)


class ToDi(Divergence):
    """Forward and reverse KL mixed token by token by sigmoid(log p/q) (ToDi, arXiv 2505.16297)."""

    def __init__(self, **options: Any) -> None:
        super().__init__("todi", **options)


def opd_loss(
    student_logprob: Tensor,
    teacher_logprob: Tensor,
    *,
    clip: float | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """On-policy distillation on sampled tokens: a policy gradient whose reward is how much likelier
    the teacher finds each token than the student does.

        advantage = stop_gradient(teacher_logprob - student_logprob)      clipped to [-clip, clip]
        loss      = -advantage * student_logprob

    Over tokens drawn from the student, the mean of the gradient is that of the reverse KL,
    sum q (log q - log p): grad q = q grad log q, and the mean of grad log q is 0. The value is no
    divergence and is not to be watched; the mean of student_logprob - teacher_logprob estimates the
    KL. (That mean itself must not be minimised: its gradient is 0 on average.)

    Along a sequence this is the reverse KL of every position given its prefix, with the prefix's
    own probability held fixed (a discount of 0, as on-policy distillation is usually run).
    Clipping, and tokens drawn from anything but the student at the temperature of
    `student_logprob`, bias the gradient. For a student that has moved since it drew them, the
    importance ratio is a weight: `weight=(student_logprob - sampler_logprob).exp().detach()`.

    Args:
        student_logprob: `[...]`, log-probabilities of the sampled tokens, as `token_logprob` gives
            them; the gradient flows here.
        teacher_logprob: `[...]`, the teacher's of the same tokens; no gradient.
        clip: largest size of the advantage; None does not clip, and a token that the teacher
            excludes (-inf) then makes the loss infinite.
        weight: `[...]`, factors of the tokens, detached.
        mask: bool `[...]`; tokens that are False are 0, whatever their log-probabilities.
        reduction: "mean" over counted tokens (sum of weight * loss / sum of weight), "sum", "none".
        denominator: of the mean, in place of the counted weight.

    Returns:
        A scalar, or `[...]` for reduction="none"; fp32, or fp64 for fp64 log-probabilities.

    Raises:
        ValueError, TypeError: for an argument that cannot be right.

    Source: the score function (Williams 1992) with the log-ratio as its reward; arXiv 2306.08543.
    """
    for name, x in (("student_logprob", student_logprob), ("teacher_logprob", teacher_logprob)):
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} is {got}; pass floating-point log-probabilities, one a token.")
    shape = tuple(student_logprob.shape)
    if tuple(teacher_logprob.shape) != shape:
        raise ValueError(
            f"teacher_logprob has shape {tuple(teacher_logprob.shape)}, student_logprob {shape};"
            " pass both of the same tokens."
        )
    for name, given in (("teacher_logprob", teacher_logprob), ("weight", weight)):
        if isinstance(given, Tensor) and given.requires_grad:
            raise ValueError(
                f"{name} requires grad, but gradients flow to student_logprob only; detach it."
            )
    if clip is not None:
        _rows.check_range("clip", clip, 0.0, math.inf, fix="pass a positive size, or None.")
    _rows.check_reduction(reduction, denominator)
    device = student_logprob.device
    _rows.check_device("teacher_logprob", teacher_logprob, device)
    mask = _rows.row_mask(mask, shape, device)
    weight = _rows.row_weight(weight, shape, device)
    counted = _rows.counted_rows(mask, weight, None, 0)
    dtype = torch.promote_types(student_logprob.dtype, torch.float32)
    student, teacher = (x.reshape(-1).to(dtype) for x in (student_logprob, teacher_logprob))
    if counted is not None:
        student, teacher = (torch.where(counted, x, 0) for x in (student, teacher))
    advantage = (teacher - student).detach()
    if clip is not None:
        advantage = advantage.clamp(-clip, clip)
    return _rows.reduce_rows(-advantage * student, weight, counted, reduction, denominator, shape)


def _is_default(name: str, value: object) -> bool:
    defaults: dict[str, Any] = Divergence.__init__.__kwdefaults__ or {}
    return not isinstance(value, Tensor) and bool(defaults[name] == value)
