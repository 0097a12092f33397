"""Streams on a real Ray: rows arrive in order at every rank, whole, and equal to those made without Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from benchmarks.one_stream import rows_of
from pipeline import recipe as recipes
from pipeline.cluster import capacity, ray_private
from pipeline.cluster.ray_input import living_actors
from pipeline.cluster.spec import Cluster, DecodeOptions
from pipeline.cluster.start import start_ray
from pipeline.data.known_rejects import NONE_KNOWN
from pipeline.data.manifest import Manifest
from pipeline.data.stream_spec import StreamSpec
from pipeline.errors import DataError

pytestmark = [
    pytest.mark.slow,
    # Ray forks its processes beside whatever this test session has imported, and opens files it closes at exit.
    pytest.mark.filterwarnings("ignore"),
]


ROOT = str(Path(__file__).resolve().parents[3])


@pytest.fixture(scope="module")
def ray_session():
    # Streams here decode with tests/decoders.py; Ray's processes take their imports from the environment.
    os.environ["PYTHONPATH"] = ROOT
    start_ray(Cluster())

    yield ray
    ray.shutdown()
    del os.environ["PYTHONPATH"]


@pytest.fixture
def wanted(toy_recipe):
    """A stream of 11 batches of the video-audio task, starting at batch 2."""
    from pipeline.recipe import specs

    recipe = recipes.from_dict(toy_recipe)
    data_set = specs.data_set_specs(recipe)["moving"]
    return StreamSpec(
        task=specs.task_specs(recipe)["video_audio"],
        data_set=data_set,
        tokens=specs.token_spec(recipe),
        tokenizer=None,
        seed=recipe.seed,
        fingerprint=Manifest(data_set.manifest).fingerprint,
        start=2,
        stop=13,
        share=0.5,
        known_bad=NONE_KNOWN,
        cache_bytes=0,
    )


def test_a_local_ray_is_reached_from_this_machine_alone(ray_session):
    _await(lambda: len(_listening()) >= 4)  # of the head, the node, its agents
    assert {ip.removeprefix("::ffff:") for ip in _listening()} <= {"127.0.0.1", "::1"}


def _listening() -> list[str]:
    """The addresses at which this process and those that it has started listen."""
    import psutil

    own, found = psutil.Process(), []
    for process in [own, *own.children(recursive=True)]:
        # It may have ended.
        with contextlib.suppress(psutil.Error):
            found += [c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    return found


def work(path):
    while not path.exists():
        time.sleep(0.05)


def test_cpus_of_workers_are_not_spare_and_those_in_use_not_free(ray_session, tmp_path):
    """Ray's tables, as ``capacity`` reads them."""
    from ray.util.placement_group import placement_group, remove_placement_group

    total = capacity.cluster_cpus()
    assert capacity.spare_cpus() == [total] and capacity.lacking_decode_cpu() is None
    workers = placement_group([{"CPU": 0.5}])
    ray.get(workers.ready())
    assert capacity.spare_cpus() == [total - 0.5]
    others = ray.remote(work).options(num_cpus=total - 0.5).remote(tmp_path / "released")
    _await(lambda: capacity.lacking_decode_cpu() is not None)
    (tmp_path / "released").touch()
    ray.get(others)
    _await(lambda: capacity.lacking_decode_cpu() is None)
    remove_placement_group(workers)
    _await(lambda: capacity.spare_cpus() == [total])


def _await(ready) -> None:
    deadline = time.monotonic() + 200
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_pool_of_actors_waits_for_cpus_that_others_use_and_gives_the_same_rows(ray_session, wanted, tmp_path):
    others = ray.remote(work).options(num_cpus=capacity.cluster_cpus()).remote(tmp_path / "released")
    _await(lambda: capacity.lacking_decode_cpu() is not None)
    stream = rows_of(wanted, Cluster(decode=DecodeOptions(mode="actors")))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, stream)
        assert not wait([first], timeout=1.0).done and capacity.lacking_decode_cpu() is not None
        (tmp_path / "released").touch()
        rows = [first.result()]
    ray.get(others)
    # The actors have started, and keep the CPUs.
    _await(lambda: not max(ray_private.free_cpus()))
    assert capacity.lacking_decode_cpu() is None
    rows += stream
    maker = wanted.maker()
    assert [r.ids for r in rows] == [maker.row(k, rank=0, world_size=1).ids for k in range(2, 13)]


