"""The blocks of a stream: each batch of each rank once, of a size that Ray serves well."""

import dataclasses

import pytest

from pipeline.data.blocks import Blocks, block_bytes, rows_per_block
from pipeline.data.spec import TokenSpec
from pipeline.data.stream_spec import StreamSpec


@pytest.fixture
def spec(make_task, make_data_set):
    """The batches 2 to 12 of a task with half of the steps."""
    return StreamSpec(
        task=make_task(),
        data_set=make_data_set(),
        tokens=TokenSpec(vision_patch=(4, 16, 16)),
        tokenizer=None,
        seed=1,
        fingerprint={"num_rows": 100},
        start=2,
        stop=13,
        share=0.5,
        known_bad={},
        cache_bytes=0,
    )


def with_variant(spec, **fields):
    variant = dataclasses.replace(spec.task.variants[0], **fields)
    return dataclasses.replace(spec, task=dataclasses.replace(spec.task, variants=(*spec.task.variants, variant)))


def test_blocks_hold_every_batch_of_every_rank_once(spec):
    blocks = Blocks(spec, world_size=2, rows_per_block=4)
    # Turns of 1, 2, 4 and the remaining 4 batches, one block a rank each.
    assert [blocks.edge(turn) for turn in range(5)] == [2, 3, 5, 9, 13]
    assert blocks.num_blocks == 8
    rows = [(batch, rank) for number in range(8) for batches, rank in [blocks.rows(number)] for batch in batches]
    assert sorted(rows) == [(batch, rank) for batch in range(2, 13) for rank in range(2)]
    assert blocks.rows(5) == (range(5, 9), 1)


def test_a_stream_of_any_length_is_arithmetic(spec):
    for count in (0, 1, 6, 7, 8, 23, 24):
        # Turns of 1, 2, 4, 5, 5, ... batches.
        blocks = Blocks(dataclasses.replace(spec, stop=2 + count), world_size=3, rows_per_block=5)
        edges, size = [2], 1
        while edges[-1] < 2 + count:
            edges.append(min(edges[-1] + size, 2 + count))
            size = min(2 * size, 5)
        assert [blocks.edge(turn) for turn in range(len(edges))] == edges
        assert blocks.num_blocks == 3 * (len(edges) - 1)
    endless = Blocks(dataclasses.replace(spec, stop=10**12), world_size=256, rows_per_block=8)
    assert endless.rows(endless.num_blocks - 1)[0].stop == 10**12


def test_the_bytes_of_a_block_are_those_of_its_largest_variant(spec):
    # Four samples of four tokens of 3 x 16 x 16 bytes a batch; frames are four to a token.
    assert block_bytes(spec, 1) == 4 * 4 * 768
    assert block_bytes(spec, 3) == 3 * 4 * 4 * 768
    assert block_bytes(with_variant(spec, num_frames=8), 1) == 4 * 4 * 4 * 768
    # Spectrograms of 32 frames of 32 float32 mels, a sample each.
    sound = dataclasses.replace(spec, task=dataclasses.replace(spec.task, modalities=("image", "audio")))
    assert block_bytes(sound, 1) == 4 * (4 * 768 + 4 * 32 * 32)


def test_blocks_last_for_equally_many_steps_below_a_bound_in_bytes(spec):
    assert rows_per_block(spec, block_steps=16) == 8
    assert rows_per_block(dataclasses.replace(spec, share=0.01), block_steps=16) == 1
    # A batch of 32 MB: two of them are a block of 64 MB.
    heavy = with_variant(spec, num_vision_tokens=4096, global_batch_size=(32 << 20) // (4096 * 768))
    assert rows_per_block(heavy, block_steps=16) == 2


def test_a_block_is_worth_what_ray_spends_on_it(spec):
    # A quarter of a second of decoding.
    assert rows_per_block(spec, block_steps=1, row_s=0.02) == 13
    assert rows_per_block(spec, block_steps=1, row_s=2.0) == 1
