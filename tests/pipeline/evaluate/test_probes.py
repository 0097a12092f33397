"""Classifiers that learn on features, of rows that leave little to learn."""

import numpy as np
import pytest

from pipeline.evaluate import probes

FEATURES = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)


@pytest.mark.parametrize("others", [[], [FEATURES[:, 0] > 0]])
def test_a_class_that_all_rows_have_is_certain_and_one_that_none_has_is_out_of_the_question(others):
    every, none = np.ones(40, bool), np.zeros(40, bool)
    targets = np.stack([every, none, every, *others], axis=1)
    logits, _ = probes.linear_probe(FEATURES, targets, FEATURES)
    assert (logits[:, [0, 2]] > 100).all() and (logits[:, 1] < -100).all()
    kernel, bias = probes.linear_layer(FEATURES, targets)
    answers = 1 / (1 + np.exp(-np.clip(FEATURES @ kernel + bias, -50, 50)))
    assert ((answers > 0.5) == targets).mean() > 0.95
