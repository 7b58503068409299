"""What `generate` returns: the tokens, and what the draft did for them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


@dataclass
class GenerateStats:
    """Counts over all requests; a block is one run of the target and what it verified.

    A drafted token is *evaluated* when it was put to the test: those behind a rejection are not.
    `evaluated_at[i]` and `accepted_at[i]` count the tokens at offset i of their block. `overlap` is
    the mean of sum min(p, q) over evaluated tokens, the acceptance with less variance.

    Speed-ups are against decoding without a draft in the same loop, whose step is timed: `measured`
    from the clock, all of the draft's work included, `predicted` from acceptance and the costs of
    one draft and one target run, with acceptance the same at every position. NaN where no step
    could be timed.
    """

    tokens: int = 0
    blocks: int = 0
    request_blocks: int = 0  # blocks times the requests in them
    drafted: int = 0
    evaluated_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    overlap: float = math.nan
    num_draft_tokens: list[int] = field(default_factory=list)  # of each block
    seconds: float = 0.0  # of all blocks
    fused_layers: bool = False  # whether the target's layers ran by `decoder_layer`
    predicted_speedup: float = math.nan
    measured_speedup: float = math.nan

    @property
    def evaluated(self) -> int:
        return sum(self.evaluated_at)

    @property
    def accepted(self) -> int:
        return sum(self.accepted_at)

    @property
    def acceptance(self) -> float:
        """Accepted of evaluated tokens."""
        return self.accepted / self.evaluated if self.evaluated else math.nan

    @property
    def acceptance_per_position(self) -> list[float]:
        pairs = zip(self.accepted_at, self.evaluated_at, strict=True)
        return [accepted / evaluated if evaluated else math.nan for accepted, evaluated in pairs]

    @property
    def block_efficiency(self) -> float:
        """Tokens a request gains from one run of the target."""
        return self.tokens / self.request_blocks if self.request_blocks else math.nan

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else math.nan


class GenerateResult(NamedTuple):
    """`sequences` are the prompts, padded on the left, and behind them the new tokens; W is the
    longest prompt, N the most new tokens of a request."""

    sequences: Tensor  # int64 [B, W + N], pad_token_id before the prompts and behind the ends
    tokens: Tensor  # int64 [B, N], the new ones: sequences[:, W:]
    num_tokens: Tensor  # int64 [B]
    logprobs: Tensor  # fp32 [B, N], under the target's warped distribution; NaN behind the ends
    stats: GenerateStats
