"""Videos with sound: a handwritten digit moves in one of four directions, and its sound says which digit it is.

One video for each source digit of `digits`, in the same split. The digit glides along a way of 24 pixels and then
starts it again. Every place of the way is equally likely at every time, so that no single frame tells the direction.
It moves 1.5 to 2.5 pixels a frame: in a clip whose frames lie 5 or more apart, left can look like right.
"""

import io
from fractions import Fraction

import numpy as np

from pipeline.data.demo import digits, sound
from pipeline.data.demo.files import Plan, stable_hash

FRAME_SIZE = 64
FRAMES_PER_SECOND = 16
NUM_FRAMES = 34
NUM_SAMPLES = NUM_FRAMES * sound.SAMPLE_RATE_HZ // FRAMES_PER_SECOND
VIDEO_TIME_BASE = Fraction(1, FRAMES_PER_SECOND)
AUDIO_TIME_BASE = Fraction(1, sound.SAMPLE_RATE_HZ)
AAC_FRAME = 1024
TRAVEL = 24
SPEED = (1.5, 2.5)
ACROSS = 4
NOISE = 3
SEED = 1
# (rows, columns): rows grow downwards.
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
# Short: a caption that a task's text length cuts would lose its direction.
CAPTIONS = (
    "the digit {digit} moving {direction}",
    "the number {digit} slides {direction}",
    "a {digit} going {direction}",
    "{digit} drifts {direction}",
    "the {digit} moves {direction}",
    "{direction} goes the {digit}",
    "handwritten {digit} gliding {direction}",
    "a {digit} that travels {direction}",
)


def captions(index: int, *, digit: str, direction: str) -> list[str]:
    """Three of the captions, different ones for neighbouring source digits."""
    chosen = [CAPTIONS[(index + step) % len(CAPTIONS)] for step in (0, 3, 5)]
    return [caption.format(digit=digit, direction=direction) for caption in chosen]


def directions(classes: np.ndarray) -> dict[int, str]:
    """Source index to direction: as many of each in every class of every split, up to a rest."""
    chosen = {}
    for by_class in digits.split_by_class(classes).values():
        for digit, indices in by_class.items():
            in_order = sorted(indices, key=lambda index: stable_hash("direction", index))
            # Starting at another direction for every class spreads the rests.
            chosen |= {index: list(DIRECTIONS)[(place + digit) % 4] for place, index in enumerate(in_order)}
    return chosen


def plan(*, limit: int | None) -> Plan:
    """Rows with a video, three captions, and the labels (digit, direction)."""
    values, classes = digits.load()
    direction = directions(classes)
    jobs, manifests = [], {}
    for split, indices in digits.split_indices(classes, limit=limit).items():
        manifests[split] = []
        for index in indices:
            name, path = digits.NAMES[classes[index]], f"videos/{index:04d}.mp4"
            row = {"id": f"moving-digit-{index:04d}", "video": path}
            row["text"] = captions(index, digit=name, direction=direction[index])
            row |= {"labels": [name, direction[index]], "source_digit": index}
            manifests[split].append(row)
            job = {"path": f"moving_digits/{path}", "index": index, "values": values[index].tolist()}
            jobs.append(job | {"digit": int(classes[index]), "direction": direction[index]})
    return Plan(name="moving_digits", jobs=jobs, manifests=manifests)


def draw(digit: np.ndarray, rng: np.random.Generator, *, direction: str) -> np.ndarray:
    """The frames, (34, 64, 64) uint8 grey, of a `digit` (40, 40) that glides along its direction."""
    step = np.array(DIRECTIONS[direction])
    moved = (rng.uniform(0, TRAVEL) + rng.uniform(*SPEED) * np.arange(NUM_FRAMES)) % TRAVEL - TRAVEL / 2
    across = (1 - np.abs(step)) * rng.integers(-ACROSS, ACROSS, endpoint=True)
    places = np.rint((FRAME_SIZE - digits.DIGIT_SIZE) / 2 + across + moved[:, None] * step).astype(int)
    frames = np.full((NUM_FRAMES, FRAME_SIZE, FRAME_SIZE), digits.BACKGROUND, np.int16)
    for frame, (top, left) in zip(frames, places, strict=True):
        frame[top : top + digits.DIGIT_SIZE, left : left + digits.DIGIT_SIZE] = digit
    frames += rng.integers(-NOISE, NOISE, frames.shape, np.int8, endpoint=True)
    return np.clip(frames, 0, 255).astype(np.uint8)


def video_frames(frames: np.ndarray):
    """PyAV frames of grey pictures (T, H, W) uint8: full-range grey to the luma range 16..235, no colour.

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
        frame.pts, frame.time_base = time, VIDEO_TIME_BASE
        yield frame


def audio_frames(wave: np.ndarray):
    """PyAV frames of a mono waveform (num_samples,) float32."""
    import av

    for start in range(0, len(wave), AAC_FRAME):
        frame = av.AudioFrame.from_ndarray(wave[None, start : start + AAC_FRAME], format="fltp", layout="mono")
        frame.sample_rate = sound.SAMPLE_RATE_HZ
        frame.pts, frame.time_base = start, AUDIO_TIME_BASE
        yield frame


def encode(frames: np.ndarray, wave: np.ndarray) -> bytes:
    """An MP4 of H.264 video and AAC sound that start together."""
    import av

    out = io.BytesIO()
    # Without B-frames the frames are stored in the order in which they are shown, from time 0: every reader agrees.
    options = {"preset": "veryfast", "crf": "24", "g": "16", "bf": "0", "threads": "1"}
    with av.open(out, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=options)
        video.height, video.width = frames.shape[1:]
        video.pix_fmt = "yuv420p"
        # The encoder's default search takes three times as long and sounds the same here.
        aac = {"aac_coder": "fast"}
        audio = container.add_stream("aac", rate=sound.SAMPLE_RATE_HZ, layout="mono", options=aac)
        audio.bit_rate = 32_000
        for stream, source in ((video, video_frames(frames)), (audio, audio_frames(wave))):
            for frame in source:
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return out.getvalue()


def render(job: dict) -> bytes:
    """The MP4 of one moving digit; everything random in it comes from its source index."""
    rng = np.random.Generator(np.random.PCG64([SEED, job["index"]]))
    frames = draw(digits.draw(job["values"]), rng, direction=job["direction"])
    return encode(frames, sound.tone(job["digit"], rng, num_samples=NUM_SAMPLES))
