"""What a media file says of itself, without decoding it: for people who look at their data, never for training."""

from __future__ import annotations

import io

from pipeline.data.media.storage import local_path_or_bytes, read_bytes


def probe(path: str, modality: str) -> dict[str, float]:
    """Some of width and height (pixels), duration_s, fps, sample_rate_hz; empty where the file cannot be read."""
    try:
        return {"image": _image, "video": _video, "audio": _audio}[modality](path)
    # Whatever is wrong with the file, decoding it says so better.
    except Exception:
        return {}


def _image(path: str) -> dict[str, float]:
    from PIL import Image

    width, height = Image.open(io.BytesIO(read_bytes(path))).size
    return {"width": width, "height": height}


def _video(path: str) -> dict[str, float]:
    import av

    source = local_path_or_bytes(path)
    with av.open(io.BytesIO(source) if isinstance(source, bytes) else source) as container:
        stream = container.streams.video[0]
        out = {"width": stream.width, "height": stream.height}
        if container.duration:
            out["duration_s"] = container.duration / av.time_base
        if stream.average_rate:
            out["fps"] = float(stream.average_rate)
        return out


def _audio(path: str) -> dict[str, float]:
    import soundfile

    info = soundfile.info(io.BytesIO(read_bytes(path)))
    return {"duration_s": info.duration, "sample_rate_hz": info.samplerate}
