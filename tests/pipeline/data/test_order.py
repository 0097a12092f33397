"""Order as arithmetic: permutations, windows, draws, against plain Python references and published hash values."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import Order, mix, mix_int, name_key, permute, tasks_at, uniform, variants_at

MASK = (1 << 64) - 1
EXAMPLES = settings(max_examples=25, deadline=None)
SIZES = {"num_rows": st.integers(1, 300), "window": st.integers(1, 80), "seed": st.integers(0, 2**40)}


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
def test_permute_is_a_bijection_and_inverse_undoes_it(size, key):
    values = permute(np.arange(size), size=size, key=key)
    assert sorted(values.tolist()) == list(range(size))
    assert permute(values, size=size, key=key, inverse=True).tolist() == list(range(size))


def test_permute_takes_a_size_for_each_position():
    sizes = np.array([3, 3, 3, 10, 1, 500])
    positions = np.array([0, 1, 2, 9, 0, 499])
    alone = [int(permute(p, size=s, key=7)[0]) for p, s in zip(positions, sizes, strict=True)]
    assert permute(positions, size=sizes, key=7).tolist() == alone


@pytest.mark.parametrize("size", [3, 8, 100])
def test_every_place_is_about_equally_likely(size):
    # Four rounds over few values lean to one side; a tenth is the most that an order of so few rows may lean.
    places = permute(np.zeros(200_000, int), size=size, key=np.arange(200_000))
    np.testing.assert_allclose(np.bincount(places, minlength=size), 200_000 / size, rtol=0.1)


@given(**SIZES)
@EXAMPLES
def test_every_epoch_visits_every_row_once(num_rows, window, seed):
    order = Order(seed, "t", num_rows, window)
    rows, epochs = order.rows(np.arange(3 * num_rows))
    for epoch in range(3):
        assert sorted(rows[epochs == epoch].tolist()) == list(range(num_rows))


def test_epochs_tasks_and_seeds_differ():
    base = epoch_rows(Order(0, "a", 1000, 100), 0)
    others = [
        epoch_rows(Order(0, "a", 1000, 100), 1),
        epoch_rows(Order(0, "b", 1000, 100), 0),
        epoch_rows(Order(1, "a", 1000, 100), 0),
        np.arange(1000),
    ]
    for other in others:
        # A random permutation of 1000 rows has one row in its old place on average.
        assert (base == other).sum() < 10


@given(**SIZES)
@EXAMPLES
def test_reads_stay_inside_few_windows(num_rows, window, seed):
    windows = epoch_rows(Order(seed, "t", num_rows, window), 0) // window
    short = num_rows // window if num_rows % window else -1
    for start in range(max(1, num_rows - window + 1)):
        touched = set(windows[start : start + window].tolist())
        assert len(touched) <= (3 if short in touched else 2)
    # A window is read in one go: the order of first visits has no window twice.
    assert 1 + np.count_nonzero(np.diff(windows)) == len(set(windows.tolist()))


def test_windows_come_in_another_order_each_epoch():
    order = Order(0, "t", 64 * 16, 16)
    first, second = (epoch_rows(order, e)[::16] // 16 for e in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(64))
    assert first.tolist() != second.tolist() != list(range(64))


def test_the_short_window_is_not_always_last():
    places = set()
    rows, _ = Order(0, "t", 45, 10).rows(np.arange(20 * 45))
    for windows in rows.reshape(20, 45) // 10:
        places.add(int(np.flatnonzero(windows == 4)[0]) // 10)
    assert len(places) >= 3


@given(**SIZES, start=st.integers(0, 2000), length=st.integers(0, 50))
@EXAMPLES
def test_any_slice_is_a_slice_of_the_whole(num_rows, window, seed, start, length):
    order = Order(seed, "t", num_rows, window)
    rows, epochs = order.rows(np.arange(start, start + length))
    whole_rows, whole_epochs = order.rows(np.arange(start + length))
    assert rows.tolist() == whole_rows[start:].tolist()
    assert epochs.tolist() == whole_epochs[start:].tolist()


def test_ten_billion_rows_cost_no_more_than_few():
    order, batch = Order(0, "web", 10**10), np.arange(7 * 10**10 + 12_345, 7 * 10**10 + 12_345 + 4096)
    tracemalloc.start()
    began = time.perf_counter()
    rows, epochs = order.rows(batch)
    seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (epochs == 7).all() and rows.min() >= 0 and rows.max() < 10**10
    assert len(np.unique(rows)) == 4096 and len(np.unique(rows // 8192)) <= 2
    assert seconds < 2 and peak < 20e6


# --- what stands in, and the draws of a visit ---


def test_substitute_depends_on_position_and_attempt_only():
    order = Order(0, "t", 1000)
    table = np.array([[order.substitute(p, a) for a in range(4)] for p in range(200)])
    assert (table == [[Order(0, "t", 1000, 10).substitute(p, a) for a in range(4)] for p in range(200)]).all()
    assert table.min() >= 0 and table.max() < 1000
    # Neighbouring positions and attempts do not share their substitutes.
    assert len(np.unique(table)) > 500
    assert order.substitute(3, 0) != Order(1, "t", 1000).substitute(3, 0)


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
    order = Order(17, "golden", 1000, 64)
    rows, epochs = order.rows(np.array([0, 1, 2, 999, 1000, 123_456]))
    assert rows.tolist() == [871, 839, 853, 725, 655, 410]
    assert epochs.tolist() == [0, 0, 0, 0, 1, 123]
    assert Order(17, "golden", 10**10).rows(np.array([5, 9_999_999_999]))[0].tolist() == [2651764524, 8603581218]
    assert [order.substitute(p, a) for p, a in ((0, 0), (0, 1), (9, 0))] == [833, 672, 903]
    assert order.generator("an id", 2).bit_generator.random_raw(2).tolist() == [70262023053905964, 677615486760819406]
    tasks = tasks_at(17, np.arange(12), probabilities=np.array([5, 3, 2]))
    assert tasks.tolist() == [0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0]
    assert variants_at(17, "golden", np.arange(12), num_variants=3).tolist() == [1, 0, 1, 2, 0, 0, 0, 1, 2, 2, 0, 2]
    assert name_key("golden") == 5434833403847302432
