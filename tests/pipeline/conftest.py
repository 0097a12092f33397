"""Small media, manifests and specs that tests make for themselves. Every fixture returns a function."""

import itertools
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from pipeline import recipe as recipes
from pipeline import waiting
from pipeline.data.spec import AudioSpec, DataSetSpec, ImageSpec, TaskSpec, Variant, VideoSpec
from pipeline.data.tokenizer import Tokenizer, train_tokenizer
from pipeline.recipe.specs import loss_fields
from tests.toy_run import save_toy_run

SOUND_RATE_HZ = 48_000
AAC_FRAME = 1024
MANIFEST_TYPES = {
    "id": pa.string(),
    "image": pa.string(),
    "video": pa.string(),
    "audio": pa.string(),
    "text": pa.list_(pa.string()),
    "labels": pa.list_(pa.string()),
    "start_s": pa.float64(),
    "end_s": pa.float64(),
}
# Few samples, 2 x 2 patches: decoding and the transform cost nothing.
SMALL_AUDIO = AudioSpec(frame_length=256, hop_length=128, num_frames=32, num_mels=32)


@pytest.fixture(autouse=True)
def no_lines_of_waits(monkeypatch):
    """A loaded machine says what it waits for, between the lines that a test looks at."""
    monkeypatch.setattr(waiting, "EVERY_S", 3600.0)


def tone(*, hz: float, seconds: float, rate_hz: int) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz)).astype(np.float32)


def grey_level(number: int) -> int:
    return 12 + 8 * (number % 28)


def _grey_frames(num_frames: int, *, height: int, width: int, fps: int, first_s: float):
    for number in range(num_frames):
        pixels = np.full((height, width, 3), grey_level(number), np.uint8)
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = number + round(first_s * fps), Fraction(1, fps)
        yield frame


def _sound_frames(wave: np.ndarray):
    for start in range(0, len(wave), AAC_FRAME):
        frame = av.AudioFrame.from_ndarray(wave[None, start : start + AAC_FRAME], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SOUND_RATE_HZ, start, Fraction(1, SOUND_RATE_HZ)
        yield frame


@pytest.fixture(scope="session")
def write_video():
    """Writes an H.264 mp4 whose frame n is all grey of ``grey_level(n)``, with an AAC tone where sound_hz is given."""

    def write(
        path: Path,
        *,
        num_frames: int = 24,
        fps: int = 24,
        height: int = 64,
        width: int = 64,
        sound_hz: float | None = None,
        sound_s: float | None = None,
        moov_first: bool = False,
    ) -> str:
        container_options = {"movflags": "faststart"} if moov_first else {}
        with av.open(str(path), "w", format="mp4", options=container_options) as container:
            options = {"preset": "ultrafast", "crf": "10", "g": "8", "threads": "1"}
            video = container.add_stream("libx264", rate=fps, options=options)
            video.height, video.width, video.pix_fmt = height, width, "yuv420p"
            sources = [(video, _grey_frames(num_frames, height=height, width=width, fps=fps, first_s=0.0))]
            if sound_hz:
                audio = container.add_stream("aac", rate=SOUND_RATE_HZ, layout="mono")
                seconds = num_frames / fps if sound_s is None else sound_s
                sources.append((audio, _sound_frames(tone(hz=sound_hz, seconds=seconds, rate_hz=SOUND_RATE_HZ))))
            for stream, frames in sources:
                for frame in itertools.chain(frames, [None]):
                    container.mux(stream.encode(frame))
        return str(path)

    return write


@pytest.fixture(scope="session")
def frame_numbers():
    """The frames of ``write_video`` that a decoded clip shows; each must be one flat grey."""

    def numbers(frames: np.ndarray) -> list[int]:
        means = frames.reshape(len(frames), -1).astype(float).mean(1)
        found = np.rint((means - 12) / 8).astype(int)
        assert np.abs(frames.reshape(len(frames), -1) - (12 + 8 * found[:, None])).max() <= 3
        return found.tolist()

    return numbers


@pytest.fixture(scope="session")
def write_wav():
    """Writes a wav file of one tone a channel."""

    def write(path: Path, *, hz: tuple[float, ...], seconds: float = 1.0, rate_hz: int = 44_100) -> str:
        channels = [tone(hz=h, seconds=seconds, rate_hz=rate_hz) for h in hz]
        soundfile.write(path, np.stack(channels, axis=1), rate_hz)
        return str(path)

    return write


@pytest.fixture(scope="session")
def peak_hz():
    """The frequency with the most energy of a waveform."""

    def peak(wave: np.ndarray, rate_hz: int) -> float:
        spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
        return float(np.argmax(spectrum) * rate_hz / len(wave))

    return peak


@pytest.fixture(scope="session")
def write_manifest():
    """Writes rows as Parquet with the manifest's types; the columns are the first row's."""

    def write(path: Path, rows: list[dict], *, row_group_size: int = 1 << 20, columns: list[str] | None = None) -> str:
        schema = pa.schema([(name, MANIFEST_TYPES[name]) for name in columns or rows[0]])
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=row_group_size)
        return str(path)

    return write


