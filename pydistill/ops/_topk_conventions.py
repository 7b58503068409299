"""Other projects' conventions for a teacher known on K tokens, by name.

What the rest of the vocabulary counts, and whether T^2 multiplies the loss, differs between
projects that all call it top-k distillation. A convention fixes both; tests pin each one's value
and gradient by its formula. docs/ops/topk_divergence.md says which projects are left out, and why.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

TAIL = "bucket"  # without a convention


class TopkConvention(NamedTuple):
    """How a project reads a call.

    kinds: those that it has. tails: the one it uses by default, then those it offers besides.
    scale_t2: multiplies the loss by T^2. kl_ends: jsd at beta = 0 is forward_kl and at 1
    reverse_kl. fixed_beta: jsd has no other beta than 1/2. only_at_1: reproduced at temperature 1
    alone, since the project has no temperature, or elsewhere another gradient.
    """

    kinds: tuple[str, ...]
    tails: tuple[str, ...]
    scale_t2: bool = False
    kl_ends: bool = False
    fixed_beta: bool = False
    only_at_1: bool = False


TOPK_CONVENTIONS: dict[str, TopkConvention] = {
    # Normalises both sides over the support, or neither. Its T^2 reaches the value alone.
    "axolotl": TopkConvention(("forward_kl",), ("renormalize", "truncate"), only_at_1=True),
    # DistillKit multiplies by T^2; tokens that were not recorded have no mass, or share the rest.
    "distillkit": TopkConvention(
        ("forward_kl", "jsd", "tvd"), ("zero", "bucket"), scale_t2=True, fixed_beta=True
    ),
    # Megatron-LM: a ghost token holds the rest.
    "megatron": TopkConvention(("forward_kl",), ("bucket",), only_at_1=True),
    # NeMo-RL: both sides over the support.
    "nemo_rl": TopkConvention(("forward_kl", "reverse_kl"), ("renormalize",), only_at_1=True),
    # TRL's tail bucket, or without it both sides over the support; GKD's ends of beta; no T^2.
    "trl": TopkConvention(
        ("forward_kl", "reverse_kl", "jsd"), ("bucket", "renormalize"), kl_ends=True
    ),
}


class Reading(NamedTuple):
    """A call in this library's own terms."""

    kind: str
    tail: str
    beta: float | Tensor | None
    scale_t2: bool


def read_convention(
    name: str | None,
    kind: str,
    tail: str | None,
    beta: float | Tensor | None,
    temperature: float | Tensor,
    scale_t2: bool,
) -> Reading:
    """What a call with convention `name` means; None is this library's own (no change)."""
    if name is None:
        return Reading(kind, TAIL if tail is None else tail, beta, scale_t2)
    if name not in TOPK_CONVENTIONS:
        known = ", ".join(TOPK_CONVENTIONS)
        raise ValueError(f"convention={name!r} is not known; use one of {known} or None.")
    rule = TOPK_CONVENTIONS[name]
    if kind not in rule.kinds:
        raise ValueError(
            f"convention={name!r} does not define kind={kind!r}; it has {', '.join(rule.kinds)}."
        )
    if tail is not None and tail not in rule.tails:
        raise ValueError(
            f"convention={name!r} does not define tail={tail!r}; it has {', '.join(rule.tails)}."
        )
    if rule.only_at_1 and (isinstance(temperature, Tensor) or temperature != 1.0):
        got = "a tensor" if isinstance(temperature, Tensor) else temperature
        raise ValueError(
            f"temperature is {got}, but convention={name!r} is reproduced at 1 only; pass"
            " convention=None and choose tail and scale_t2."
        )
    if rule.fixed_beta and kind == "jsd" and (isinstance(beta, Tensor) or beta not in (None, 0.5)):
        got = "a tensor" if isinstance(beta, Tensor) else beta
        raise ValueError(
            f"beta is {got}, but convention={name!r} has jsd at 0.5 only; drop beta, or pass"
            " convention=None and choose tail and scale_t2."
        )
    if rule.kl_ends and kind == "jsd" and isinstance(beta, (int, float)) and beta in (0, 1):
        kind, beta = ("forward_kl" if beta == 0 else "reverse_kl"), None
    return Reading(kind, rule.tails[0] if tail is None else tail, beta, scale_t2 or rule.scale_t2)
