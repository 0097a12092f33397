"""The gates of two workers with a step coordinator in a thread of its own in the place of an actor."""

import asyncio
import concurrent.futures
import threading
import time
import types

import pytest

from pipeline.cluster import worker
from pipeline.cluster.worker import WorkerGate
from pipeline.train import attempts
from pipeline.train.reject_limit import Draws, RejectCounts
from pipeline.train.step_coordinator import StepCoordinator
from pipeline.train.step_gate import NextAction

START = 7
STORED = {"pets": {"drawn": 100, "rejected": 3}}


class Actor:
    """Calls of a coordinator as an actor's handle takes them."""

    def __init__(self, coordinator: StepCoordinator, loop: asyncio.AbstractEventLoop):
        self._coordinator, self._loop = coordinator, loop

    def __getattr__(self, name: str):
        method = getattr(self._coordinator, name)
        return types.SimpleNamespace(
            remote=lambda *args: Ref(asyncio.run_coroutine_threadsafe(method(*args), self._loop))
        )


class Ref:
    """A reference to a result, as Ray gives it."""

    def __init__(self, future: concurrent.futures.Future):
        self._future = future

    def future(self) -> concurrent.futures.Future:
        return self._future


def _done(value) -> Ref:
    future = concurrent.futures.Future()
    future.set_result(value)
    return Ref(future)


@pytest.fixture
def gates(monkeypatch, tmp_path):
    """Two ranks that go on from the checkpoint of step 7."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    told = []
    monkeypatch.setattr(worker.ray, "get", lambda ref: ref.future().result(60))
    monkeypatch.setattr(worker.ray, "put", _done)
    monkeypatch.setattr(worker.ray.train, "get_context", lambda: types.SimpleNamespace(get_world_size=lambda: 2))
    monkeypatch.setattr(worker.ray.train, "get_preemption_info", lambda: None)
    monkeypatch.setattr(worker.collective, "broadcast_from_rank_zero", lambda one: told.append(one) or told[0])
    checkpoints = types.SimpleNamespace(latest_step=START, remove_leftovers=lambda: None)
    spec = types.SimpleNamespace(
        run_dir=str(tmp_path),
        open_checkpoints=lambda: checkpoints,
        reject_counts=lambda step: RejectCounts({"pets": 0.05}, STORED),
    )
    actor = Actor(StepCoordinator(), loop)
    made = [WorkerGate(actor, spec, rank=rank, elastic=False, checked_step=START) for rank in range(2)]
    for gate in made:
        gate.open(spec.reject_counts(START))
    yield made, actor
    # Answers that are asked for ahead.
    actor.stop.remote().future().result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def draws(rejected: int = 0) -> Draws:
    return Draws("pets", 50, rejected, ("a (no_text)",) if rejected else ())


def actions(gates, step: int) -> list[NextAction]:
    """The next actions of ranks that ask at the same time."""
    with concurrent.futures.ThreadPoolExecutor(len(gates)) as pool:
        return list(pool.map(lambda gate: gate.next_action(step), gates))


def test_all_ranks_count_alike_and_end_before_the_same_step(gates):
    (first, second), actor = gates
    assert (first.epoch, first.start_step) == (second.epoch, second.start_step) == (1, START)
    # The feeds are ahead of the loops.
    for step in (7, 8):
        first.ready(step, draws())
    assert first.next_action(7, wait=False) is None
    second.ready(7, draws(1))
    assert actions((first, second), 7) == [NextAction.STEP] * 2
    for gate in (first, second):
        # Before step 8: what the checkpoint holds, and both ranks' draws for step 7.
        assert gate.rejects_before(8).as_dict() == {"pets": {"drawn": 200, "rejected": 4}}
    second.ready(8, draws(30))
    assert actions((first, second), 8) == [NextAction.STOP] * 2
    for gate in (first, second):
        # The step that was not run is drawn again, and counts then.
        assert gate.rejects_before(8).as_dict() == {"pets": {"drawn": 200, "rejected": 4}}
    assert actor.why.remote().future().result(60).startswith("data set pets: 34 of 300 samples were bad, more than")


@pytest.mark.parametrize("off_s", [3600.0, -3600.0])
def test_the_log_of_attempts_goes_by_the_commands_clock(gates, monkeypatch, tmp_path, off_s):
    _, actor = gates
    began = time.time()
    # The clock of a worker's machine; the coordinator has its own.
    clock = types.SimpleNamespace(time=lambda: time.time() + off_s, perf_counter=time.perf_counter)
    assert worker._clock_off_s(actor) == 0
    monkeypatch.setattr(worker, "time", clock)
    monkeypatch.setattr(attempts, "time", clock)
    attempts.RankAttempt(tmp_path, rank=0, start_step=0, facts={}, clock_off_s=worker._clock_off_s(actor))
    (line,) = attempts.read_file(tmp_path / "attempts" / "rank-0.jsonl")
    assert began - 10 < line["at"] < time.time() + 10


def test_a_checkpoint_holds_the_counts_before_its_step_whatever_was_granted_since(gates):
    (first, second), _ = gates
    for step in (7, 8):
        for gate in (first, second):
            gate.ready(step, draws())
    for step in (7, 8):
        assert actions((first, second), step) == [NextAction.STEP] * 2
    # A save before step 8, once its answer is here.
    assert first.rejects_before(8).as_dict()["pets"]["drawn"] == 200
    assert first.rejects_before(9).as_dict()["pets"]["drawn"] == 300
