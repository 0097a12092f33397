"""The limit on rejects: never reached by healthy data, however long the run; soon by bad ones."""

import math

import numpy as np
import pytest

from pipeline.train.reject_limit import Draws, RejectCounts, too_many, weights


def test_the_score_by_hand():
    """A limit of 5 % has the odds 1 / 19.

    p0 = 1 / (1 + 30.4) = 3.1847 %, p1 = 1 / (1 + 11.875) = 7.7670 %. A reject is worth ln(p1 / p0) = ln 2.43883 =
    0.89152, another sample -ln(0.968153 / 0.922330) = -0.04849; ln 10^6 = 13.81551.
    """
    # 15 x 0.89152 = 13.373, 16 x 0.89152 = 14.264.
    assert not too_many(15, 15, limit=0.05) and too_many(16, 16, limit=0.05)
    # 117 x 0.89152 - 1883 x 0.04849 = 13.007, 118 x 0.89152 - 1882 x 0.04849 = 13.947.
    assert not too_many(2000, 117, limit=0.05) and too_many(2000, 118, limit=0.05)
    # Evenly spread, 8 %: 13.81551 / (0.08 x 0.89152 - 0.92 x 0.04849) = 517.2 draws; the 42nd reject is the 525th.
    assert next(n for n in range(1, 2000) if too_many(n, 8 * n // 100, limit=0.05)) == 525


def test_the_bounds_of_a_limit():
    assert not too_many(10**10, 0, limit=0.0) and too_many(10**10, 1, limit=0.0)
    assert not too_many(10**10, 10**10, limit=1.0)
    # The share found is above the limit whenever a run ends, also where the score alone would end it sooner.
    assert not too_many(10**6, 950_000, limit=0.95) and too_many(10**6, 960_000, limit=0.95)


def chance_of_an_end(share: float, num_draws: int, *, limit: float) -> float:
    """The exact probability that a run ends within some draws that are bad at random: by counting all paths."""
    alive, ended, bound = np.zeros(num_draws + 2), 0.0, 0
    alive[0] = 1.0
    for n in range(1, num_draws + 1):
        alive[1:] = alive[1:] * (1 - share) + alive[:-1] * share
        alive[0] *= 1 - share
        while bound <= n and not too_many(n, bound, limit=limit):
            bound += 1
        ended += alive[bound:].sum()
        alive[bound:] = 0.0
    return ended


def test_three_percent_end_no_run_and_eight_end_nearly_all_within_2000_samples():
    assert 0 < chance_of_an_end(0.03, 5000, limit=0.05) < 1e-6
    assert 1 - 1e-4 < chance_of_an_end(0.08, 2000, limit=0.05) < 1


@pytest.mark.parametrize("limit", [1e-4, 0.05, 0.3, 0.5, 0.95])
def test_the_score_is_a_fair_game_at_any_length(limit):
    """At 1 / 1.6 of the limit's odds one more draw multiplies exp(score) by 1 in the mean, below them by less: Ville's
    inequality then bounds the probability of ever reaching 10^6, whatever the number of looks."""
    gain, loss = weights(limit)
    p0 = 1 / (1 + 1.6 * (1 - limit) / limit)
    assert p0 * math.exp(gain) + (1 - p0) * math.exp(-loss) == pytest.approx(1, abs=1e-12)
    assert 0.9 * p0 * math.exp(gain) + (1 - 0.9 * p0) * math.exp(-loss) < 1


def test_data_sets_are_counted_apart_and_named_with_examples():
    counts = RejectCounts({"pets": 0.1, "cars": 0.1})
    pets, cars = Draws("pets", 10_000, 0), Draws("cars", 60, 30, ("a (no_text)", "b (no_text)", "c (no_text)"))
    assert counts.add([pets]) == ("pets", 10_000, 0) and counts.fault([pets]) is None
    assert counts.add([Draws("cars", 40, 0), cars]) == ("cars", 100, 30)
    assert counts.fault([Draws("cars", 40, 0), cars]) == (
        "data set cars: 30 of 100 samples were bad, more than max_reject_fraction = 0.1. For example: a (no_text); "
        "b (no_text); c (no_text). Mend the data, or raise max_reject_fraction"
    )
    assert counts.as_dict() == {"pets": {"drawn": 10_000, "rejected": 0}, "cars": {"drawn": 100, "rejected": 30}}
    # A data set that has left the recipe keeps its counts, and ends nothing.
    later = RejectCounts({"pets": 0.1}, counts.as_dict())
    assert later.as_dict() == counts.as_dict()
    assert later.add([cars]) == ("cars", 160, 60) and later.fault([cars]) is None
