"""Files, pictures and arrays → what the tokens of an exported model are cut from, decoded as in its evaluation.

Packages that only some inputs need are imported by name where they are used, since a loader refuses a model if one of
its import statements fails.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from typing import Any

import numpy as np

# Maximum rounding of containers' timestamps, in seconds.
_SLACK_S = 1e-3
# Formats that may be detected: others run programs, open other files or match nearly any bytes.
PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "PCX", "QOI", "SGI")
CONTAINERS = (
    *("mov", "matroska", "avi", "mpeg", "mpegts", "mpegvideo", "asf", "flv", "ogg", "ivf", "mxf", "nut", "dv", "gif"),
    *("h264", "hevc", "av1", "m4v", "mjpeg", "yuv4mpegpipe"),
    *("wav", "w64", "aiff", "au", "caf", "mp3", "flac", "aac", "ac3", "eac3", "amr", "ape", "tta", "wv", "voc"),
)
# Marks of an MP3's header that has the number of its frames, and seconds that two ways of counting them may differ by.
COUNTS, ROUNDING_S = (b"Xing", b"Info", b"VBRI"), 0.1
# Bytes in which an MP3's first frame ends.
FRAME_BYTES = 4096


def picture(item: Any, settings: dict) -> np.ndarray:
    """(H, W, 3) uint8 of a path, a PIL image or an array, the short side as in training."""
    if isinstance(item, str):
        with pillow().open(item, formats=PICTURES) as image:
            width, height = _canonical_size(image.size, settings["short_side"])
            image.draft(image.mode, (2 * width, 2 * height))
            return _pixels(image, settings["short_side"])
    if isinstance(item, np.ndarray):
        _check(item.dtype == np.uint8 and item.shape[2:] == (3,), "(height, width, 3) uint8", item)
        item = pillow().fromarray(np.ascontiguousarray(item))
    return _pixels(item, settings["short_side"])


def _pixels(image: Any, short_side: int) -> np.ndarray:
    image = _to_rgb(image)
    with contextlib.suppress(Exception):  # damaged EXIF data in a good image
        image = importlib.import_module("PIL.ImageOps").exif_transpose(image)
    return np.asarray(_resized(image, short_side))


def _to_rgb(image: Any) -> Any:
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError(f"expected pixels of at most 16 bits a channel, found mode {image.mode}")
    if image.mode.startswith("I"):
        return pillow().fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return pillow().alpha_composite(pillow().new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _resized(image: Any, short_side: int) -> Any:
    if min(image.size) == short_side:
        return image
    return image.resize(_canonical_size(image.size, short_side), 2, reducing_gap=2.0)


def _canonical_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    scale = short_side / min(size)
    return max(short_side, round(size[0] * scale)), max(short_side, round(size[1] * scale))


def pillow() -> Any:
    """The module PIL.Image."""
    return importlib.import_module("PIL.Image")


def clip(item: Any, settings: dict) -> np.ndarray:
    """(T, H, W, 3) uint8 of a path, or of {"array": frames, "video_metadata": {"fps": F}}, at the training's rate."""
    if isinstance(item, str):
        frames = _read_video(item, settings)
    else:
        fps = (item.get("video_metadata") or {}).get("fps") if isinstance(item, dict) else None
        if not fps:
            raise ValueError('a video that is no file: expected {"array": frames, "video_metadata": {"fps": F}}')
        frames = np.asarray(item["array"])
        _check(frames.dtype == np.uint8 and frames.shape[3:] == (3,), "(frames, height, width, 3) uint8", frames)
        shown = np.arange(len(frames)) / fps
        times = np.arange(_num_frames(shown, settings)) / settings["fps"]
        frames = frames[np.searchsorted(shown, times + _SLACK_S, side="right") - 1]
    images = (pillow().fromarray(np.ascontiguousarray(frame)) for frame in frames)
    return np.stack([np.asarray(_resized(image, settings["short_side"])) for image in images])


def _num_frames(shown: Any, settings: dict) -> int:
    """Frames of a clip whose source shows its frames at these seconds."""
    last = float(np.median(np.diff(shown))) if len(shown) > 1 else 1.0 / settings["fps"]
    return int(max(1, min(settings["max_frames"], (shown[-1] + last) * settings["fps"] + _SLACK_S)))


def _read_video(path: str, settings: dict) -> np.ndarray:
    """The last frame shown by each time i / fps, already at its size."""
    pictures, shown, current, zero = [], [], None, None
    convert = functools.lru_cache(maxsize=1)(_converter(settings["short_side"]))
    with _open(path) as container:
        stream = container.streams.video[0]
        if stream.start_time is not None:
            zero = float(stream.start_time * stream.time_base)
        for number, frame in enumerate(container.decode(stream)):
            time = frame.time if frame.time is not None else number / settings["fps"]
            zero = time if zero is None else zero
            while current is not None and len(pictures) < settings["max_frames"]:
                if len(pictures) / settings["fps"] + _SLACK_S >= time - zero:
                    break
                pictures.append(convert(current))
            current = frame
            shown.append(time - zero)
            if len(pictures) == settings["max_frames"]:
                return np.stack(pictures)
    pictures += [convert(current) for _ in range(_num_frames(shown, settings) - len(pictures))]
    return np.stack(pictures[: _num_frames(shown, settings)])


