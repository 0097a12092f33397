import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import RequestError
from pipeline.files import (
    TEMPORARY_SUFFIX,
    cache_dir,
    ensure_home,
    make_folder,
    user_cache,
    whole_file,
    write_bytes,
    write_json,
)


def test_a_file_takes_its_place_when_the_block_ends(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with whole_file(path) as temporary:
        temporary.write_text("[]")
        assert json.loads(path.read_text()) == {"a": 1}
        assert temporary.parent == path.parent
    assert path.read_text() == "[]"
    assert os.listdir(tmp_path) == ["value.json"]


def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "value"
    write_bytes(path, b"old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as temporary:
        temporary.write_bytes(b"half of the n")
        1 / 0  # noqa: B018
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["value"]


def test_a_killed_writer_leaves_the_old_file_and_a_marked_rest(tmp_path):
    path = tmp_path / "value"
    write_bytes(path, b"old")
    script = (
        "import os, signal, sys; from pathlib import Path; from pipeline.files import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half of the n'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=root, timeout=200, check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    (rest,) = set(os.listdir(tmp_path)) - {"value"}
    assert rest.endswith(TEMPORARY_SUFFIX)


def test_a_folder_that_cannot_be_made_or_written_is_a_wrong_request(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    make_folder(tmp_path / "a/b", "--out")
    assert os.listdir(tmp_path / "a/b") == []
    for path in (tmp_path / "file", tmp_path / "file/below", Path("/proc/nothing/here")):
        with pytest.raises(RequestError, match=f"--out {path}: expected a folder that can be written, found: "):
            make_folder(path, "--out")

    # Permissions do not bind who runs as root.
    def refuse(*, dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pipeline.files.tempfile.TemporaryFile", refuse)
    with pytest.raises(RequestError, match="Permission denied"):
        make_folder(tmp_path / "a", "--run-dir")


@pytest.fixture
def container(tmp_path, monkeypatch):
    """A process whose cache is nowhere named, with an empty folder for temporary files."""
    monkeypatch.delenv("IMP_CACHE", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"imp-cache-{os.getuid()}"


def test_the_cache_is_at_home_where_that_can_be_written(tmp_path, monkeypatch, container):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == user_cache() == tmp_path / ".cache/imp"
    ensure_home()
    assert os.environ["HOME"] == str(tmp_path)
    monkeypatch.setenv("IMP_CACHE", "~/elsewhere")
    assert cache_dir() == tmp_path / "elsewhere"
    assert os.listdir(tmp_path) == []


def test_a_user_without_a_home_has_a_cache_of_their_own(tmp_path, monkeypatch, container):
    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert cache_dir() == container and container.stat().st_mode & 0o777 == 0o700
    ensure_home()
    assert Path.home() == container
    # A home that is no folder; permissions do not bind who runs as root.
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file/home"))
    assert cache_dir() == container
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    assert cache_dir() == container


@pytest.mark.parametrize("kind", ["writable by all", "a link", "another user's"])
def test_a_cache_that_others_could_fill_is_refused(tmp_path, monkeypatch, container, kind):
    monkeypatch.setenv("HOME", "/dev/null/home")
    if kind == "writable by all":
        container.mkdir()
        container.chmod(0o777)
    elif kind == "a link":
        (tmp_path / "other").mkdir()
        container.symlink_to(tmp_path / "other")
    else:
        me = os.getuid()
        monkeypatch.setattr("os.getuid", lambda: me + 1)
        (tmp_path / f"imp-cache-{me + 1}").mkdir(mode=0o700)
    with pytest.raises(RequestError, match="is not of this user alone; let IMP_CACHE name a folder"):
        cache_dir()
