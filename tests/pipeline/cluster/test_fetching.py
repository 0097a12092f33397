"""Blocks are brought here each on its own, without Ray: a slow one holds up no other, errors arrive."""

import threading
import types

import pytest

from pipeline.cluster import fetching
from pipeline.cluster.fetching import fetched


@pytest.fixture
def objects(monkeypatch):
    """Ref → what it is, or an event to wait for before."""
    found = {}

    def get(ref):
        value = found[ref]
        if isinstance(value, threading.Event):
            assert value.wait(10)
            return ref
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(fetching, "ray", types.SimpleNamespace(get=get))
    return found


def test_a_block_that_takes_long_holds_up_no_other(objects):
    objects |= {"slow": threading.Event(), "a": 1, "b": 2}
    blocks = fetched(iter(["slow", "a", "b"]), end=lambda: None)
    assert {next(blocks).table, next(blocks).table} == {1, 2}
    objects["slow"].set()
    slow = next(blocks)
    assert slow.table == "slow" and slow.arrival.here_at > slow.arrival.decoded_at
    assert list(blocks) == []


def test_what_the_refs_or_a_block_raise_is_raised_and_ends_them(objects):
    ended = threading.Event()

    def refs(*names):
        yield from names
        assert ended.wait(10)
        raise OSError("the stream ends")

    objects |= {"a": 1, "lost": ValueError("lost")}
    with pytest.raises(ValueError, match="lost"):
        list(fetched(refs("a", "lost"), end=ended.set))
    assert ended.is_set() and not [t for t in threading.enumerate() if t.name == "blocks"]
    with pytest.raises(OSError, match="the stream ends"):
        list(fetched(refs("a"), end=ended.set))


def test_blocks_that_are_not_wanted_any_more_end_the_refs(objects):
    ended = threading.Event()

    def refs():
        yield "a"
        assert ended.wait(10)

    objects |= {"a": 1}
    blocks = fetched(refs(), end=ended.set)
    assert next(blocks).table == 1
    blocks.close()
    assert ended.is_set() and not [t for t in threading.enumerate() if t.name == "blocks"]
