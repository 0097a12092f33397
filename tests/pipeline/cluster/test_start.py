"""Ray is started for this machine alone, or joined at its address; it never starts by itself."""

import os
import socket
import stat
import subprocess
import sys
import types
from pathlib import Path

import pytest
from ray._common.utils import get_default_ray_temp_dir
from ray._private.utils import validate_socket_filepath

from pipeline.cluster import start as ray_start
from pipeline.cluster.spec import Cluster
from pipeline.errors import DataError, RequestError

ROOT = Path(__file__).resolve().parents[3]


def test_an_address_where_nothing_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(
            RequestError, match=f"RAY_ADDRESS: expected a running Ray at {address}, found none: .*refus"
        ):
            ray_start._check_answers(address, "RAY_ADDRESS")


@pytest.mark.parametrize("error", [TimeoutError("timed out"), socket.gaierror(-2, "Name or service not known")])
def test_an_address_that_cannot_be_reached(monkeypatch, error):
    def connect(address, timeout):
        assert address == ("head.example", 6379) and timeout <= 30
        raise error

    monkeypatch.setattr(socket, "create_connection", connect)
    for address in ("head.example:6379", "ray://head.example:6379"):
        with pytest.raises(RequestError, match=r"cluster\.address: expected a running Ray"):
            ray_start._check_answers(address, "cluster.address")
    # What Ray alone can look up.
    ray_start._check_answers("auto", "cluster.address")


def test_an_address_where_something_else_listens(monkeypatch):
    asked = []
    monkeypatch.setattr(ray_start.subprocess, "run", lambda command, **_: asked.append(command) or found)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        for found in (types.SimpleNamespace(returncode=0), types.SimpleNamespace(returncode=1)):
            if not found.returncode:
                ray_start._check_answers(address, "RAY_ADDRESS")
                continue
            with pytest.raises(RequestError, match="another version or something else"):
                ray_start._check_answers(address, "RAY_ADDRESS")
    assert all(command[-2:] == ["--address", address] for command in asked)


@pytest.mark.parametrize(
    ("machine", "workers", "each", "cpus"),
    # Two quarters and the CPU that decodes take two; four workers of a machine of two share its CPUs.
    [(2, 2, 0.25, 2), (2, 1, 1.0, 2), (1, 0, 1.0, 1), (2, 4, 0.5, 3), (8, (1, 16), 1.0, 15), (8, 3, 1.1, 11)],
)
def test_a_whole_cpu_is_left_to_decode_with(monkeypatch, machine, workers, each, cpus):
    given = []
    monkeypatch.setattr(ray_start, "machine_cpus", lambda: machine)
    monkeypatch.setattr(ray_start.ray_private, "listen_on_this_machine_alone", lambda: None)
    monkeypatch.setattr(ray_start, "_own_token", lambda: None)
    monkeypatch.setattr(ray_start.ray, "init", lambda **options: given.append(options["num_cpus"]))
    ray_start._start(Cluster(num_workers=workers, cpus_per_worker=each), driver_cpus=1)
    assert given == [cpus]


@pytest.fixture
def started(monkeypatch):
    """Starts Ray without Ray, and returns what it is told."""
    given = {}
    monkeypatch.setattr(ray_start.ray_private, "listen_on_this_machine_alone", lambda: None)
    monkeypatch.setattr(ray_start, "_own_token", lambda: None)
    monkeypatch.setattr(ray_start.ray, "init", given.update)

    def start() -> dict:
        ray_start._start(Cluster(), driver_cpus=1)
        return given

    return start


@pytest.mark.parametrize(
    ("machine", "store"), [(2_000_000_000, 512 << 20), (24_000_000_000, 2_400_000_000), (1 << 40, 8 << 30)]
)
def test_the_object_store_is_a_part_of_the_container_s_memory(started, monkeypatch, machine, store):
    """Ray refuses to start with a store, or a rest beside it, that its container does not have."""
    monkeypatch.setattr(ray_start, "machine_bytes", lambda: machine)
    given = started()
    assert (given["object_store_memory"], given["_memory"]) == (store, machine)


@pytest.mark.parametrize("length", [4, 39, 40, 120])
def test_a_folder_with_a_long_name_is_none_for_sockets(started, monkeypatch, length):
    """As TMPDIR of batch systems is; Ray itself fails."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/".ljust(length, "t"))
    folder = started()["_temp_dir"] or get_default_ray_temp_dir()
    # Ray's own check of the longest name that a session may have.
    validate_socket_filepath(f"{folder}/session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store")
    assert folder == (f"{os.environ['TMPDIR']}/ray" if length < 40 else "/tmp/ray")


def test_a_folder_that_cannot_be_written_is_one_line(started, monkeypatch):
    def refuse(**options: object) -> None:
        raise PermissionError(13, "Permission denied", "/scratch/ray")

    monkeypatch.setattr(ray_start.ray, "init", refuse)
    with pytest.raises(DataError, match=r"Ray did not start: .Errno 13. Permission denied: '/scratch/ray'.*RAY_TMPDIR"):
        started()


@pytest.mark.parametrize("before", [None, 0o644, 0o600])
def test_the_token_is_the_user_s_alone(tmp_path, monkeypatch, before):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".ray/auth_token"
    if before:
        path.parent.mkdir()
        path.write_text("a token")
        path.chmod(before)
    ray_start._own_token()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == "a token" if before else len(path.read_text()) == 64


def test_a_home_that_cannot_be_written_leaves_the_token_to_the_environment(tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file is no folder, not even for root")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    # Registered first, so that what the call sets is undone.
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    ray_start._own_token()
    made = os.environ["RAY_AUTH_TOKEN"]
    assert len(made) == 64
    # A token that is there already stays.
    ray_start._own_token()
    assert os.environ["RAY_AUTH_TOKEN"] == made


def test_ray_never_starts_by_itself():
    """A call of Ray's outside a session fails, in whatever order things are imported."""
    code = (
        "import pipeline.files, ray\n"
        "try: ray.put(1)\n"
        "except Exception as e: print(type(e).__name__, ray.is_initialized())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.split()[1:] == ["False"], done.stdout + done.stderr


def test_a_ray_of_its_own_inherits_settings_that_the_user_has_not_set(monkeypatch):
    monkeypatch.setenv("SET", "by the user")
    monkeypatch.delenv("NOT_SET", raising=False)
    before = dict(os.environ)
    with pytest.raises(ZeroDivisionError), ray_start._inherited({"SET": "0", "NOT_SET": "1"}):
        assert (os.environ["SET"], os.environ["NOT_SET"]) == ("by the user", "1")
        raise ZeroDivisionError
    assert dict(os.environ) == before
