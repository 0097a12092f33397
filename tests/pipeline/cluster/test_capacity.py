"""Missing resources are reported in one line before anything waits for them; workers leave a CPU to decode."""

import dataclasses
import json
import types

import pytest

from pipeline.cluster import capacity
from pipeline.cluster.capacity import DecodeCpus, bytes_ahead, check_accelerator, max_workers, part_that_fits, room
from pipeline.cluster.spec import Cluster, DecodeOptions
from pipeline.errors import RequestError


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


class Request:
    """Notes what an autoscaler would be asked for."""

    def __init__(self, bundles, asked):
        self.bundles, self.asked = bundles, asked

    def renew(self, *, expire_after_s):
        self.asked.append(self.bundles)

    def cancel(self):
        self.asked.append("cancelled")


def test_how_many_workers_fit():
    # 8 CPUs hold two of 3, one GPU one; machines do not help each other out.
    machines = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 64.0}]
    assert room(machines, {"CPU": 3.0, "GPU": 1}) == 2 + 1
    assert room(machines, {"CPU": 1.0, "TPU": 4}) == 0
    assert room(machines, {"CPU": 0.1, "GPU": 0}) == 80 + 80 + 640


@pytest.mark.parametrize("workers", [0, 2])
def test_an_accelerator_that_is_not_there(monkeypatch, workers):
    monkeypatch.setattr(capacity, "_DEVICE_FILES", {"gpu": ("no-such-device*",), "tpu": ("null",)})
    check_accelerator(Cluster(num_workers=workers))
    check_accelerator(Cluster(num_workers=workers, accelerator="tpu"))
    with pytest.raises(RequestError, match=r"cluster\.accelerator: gpu: this machine has none"):
        check_accelerator(Cluster(num_workers=workers, accelerator="gpu"))
    # The driver of a cluster need have none.
    check_accelerator(Cluster(num_workers=workers, accelerator="gpu", address="head:6379"))


def test_more_workers_than_cpus(monkeypatch):
    monkeypatch.setattr(capacity, "machine_cpus", lambda: 2)
    capacity.check_machine(Cluster(num_workers=2))
    capacity.check_machine(Cluster(num_workers=(1, 8)))
    capacity.check_machine(Cluster(num_workers=8, cpus_per_worker=0.25))
    with pytest.raises(RequestError, match=r"num_workers = 8: workers of 1 CPUs each need 8, this machine has 2"):
        capacity.check_machine(Cluster(num_workers=8))


@pytest.mark.parametrize(
    ("joins", "grows", "timeout_s", "limit_s"), [(False, False, 9, 0), (True, False, 9, 9), (True, True, 9, 9)]
)
def test_machines_are_waited_for_where_they_may_come(monkeypatch, joins, grows, timeout_s, limit_s):
    monkeypatch.setattr(capacity, "_machines", lambda: [{"CPU": 5.0}])
    monkeypatch.setattr(capacity, "cluster_cpus", lambda: 5.0)
    monkeypatch.setattr(capacity, "may_grow", lambda: grows)
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr(capacity, "time", clock)
    asked = []
    monkeypatch.setattr(capacity.ray_private, "MachineRequest", lambda bundles: Request(bundles, asked))
    address = "head:6379" if joins else None
    capacity.await_room(Cluster(num_workers=4, address=address))
    assert asked == []
    cluster = Cluster(num_workers=2, accelerator="gpu", address=address, start_timeout_s=timeout_s)
    with pytest.raises(RequestError, match="room for 0 of 2 workers of 1 CPU and 1 GPU each"):
        capacity.await_room(cluster)
    assert now[0] == limit_s
    assert asked == [[{"CPU": 1.0, "GPU": 1}] * 2, "cancelled"] * joins


@pytest.fixture
def four_cpus(monkeypatch):
    monkeypatch.setattr(capacity.ray_private, "MachineRequest", lambda bundles: Request(bundles, []))
    monkeypatch.setattr(capacity, "_machines", lambda: [{"CPU": 2.0}, {"CPU": 2.0}])
    monkeypatch.setattr(capacity, "cluster_cpus", lambda: 4.0)
    monkeypatch.setattr(capacity, "spare_cpus", lambda: [2.0, 2.0])
    monkeypatch.setattr(capacity, "may_grow", lambda: False)
    monkeypatch.setattr(capacity, "autoscales", lambda: False)


def test_workers_leave_a_cpu_to_decode_with(four_cpus, monkeypatch):
    capacity.await_room(Cluster(num_workers=3, address="head:6379"))
    every_cpu = Cluster(num_workers=(2, 4), cpus_per_worker=2, address="head:6379", start_timeout_s=0.01)
    with pytest.raises(RequestError, match="= 2: they take 4 of the cluster's 4 CPUs, and decoding needs one"):
        capacity.await_room(every_cpu)
    # Actors ask for a part of a CPU; an autoscaler brings more.
    capacity.await_room(dataclasses.replace(every_cpu, decode=DecodeOptions(mode="actors")))
    monkeypatch.setattr(capacity, "may_grow", lambda: True)
    capacity.await_room(every_cpu)


