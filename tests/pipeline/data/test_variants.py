"""The paper's table of input sizes, impossible sizes, and the view a variant takes of a clip."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.spec import Augment, TokenSpec, Variant
from pipeline.data.variants import _crop_box, make_variant, view_frames, window_starts

SPEC = TokenSpec()
SETTINGS = settings(max_examples=40, deadline=None)


def variant(num_frames: int, size: int, drop_rate: float = 0.0, *, base=None, batch_size=None) -> Variant:
    return make_variant(
        num_frames=num_frames, size=size, drop_rate=drop_rate, base=base, batch_size=batch_size, spec=SPEC
    )


BASE = variant(0, 256, batch_size=64)


def view(frames: np.ndarray, *, num_frames: int, size: int, augment: Augment | None = None, seed: int = 0):
    rng = None if augment is None else np.random.default_rng(seed)
    return view_frames(frames, Variant("v", 1, num_frames=num_frames, size=size), augment=augment, rng=rng)


# --- sizes at equal vision tokens a step ---


@pytest.mark.parametrize(
    ("num_frames", "size", "drop_rate", "name", "grid", "tokens", "batch"),
    [
        (0, 256, 0.0, "256x256", (1, 16, 16), 256, 64),
        (0, 512, 0.0, "512x512", (1, 32, 32), 1024, 16),
        (0, 512, 0.75, "512x512-drop0.75", (1, 32, 32), 256, 64),
        (16, 128, 0.0, "16x128x128", (4, 8, 8), 256, 64),
        (16, 256, 0.0, "16x256x256", (4, 16, 16), 1024, 16),
        (16, 256, 0.75, "16x256x256-drop0.75", (4, 16, 16), 256, 64),
        (16, 512, 0.0, "16x512x512", (4, 32, 32), 4096, 4),
        (4, 256, 0.0, "4x256x256", (1, 16, 16), 256, 64),
    ],
)
def test_table_of_the_paper(num_frames, size, drop_rate, name, grid, tokens, batch):
    found = variant(num_frames, size, drop_rate, base=BASE)
    assert found == Variant(name, batch, num_frames, size, drop_rate, grid, tokens)
    assert found.global_batch_size * found.num_vision_tokens == 64 * 256


def test_dropping_from_the_base_size_gives_a_larger_batch():
    assert variant(0, 256, 0.75, base=BASE).global_batch_size == 256


@pytest.mark.parametrize(
    ("num_frames", "size", "drop_rate", "message"),
    [
        (0, 250, 0.0, "variant 250x250: frames must divide by 4 and size by 16; found 0 and 250"),
        (6, 256, 0.0, "variant 6x256x256: frames must divide by 4 and size by 16; found 6 and 256"),
        (2, 256, 0.0, "found 2 and 256"),
        (0, 0, 0.0, "found 0 and 0"),
        (0, 528, 0.0, r"grid \(1, 33, 33\) is larger than the position tables \(16, 32, 32\)"),
        (68, 16, 0.0, r"grid \(17, 1, 1\) is larger than the position tables \(16, 32, 32\)"),
        (0, 16, 0.75, "drop_rate 0.75 leaves none of 1 tokens"),
    ],
)
def test_impossible_ones_say_why(num_frames, size, drop_rate, message):
    with pytest.raises(ValueError, match=message):
        variant(num_frames, size, drop_rate, base=BASE)


@pytest.mark.parametrize(
    ("base", "batch", "size", "found"),
    [
        # 64 x 196 tokens are 49 x 256; 48 can be shared by 16 devices and have 98 % of them.
        (224, 64, 256, 48),
        # 87 x 144; 84 have 96.4 %, 80 only 91.8.
        (224, 64, 192, 84),
        (224, 64, 288, 38),
        (256, 64, 224, 80),
        (256, 64, 192, 112),
        (256, 1024, 320, 640),
        # An odd batch has no power of two to keep.
        (256, 7, 128, 28),
        (192, 64, 256, 36),
    ],
)
def test_a_batch_is_rounded_to_what_devices_can_share(base, batch, size, found):
    first = variant(0, base, batch_size=batch)
    other = variant(0, size, base=first)
    assert other.global_batch_size == found
    assert 0.95 <= found * other.num_vision_tokens / (batch * first.num_vision_tokens) <= 1


def test_natural_sizes_work_at_natural_batches():
    sizes = (64, 96, 112, 128, 160, 192, 224, 256, 320, 384)
    for first in sizes:
        base = variant(0, first, batch_size=64)
        assert all(variant(0, size, base=base).global_batch_size % 2 == 0 for size in sizes if size <= 1.4 * first)


@pytest.mark.parametrize(("base", "batch", "size"), [(224, 8, 288), (224, 8, 384), (256, 2, 512), (64, 3, 512)])
def test_where_no_batch_comes_near_the_numbers_that_work_are_named(base, batch, size):
    first = variant(0, base, batch_size=batch)
    with pytest.raises(ValueError, match="at most 5% may be missing; what works: batch_size") as caught:
        variant(0, size, base=first)
    named = re.search(r"batch_size (\d+) or size (\d+) or size (\d+)", str(caught.value))
    assert variant(0, size, base=variant(0, base, batch_size=int(named[1])))
    assert all(variant(0, int(other), base=first) for other in named.groups()[1:])


def test_a_variant_without_a_batch_says_why():
    with pytest.raises(ValueError) as caught:
        variant(0, 288, base=variant(0, 224, batch_size=8))
    assert str(caught.value) == (
        "variant 288x288: a batch of 4 has 1296 of the 1568 vision tokens of the task's first variant, and at "
        "most 5% may be missing; what works: batch_size 10 or size 208 or size 256"
    )


# --- views in time ---


def numbered(count: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, height, width, 3)).copy()


def shown(frames: np.ndarray) -> list[int]:
    return frames[:, 0, 0, 0].tolist()


def test_evaluation_takes_the_middle_frames():
    out, start = view(numbered(11), num_frames=4, size=16)
    assert start == 3 and shown(out) == [3, 4, 5, 6]


@pytest.mark.parametrize(
    ("spare", "count", "starts"),
    [
        (7, 1, [3]),
        (7, 2, [0, 7]),
        (8, 3, [0, 4, 8]),
        (10, 4, [0, 3, 7, 10]),
        (34, 8, [0, 5, 10, 15, 19, 24, 29, 34]),
        # Fewer frames to spare than windows: starts repeat.
        (2, 4, [0, 1, 1, 2]),
        (0, 3, [0, 0, 0]),
    ],
)
def test_evaluation_windows_are_evenly_spaced(spare, count, starts):
    assert window_starts(spare, count) == starts
    for number, start in enumerate(starts):
        variant = Variant("v", 1, num_frames=4, size=16)
        out, found = view_frames(numbered(4 + spare), variant, augment=None, rng=None, window=(number, count))
        assert found == start and shown(out) == list(range(start, start + 4))


def test_no_window_is_refused():
    with pytest.raises(ValueError, match="at least one window, found 0"):
        window_starts(5, 0)


@pytest.mark.parametrize("augment", [None, Augment()])
def test_a_short_clip_shows_its_last_frame_again(augment):
    out, start = view(numbered(3), num_frames=8, size=16, augment=augment)
    assert start == 0 and shown(out) == [0, 1, 2, 2, 2, 2, 2, 2]


def test_an_image_is_one_frame():
    out, start = view(numbered(1), num_frames=0, size=16)
    assert out.shape == (1, 16, 16, 3) and start == 0 and out.dtype == np.uint8


def test_training_draws_every_window_in_time():
    starts = [view(numbered(7), num_frames=4, size=16, augment=Augment(), seed=s)[1] for s in range(200)]
    assert np.bincount(starts, minlength=4).min() > 30 and max(starts) == 3
    for seed in range(5):
        out, start = view(numbered(7), num_frames=4, size=16, augment=Augment(), seed=seed)
        assert shown(out) == list(range(start, start + 4))


# --- views in space ---


def columns(height: int, width: int) -> np.ndarray:
    """Red tells the column, green the row."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)[None]


