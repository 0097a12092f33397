"""More CPUs are asked for while training waits for decoders that are all busy; fewer after a long calm."""

import math

import pytest

from pipeline.cluster.decode_demand import DecodeDemand


class ShortDemand(DecodeDemand):
    calm_windows = 3


class Cluster:
    """Machines that come as soon as they are asked for, or not; the time of day."""

    def __init__(self, decoders: int, low: float = 1, high: float = math.inf):
        self.decoders, self.now = decoders, 100.0
        self.demand = ShortDemand(low, high, lambda: self.decoders, clock=lambda: self.now)

    def spend(self, seconds: int, *, unfinished: int, waits: bool = False) -> int:
        for _ in range(seconds):
            self.demand.note(unfinished, waits=waits)
            self.now += 1
        self.demand.note(unfinished, waits=waits)
        return self.demand.cpus


def test_waits_for_busy_decoders_ask_for_half_as_many_again():
    cluster = Cluster(4)
    assert cluster.spend(9, unfinished=5, waits=True) == 4
    assert cluster.spend(2, unfinished=5, waits=True) == 6
    # No more before those have come.
    assert cluster.spend(100, unfinished=5, waits=True) == 6
    cluster.decoders = 6
    assert cluster.spend(11, unfinished=7, waits=True) == 9


def test_waits_for_something_else_ask_for_nothing():
    cluster = Cluster(4)
    # A slow file keeps one decoder busy.
    assert cluster.spend(100, unfinished=1, waits=True) == 4


def test_a_wait_now_and_then_is_no_need():
    cluster = Cluster(4)
    for _ in range(10):
        cluster.spend(99, unfinished=5)
        cluster.demand.note(5, waits=True)
    assert cluster.demand.cpus <= 5


def test_a_calm_gives_back_what_was_not_busy():
    cluster = Cluster(16)
    assert cluster.spend(25, unfinished=4) == 16
    # Four of them were busy, and a quarter is kept in reserve.
    assert cluster.spend(10, unfinished=4) == 5
    # A wait ends the calm, and CPUs are asked for again: 1.5 times those that may decode.
    assert cluster.spend(10, unfinished=6, waits=True) == 8


@pytest.mark.parametrize(
    ("low", "high", "first", "most", "least"), [(2, 6, 4, 6, 2), (8, 8, 8, 8, 8), (0.5, 1.5, 1, 1, 1)]
)
def test_bounds_hold(low, high, first, most, least):
    cluster = Cluster(4, low, high)
    assert cluster.demand.cpus == first
    cluster.decoders = min(4, first)
    assert cluster.spend(40, unfinished=9, waits=True) == most
    assert cluster.spend(60, unfinished=0) == least


def test_a_thread_that_did_not_run_is_no_wait():
    cluster = Cluster(4)
    cluster.demand.note(5, waits=False)
    cluster.now += 1000
    cluster.demand.note(5, waits=False)
    assert cluster.demand.cpus == 4
