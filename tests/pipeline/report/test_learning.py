"""Whether a metric is better than guessing."""

import math

import pytest

from pipeline.report.learning import _rank_verdict, _verdict


@pytest.mark.parametrize(
    "value, chance, count, good",
    [
        # 100 guesses of 1 in 2 are right 40 to 60 times, by two deviations of 5.
        (0.61, 0.5, 100, True),
        (0.59, 0.5, 100, False),
        (0.3, 0.5, 100, False),
        (math.nan, 0.5, 100, None),
        (1.0, 1.0, 100, None),
    ],
)
def test_higher_shares_are_better(value, chance, count, good):
    assert _verdict(value, chance, count)[0] is good


@pytest.mark.parametrize(
    "value, chance, count, good",
    [
        # The median of 100 ranks that are spread evenly over 1,000 deviates by 50.
        (399, 500, 100, True),
        (401, 500, 100, False),
        (601, 500, 100, False),
        (1, 500, 100, True),
        (1, 1, 100, None),
        (math.nan, 500, 100, None),
    ],
)
def test_lower_ranks_are_better(value, chance, count, good):
    found, words = _rank_verdict(value, chance, count)
    assert found is good and (words == "worse than chance") is (value == 601)
