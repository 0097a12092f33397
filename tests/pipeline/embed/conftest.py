"""A toy run, its export, a folder of media, and their embeddings, made once."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.embed.job import Request, embed
from pipeline.export import load


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory, toy_run):
    return shutil.copytree(toy_run, tmp_path_factory.mktemp("embed") / "run")


@pytest.fixture(scope="session")
def held_out(run_dir):
    """The embeddings of the run's held-out sets; tests leave them as they are."""
    out = run_dir.parent / "found"
    embed(Request(run=run_dir, out=out))
    return out


@pytest.fixture(scope="session")
def exported(held_out):
    return held_out / "model"


@pytest.fixture(scope="session")
def encoder(exported):
    return load(exported)


@pytest.fixture(scope="session")
def media(toy_corpus):
    """A function that copies a few files of every modality, a damaged one and one of another kind, into a folder."""

    def make(folder: Path) -> Path:
        (folder / "more").mkdir(parents=True)
        (folder / ".hidden").mkdir()
        rows = pq.read_table(toy_corpus / "moving_digits/held_out.parquet").to_pylist()
        for row in rows[:2]:
            shutil.copy(toy_corpus / "moving_digits" / row["video"], folder / "more")
        rows = pq.read_table(toy_corpus / "digits/held_out.parquet").to_pylist()
        for row in rows[:5]:
            shutil.copy(toy_corpus / "digits" / row["image"], folder)
        (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
        (folder / "a digit.txt").write_text("the digit three\n", encoding="utf-8")
        (folder / "empty.txt").write_text("", encoding="utf-8")
        (folder / "table.csv").write_text("1,2\n", encoding="utf-8")
        shutil.copy(folder / "broken.png", folder / ".hidden")
        return folder

    return make


@pytest.fixture(scope="session")
def read_items():
    """A function that reads all parts of a folder in order."""

    def read(folder: Path) -> list[dict]:
        files = sorted((folder / "parts").glob("*.parquet"))
        return [row for path in files for row in pq.read_table(path).to_pylist()]

    return read
