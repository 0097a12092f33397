"""Messages between the driver and its workers, with a step coordinator that is not an actor."""

import asyncio
import signal
import types

import pytest

from pipeline import stopping
from pipeline.cluster import relay as relay_module
from pipeline.cluster.relay import Relay, lines_to
from pipeline.cluster.spec import Cluster
from pipeline.stopping import Stop
from pipeline.train.reject_limit import Draws
from pipeline.train.step_coordinator import REFUSED, StepCoordinator


class Ended(Exception):
    pass


def actor(coordinator: StepCoordinator):
    """Calls as of an actor, done at once."""

    def method(name):
        return types.SimpleNamespace(remote=lambda *a: asyncio.run(getattr(coordinator, name)(*a)))

    names = ("news", "stop", "print", "lost", "saved", "trains")
    return types.SimpleNamespace(**{name: method(name) for name in names})


@pytest.fixture
def relay(monkeypatch, tmp_path):
    monkeypatch.setattr(relay_module.ray, "get", lambda value, timeout=None: value)
    monkeypatch.setattr(relay_module.ray, "wait", lambda refs, timeout=None: (refs, []))

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(relay_module, "end_process", end)
    coordinator, stop = StepCoordinator(), Stop("stopped")
    spec = types.SimpleNamespace(
        open_checkpoints=lambda: types.SimpleNamespace(latest_step=40), mixture=types.SimpleNamespace(num_steps=100)
    )
    relay = Relay(actor(coordinator), stop, spec=spec, cluster=Cluster(num_workers=2, start_timeout_s=60))
    monkeypatch.setattr(relay._thread, "start", lambda: None)
    relay.__enter__()
    yield relay, coordinator, stop
    relay._wait.close()


def test_lines_of_rank_0_come_whole_and_others_only_to_stderr(relay, capsys):
    import sys

    relay, coordinator, _ = relay
    for rank in (0, 1):
        with lines_to(actor(coordinator), rank=rank):
            print(f"rank {rank} a", end="", flush=True)
            print(f"\nrank {rank} b")
            print(f"rank {rank} failed", file=sys.stderr, flush=True)
    elsewhere = capsys.readouterr()
    assert elsewhere.out == "rank 1 a\nrank 1 b\n" and elsewhere.err == ""
    relay._pass_on()
    shown = capsys.readouterr()
    assert shown.out == "rank 0 a\nrank 0 b\n" and shown.err == "rank 0 failed\nrank 1 failed\n"
    relay._pass_on()
    assert capsys.readouterr() == ("", "")


def test_a_stop_is_passed_on_and_ends_a_run_without_workers(relay, capsys):
    relay, coordinator, stop = relay
    asyncio.run(coordinator.begin(1))
    assert asyncio.run(coordinator.step(1, 0, 0, Draws("pets", 4, 0)))[0]
    relay._pass_on()
    # A step was granted: from here on a signal asks for a save.
    assert stop._deferred
    stop._asked.set()
    relay._pass_on()
    assert asyncio.run(coordinator.step(1, 0, 1, Draws("pets", 4, 0))) == REFUSED
    # The workers fail before they have saved, and Ray waits for machines.
    asyncio.run(coordinator.lost("workers [0] failed\n"))
    with pytest.raises(Ended, match="75"):
        relay._pass_on()
    out, err = capsys.readouterr()
    assert out == "workers [0] failed\n"
    assert err == "stopped while no worker trained; the newest whole checkpoint is 40\n"


@pytest.mark.parametrize("granted", [True, False])
def test_a_signal_between_the_first_step_and_the_next_news_lets_the_workers_save(relay, monkeypatch, granted):
    relay, coordinator, stop = relay
    monkeypatch.setattr(stopping, "end_process", relay_module.end_process)
    asyncio.run(coordinator.begin(1))
    relay._pass_on()
    if not granted:
        with pytest.raises(Ended, match="75"):
            stop._take(signal.SIGTERM)
        return
    assert asyncio.run(coordinator.step(1, 0, 0, Draws("pets", 4, 0)))[0]
    stop._take(signal.SIGTERM)
    stop.close()
    relay._pass_on()
    assert asyncio.run(coordinator.step(1, 0, 1, Draws("pets", 4, 0))) == REFUSED
    # Once training has ended nobody is asked.
    coordinator.trains = None
    stop._asked.clear()
    stop.at_once("done")
    with pytest.raises(Ended, match="75"):
        stop._take(signal.SIGTERM)


def test_a_stop_during_the_first_compile_of_a_group_waits_for_nothing(relay, capsys):
    relay, coordinator, stop = relay
    asyncio.run(coordinator.begin(2, 40))
    stop.defer()
    stop._asked.set()
    with pytest.raises(Ended, match="75"):
        relay._pass_on()
    assert "stopped while no worker trained; the newest whole checkpoint is 40\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("steps", "compiling", "fault", "ends"),
    [
        ((41, 41), {1}, False, True),
        # They end by themselves; one has not saved; the last step; the driver is told of the fault at the end.
        ((41, 41), set(), False, False),
        ((41,), {0}, False, False),
        ((100, 100), {1}, False, False),
        ((41, 41), {0, 1}, True, False),
    ],
)
def test_workers_that_have_saved_and_compile_on_are_not_waited_for(relay, capsys, steps, compiling, fault, ends):
    relay, coordinator, _ = relay
    asyncio.run(coordinator.begin(2, 40))
    for rank, step in enumerate(steps):
        asyncio.run(coordinator.saved(1, rank, step, rank in compiling))
    if fault:
        asyncio.run(coordinator.end(1, "the disk is full"))
    if not ends:
        relay._pass_on()
        assert capsys.readouterr().err == ""
        return
    with pytest.raises(Ended, match="75"):
        relay._pass_on()
    assert capsys.readouterr().err.startswith("stopped after step 41, state saved; go on with: ")


def test_workers_that_never_start_end_the_run(relay, capsys):
    relay, _, _ = relay
    relay._pass_on()
    relay._began -= 61
    with pytest.raises(Ended, match="1"):
        relay._pass_on()
    assert "no worker has started within cluster.start_timeout_s = 60 s" in capsys.readouterr().err


def test_a_coordinator_that_is_gone_is_no_failure_of_the_relay(relay, monkeypatch):
    relay, _, _ = relay

    def gone(value, timeout=None):
        raise relay_module.ray.exceptions.RayActorError()

    monkeypatch.setattr(relay_module.ray, "get", gone)
    relay._pass_on()
    assert not relay._stop.has_state()