def _strings(values: list) -> pa.Array:
    """A string column, or one of lists of strings, of bytes that nobody checks."""
    if not any(isinstance(v, list) for v in values):
        return pa.array(values, pa.binary()).view(pa.string())
    raw = pa.array(values, pa.list_(pa.binary()))
    return pa.ListArray.from_arrays(raw.offsets, raw.values.view(pa.string()), mask=raw.is_null())


@pytest.fixture(scope="session")
def write_raw_manifest():
    """Writes rows as Parquet whose strings are the bytes given, UTF-8 or not."""

    def write(path: Path, rows: list[dict], *, row_group_size: int = 1 << 20) -> str:
        table = pa.table({name: _strings([row[name] for row in rows]) for name in rows[0]})
        pq.write_table(table, path, row_group_size=row_group_size)
        return str(path)

    return write


@pytest.fixture(scope="session")
def make_data_set():
    """A DataSetSpec of small clips."""

    def make(manifest: str = "unused", **fields) -> DataSetSpec:
        defaults = {
            "name": "toy",
            "manifest": manifest,
            "held_out": {},
            "image": ImageSpec(short_side=32),
            "video": VideoSpec(fps=8.0, short_side=32, max_frames=8),
            "audio": SMALL_AUDIO,
        }
        return DataSetSpec(**defaults | fields)

    return make


@pytest.fixture(scope="session")
def make_task():
    """A TaskSpec of one 32-pixel variant with 2 x 2 patches, four samples a batch. objective: one name, or weights."""

    def make(*, objective: str | dict[str, float] = "softmax", **fields) -> TaskSpec:
        terms = objective if isinstance(objective, dict) else {objective: 1.0}
        variant = Variant(name="32x32", global_batch_size=4, size=32, grid=(1, 2, 2), num_vision_tokens=4)
        loss = loss_fields(tuple(terms.items()), fields.get("modalities", ("image",)))
        return TaskSpec(**{"name": "toy_task", "data_set": "toy", "variants": (variant,)} | loss | fields)

    return make


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """A tiny sentencepiece model that knows the alphabet."""
    sentences = ["the quick brown fox jumps over the lazy dog", "a picture of a cat", "this is a red dog", "blue cat"]
    into = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(sentences, vocab_size=64, into=into)


@pytest.fixture(scope="session")
def pet_rows() -> list[dict]:
    """Thirty rows of a manifest of pets."""
    return [
        {"id": f"id-{i}", "image": f"{i}.png", "text": [f"a cat number {i}", "one dog"], "labels": ["cat"]}
        for i in range(30)
    ]


@pytest.fixture(scope="session")
def pet_task() -> dict:
    """A recipe's task over the pets."""
    return {
        "data_set": "pets",
        "objective": "nce",
        "modalities": ["image", "text"],
        "batch_size": 8,
        "variants": [{"size": 64}],
        "text_length": 16,
    }


@pytest.fixture
def make_pet_recipe(tmp_path, write_manifest, pet_rows, pet_task):
    """A recipe over a manifest of thirty rows; nothing is decoded, so an image is an empty file."""
    manifest = write_manifest(tmp_path / "data" / "m.parquet", pet_rows)
    for row in pet_rows:
        (tmp_path / "data" / row["image"]).touch()

    def make(*, rows: str = manifest, task: dict = pet_task, **parts) -> recipes.Recipe:
        raw = {
            "data_sets": {"pets": {"manifest": rows, "classes": ["cat", "dog"]}},
            "tasks": {"pet_text": task},
            "train": {"num_steps": 10},
            "text": {"vocab_size": 60},
        }
        return recipes.from_dict(raw | parts)

    return make


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory, make_toy_recipe):
    return save_toy_run(tmp_path_factory.mktemp("toy") / "run", make_toy_recipe())