def test_an_elastic_run_grows_as_far_as_decode_keeps_a_cpu(four_cpus, monkeypatch):
    elastic = Cluster(num_workers=(1, 8))
    assert max_workers(elastic) == 3
    assert max_workers(dataclasses.replace(elastic, cpus_per_worker=1.5)) == 2
    assert max_workers(dataclasses.replace(elastic, cpus_per_worker=0)) == 8
    assert max_workers(dataclasses.replace(elastic, num_workers=(1, 2))) == 2
    assert max_workers(dataclasses.replace(elastic, decode=DecodeOptions(mode="actors"))) == 8
    # What was asked for at least is not taken away while a machine is gone.
    assert max_workers(dataclasses.replace(elastic, num_workers=(4, 8))) == 4
    # A machine joins.
    monkeypatch.setattr(capacity, "cluster_cpus", lambda: 6.0)
    assert max_workers(elastic) == 5


def test_decoders_follow_the_machines_of_the_moment(four_cpus, monkeypatch):
    monkeypatch.setattr(capacity, "_LOOK_EVERY_S", 0.0)
    alone = DecodeCpus(Cluster(), 1)
    # One block waits while each of four is decoded.
    assert (alone.cpus, alone.num_decoders, alone.max_unfinished()) == (4.0, 4, 5)
    shared = DecodeCpus(Cluster(num_workers=2), 2)
    assert (shared.cpus, shared.num_decoders, shared.max_unfinished()) == (1.0, 1, 1)
    actors = DecodeCpus(Cluster(num_workers=2, decode=DecodeOptions(mode="actors")), 2)
    assert actors.max_unfinished() == 2
    # All CPUs are the trainers': decoders share them.
    none = DecodeCpus(Cluster(num_workers=4), 4)
    assert (none.cpus, none.num_decoders, none.max_unfinished()) == (0.0, 1, 1)
    # A machine joins, another one goes.
    monkeypatch.setattr(capacity, "cluster_cpus", lambda: 12.0)
    assert (alone.max_unfinished(), shared.max_unfinished(), actors.max_unfinished()) == (13, 5, 10)
    monkeypatch.setattr(capacity, "cluster_cpus", lambda: 3.0)
    assert (alone.max_unfinished(), shared.max_unfinished()) == (4, 1)
    # A pool of actors asks for its size alone, also while no block may start.
    assert actors.num_decoders == 1


@pytest.mark.parametrize(
    ("spare", "decoders", "part"),
    [
        ([4.0, 4.0], 8, 1.0),
        # A machine of four halves and one of one hold five at most, of a half each.
        ([2.0, 0.5], 5, 0.5),
        # Two fit on the larger machine, and none on the smaller.
        ([1.0, 0.4], 2, 0.5),
        ([1.0, 0.75], 2, 0.75),
        ([0.1 + 0.2], 1, 0.3),
        ([0.0], 3, 0.0),
        ([], 1, 0.0),
    ],
)
def test_the_largest_part_of_a_cpu_of_which_all_decoders_fit(spare, decoders, part):
    assert part_that_fits(spare, decoders) == part


def test_a_decoder_asks_for_no_more_than_a_machine_can_give(four_cpus, monkeypatch):
    actors = DecodeOptions(mode="actors")
    assert DecodeCpus(Cluster(num_workers=2), 2).each == 1.0
    # Workers of 1.25 CPUs leave 0.75 on each of two machines: 1.5 in all, and a whole one nowhere.
    monkeypatch.setattr(capacity, "spare_cpus", lambda: [0.75, 0.75])
    assert DecodeCpus(Cluster(num_workers=2, cpus_per_worker=1.25), 2).each == 0.75
    assert DecodeCpus(Cluster(num_workers=2, cpus_per_worker=1.25, decode=actors), 2).each == 0.75
    # The first rank's actor must leave a place for the other's.
    monkeypatch.setattr(capacity, "spare_cpus", lambda: [1.0, 0.5])
    assert DecodeCpus(Cluster(num_workers=2, cpus_per_worker=1.25), 2).each == 1.0
    assert DecodeCpus(Cluster(num_workers=2, cpus_per_worker=1.25, decode=actors), 2).each == 0.5
    # Another job's workers have reserved a machine.
    monkeypatch.setattr(capacity, "spare_cpus", lambda: [2.0, 0.0])
    assert DecodeCpus(Cluster(decode=actors), 1).each == 1.0
    # Workers take all: tasks wait for a machine, actors share theirs.
    monkeypatch.setattr(capacity, "spare_cpus", lambda: [0.0, 0.0])
    assert DecodeCpus(Cluster(num_workers=4), 4).each == 1.0
    assert DecodeCpus(Cluster(num_workers=4, decode=actors), 4).each == 0.0


