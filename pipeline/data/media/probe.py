"""Metadata of a media file, read without decoding it: for reports on a data set, never for training.

Runs in the decode process.
"""

from __future__ import annotations

from pipeline.data.media.container import open_container
from pipeline.data.media.decoders import as_file
from pipeline.data.media.image import FORMATS


def probe(source: str | bytes, modality: str) -> dict[str, float]:
    """Some of width and height (pixels), duration_s, fps, sample_rate_hz; empty if the file cannot be read."""
    try:
        return {"image": _image, "video": _video, "audio": _audio}[modality](source)
    # Decoding the file reports better what is wrong with it.
    except Exception:
        return {}


def _image(source: str | bytes) -> dict[str, float]:
    from PIL import Image

    with Image.open(as_file(source), formats=FORMATS) as image:
        return {"width": image.width, "height": image.height}


def _video(source: str | bytes) -> dict[str, float]:
    import av

    with open_container(source) as container:
        stream = container.streams.video[0]
        out = {"width": stream.width, "height": stream.height}
        if container.duration:
            out["duration_s"] = container.duration / av.time_base
        if stream.average_rate:
            out["fps"] = float(stream.average_rate)
        return out


def _audio(source: str | bytes) -> dict[str, float]:
    import soundfile

    info = soundfile.info(as_file(source))
    return {"duration_s": info.duration, "sample_rate_hz": info.samplerate}
