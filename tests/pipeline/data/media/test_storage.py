"""Storage: what is missing is a reject, what cannot be reached is retried and stops the run."""

import fsspec
import pytest

from pipeline.data.media import storage
from pipeline.data.media.errors import Reject
from pipeline.errors import DataError


class Flaky:
    """A file system that fails a number of times before it answers."""

    def __init__(self, inner, failures: int):
        self.inner, self.failures, self.calls = inner, failures, 0

    def __call__(self, uri: str):
        self.calls += 1
        if self.calls <= self.failures:
            raise OSError("connection reset")
        return self.inner(uri)


@pytest.fixture
def make_flaky(monkeypatch):
    def make(failures: int) -> tuple[Flaky, list[float]]:
        flaky, waits = Flaky(storage.resolve_filesystem, failures), []
        monkeypatch.setattr(storage, "resolve_filesystem", flaky)
        monkeypatch.setattr(storage.time, "sleep", waits.append)
        return flaky, waits

    return make


def test_a_short_outage_is_waited_out(tmp_path, make_flaky):
    (tmp_path / "a").write_bytes(b"content")
    flaky, waits = make_flaky(3)
    assert storage.read_bytes(str(tmp_path / "a")) == b"content"
    assert flaky.calls == 4 and waits == [0.5, 1.0, 2.0]


def test_a_long_outage_stops_the_run(tmp_path, make_flaky):
    make_flaky(100)
    with pytest.raises(DataError, match=r"storage: .*a could not be read after 5 tries: connection reset"):
        storage.read_bytes(str(tmp_path / "a"))


def test_what_is_missing_is_not_retried(tmp_path, make_flaky):
    flaky, waits = make_flaky(0)
    with pytest.raises(Reject, match="missing_file"):
        storage.read_bytes(str(tmp_path / "a"))
    assert flaky.calls == 1 and not waits


def test_uris(tmp_path):
    (tmp_path / "a").write_bytes(b"local")
    assert storage.read_bytes(f"file://{tmp_path}/a") == b"local"
    with fsspec.open("memory://storage/a", "wb") as f:
        f.write(b"remote")
    assert storage.read_bytes("memory://storage/a") == b"remote"
    with pytest.raises(Reject, match="missing_file"):
        storage.read_bytes("memory://storage/b")


def test_local_files_are_left_to_the_decoder(tmp_path):
    (tmp_path / "a").write_bytes(b"local")
    assert storage.local_path_or_bytes(str(tmp_path / "a")) == str(tmp_path / "a")
    assert storage.local_path_or_bytes(f"file://{tmp_path}/a") == b"local"


def test_a_decoder_that_complains_of_bad_storage(tmp_path, monkeypatch):
    """A local file is read by its decoder: when that fails, the file is read once more to tell damage from storage."""
    path, waits = tmp_path / "a", []
    path.write_bytes(b"content")
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    storage.confirm_readable(str(path))
    assert not waits

    def fail(*arguments, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(DataError, match=r"a could not be read after 5 tries: .*Input/output error"):
        storage.confirm_readable(str(path))
    assert len(waits) == 4
