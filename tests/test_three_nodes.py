"""A cluster of three nodes gains and loses machines, is stopped and submitted again, and ends with the same bits."""

import pytest

from benchmarks import three_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_run_that_loses_machines_and_is_submitted_again_ends_like_one_left_alone(toy_corpus, tmp_path):
    found = three_nodes.toy(tmp_path, toy_corpus, num_steps=32)
    # Every loss, every sample of every rank, all parameters.
    assert found["unequal"] == [] and found["each once"] and found["steps"] == 32, found
    assert 0 < found["steps at the stop"] < 32, found