def _converter(short_side: int) -> Any:
    """A function of a frame that returns (H, W, 3) uint8, resized while it is converted."""
    module = importlib.import_module("av.video.reformatter")
    how = module.Interpolation.BILINEAR | module.Interpolation.ACCURATE_RND | module.Interpolation.BITEXACT
    scaler, sizes = module.VideoReformatter(), []

    def convert(frame: Any) -> np.ndarray:
        sizes.append(sizes[0] if sizes else _canonical_size((frame.width, frame.height), short_side))
        width, height = sizes[0]
        rgb = scaler.reformat(frame, format="rgb24", width=width, height=height, interpolation=how)
        return np.rot90(rgb.to_ndarray(), round(frame.rotation / 90))

    return convert


def waveform(item: Any, settings: dict, clip_s: float) -> np.ndarray:
    """(samples,) float32 mono at the training's rate, of a path or {"array": samples, "sampling_rate": R}.

    An array is (samples,) or (samples, channels), floats from -1 to 1 or int16.
    """
    rate = settings["sample_rate_hz"]
    count = (settings["num_frames"] - 1) * settings["hop_length"] + round(clip_s * rate)
    count += settings["hop_length" if settings["pad_value"] is None else "frame_length"]
    if isinstance(item, str):
        samples, found = _read_sound(item, count / rate)
    elif isinstance(item, dict) and item.get("sampling_rate"):
        samples, found = np.asarray(item["array"]), item["sampling_rate"]
        _check(samples.ndim in (1, 2) and samples.dtype.kind in "fi", "(samples,) or (samples, channels)", samples)
        scale = 1 << 15 if samples.dtype.kind == "i" else 1
        samples = samples[: math.ceil(count / rate * found)].astype(np.float32) / np.float32(scale)
        samples = samples.reshape(len(samples), -1)
    else:
        raise ValueError('a sound that is no file: expected {"array": samples, "sampling_rate": Hz}')
    mono = functools.reduce(np.add, samples.T) / np.float32(samples.shape[1])
    if found != rate:
        mono = importlib.import_module("soxr").resample(mono, found, rate)
    return mono[:count].astype(np.float32, copy=False)


def _read_sound(path: str, seconds: float) -> tuple[np.ndarray, float]:
    """((samples, channels) float32, Hz) of a file's beginning, by soundfile or, of what it cannot read, by PyAV."""
    soundfile = importlib.import_module("soundfile")
    try:
        with soundfile.SoundFile(path) as file:
            rate, count = file.samplerate, min(file.frames, math.ceil(seconds * file.samplerate))
            if count < file.frames or file.format != "MP3" or not _goes_on(path, file.frames / rate):
                return file.read(count, dtype="float32", always_2d=True), rate
    except soundfile.LibsndfileError:
        pass
    return _read_track(path, seconds)


def _goes_on(path: str, length_s: float) -> bool:
    """Whether an MP3 without a count of its frames is longer than libsndfile guesses from the first."""
    if any(mark in _first_frame(path) for mark in COUNTS):
        return False
    samples, rate = _read_track(path, length_s + 2 * ROUNDING_S)
    return len(samples) > (length_s + ROUNDING_S) * rate


def _first_frame(path: str) -> bytes:
    """The bytes after an MP3's tag (ID3), with its first frame: the header that counts the frames is there."""
    with open(path, "rb") as file:
        start = file.read(10)
        # The size of the tag, in bytes of seven bits.
        size = sum(byte << 7 * place for place, byte in enumerate(reversed(start[6:]))) + len(start)
        file.seek(size if start.startswith(b"ID3") else 0)
        return file.read(FRAME_BYTES)


def _read_track(path: str, seconds: float) -> tuple[np.ndarray, float]:
    """The first sound track of a file, on the clock of its video if it has one."""
    av = importlib.import_module("av")
    parts, first, resampler, rate = [], 0.0, None, 0
    with _open(path) as container:
        stream = container.streams.audio[0]
        timed = [s for s in (*container.streams.video[:1], stream) if s.start_time is not None]
        zero = float(timed[0].start_time * timed[0].time_base) if timed else 0.0
        for frame in container.decode(stream):
            if resampler is None:
                rate, time = frame.sample_rate, frame.time or 0.0
                resampler = av.AudioResampler(format="fltp", layout=frame.layout, rate=rate)
            time = time if frame.time is None else frame.time
            samples = [f.to_ndarray() for f in resampler.resample(frame)]
            if time + frame.samples / rate > zero:
                first = time if not parts else first
                parts += samples
            time += frame.samples / rate
            if time >= zero + seconds:
                break
    samples, start = np.concatenate(parts, axis=1).T, round((zero - first) * rate)
    samples = np.pad(samples, ((max(0, -start), 0), (0, 0)))[max(0, start) :]
    return samples[: math.ceil(seconds * rate)], rate


def _check(right: bool, expected: str, found: np.ndarray) -> None:
    if not right or not found.size:
        raise ValueError(f"expected {expected}, found {found.shape} {found.dtype}")


def _open(path: str) -> Any:
    options = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}
    return importlib.import_module("av").open(path, container_options=options)