def test_a_cluster_whose_cpus_are_taken_is_what_decoding_waits_for(four_cpus, monkeypatch):
    free, living = [0.0, 0.9], [0]
    monkeypatch.setattr(capacity.ray_private, "free_cpus", lambda: free)
    monkeypatch.setattr("pipeline.cluster.ray_input.living_actors", lambda: living[0])
    lack = capacity.lacking_decode_cpu
    assert lack() == "a free CPU to decode with; others use the 4 of the cluster"
    free[0] = 1.0
    assert lack() is None
    # An actor that has started holds its CPU while it waits.
    free[0], living[0] = 0.0, 1
    assert lack() is None
    # No machine has a whole CPU beside the workers: streams that are opened now ask for less.
    living[0] = 0
    monkeypatch.setattr(capacity, "spare_cpus", lambda: [0.75, 0.5])
    assert lack() is None


def test_reserved_cpus_are_not_spare(monkeypatch):
    nodes = [
        {"NodeID": name, "Alive": name != "gone", "Resources": {"CPU": 4.0} if name != "bare" else {}}
        for name in ("a", "b", "bare", "gone")
    ]
    of_a_group_before = {"state": "REMOVED", "bundles": {0: {"CPU": 4.0}}, "bundles_to_node_id": {0: "a"}}
    groups = {
        "before": of_a_group_before,
        "workers": {
            "state": "CREATED",
            "bundles": {0: {"CPU": 1.25}, 1: {"CPU": 1.25, "GPU": 1.0}, 2: {"CPU": 1.25}},
            "bundles_to_node_id": {0: "a", 1: "a", 2: "gone"},
        },
    }
    table = types.SimpleNamespace(placement_group_table=lambda: groups)
    monkeypatch.setattr(capacity, "ray", types.SimpleNamespace(nodes=lambda: nodes, util=table))
    assert capacity.spare_cpus() == [1.5, 4.0, 0.0]


def test_decoders_stay_within_the_recipe_s_bounds(four_cpus, monkeypatch):
    monkeypatch.setattr(capacity, "_LOOK_EVERY_S", 0.0)
    bounded = Cluster(num_workers=2, decode=DecodeOptions(cpus=(4, 8)))
    assert DecodeCpus(bounded, 2).wanted() == 0
    monkeypatch.setattr(capacity, "autoscales", lambda: True)
    # Two of four CPUs are the trainers'; each rank asks for its half of four, and has one decoder.
    rank = DecodeCpus(bounded, 2)
    assert (rank.wanted(), rank.num_decoders) == (2, 1)
    monkeypatch.setattr(capacity, "cluster_cpus", lambda: 100.0)
    rank.look()
    # It decodes with what it has asked for, and may ask for no more than half of eight.
    assert (rank.cpus, rank.wanted(), rank.num_decoders) == (4.0, 2, 2)


@pytest.mark.parametrize(
    ("limits", "second", "kinds", "grows", "certainly"),
    [
        ({"CPU": 9.0}, False, None, True, True),
        # One of the second version tells no limits where no operator does, and writes no status.
        (None, True, None, True, True),
        (None, False, {"decode": 1}, True, True),
        # Of machines that were started by hand each is of its own kind.
        (None, False, {"node_c25f": 1}, False, False),
        (None, False, None, True, False),
    ],
)
def test_what_tells_that_there_is_an_autoscaler(monkeypatch, limits, second, kinds, grows, certainly):
    status = kinds and json.dumps({"autoscaler_report": {"active_nodes": kinds}})
    monkeypatch.setattr(capacity.ray_private, "autoscaler_limits", lambda: limits)
    monkeypatch.setattr(capacity.ray_private, "has_second_autoscaler", lambda: second)
    monkeypatch.setattr(capacity.ray_private, "autoscaler_status", lambda: status)
    assert (capacity.may_grow(), capacity.autoscales()) == (grows, certainly)


def test_ranks_share_the_object_stores(monkeypatch):
    nodes = [
        {"NodeID": "here", "Alive": True, "Resources": {"object_store_memory": 1000.0}},
        {"NodeID": "there", "Alive": True, "Resources": {"object_store_memory": 5000.0}},
        {"NodeID": "gone", "Alive": False, "Resources": {"object_store_memory": 9000.0}},
    ]
    context = types.SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr(
        capacity, "ray", types.SimpleNamespace(nodes=lambda: nodes, get_runtime_context=lambda: context)
    )
    cluster = Cluster(decode=DecodeOptions(ahead=0.5))
    assert bytes_ahead(cluster, 1) == 500
    assert bytes_ahead(cluster, 4) == 500
    assert bytes_ahead(cluster, 12) == 250
    # Ray packs workers that fit on one machine.
    assert bytes_ahead(cluster, 4, ranks_here=4) == 125
