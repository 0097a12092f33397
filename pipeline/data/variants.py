"""Input sizes of a task at equal vision tokens a step (paper section 3.4), and the view a variant takes of a clip."""

from __future__ import annotations

import itertools

import numpy as np

from pipeline.data.spec import Augment, TokenSpec, Variant
from pipeline.data.tokens import kept_tokens

# Maximum share of the first variant's vision tokens a step that another variant may lack.
_SHORTFALL = 0.05


def make_variant(
    *, num_frames: int, size: int, drop_rate: float, base: Variant | None, batch_size: int | None, spec: TokenSpec
) -> Variant:
    """A variant whose batch follows from the first one's (``base``) vision tokens a step, or from ``batch_size``.

    num_frames: 0 for still images. Raises ValueError with the numbers if the grid is not whole, the tables are too
    small, or no batch comes close enough to the tokens of ``base``.
    """
    t, h, w = spec.vision_patch
    frames_name = f"{num_frames}x" if num_frames else ""
    name = f"{frames_name}{size}x{size}" + (f"-drop{drop_rate:g}" if drop_rate else "")
    if num_frames % t or size % h or size % w or not size:
        raise ValueError(f"variant {name}: frames must divide by {t} and size by {h}; found {num_frames} and {size}")
    grid = (max(1, num_frames // t), size // h, size // w)
    if any(n > rows for n, rows in zip(grid, spec.vision_positions, strict=True)):
        raise ValueError(f"variant {name}: grid {grid} is larger than the position tables {spec.vision_positions}")
    num_tokens = kept_tokens(int(np.prod(grid)), drop_rate)
    if num_tokens < 1:
        raise ValueError(f"variant {name}: drop_rate {drop_rate} leaves none of {int(np.prod(grid))} tokens")
    if batch_size is None:
        batch_size = _shared_batch(base.global_batch_size, base.num_vision_tokens, num_tokens)
        if batch_size is None:
            raise ValueError(f"variant {name}: {_no_batch(base, num_tokens, size=size, spec=spec)}")
    return Variant(
        name=name,
        global_batch_size=batch_size,
        num_frames=num_frames,
        size=size,
        drop_rate=drop_rate,
        grid=grid,
        num_vision_tokens=num_tokens,
    )


def _shared_batch(base_batch: int, base_tokens: int, num_tokens: int) -> int | None:
    """The batch whose tokens are those of the first variant's batch, or up to ``_SHORTFALL`` fewer.

    It is a multiple of the highest power of two that this allows, at most that of the first variant's batch, so that
    the same devices can share both. None if no batch fits.
    """
    token_budget = base_batch * base_tokens
    power = base_batch & -base_batch
    while power:
        batch = token_budget // num_tokens // power * power
        if batch and batch * num_tokens >= (1 - _SHORTFALL) * token_budget:
            return batch
        power //= 2
    return None


def _no_batch(base: Variant, num_tokens: int, *, size: int, spec: TokenSpec) -> str:
    """The reason why no batch fits, and the nearest numbers that do."""
    batch, tokens = base.global_batch_size, base.num_vision_tokens
    fits = batch * tokens // num_tokens
    batches = (n for n in range(batch + 1, 32 * batch) if _shared_batch(n, tokens, num_tokens))
    kept, step = num_tokens / (size * size), spec.vision_patch[1]
    known = set(range(step, step * spec.vision_positions[1] + 1, step)) - {base.size}
    near = sorted(known, key=lambda n: (abs(n - size), n))
    sizes = [n for n in near if _shared_batch(batch, tokens, max(1, round(kept * n * n)))][:2]
    works = [f"batch_size {n}" for n in itertools.islice(batches, 1)] + [f"size {n}" for n in sorted(sizes)]
    return (
        f"a batch of {fits} has {fits * num_tokens} of the {batch * tokens} vision tokens of the task's first variant, "
        f"and at most {_SHORTFALL:.0%} may be missing; what works: {' or '.join(works)}"
    )


def window_starts(spare: int, count: int) -> list[int]:
    """Starts of ``count`` evenly spaced windows in 0..spare, first and last at its ends; one window is the middle.

    Starts repeat if ``spare`` is small. Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"expected at least one window, found {count}")
    return [spare // 2] if count == 1 else np.linspace(0, spare, count).round().astype(int).tolist()


def view_frames(
    frames: np.ndarray,
    variant: Variant,
    *,
    augment: Augment | None,
    rng: np.random.Generator | None,
    window: tuple[int, int] = (0, 1),
) -> tuple[np.ndarray, int]:
    """(T, H, W, 3) of a canonical clip → ((num_frames, size, size, 3) uint8, its first frame).

    augment: None takes the middle square (evaluation), in time window i of n for ``window`` (i, n); otherwise the
    window in time, the crop and the flip are drawn. A clip with fewer frames shows its last frame again.
    """
    num = max(1, variant.num_frames)
    spare = max(0, len(frames) - num)
    number, count = window
    start = window_starts(spare, count)[number] if augment is None else int(rng.integers(spare + 1))
    chosen = frames[start : start + num]
    if len(chosen) < num:
        chosen = frames[np.minimum(np.arange(start, start + num), len(frames) - 1)]
    box = _crop_box(chosen.shape[1:3], augment, rng)
    flip = augment is not None and augment.flip and rng.random() < 0.5
    out = _view(chosen, box, variant.size)
    return (out[:, :, ::-1] if flip else out), start


def _crop_box(shape: tuple[int, int], augment: Augment | None, rng) -> tuple[float, float, float, float]:
    """(left, top, right, bottom): the central square, or a crop of random area, aspect and place."""
    height, width = shape
    if augment is None or (augment.area == (1.0, 1.0) and augment.aspect == (1.0, 1.0)):
        side = min(height, width)
        spare_w, spare_h = width - side, height - side
        # Even without random crops a training view of a wide clip moves along its long side.
        left, top = (
            (spare_w / 2, spare_h / 2) if augment is None else (rng.integers(spare_w + 1), rng.integers(spare_h + 1))
        )
        return (left, top, left + side, top + side)
    area = rng.uniform(*augment.area) * height * width
    aspect = np.exp(rng.uniform(*np.log(augment.aspect)))
    crop_w, crop_h = min(width, np.sqrt(area * aspect)), min(height, np.sqrt(area / aspect))
    left, top = rng.uniform(0, width - crop_w), rng.uniform(0, height - crop_h)
    return (left, top, left + crop_w, top + crop_h)


def _view(frames: np.ndarray, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """The box of every frame at size x size."""
    left, top, right, bottom = box
    if right - left == bottom - top == size and left == int(left) and top == int(top):
        # Whole pixels at their own size: resampling would give the same.
        return frames[:, int(top) : int(bottom), int(left) : int(right)]
    return np.stack([_resize(frame, box, size) for frame in frames])


def _resize(frame: np.ndarray, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    from PIL import Image  # an exported model does without where nothing is to be resized

    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