def test_evaluation_takes_the_middle_square():
    wide, _ = view(columns(16, 40), num_frames=0, size=16)
    assert wide[0, 0, :, 0].tolist() == list(range(12, 28)) and wide[0, :, 0, 1].tolist() == list(range(16))
    tall, _ = view(columns(40, 16), num_frames=0, size=16)
    assert tall[0, :, 0, 1].tolist() == list(range(12, 28)) and tall[0, 0, :, 0].tolist() == list(range(16))


def test_a_square_of_the_right_size_is_not_touched():
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    for augment in (None, Augment()):
        out, start = view(frames, num_frames=4, size=32, augment=augment)
        assert (out == frames[start : start + 4]).all()


def test_evaluation_resizes_the_whole_square():
    # A frame of four flat quarters stays four flat quarters.
    frames = np.kron(np.array([[10, 60], [110, 160]], np.uint8), np.ones((32, 32), np.uint8))
    out, _ = view(np.repeat(frames[None, :, :, None], 3, axis=-1), num_frames=0, size=32)
    assert (out[0, 2:14, 2:14] == 10).all() and (out[0, 2:14, 18:30] == 60).all()
    assert (out[0, 18:30, 2:14] == 110).all() and (out[0, 18:30, 18:30] == 160).all()


def test_training_moves_the_square_along_the_long_side():
    seen = set()
    for seed in range(100):
        out, _ = view(columns(16, 20), num_frames=0, size=16, augment=Augment(), seed=seed)
        left = int(out[0, 0, 0, 0])
        assert out[0, 0, :, 0].tolist() == list(range(left, left + 16))
        seen.add(left)
    assert seen == {0, 1, 2, 3, 4}


