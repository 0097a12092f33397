"""Streams on a real Ray: rows arrive in order at every rank, whole, and equal to those made without Ray."""

from __future__ import annotations

import dataclasses
import os
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from pipeline import recipe as recipes
from pipeline.cluster.decode_shares import DecodeShare, decode_shares
from pipeline.cluster.shared_rejects import shared
from pipeline.cluster.spec import Cluster, DecodeOptions
from pipeline.cluster.start import start_ray
from pipeline.cluster.streams import build_stream, iterate
from pipeline.data.known_rejects import NONE_KNOWN, Collector
from pipeline.data.manifest import Manifest
from pipeline.data.stream_spec import StreamSpec
from pipeline.data.task_queue import checked_rows
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
    import psutil

    own = psutil.Process()
    listening = [
        connection.laddr.ip
        for process in [own, *own.children(recursive=True)]
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 4  # of the head, the node, its agents
    assert {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1", "::1"}


def test_costs_are_measured_in_the_cluster(ray_session, wanted):

    other = dataclasses.replace(
        wanted, task=dataclasses.replace(wanted.task, name="other"), share=0.25, key="another stream"
    )
    shares = decode_shares([wanted, other], cpus=16)
    assert shares["video_audio"].row_s > 0.001
    # The same work at half the steps.
    assert 0.2 < shares["other"].cpus / shares["video_audio"].cpus < 0.9


def test_known_rejects_travel_as_a_reference(ray_session, wanted):
    """However many they are: processes find them in the object store."""
    from ray import cloudpickle

    collector = Collector()
    for number in range(20_000):
        collector.add(f"other-{number}", "missing_file")
    collector.add(wanted.maker().source.id(0), "not_decodable")
    bad = shared({"video_audio": collector.rejects()})["video_audio"]
    spec = dataclasses.replace(wanted, known_bad=bad, key="a stream that goes on")
    assert len(cloudpickle.dumps(spec)) < len(cloudpickle.dumps(wanted)) + 2000
    found = list(iterate(build_stream(spec, world_size=1, options=DecodeOptions())))
    maker = dataclasses.replace(wanted, known_bad=collector.rejects()).maker()
    alone = [maker.row(index, rank=0, world_size=1) for index in range(2, 13)]
    assert [(row.ids, row.rejects) for row in found] == [(row.ids, row.rejects) for row in alone]
    assert any(reject["journalled"] for row in found for reject in row.rejects)


def test_a_stream_of_actors_gives_the_same_rows(ray_session, wanted):

    options, share = DecodeOptions(mode="actors"), DecodeShare(cpus=0.4)
    stream = build_stream(wanted, world_size=1, options=options, share=share)
    rows = list(checked_rows(iterate(stream), task="video_audio", start=2, rank=0))
    maker = wanted.maker()
    assert [r.ids for r in rows] == [maker.row(k, rank=0, world_size=1).ids for k in range(2, 13)]


def test_local_stream_is_in_order_and_equal_to_bare_rows(ray_session, wanted):

    stream = build_stream(wanted, world_size=1, options=DecodeOptions())
    rows = list(checked_rows(iterate(stream), task="video_audio", start=2, rank=0))
    assert [r.batch for r in rows] == list(range(2, 13))
    maker = wanted.maker()
    for row in rows:
        bare = maker.row(row.batch, rank=0, world_size=1)
        assert row.ids == bare.ids
        for name, array in bare.arrays.items():
            np.testing.assert_array_equal(row.arrays[name], array)


def test_two_ranks_share_each_batch(ray_session, wanted):

    splits = build_stream(wanted, world_size=2, options=DecodeOptions()).streaming_split(2, equal=True)
    got: dict[int, list] = {}

    def pull(rank: int) -> None:
        got[rank] = list(checked_rows(iterate(splits[rank]), task="video_audio", start=2, rank=rank))

    threads = [threading.Thread(target=pull, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    whole = wanted.maker()
    for k, (first, second) in enumerate(zip(got[0], got[1], strict=True)):
        assert first.ids + second.ids == whole.row(2 + k, rank=0, world_size=1).ids


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
    bad = dataclasses.replace(wanted, data_set=data_set, fingerprint=fingerprint, key="all bad")
    stream = build_stream(bad, world_size=1, options=DecodeOptions())
    with pytest.raises(DataError, match=r"64 samples in a row are bad, the last .*missing_file"):
        list(checked_rows(iterate(stream), task="video_audio", start=2, rank=0))
