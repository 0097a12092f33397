"""Streams share the CPUs by their steps and their cost."""

import pytest

from pipeline.cluster.decode_shares import DecodeShare, share_out


def test_cpus_are_shared_out_by_steps_and_cost():
    # Films take 0.8 of the steps at 9 s of CPU a batch, pictures 0.2 at 4 s: 7.2 and 0.8 s a step.
    shares = share_out({"films": (0.8, 9.0), "pictures": (0.2, 4.0)}, cpus=40, world_size=2)
    assert shares["films"].cpus == pytest.approx(40 * (0.9 * 0.9 + 0.05)) and shares["films"].num_decoders == 34
    assert shares["pictures"].cpus == pytest.approx(40 * (0.9 * 0.1 + 0.05)) and shares["pictures"].num_decoders == 6
    assert shares["films"].row_s == 4.5
    # Twenty streams of a machine with eight CPUs: each has a decoder, and together they ask for no more than it has.
    small = share_out({f"t{i}": (0.05, 1.0) for i in range(20)}, cpus=8)
    assert all(s.num_decoders == 1 for s in small.values())
    assert sum(min(1.0, s.cpus / s.num_decoders) for s in small.values()) == pytest.approx(8)
    assert DecodeShare().num_decoders == 1
