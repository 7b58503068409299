"""What a cache would have lost with fewer slots, from its own rows.

Keeping the K' likeliest of a row's tokens leaves out a tail of mass t. What a student is taught by
`tail="renormalize"` or `"zero"` is the teacher given that the token is kept, and

    KL(teacher given kept || teacher) = -log(1 - t)

exactly; `tail="bucket"` merges the mass t into one cell. Both are known for every K' <= K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pydistill.cache.teacher_cache import TeacherCache


class Truncation(NamedTuple):
    """Means over tokens: the mass outside the k likeliest, and the KL above, in nats."""

    k: int
    tail_mass: float
    renormalized_kl: float


def truncation(cache: TeacherCache, tokens: int = 65536) -> list[Truncation]:
    """The loss at K' = 1, 2, 4, ... and K, from at most `tokens` of the cache's, evenly spaced."""
    if not len(cache):
        return []
    index = torch.linspace(0, len(cache) - 1, min(tokens, len(cache)), dtype=torch.float64)
    slots = cache.manifest.k
    sizes = sorted({*(2**i for i in range(slots.bit_length())), slots})
    sums = torch.zeros(2, len(sizes), dtype=torch.float64)
    for some in index.round().long().split(8192):
        rows = cache.rows(some)
        p = rows.topk_logprobs.double().exp().sort(-1).values  # the smallest are summed first
        outside = rows.tail_logprob.double().exp()[:, None] + torch.cat(
            [torch.zeros(len(p), 1, dtype=p.dtype), p.cumsum(-1)], -1
        )
        kept = outside[:, [slots - k for k in sizes]].clamp(max=1)
        sums += torch.stack([kept.sum(0), -torch.log1p(-kept).sum(0)])
    means = (sums / len(index)).T.tolist()
    return [Truncation(k, *row) for k, row in zip(sizes, means, strict=True)]