def test_a_flip_mirrors_half_of_the_views_and_all_frames_of_each():
    frames = np.repeat(columns(16, 16), 4, axis=0)
    flips = 0
    for seed in range(200):
        out, _ = view(frames, num_frames=4, size=16, augment=Augment(flip=True), seed=seed)
        row = out[:, 0, :, 0].tolist()
        assert row in ([list(range(16))] * 4, [list(range(15, -1, -1))] * 4)
        flips += row[0][0] == 15
    # 100 on average, standard deviation 7.
    assert 65 < flips < 135


def test_evaluation_never_flips_or_crops_at_random():
    frames = columns(24, 40)
    assert (view(frames, num_frames=0, size=16)[0] == view(frames, num_frames=0, size=16)[0]).all()


@given(
    height=st.integers(16, 90),
    width=st.integers(16, 90),
    seed=st.integers(0, 10**6),
    area=st.tuples(st.floats(0.05, 1.0), st.floats(0.05, 1.0)).map(sorted),
    aspect=st.tuples(st.floats(0.3, 3.0), st.floats(0.3, 3.0)).map(sorted),
)
@SETTINGS
def test_crops_stay_inside_and_keep_their_area_and_aspect(height, width, seed, area, aspect):
    augment = Augment(area=tuple(area), aspect=tuple(aspect))
    left, top, right, bottom = _crop_box((height, width), augment, np.random.default_rng(seed))
    assert 0 <= left < right <= width + 1e-9 and 0 <= top < bottom <= height + 1e-9
    share = (right - left) * (bottom - top) / (height * width)
    assert share <= area[1] + 1e-6
    cut_off = right - left > width - 1e-6 or bottom - top > height - 1e-6
    if not cut_off and augment != Augment():
        assert area[0] - 1e-6 <= share and aspect[0] - 1e-6 <= (right - left) / (bottom - top) <= aspect[1] + 1e-6
    out, _ = view(columns(height, width), num_frames=0, size=16, augment=augment, seed=seed)
    assert out.shape == (1, 16, 16, 3)


def test_all_frames_of_a_clip_get_the_same_crop():
    frames = np.repeat(columns(40, 60), 8, axis=0)
    out, _ = view(frames, num_frames=8, size=16, augment=Augment(area=(0.2, 0.5), aspect=(0.5, 2.0)), seed=3)
    assert (out == out[0]).all()
