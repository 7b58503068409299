"""Other projects' conventions for one and the same divergence, by name.

The same words mean different numbers in different projects: whether T^2 multiplies the loss, which
side beta weighs, what beta = 0 and 1 are, whether the teacher's entropy is part of the value. A
convention fixes these; tests pin each one's value and gradient by its formula.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Convention(NamedTuple):
    """How a project reads `kind`, `beta` and `temperature`.

    scale_t2: multiplies the divergence by T^2. kl_ends: jsd at beta = 0 is forward_kl and at 1
    reverse_kl.
    student_beta: beta weighs the student in the mixture (M = (1 - beta) p + beta q).
    soft_cross_entropy: KLs from the teacher are reported as cross-entropy, without subtracting the
    teacher's entropy (the gradient is the same).
    """

    scale_t2: bool = False
    kl_ends: bool = False
    student_beta: bool = False
    soft_cross_entropy_kinds: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    soft_cross_entropy: bool = False

    def apply(
        self, kind: str, alpha: float | Tensor | None, beta: float | Tensor | None, scale_t2: bool
    ) -> tuple[str, float | Tensor | None, float | Tensor | None, bool]:
        """The call in this library's own terms."""
        if self.kl_ends and kind == "jsd" and isinstance(beta, (int, float)) and beta in (0, 1):
            return ("forward_kl" if beta == 0 else "reverse_kl"), alpha, None, scale_t2
        if self.student_beta and kind == "jsd" and beta is not None:
            beta = 1.0 - beta
        return kind, alpha, beta, scale_t2 or self.scale_t2


CONVENTIONS: dict[str, Convention] = {
    # Hinton et al. 2015 (arXiv 1503.02531): soft targets at T, gradients rescaled by T^2.
    "hinton": Convention(scale_t2=True, kinds=("forward_kl",)),
    # GKD as trained by TRL: no T^2, beta = 0 and 1 jump to the two KLs.
    "trl": Convention(kl_ends=True, kinds=("forward_kl", "reverse_kl", "jsd")),
    # Liger's JSD: TRL's meaning of beta.
    "liger": Convention(kl_ends=True, kinds=("forward_kl", "reverse_kl", "jsd", "tvd")),
    # DistillKit multiplies every divergence by T^2.
    "distillkit": Convention(scale_t2=True, kinds=("forward_kl", "jsd", "tvd")),
    # DistiLLM (arXiv 2402.03898): lambda weighs the student in the JSD; forward KLs keep the
    # cross-entropy form.
    "distillm": Convention(
        student_beta=True,
        soft_cross_entropy_kinds=("forward_kl", "skew_forward_kl"),
        kinds=("forward_kl", "reverse_kl", "jsd", "tvd", "skew_forward_kl", "skew_reverse_kl"),
    ),
    # torchtune's forward KL is the cross-entropy with soft targets.
    "torchtune": Convention(
        soft_cross_entropy_kinds=("forward_kl",), kinds=("forward_kl", "reverse_kl")
    ),
}


def find_convention(name: str | None, kind: str) -> Convention:
    """The convention `name` for `kind`; None is this library's own (no change)."""
    if name is None:
        return Convention()
    if name not in CONVENTIONS:
        raise ValueError(
            f"convention={name!r} is not known; use one of {', '.join(CONVENTIONS)} or None."
        )
    found = CONVENTIONS[name]
    if kind not in found.kinds:
        raise ValueError(
            f"convention={name!r} does not define kind={kind!r}; it has {', '.join(found.kinds)}."
        )
    return found._replace(soft_cross_entropy=kind in found.soft_cross_entropy_kinds)
