"""How many tokens a block drafts: by costs and acceptance that are known, or found out."""

import math

import pytest

from pydistill.speculative.draft_length import Costs, DraftLength


def test_a_plain_step_takes_no_longer_than_a_wider_one() -> None:
    """One disturbed sample does not make every draft look good."""
    costs = Costs()
    assert math.isnan(costs.plain(1))
    costs.runs[1, 1].append(5.0)
    costs.runs[1, 3].extend([1.2, 1.1])
    assert costs.plain(1) == 5.0  # too few to be believed
    costs.runs[1, 3].append(9.0)
    costs.runs[2, 3].extend([0.1, 0.1, 0.1])  # of another batch
    assert costs.plain(1) == 1.2 and costs.run(1, 3) == 1.2


class Machine:
    """Blocks of known cost and acceptance, for a chooser to find out about."""

    def __init__(self, draft: float, wider: float, acceptance: float, tokens: int = 200) -> None:
        self.length = DraftLength(Costs(), None, 8, tokens)
        self.length.costs.guess = draft
        self.chosen, self.seconds, self.written = list[int](), 0.0, 0.0
        while self.written < tokens:
            k = self.length.choose(1, 8)
            # Expectations in the place of samples.
            tokens_here = sum(acceptance**i for i in range(k + 1))
            spent, run = k * draft, 1 + wider * k
            judged = sum(acceptance**i for i in range(k))
            self.length.costs.judge(judged, judged * acceptance)
            self.length.record(1, k, spent, run, tokens_here, (True, True))
            self.chosen.append(k)
            self.seconds += spent + run
            self.written += tokens_here


@pytest.mark.parametrize("draft", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("wider", [0.02, 0.2, 1.0])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6, 0.95])
def test_auto_takes_what_pays_and_loses_little(
    draft: float, wider: float, acceptance: float
) -> None:
    """Never more than 5 % behind plain decoding, and near the best fixed number where one pays."""
    machine = Machine(draft, wider, acceptance)
    rate = machine.written / machine.seconds
    rates = [
        sum(acceptance**i for i in range(k + 1)) / (k * draft + 1 + wider * k) for k in range(9)
    ]
    assert rate > 0.95, machine.chosen
    if max(rates) > 1.2:
        assert rate > 0.85 * max(rates)
