"""What is asked for and not there is said in one line, before Ray is started."""

import socket
import stat
import types

import pytest

from pipeline.cluster import start as ray_cluster
from pipeline.cluster.start import Cluster, check_accelerator, room
from pipeline.errors import RequestError


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_how_many_workers_fit():
    # 8 CPUs hold two of 3, one GPU one; machines do not help each other out.
    machines = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 64.0}]
    assert room(machines, {"CPU": 3.0, "GPU": 1}) == 2 + 1
    assert room(machines, {"CPU": 1.0, "TPU": 4}) == 0
    assert room(machines, {"CPU": 0.1, "GPU": 0}) == 80 + 80 + 640


def test_an_address_is_what_joins_a_cluster(monkeypatch):
    assert Cluster().joins is None and Cluster(address="local").joins is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert Cluster().joins == "10.0.0.1:6379" and Cluster(address="auto").joins == "auto"
    assert Cluster(address="local").joins is None


def test_an_address_where_nothing_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(
            RequestError, match=f"RAY_ADDRESS: expected a running Ray at {address}, found none: .*refus"
        ):
            ray_cluster._check_answers(address, "RAY_ADDRESS")


@pytest.mark.parametrize("error", [TimeoutError("timed out"), socket.gaierror(-2, "Name or service not known")])
def test_an_address_that_cannot_be_reached(monkeypatch, error):
    def connect(address, timeout):
        assert address == ("head.example", 6379) and timeout <= 30
        raise error

    monkeypatch.setattr(socket, "create_connection", connect)
    for address in ("head.example:6379", "ray://head.example:6379"):
        with pytest.raises(RequestError, match=r"cluster\.address: expected a running Ray"):
            ray_cluster._check_answers(address, "cluster.address")
    # What Ray alone can look up.
    ray_cluster._check_answers("auto", "cluster.address")


def test_an_address_where_something_else_listens(monkeypatch):
    asked = []
    monkeypatch.setattr(ray_cluster.subprocess, "run", lambda command, **_: asked.append(command) or found)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        for found in (types.SimpleNamespace(returncode=0), types.SimpleNamespace(returncode=1)):
            if not found.returncode:
                ray_cluster._check_answers(address, "RAY_ADDRESS")
                continue
            with pytest.raises(RequestError, match="another version or something else"):
                ray_cluster._check_answers(address, "RAY_ADDRESS")
    assert all(command[-2:] == ["--address", address] for command in asked)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_accelerator_that_is_not_there(monkeypatch, workers):
    monkeypatch.setattr(ray_cluster, "_DEVICE_FILES", {"gpu": ("no-such-device*",), "tpu": ("null",)})
    check_accelerator(Cluster(num_workers=workers))
    check_accelerator(Cluster(num_workers=workers, accelerator="tpu"))
    with pytest.raises(RequestError, match=r"cluster\.accelerator: gpu: this machine has none"):
        check_accelerator(Cluster(num_workers=workers, accelerator="gpu"))
    # The driver of a cluster need have none.
    check_accelerator(Cluster(num_workers=workers, accelerator="gpu", address="head:6379"))


def test_more_workers_than_cpus(monkeypatch):
    monkeypatch.setattr(ray_cluster, "machine_cpus", lambda: 2)
    ray_cluster._check_machine(Cluster(num_workers=2))
    ray_cluster._check_machine(Cluster(num_workers=(1, 8)))
    ray_cluster._check_machine(Cluster(num_workers=8, cpus_per_worker=0.25))
    with pytest.raises(RequestError, match=r"num_workers = 8: .* of 1 CPUs need 8, this machine has 2"):
        ray_cluster._check_machine(Cluster(num_workers=8))


@pytest.mark.parametrize("before", [None, 0o644, 0o600])
def test_the_token_is_the_user_s_alone(tmp_path, monkeypatch, before):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".ray/auth_token"
    if before:
        path.parent.mkdir()
        path.write_text("a token")
        path.chmod(before)
    ray_cluster._own_token()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == "a token" if before else len(path.read_text()) == 64


@pytest.mark.parametrize(
    ("joins", "grows", "timeout_s", "limit_s"), [(False, False, 9, 0), (True, False, 9, 2), (True, True, 9, 9)]
)
def test_machines_are_waited_for_where_they_may_come(monkeypatch, joins, grows, timeout_s, limit_s):
    monkeypatch.setattr(ray_cluster, "_machines", lambda: [{"CPU": 5.0}])
    monkeypatch.setattr(ray_cluster, "_may_grow", lambda: grows)
    monkeypatch.setattr(ray_cluster, "_JOINING_S", 2)
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr(ray_cluster, "time", clock)
    address = "head:6379" if joins else None
    ray_cluster.await_room(Cluster(num_workers=4, address=address))
    cluster = Cluster(num_workers=2, accelerator="gpu", address=address, start_timeout_s=timeout_s)
    with pytest.raises(RequestError, match="room for 0 of 2 workers of 1 CPU and 1 GPU each"):
        ray_cluster.await_room(cluster)
    assert now[0] == limit_s


def test_workers_leave_a_cpu_to_decode_with(monkeypatch):
    monkeypatch.setattr(ray_cluster, "_machines", lambda: [{"CPU": 2.0}, {"CPU": 2.0}])
    grows, actors = [False], [False]
    monkeypatch.setattr(ray_cluster, "_may_grow", lambda: grows[0])
    monkeypatch.setattr(ray_cluster, "uses_actors", lambda options: actors[0])
    ray_cluster.await_room(Cluster(num_workers=3, address="head:6379"))
    every_cpu = Cluster(num_workers=(2, 4), cpus_per_worker=2, address="head:6379")
    with pytest.raises(RequestError, match="= 2: they take 4 of the cluster's 4 CPUs, and decoding needs one"):
        ray_cluster.await_room(every_cpu)
    for allowed in (grows, actors):
        allowed[0] = True
        ray_cluster.await_room(every_cpu)
        allowed[0] = False
