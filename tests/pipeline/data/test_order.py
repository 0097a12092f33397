"""Order as arithmetic: permutations, fair batches, draws, against plain Python references and published hash values."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import (
    MANY_ROWS,
    Order,
    mix,
    mix_int,
    name_key,
    permute,
    substitutes_of,
    tasks_at,
    uniform,
    variants_at,
)

MASK = (1 << 64) - 1
EXAMPLES = settings(max_examples=25, deadline=None)


def splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = counts.sum() * np.asarray(probabilities)
    return float(((counts - expected) ** 2 / expected).sum())


def epoch_rows(order: Order, epoch: int) -> np.ndarray:
    rows, epochs = order.rows(np.arange(epoch * order.num_rows, (epoch + 1) * order.num_rows))
    assert (epochs == epoch).all()
    return rows


# --- the hash ---


def test_one_word_is_published_splitmix64():
    # The first two outputs of the reference C code for seed 1234567; its state grows by the golden number.
    assert int(mix(1234567)[0]) == 6457827717110365317
    assert int(mix((1234567 + 0x9E3779B97F4A7C15) & MASK)[0]) == 3203168211198807973


@given(words=st.lists(st.integers(0, MASK), min_size=1, max_size=5))
@EXAMPLES
def test_words_are_chained(words):
    state = 0
    for word in words:
        state = splitmix(word ^ state)
    assert int(mix(*words)[0]) == state
    assert mix_int(*words) == state


def test_arrays_are_broadcast_and_equal_single_values():
    steps = np.arange(7)
    assert mix(3, steps, 5).tolist() == [int(mix(3, s, 5)[0]) for s in range(7)]


def test_uniform_stays_below_one_and_fills_the_interval():
    draws = uniform(0, np.arange(200_000))
    assert draws.dtype == np.float64 and draws.min() >= 0 and draws.max() < 1
    # 64 equal bins; 99.9999 % point of chi-square with 63 degrees of freedom is about 131.
    assert chi_square(np.bincount((draws * 64).astype(int), minlength=64), np.full(64, 1 / 64)) < 131


def test_name_key_is_the_first_8_bytes_of_blake2b():
    # blake2b("", digest_size=8) as `b2sum -l 64` prints it.
    assert name_key("") == int.from_bytes(bytes.fromhex("e4a6a0577479b2b4"), "little")
    assert name_key("a") != name_key("b")


# --- permutations ---


@given(size=st.integers(1, 500), key=st.integers(0, MASK))
@EXAMPLES
def test_permute_is_a_bijection(size, key):
    assert sorted(permute(np.arange(size), size=size, key=key).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2**16, 2**16 + 1, 2**17, 2**17 + 1, 200_000])
def test_permute_is_a_bijection_at_the_edges_of_its_two_forms(size):
    assert (np.bincount(permute(np.arange(size), size=size, key=5), minlength=size) == 1).all()


@pytest.mark.parametrize("size", [10, 10**6])
def test_permute_takes_a_key_for_each_position(size):
    positions, keys = np.array([3, 9, 3, 0]), np.array([7, 8, 9, 7])
    alone = [int(permute(p, size=size, key=int(k))[0]) for p, k in zip(positions, keys, strict=True)]
    assert permute(positions, size=size, key=keys).tolist() == alone


def test_every_order_of_few_is_equally_likely():
    orders = np.stack([permute(np.arange(3), size=3, key=key) for key in range(6000)])
    counts = np.bincount(orders @ [9, 3, 1], minlength=27)
    # 99.9999 % point with 5 degrees of freedom is about 36.
    assert chi_square(counts[counts > 0], np.full(6, 1 / 6)) < 36


@given(num_rows=st.integers(1, 300), seed=st.integers(0, 2**40))
@EXAMPLES
def test_every_epoch_visits_every_row_once(num_rows, seed):
    rows, epochs = Order(seed, "t", num_rows).rows(np.arange(3 * num_rows))
    for epoch in range(3):
        assert sorted(rows[epochs == epoch].tolist()) == list(range(num_rows))


@pytest.mark.parametrize("num_rows", [1000, 100_000])
def test_epochs_tasks_and_seeds_differ(num_rows):
    base = epoch_rows(Order(0, "a", num_rows), 0)
    others = [
        epoch_rows(Order(0, "a", num_rows), 1),
        epoch_rows(Order(0, "b", num_rows), 0),
        epoch_rows(Order(1, "a", num_rows), 0),
        np.arange(num_rows),
    ]
    for other in others:
        # A random permutation has one row in its old place on average, however many rows there are.
        assert (base == other).sum() < 10


# --- a batch is a fair draw, however the manifest is sorted ---

# Where each class, source or day of a sorted manifest ends, as shares of its rows.
SORTED = {
    "by label, ten alike": np.arange(1, 11) / 10,
    "by source, one large and some small": np.array([0.9, 0.95, 0.98, 1.0]),
    "by time, a thousand days": np.arange(1, 1001) / 1000,
}


def group_counts(order: Order, start: int, length: int, ends: np.ndarray) -> np.ndarray:
    rows, _ = order.rows(np.arange(start, start + length))
    groups = np.searchsorted(np.round(ends * order.num_rows), rows, side="right")
    return np.bincount(groups, minlength=len(ends))


@pytest.mark.parametrize("num_rows", [10**4, 10**6, 10**10])
@pytest.mark.parametrize("ends", SORTED.values(), ids=SORTED)
@pytest.mark.parametrize("length", [64, 4096])
def test_counts_of_a_sorted_manifest_are_hypergeometric(num_rows, ends, length):
    """Windows of consecutive samples, from single batches to 64 of them, all over an epoch: mean and spread of each
    group's count as of a draw without replacement, whose chi-square statistic has a known mean.
    """
    order, num_windows = Order(3, "t", num_rows), min(num_rows // length, 256)
    spacing = num_rows // num_windows
    counts = np.stack([group_counts(order, w * spacing, length, ends) for w in range(num_windows)])
    shares = np.diff(ends, prepend=0.0)
    correction = (num_rows - length) / (num_rows - 1)
    statistic = ((counts - length * shares) ** 2 / (length * shares)).sum(1) / correction
    # Its mean is the degrees of freedom; 5 standard errors, estimated from the windows themselves.
    error = statistic.std() / np.sqrt(num_windows) if num_windows > 2 else np.sqrt(2 * len(ends))
    assert abs(statistic.mean() - (len(ends) - 1)) < 5 * error + 0.02 * len(ends)
    # The sum over all windows is a draw too: no group comes early or late.
    drawn = counts.sum(0)
    spread = np.sqrt(drawn.sum() * shares * (1 - shares))
    assert (abs(drawn - drawn.sum() * shares) < 6 * spread + 1).all()


def test_three_rows_each_stand_once_in_every_three_samples():
    rows, epochs = Order(0, "t", 3).rows(np.arange(3000))
    assert (np.sort(rows.reshape(1000, 3), axis=1) == [0, 1, 2]).all()
    assert epochs.tolist() == sorted(list(range(1000)) * 3)


@pytest.mark.parametrize("num_rows", [10**6, 10**10])
def test_neighbours_in_a_batch_are_not_neighbours_in_the_manifest(num_rows):
    rows, _ = Order(0, "t", num_rows).rows(np.arange(10_000))
    gaps = np.abs(np.diff(rows)) / num_rows
    # Two uniform draws lie a third of the whole apart on average, with a standard deviation of 1 / sqrt(18).
    assert abs(gaps.mean() - 1 / 3) < 5 / np.sqrt(18 * len(gaps)) * np.sqrt(2)


@given(num_rows=st.integers(1, 300), seed=st.integers(0, 2**40), start=st.integers(0, 2000), length=st.integers(0, 50))
@EXAMPLES
def test_any_slice_is_a_slice_of_the_whole(num_rows, seed, start, length):
    order = Order(seed, "t", num_rows)
    rows, epochs = order.rows(np.arange(start, start + length))
    whole_rows, whole_epochs = order.rows(np.arange(start + length))
    assert rows.tolist() == whole_rows[start:].tolist()
    assert epochs.tolist() == whole_epochs[start:].tolist()


def test_ten_billion_rows_cost_no_more_than_few():
    order, batch = Order(0, "web", 10**10), np.arange(7 * 10**10 + 12_345, 7 * 10**10 + 12_345 + 4096)
    tracemalloc.start()
    began = time.process_time()
    rows, epochs = order.rows(batch)
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (epochs == 7).all() and rows.min() >= 0 and rows.max() < 10**10
    assert len(np.unique(rows)) == 4096
    assert seconds < 2 and peak < 20e6


# --- substitutes, and the draws of a visit ---


def test_substitute_depends_on_position_and_attempt_only():
    order = Order(0, "t", 1000)
    table = np.array([[order.substitute(p, a, row=p) for a in range(4)] for p in range(200)])
    assert (table == [[Order(0, "t", 1000).substitute(p, a, row=p) for a in range(4)] for p in range(200)]).all()
    assert table.min() >= 0 and table.max() < 1000
    # Neighbouring positions and attempts do not share their substitutes.
    assert len(np.unique(table)) > 500
    assert order.substitute(3, 0, row=0) != Order(1, "t", 1000).substitute(3, 0, row=0)


@EXAMPLES
@given(
    num_rows=st.integers(MANY_ROWS + 1, 10**12),
    place=st.floats(0, 1, exclude_max=True),
    attempt=st.integers(0, 9),
    position=st.integers(0, 10**12),
)
def test_substitutes_of_many_rows_are_near_at_first(num_rows, place, attempt, position):
    order, row = Order(1, "t", num_rows), min(int(place * num_rows), num_rows - 1)
    found = order.substitute(position, attempt, row=row)
    assert 0 <= found < num_rows and order.substitute(position, attempt, row=row) == found
    alone = row == num_rows - 1 and row % 64 == 0
    if attempt < 4 and not alone:
        assert found // 64 == row // 64 and found != row


def test_substitutes_of_many_rows_are_fair_and_leave_a_neighbourhood_that_is_bad():
    order = Order(1, "t", 10**10)
    counts = np.bincount([order.substitute(p, 1, row=6407) - 6400 for p in range(6300)], minlength=64)
    assert counts[7] == 0 and counts.argmax() < 64 and chi_square(np.delete(counts, 7), np.full(63, 1 / 63)) < 115
    far = [order.substitute(p, 4, row=6407) for p in range(100)]
    assert len({row // 10**9 for row in far}) == 10 and all(row // 64 != 100 for row in far)


@pytest.mark.parametrize("row", [0, 3, MANY_ROWS - 1])
def test_up_to_the_limit_substitutes_come_from_all_rows(row):
    order = Order(1, "t", MANY_ROWS)
    assert [order.substitute(p, 0, row=row) for p in range(9)] == [order.substitute(p, 0, row=7) for p in range(9)]
    assert substitutes_of(MANY_ROWS) == {} and substitutes_of(MANY_ROWS + 1)


def test_generator_is_a_function_of_seed_task_id_and_epoch():
    def draws(seed=0, task="t", sample_id="x", epoch=0):
        return tuple(Order(seed, task, 10).generator(sample_id, epoch).random(3))

    assert draws() == draws()
    assert len({draws(), draws(seed=1), draws(task="u"), draws(sample_id="y"), draws(epoch=1)}) == 5


# --- tasks and variants ---


@pytest.mark.parametrize("weights", [[1, 1], [5, 3, 2], [1000, 1, 30, 200], [0.5, 0, 0.5]])
def test_tasks_follow_their_weights(weights):
    drawn = tasks_at(3, np.arange(100_000), probabilities=np.array(weights, float))
    counts = np.bincount(drawn, minlength=len(weights))
    used = np.flatnonzero(weights)
    assert counts[np.asarray(weights) == 0].sum() == 0
    # 99.9999 % point with 3 degrees of freedom is about 31.
    assert chi_square(counts[used], np.asarray(weights, float)[used] / sum(weights)) < 31


def test_neighbouring_steps_are_independent():
    drawn = tasks_at(0, np.arange(90_001), probabilities=np.ones(3))
    pairs = np.bincount(3 * drawn[:-1] + drawn[1:], minlength=9)
    # 99.9999 % point with 8 degrees of freedom is about 43.
    assert chi_square(pairs, np.full(9, 1 / 9)) < 43


@given(seed=st.integers(0, 2**40), steps=st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
@EXAMPLES
def test_a_step_draws_the_same_alone_and_among_others(seed, steps):
    weights = np.array([3.0, 1.0, 4.0])
    together = tasks_at(seed, np.array(steps), probabilities=weights)
    alone = [int(tasks_at(seed, np.array([s]), probabilities=10 * weights)[0]) for s in steps]
    assert together.tolist() == alone


def test_variants_are_uniform_and_differ_between_tasks():
    drawn = variants_at(0, "a", np.arange(60_000), num_variants=3)
    assert chi_square(np.bincount(drawn, minlength=3), np.full(3, 1 / 3)) < 28
    other = variants_at(0, "b", np.arange(60_000), num_variants=3)
    assert abs((drawn == other).mean() - 1 / 3) < 0.02
    assert drawn[[5, 100, 59_999]].tolist() == variants_at(0, "a", [5, 100, 59_999], num_variants=3).tolist()


def test_golden_values():
    """Recorded from the code when it was written: a change here changes the order of every run that exists."""
    order = Order(17, "golden", 1000)
    rows, epochs = order.rows(np.array([0, 1, 2, 999, 1000, 123_456]))
    assert rows.tolist() == [306, 826, 509, 451, 985, 504]
    assert epochs.tolist() == [0, 0, 0, 0, 1, 123]
    assert Order(17, "golden", 10**10).rows(np.array([5, 9_999_999_999]))[0].tolist() == [5432386299, 9668934671]
    assert [order.substitute(p, a, row=p) for p, a in ((0, 0), (0, 1), (9, 0))] == [516, 5, 698]
    assert order.generator("an id", 2).bit_generator.random_raw(2).tolist() == [
        3506314070744725770,
        5907568636276075870,
    ]
    tasks = tasks_at(17, np.arange(12), probabilities=np.array([5, 3, 2]))
    assert tasks.tolist() == [0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0]
    assert variants_at(17, "golden", np.arange(12), num_variants=3).tolist() == [1, 0, 1, 2, 0, 0, 0, 1, 2, 2, 0, 2]
    assert name_key("golden") == 5434833403847302432
