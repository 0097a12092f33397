"""Batches of a task: where they start, what each rank gets, and the names of arrays."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.plan import TaskPlan, group_arrays, model_modalities
from pipeline.data.spec import Variant

NUM_BATCHES = 40


@pytest.fixture(scope="module")
def make_plan(make_task):
    def make(*sizes: int, seed: int = 0, num_rows: int = 103, num_batches: int = NUM_BATCHES) -> TaskPlan:
        variants = tuple(Variant(name=f"v{i}", global_batch_size=size) for i, size in enumerate(sizes))
        return TaskPlan(make_task(variants=variants), seed=seed, num_rows=num_rows, num_batches=num_batches)

    return make


def test_a_batch_starts_where_the_one_before_ended(make_plan):
    plan, end, seen = make_plan(8, 32, 16), 0, set()
    for index in range(NUM_BATCHES):
        variant, positions = plan.batch(index, rank=0, world_size=1)
        assert positions.start == end and len(positions) == variant.global_batch_size
        end = positions.stop
        seen.add(variant.name)
    assert seen == {"v0", "v1", "v2"} and plan.starts[-1] == end


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_a_batch_in_order(make_plan, world_size):
    plan = make_plan(8, 32, 16)
    for index in range(NUM_BATCHES):
        shares = [plan.batch(index, rank=rank, world_size=world_size) for rank in range(world_size)]
        whole = plan.batch(index, rank=0, world_size=1)
        assert {len(positions) for _, positions in shares} == {len(whole[1]) // world_size}
        assert [p for _, positions in shares for p in positions] == list(whole[1])
        assert {variant for variant, _ in shares} == {whole[0]}


@settings(max_examples=20, deadline=None)
@given(more=st.integers(0, 50), seed=st.integers(0, 1000))
def test_a_longer_run_has_the_same_first_batches(make_plan, more, seed):
    short, long = (make_plan(4, 12, seed=seed, num_batches=n) for n in (10, 10 + more))
    for index in range(10):
        assert short.batch(index, rank=0, world_size=1) == long.batch(index, rank=0, world_size=1)


def test_no_batches_is_a_plan_too(make_plan):
    assert make_plan(4, num_batches=0).starts.tolist() == [0]


def test_arrays_are_grouped_by_modality():
    arrays = {"vision/tokens": np.zeros(1), "vision/positions": np.ones(1), "labels": np.full(1, 2)}
    grouped = group_arrays(arrays)
    assert set(grouped) == {"vision", "labels"} and set(grouped["vision"]) == {"tokens", "positions"}
    assert grouped["labels"] is arrays["labels"] and grouped["vision"]["tokens"] is arrays["vision/tokens"]


def test_images_and_videos_are_vision_to_the_model(make_task):
    task = make_task(modalities=("video", "audio", "text"))
    assert model_modalities(task) == ("vision", "audio", "text")
    assert model_modalities(dataclasses.replace(task, modalities=("image",))) == ("vision",)
