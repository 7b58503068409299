"""The divergences as modules, for trainers that hold their loss as an object.

Each is `pydistill.divergence` with its kind fixed: options are given once, tensors at every call.

    loss = ReverseKL(temperature=2.0)(student_logits, teacher_logits, mask=completion_mask)

They hold no parameters and no state. `kind`'s own parameters (`beta`, `alpha`) come first.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

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


def _is_default(name: str, value: object) -> bool:
    defaults: dict[str, Any] = Divergence.__init__.__kwdefaults__ or {}
    return not isinstance(value, Tensor) and bool(defaults[name] == value)
