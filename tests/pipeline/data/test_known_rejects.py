"""Known rejects as sorted hashes: each key finds its own reason, none another's."""

import pickle

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.known_rejects import NONE_KNOWN, Collector, key_hash

KEYS = st.text(max_size=3) | st.tuples(st.integers(0, 3), st.integers(0, 3))


@given(added=st.lists(st.tuples(KEYS, st.sampled_from("abc"))), others=st.sets(KEYS))
def test_every_key_has_its_last_reason(added, others):
    collector = Collector()
    for key, reason in added:
        collector.add(key, reason)
    known, wanted = pickle.loads(pickle.dumps(collector.rejects())), dict(added)
    assert {key: known.reason(key) for key in wanted} == wanted and len(known) == len(wanted)
    assert not any(known.reason(key) for key in others - wanted.keys())
    assert bool(known) is bool(wanted)


def test_an_id_is_never_a_visit():
    hashes = {key_hash(key) for key in ((1, 2), "1 2", "(1, 2)", "visit 1 2", (1, 21), (12, 1), "")}
    assert len(hashes) == 7 and all(0 <= value < 2**64 for value in hashes)


def test_none():
    assert len(NONE_KNOWN) == 0 and NONE_KNOWN.reason("a") is None


def test_equal_rejects_have_equal_names_in_every_process():
    """A stream's key is made of them: processes of several ranks share the makers of equal streams."""

    def known(*keys):
        collector = Collector()
        for key, reason in keys:
            collector.add(key, reason)
        return collector.rejects()

    first = known(("a", "hung"), ("b", "missing_file"))
    assert repr(first) == repr(pickle.loads(pickle.dumps(first))) == repr(known(("a", "hung"), ("b", "missing_file")))
    others = [known(("a", "hung")), known(("a", "crashed"), ("b", "missing_file")), known(("a", "hung"), ("c", "hung"))]
    assert len({repr(rejects) for rejects in [first, NONE_KNOWN, *others]}) == 5


def test_a_reject_takes_nine_bytes():
    collector = Collector()
    for number in range(10_000):
        collector.add(f"a long name of a sample, number {number}", "missing_file")
    assert len(pickle.dumps(collector.rejects())) < 9 * 10_000 + 1000
    assert np.all(np.diff(collector.rejects()._hashes.astype(object)) > 0)
