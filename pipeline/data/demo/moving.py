"""Videos with sound: a handwritten digit moves in one of four directions, and its sound says which digit it is.

One video for each source digit of ``digits``, in the same split. The digit glides along a path of 24 pixels and then
starts again. Every place on the path is equally likely at every time, so that no single frame reveals the direction.
It moves 1.5 to 2.5 pixels a frame: in a clip whose frames lie 5 or more apart, left can look like right.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.demo import digits, sound
from pipeline.data.demo.corpus_plan import CorpusPlan, stable_hash

if TYPE_CHECKING:
    import av

_FRAME_SIZE = 64
_FRAMES_PER_SECOND = 16
_NUM_FRAMES = 34
NUM_SAMPLES = _NUM_FRAMES * sound.SAMPLE_RATE_HZ // _FRAMES_PER_SECOND
_VIDEO_TIME_BASE = Fraction(1, _FRAMES_PER_SECOND)
_AUDIO_TIME_BASE = Fraction(1, sound.SAMPLE_RATE_HZ)
_AAC_FRAME = 1024
# Length of the path in pixels, and the range of speeds in pixels per frame.
_TRAVEL = 24
_SPEED = (1.5, 2.5)
# Maximum offset across the direction in pixels, and amplitude of the noise in grey levels.
_ACROSS = 4
_NOISE = 3
_SEED = 1
# (rows, columns): rows grow downwards.
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
# Short: a caption cut to a task's text length would lose its direction.
_CAPTIONS = (
    "the digit {digit} moving {direction}",
    "the number {digit} slides {direction}",
    "a {digit} going {direction}",
    "{digit} drifts {direction}",
    "the {digit} moves {direction}",
    "{direction} goes the {digit}",
    "handwritten {digit} gliding {direction}",
    "a {digit} that travels {direction}",
)


def _captions(index: int, *, digit: str, direction: str) -> list[str]:
    """Three of the captions, different ones for neighbouring source digits."""
    chosen = [_CAPTIONS[(index + step) % len(_CAPTIONS)] for step in (0, 3, 5)]
    return [caption.format(digit=digit, direction=direction) for caption in chosen]


def directions(classes: np.ndarray) -> dict[int, str]:
    """Source index → direction, balanced within every class of every split."""
    chosen = {}
    for by_class in digits.split_by_class(classes).values():
        for digit, indices in by_class.items():
            in_order = sorted(indices, key=lambda index: stable_hash("direction", index))
            # Each class starts at another direction, so that remainders are spread.
            chosen |= {index: list(DIRECTIONS)[(place + digit) % 4] for place, index in enumerate(in_order)}
    return chosen


def plan(*, limit: int | None) -> CorpusPlan:
    """Plans rows with a video, three captions, and the labels (digit, direction)."""
    values, classes = digits.load()
    direction = directions(classes)
    jobs, manifests = [], {}
    for split, indices in digits.split_indices(classes, limit=limit).items():
        manifests[split] = []
        for index in indices:
            name, path = digits.NAMES[classes[index]], f"videos/{index:04d}.mp4"
            row = {"id": f"moving-digit-{index:04d}", "video": path}
            row["text"] = _captions(index, digit=name, direction=direction[index])
            row |= {"labels": [name, direction[index]], "source_digit": index}
            manifests[split].append(row)
            job = {"path": f"moving_digits/{path}", "index": index, "values": values[index].tolist()}
            jobs.append(job | {"digit": int(classes[index]), "direction": direction[index]})
    return CorpusPlan(name="moving_digits", jobs=jobs, manifests=manifests)


def draw(digit: np.ndarray, rng: np.random.Generator, *, direction: str) -> np.ndarray:
    """Draws frames, (34, 64, 64) uint8 grey, of a digit (40, 40) that glides along its direction."""
    step = np.array(DIRECTIONS[direction])
    moved = (rng.uniform(0, _TRAVEL) + rng.uniform(*_SPEED) * np.arange(_NUM_FRAMES)) % _TRAVEL - _TRAVEL / 2
    across = (1 - np.abs(step)) * rng.integers(-_ACROSS, _ACROSS, endpoint=True)
    places = np.rint((_FRAME_SIZE - digits.DIGIT_SIZE) / 2 + across + moved[:, None] * step).astype(int)
    frames = np.full((_NUM_FRAMES, _FRAME_SIZE, _FRAME_SIZE), digits.BACKGROUND, np.int16)
    for frame, (top, left) in zip(frames, places, strict=True):
        frame[top : top + digits.DIGIT_SIZE, left : left + digits.DIGIT_SIZE] = digit
    frames += rng.integers(-_NOISE, _NOISE, frames.shape, np.int8, endpoint=True)
    return np.clip(frames, 0, 255).astype(np.uint8)


def _video_frames(frames: np.ndarray) -> Iterator[av.VideoFrame]:
    """Yields PyAV frames of grey pictures (T, H, W) uint8: full-range grey to the luma range 16..235, no colour.

    H and W must fit the planes without padding, as multiples of 64 do.
    """
    import av

    luma = (16 + frames * np.float32(219 / 255)).round().astype(np.uint8)
    height, width = frames.shape[1:]
    no_colour = bytes([128]) * (height * width // 4)
    for time, picture in enumerate(luma):
        frame = av.VideoFrame(width, height, "yuv420p")
        for plane, values in zip(frame.planes, (picture.tobytes(), no_colour, no_colour), strict=True):
            plane.update(values)
        frame.pts, frame.time_base = time, _VIDEO_TIME_BASE
        yield frame


def _audio_frames(wave: np.ndarray) -> Iterator[av.AudioFrame]:
    """Yields PyAV frames of a mono waveform (num_samples,) float32."""
    import av

    for start in range(0, len(wave), _AAC_FRAME):
        frame = av.AudioFrame.from_ndarray(wave[None, start : start + _AAC_FRAME], format="fltp", layout="mono")
        frame.sample_rate = sound.SAMPLE_RATE_HZ
        frame.pts, frame.time_base = start, _AUDIO_TIME_BASE
        yield frame


def encode(frames: np.ndarray, wave: np.ndarray) -> bytes:
    """Encodes an MP4 of H.264 video and AAC sound that start together."""
    import av

    out = io.BytesIO()
    # Without B-frames the frames are stored in the order in which they are shown, from time 0: every reader agrees.
    options = {"preset": "veryfast", "crf": "24", "g": "16", "bf": "0", "threads": "1"}
    with av.open(out, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=_FRAMES_PER_SECOND, options=options)
        video.height, video.width = frames.shape[1:]
        video.pix_fmt = "yuv420p"
        # The encoder's default search takes three times as long and sounds the same here.
        aac = {"aac_coder": "fast"}
        audio = container.add_stream("aac", rate=sound.SAMPLE_RATE_HZ, layout="mono", options=aac)
        audio.bit_rate = 32_000
        for stream, source in ((video, _video_frames(frames)), (audio, _audio_frames(wave))):
            for frame in source:
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return out.getvalue()


def render(job: dict) -> bytes:
    """Draws the MP4 of one moving digit; all its randomness comes from its source index."""
    rng = np.random.Generator(np.random.PCG64([_SEED, job["index"]]))
    frames = draw(digits.draw(job["values"]), rng, direction=job["direction"])
    return encode(frames, sound.tone(job["digit"], rng, num_samples=NUM_SAMPLES))