def test_blocks_of_an_actor_that_is_lost_come_although_others_have_all_cpus(ray_session, wanted, monkeypatch, tmp_path):
    """As of a machine that goes: what is left has no CPU for the actor, until an idle one makes room."""
    number = [2]
    monkeypatch.setattr(capacity.DecodeCpus, "num_decoders", property(lambda _: number[0]))
    stream = rows_of(wanted, Cluster(decode=DecodeOptions(mode="actors")))
    rows = [next(stream)]
    _await(lambda: living_actors() == 2)
    free = capacity.cluster_cpus() / 2
    others = ray.remote(work).options(num_cpus=free).remote(tmp_path / "released")
    actors = ray._private.state.actors().values()
    lost, *_ = [a["Pid"] for a in actors if "Decoder" in a["ActorClassName"] and a["State"] == "ALIVE"]
    os.kill(lost, signal.SIGKILL)
    _await(lambda: living_actors() == 1)
    number[0] = 1
    rows += stream
    (tmp_path / "released").touch()
    ray.get(others)
    assert [r.batch for r in rows] == list(range(2, 13))


def test_rows_are_in_order_and_equal_to_bare_ones(ray_session, wanted):
    rows = list(rows_of(wanted))
    assert [r.batch for r in rows] == list(range(2, 13))
    maker = wanted.maker()
    for row in rows:
        bare = maker.row(row.batch, rank=0, world_size=1)
        assert row.ids == bare.ids
        for name, array in bare.arrays.items():
            np.testing.assert_array_equal(row.arrays[name], array)


def test_two_ranks_share_each_batch(ray_session, wanted):
    first, second = (list(rows_of(wanted, rank=rank, world_size=2)) for rank in range(2))
    whole = wanted.maker()
    for k, (one, other) in enumerate(zip(first, second, strict=True)):
        assert (one.rank, other.rank) == (0, 1)
        assert one.ids + other.ids == whole.row(2 + k, rank=0, world_size=1).ids


def test_a_stream_that_is_left_half_read_ends(ray_session, wanted):
    endless = dataclasses.replace(wanted, stop=10_000_000)
    rows = rows_of(endless)
    assert [next(rows).batch for _ in range(3)] == [2, 3, 4]
    rows.close()
    assert not [t for t in threading.enumerate() if t.name == "streams"]


def test_a_fifth_of_broken_files_through_real_streams(ray_session, tmp_path, monkeypatch):
    """Every kind of broken file, decoders that crash and hang among them: listed, replaced, the rest in its order."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import faults

    result = faults.run(tmp_path, files=250, timeout_s=1.0)
    assert {name: r["wrong"] for name, r in result.items()} == {"image": [], "video": [], "audio": []}
    assert [(r["broken"], r["listed"], r["crashes"]) for r in result.values()] == [
        (24, 24, 0),
        (14, 14, 0),
        (10, 10, 0),
    ]
    assert {"crashed", "hung"} <= set(result["image"]["reasons"]) & set(result["video"]["reasons"])


def test_an_error_of_a_stream_arrives_as_what_it_is(ray_session, wanted, tmp_path):
    """Ray wraps what a task raises; the run must still know that it was the data, save its state and say one line."""

    rows = [{"id": str(i), "video": f"none-{i}.mp4", "text": [], "labels": []} for i in range(100)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    data_set = dataclasses.replace(wanted.data_set, manifest=str(tmp_path / "m.parquet"))
    fingerprint = Manifest(data_set.manifest).fingerprint
    bad = dataclasses.replace(wanted, data_set=data_set, fingerprint=fingerprint)
    with pytest.raises(DataError, match=r"64 samples in a row are bad, the last .*missing_file"):
        list(rows_of(bad))


def test_many_ranks_agree_through_the_actors_of_their_groups(ray_session):
    """Not a stream: here is a Ray. A group that is lost fails its ranks, which their run then starts again."""
    from benchmarks.gate import Ranks
    from pipeline.cluster.step_actors import make_coordinator
    from pipeline.train.reject_limit import Draws, RejectCounts

    coordinator = make_coordinator(9)
    ray.get(coordinator.begin.remote(9, 0, RejectCounts({})))
    ranks = Ranks(coordinator, range(9), 9)
    # Raises where the counts are not those of all nine.
    ranks.run(20)
    group = ray.get(coordinator.group.remote(1, range(4, 9)))
    ray.kill(group)
    with pytest.raises(ray.exceptions.RayActorError):
        # It ends a moment later.
        while True:
            ray.get(group.__ray_ready__.remote(), timeout=200)
    for requests in ranks.requests[4:]:
        requests.ready(20, Draws("pets", 1, 0))
        with pytest.raises(ray.exceptions.RayActorError):
            requests.answer(20).result(200)
