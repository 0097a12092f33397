"""Blocks: their size, their bytes, and what becomes of one that cannot be made."""

import dataclasses

import pytest

from pipeline.data import blocks
from pipeline.data.blocks import Block, bytes_of_row, make_block, rows_per_block
from pipeline.data.known_rejects import NONE_KNOWN
from pipeline.data.spec import TokenSpec
from pipeline.data.stream_spec import StreamSpec
from pipeline.data.wire import first_of, from_arrow
from pipeline.errors import RequestError


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
        known_bad=NONE_KNOWN,
        cache_bytes=0,
    )


def with_variant(spec, **fields):
    variant = dataclasses.replace(spec.task.variants[0], **fields)
    return dataclasses.replace(spec, task=dataclasses.replace(spec.task, variants=(*spec.task.variants, variant)))


def test_a_block_is_known_by_its_description():
    block = Block("t", 5, 9, 1)
    assert block.description().num_rows == 1
    assert Block.described(block.description()) == block


def test_the_bytes_of_a_row_are_those_of_its_largest_variant(spec):
    # Four samples of four tokens of 3 x 16 x 16 bytes a batch; frames are four to a token.
    assert bytes_of_row(spec) == 4 * 4 * 768
    assert bytes_of_row(spec, world_size=2) == 2 * 4 * 768
    assert bytes_of_row(with_variant(spec, num_frames=8)) == 4 * 4 * 4 * 768
    # Spectrograms of 32 frames of 32 float32 mels, a sample each.
    sound = dataclasses.replace(spec, task=dataclasses.replace(spec.task, modalities=("image", "audio")))
    assert bytes_of_row(sound) == 4 * (4 * 768 + 4 * 32 * 32)


def test_blocks_last_for_equally_many_steps_below_a_bound_in_bytes(spec):
    large = {"block_steps": 16, "max_bytes": 1 << 40}
    assert rows_per_block(spec, row_bytes=10, **large) == 8
    assert rows_per_block(dataclasses.replace(spec, share=0.01), row_bytes=10, **large) == 4
    # A batch of 32 MB: two of them are a block of 64 MB.
    assert rows_per_block(spec, row_bytes=32 << 20, **large) == 2
    assert rows_per_block(spec, row_bytes=10, block_steps=16, max_bytes=35) == 3
    # One batch is a block, however large it is.
    assert rows_per_block(spec, row_bytes=10, block_steps=16, max_bytes=1) == 1


def test_errors_travel_with_the_block_that_they_are_of(spec, monkeypatch):
    def broken(spec):
        raise RequestError("another manifest")

    monkeypatch.setattr(blocks, "_maker_of", broken)
    table = make_block(spec, Block("t", 5, 9, 1), world_size=2)
    assert first_of(table) == ("t", 5, 1)
    with pytest.raises(RequestError, match="another manifest"):
        list(from_arrow(table))
