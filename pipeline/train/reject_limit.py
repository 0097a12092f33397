"""The limit on the share of rejects, judged over all ranks and only against what chance cannot explain.

Wald's sequential probability ratio test (Ann. Math. Stat. 16, 1945). A limit L has the odds L / (1 - L); the odds of p0
are these divided by 1.6, those of p1 these times 1.6. After n draws with k rejects the test's score is

    k ln(p1 / p0) - (n - k) ln((1 - p0) / (1 - p1)),

and a run ends once it reaches ln 10^6. As long as draws are bad with a probability of at most p0, exp(score) is a
non-negative supermartingale that begins at 1, so by Ville's inequality it *ever* reaches 10^6 with a probability of at
most 10^-6, however often one looks, after however many draws. At a limit of 5 %: p0 = 3.18 % and p1 = 7.77 %; with 3 %
bad 1.5 of 10^7 runs ever end; 8 % bad, evenly spread, end one after 525 draws, and at random all but 7 of 10^5 runs
within 2,000. Between p0 and the limit a run may end, but only while the share that it has found is above the limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

# Factor of the limit's odds on either side, between the shares that the test tells apart.
_ODDS_FACTOR = 1.6
# Score at which a run ends: the logarithm of one over the probability of ending a healthy one.
_MAX_SCORE = math.log(1e6)
# Maximum number of rejects that a message names.
_NUM_EXAMPLES = 3


class Draws(NamedTuple):
    """What one rank, or a group of them, has drawn for one step. examples: the first of its rejects, in words."""

    data_set: str
    drawn: int
    rejected: int
    examples: tuple[str, ...] = ()

    @classmethod
    def of(cls, data_set: str, *, samples: int, rejects: list[dict]) -> Draws:
        """Counts the rows that the order drew, one for each sample, and those of them that were bad.

        Substitutes are not counted: they may be neighbours of a bad row, and bad rows often lie together.
        """
        own = [reject for reject in rejects if not reject.get("substitute")]
        examples = tuple(f"{r['source'] or r['id']} ({r['reason']})" for r in own[:_NUM_EXAMPLES])
        return cls(data_set, samples, len(own), examples)

    @classmethod
    def of_ranks(cls, step: Sequence[Draws]) -> Draws:
        """Adds up what several ranks have drawn for one step, in order of rank."""
        examples = [text for draws in step for text in draws.examples][:_NUM_EXAMPLES]
        drawn, rejected = sum(draws.drawn for draws in step), sum(draws.rejected for draws in step)
        return cls(step[0].data_set, drawn, rejected, tuple(examples))


class RejectCounts:
    """The draws and rejects of each data set since the start of the run, over all ranks.

    limits: data set → maximum share of draws that may be rejects. stored: ``as_dict`` of an earlier part of the run.
    """

    def __init__(self, limits: Mapping[str, float], stored: Mapping[str, Mapping[str, int]] | None = None) -> None:
        self._limits = dict(limits)
        self._counts = dict.fromkeys(limits, (0, 0))
        self._counts |= {name: (count["drawn"], count["rejected"]) for name, count in (stored or {}).items()}

    def add(self, step: Iterable[Draws]) -> tuple[str, int, int]:
        """Adds the draws of all ranks for one step. Returns (its data set, the data set's draws, its rejects)."""
        for draws in step:
            drawn, rejected = self._counts.get(draws.data_set, (0, 0))
            self._counts[draws.data_set] = total = drawn + draws.drawn, rejected + draws.rejected
        return draws.data_set, *total

    def set(self, data_set: str, drawn: int, rejected: int) -> None:
        """Takes the counts of a data set as ``add`` returned them."""
        self._counts[data_set] = drawn, rejected

    def fault(self, step: Iterable[Draws]) -> str | None:
        """Why the run must end before a step whose draws were added, None if it need not."""
        found = Draws.of_ranks(list(step))
        name = found.data_set
        (drawn, rejected), limit = self._counts[name], self._limits.get(name, 1.0)
        if not too_many(drawn, rejected, limit=limit):
            return None
        examples = "; ".join(found.examples)
        return (
            f"data set {name}: {rejected} of {drawn} samples were bad, more than max_reject_fraction = {limit:g}. "
            f"For example: {examples or 'see quarantine/'}. Mend the data, or raise max_reject_fraction"
        )

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Data set → drawn and rejected."""
        return {name: {"drawn": drawn, "rejected": rejected} for name, (drawn, rejected) in self._counts.items()}


def too_many(drawn: int, rejected: int, *, limit: float) -> bool:
    """Whether so large a share of rejects shows that the limit is exceeded (the test at the head of this module)."""
    if limit <= 0 or limit >= 1:
        return limit <= 0 < rejected
    gain, loss = weights(limit)
    # Above limits of a half the score may rise at shares just below the limit.
    return rejected > limit * drawn and rejected * gain - (drawn - rejected) * loss >= _MAX_SCORE


def weights(limit: float) -> tuple[float, float]:
    """(what a reject adds to the score, what another draw takes off it)."""
    odds = limit / (1 - limit)
    loss = math.log1p(odds * _ODDS_FACTOR) - math.log1p(odds / _ODDS_FACTOR)
    return 2 * math.log(_ODDS_FACTOR) - loss, loss
