import collections
import contextlib
import types

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.train.feed import Batch
from pipeline.train.loop import Hooks, Loop
from pipeline.train.step_gate import NextAction, StepGate

STEP_S, WAIT_S = 0.05, 0.3


class FakeTime:
    """A clock that only sleeping moves: the loop runs in one thread, so every time is known."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


time = FakeTime()


class LateMetric:
    """A scalar of a step on a device that takes STEP_S for each and runs one at a time."""

    def __init__(self, value, device):
        self.value, self.ready_at = value, max(time.perf_counter(), device.free_at) + STEP_S
        device.free_at = self.ready_at

    def __array__(self, dtype=None, copy=None):
        time.sleep(max(0.0, self.ready_at - time.perf_counter()))
        return np.asarray(self.value, dtype)


class FakeFeed:
    """Batches of two structures in turn. late: steps whose batch is not there when it is first asked for.

    tasks: names that come in turn.
    """

    def __init__(self, num_steps, late=(), tasks=("t",), graph_s=0.0):
        self.graph_s = graph_s
        self.late, self.tasks = set(late), tasks
        self.batches = [self._batch(step) for step in range(num_steps)]

    def _batch(self, step):
        structure = types.SimpleNamespace(global_batch_size=4, num_tokens=12, name=f"s{step % 2}")
        variant = types.SimpleNamespace(name="all")
        task = self.tasks[step % len(self.tasks)]
        plan = types.SimpleNamespace(task=task, variant=variant, structure=structure, batch=step // len(self.tasks))
        # The last 0.1 s of making it were spent on the devices, the 0.05 s before on the journal and the batch.
        made_s = {"sampler": 0.0, "decode": 5.0, "transfer": 0.0, "batch": 0.02, "journal": 0.03, "devices": 0.1}
        return Batch(step, plan, {}, [str(step)], 1.5, made_s, self.graph_s)

    def next(self, *, wait=True, leave=lambda: False):
        if self.batches[0].step in self.late:
            if not wait:
                return None
            time.sleep(WAIT_S)
        return self.batches.pop(0)


class FakeCompiler:
    """The first use of each structure takes WAIT_S. bad: steps whose update is not finite. losses: metrics of all."""

    def __init__(self, events, *, bad=(), losses=None):
        self.done, self.events, self.free_at = set(), events, 0.0
        self.bad, self.losses = bad, losses or {}

    def ready(self, structure):
        return self.step if structure.name in self.done else None

    def get(self, structure, *, leave=lambda: False):
        self.events.append(f"compile {structure.name}")
        time.sleep(WAIT_S)
        self.done.add(structure.name)
        return self.step

    def step(self, state, arrays, learning_rate):
        state.update({name: state[name] + 1 for name in ("a", "b")})
        finite = float(learning_rate) not in self.bad
        return {"loss": LateMetric(float(learning_rate), self), "finite": finite, "losses": self.losses}


def read_metrics(metrics):
    """``jax.device_get`` for metrics that are late."""
    return {k: read_metrics(v) if isinstance(v, dict) else np.asarray(v) for k, v in metrics.items()}


def run(monkeypatch, *, num_steps, late=(), tasks=("t",), **metrics):
    monkeypatch.setattr("jax.device_get", read_metrics)
    monkeypatch.setattr("pipeline.train.loop.time", time)
    events, records, saved = [], [], []

    def record(r):
        events.append(f"record {r['step']}")
        records.append(r)

    loop = Loop(
        state={"a": 0, "b": 0, "c": 0},
        feed=FakeFeed(num_steps, late, tasks),
        compiler=FakeCompiler(events, **metrics),
        gate=StepGate(),
        hooks=Hooks(record=record, save=lambda step, state: saved.append((step, dict(state)))),
        steps=range(num_steps),
        learning_rates=np.arange(num_steps, dtype=np.float32),
        checkpoint_every=100,
    )
    began = time.perf_counter()
    assert loop.run() == num_steps
    return loop, events, records, saved, time.perf_counter() - began


def test_waits_are_charged_to_the_step_that_waited_and_all_times_add_up(monkeypatch):
    loop, _, records, _, wall_s = run(monkeypatch, num_steps=6, late=[4])
    assert [r["compile_wait_s"] for r in records] == pytest.approx([WAIT_S, WAIT_S, 0, 0, 0, 0], abs=1e-6)
    assert [r["data_wait_s"] for r in records] == pytest.approx([0, 0, 0, 0, WAIT_S, 0], abs=1e-6)
    assert [r["step_s"] for r in records] == pytest.approx([STEP_S] * 6, abs=1e-6)
    times = loop.times
    assert times.compile_wait_s + times.data_wait_s + times.steps_s == pytest.approx(wall_s)
    stages = {
        "sampler": 0,
        "decode": WAIT_S - 0.15,
        "transfer": 0,
        "batch": 0.02,
        "journal": 0.03,
        "devices": 0.1,
        "ranks": 0,
    }
    assert times.waits == pytest.approx(stages, abs=1e-6)
    assert times.values()["slowest"] == "t"


@pytest.mark.parametrize("graph_s", [0.0, 0.2, 5.0])
def test_a_wait_for_a_grant_is_for_the_own_compile_as_far_as_that_lasted(monkeypatch, graph_s):
    monkeypatch.setattr("jax.device_get", read_metrics)
    monkeypatch.setattr("pipeline.train.loop.time", time)

    class LateGate(StepGate):
        def next_action(self, step, *, wait=True):
            if not wait:
                return None
            assert loop.waits_for_data
            time.sleep(WAIT_S)
            return NextAction.STEP

    loop = Loop(
        state={"a": 0, "b": 0, "c": 0},
        feed=FakeFeed(1, graph_s=graph_s),
        compiler=FakeCompiler([]),
        gate=LateGate(),
        hooks=Hooks(record=lambda r: None, save=lambda step, state: None),
        steps=range(1),
        learning_rates=np.zeros(1, np.float32),
        checkpoint_every=9,
    )
    loop._compiler.done.add("s0")
    loop.run()
    assert not loop.waits_for_data
    assert loop.times.compile_wait_s == pytest.approx(min(graph_s, WAIT_S))
    assert loop.times.waits["ranks"] == pytest.approx(WAIT_S - min(graph_s, WAIT_S))


def test_records_and_saves_leave_no_gap_between_the_times(monkeypatch):
    """A record takes 0.01 s, a save 0.2 s; the step before a save ends first, so that the device waits for both."""
    monkeypatch.setattr("jax.device_get", read_metrics)
    monkeypatch.setattr("pipeline.train.loop.time", time)
    loop = Loop(
        state={"a": 0, "b": 0},
        feed=FakeFeed(5, late=[3]),
        compiler=FakeCompiler([]),
        gate=StepGate(),
        hooks=Hooks(record=lambda r: time.sleep(0.01), save=lambda step, state: time.sleep(0.2)),
        steps=range(5),
        learning_rates=np.arange(5, dtype=np.float32),
        checkpoint_every=2,
    )
    began = time.perf_counter()
    loop.run()
    times, wall_s = loop.times, time.perf_counter() - began
    assert times.save_s == pytest.approx(3 * 0.2) and times.data_wait_s == pytest.approx(WAIT_S)
    assert times.compile_wait_s == pytest.approx(2 * WAIT_S)
    # All but the last step's record.
    measured = times.steps_s + times.data_wait_s + times.compile_wait_s + times.save_s
    assert measured == pytest.approx(wall_s - 0.01)


def test_a_wait_is_the_end_of_making_a_batch_and_what_is_longer_the_decoders():
    made_s = {"sampler": 0.25, "decode": 0.5, "transfer": 1.0, "batch": 0.5, "journal": 0.0, "devices": 0.25}
    batch, none = Batch(0, None, {}, [], 1.0, made_s), dict.fromkeys(made_s, 0)
    assert batch.waits(0.125) == none | {"devices": 0.125}
    assert batch.waits(1.25) == none | {"devices": 0.25, "batch": 0.5, "transfer": 0.5}
    assert batch.waits(4.0) == made_s | {"decode": 2.0}


def test_a_step_is_recorded_before_the_host_waits_for_the_next_ones_compiler(monkeypatch):
    _, events, _, _, _ = run(monkeypatch, num_steps=3)
    assert events == ["compile s0", "record 1", "compile s1", "record 2", "record 3"]


def test_updates_that_are_not_finite_are_counted(monkeypatch):
    loop, _, records, _, _ = run(monkeypatch, num_steps=5, bad=(1.0, 2.0, 4.0))
    assert loop.skipped_updates == 3 and [r["finite"] for r in records] == [True, False, False, True, False]


def test_too_many_updates_in_a_row_that_are_not_finite_end_the_run(monkeypatch):
    monkeypatch.setattr("pipeline.train.loop.MAX_NON_FINITE", 2)
    run(monkeypatch, num_steps=5, bad=(0.0, 1.0, 3.0, 4.0))
    with pytest.raises(DataError, match=r"step 4 \(t\): 3 updates of this task in a row were not finite"):
        run(monkeypatch, num_steps=5, bad=(1.0, 2.0, 3.0))
    with pytest.raises(DataError, match=r"step 6 \(b\): 3 updates of this task in a row were not finite"):
        run(monkeypatch, num_steps=8, bad=(1.0, 3.0, 5.0), tasks=("a", "b"))


def test_losses_are_recorded_where_there_are_several(monkeypatch):
    _, _, records, _, _ = run(monkeypatch, num_steps=1, losses={"nce": np.float32(2.5), "softmax": np.float32(0.5)})
    assert records[0]["losses"] == {"nce": 2.5, "softmax": 0.5}
    _, _, records, _, _ = run(monkeypatch, num_steps=1)
    assert "losses" not in records[0]


def test_only_the_groups_of_a_structure_change_and_the_last_state_is_saved(monkeypatch):
    loop, _, records, saved, _ = run(monkeypatch, num_steps=3)
    assert loop.state == {"a": 3, "b": 3, "c": 0}
    assert [r["loss"] for r in records] == [0.0, 1.0, 2.0]  # each step got its own learning rate
    assert saved == [(3, loop.state)]


def test_a_save_comes_after_all_its_steps_are_observed_recorded_and_synced(monkeypatch):
    monkeypatch.setattr("jax.device_get", read_metrics)
    events = []
    hooks = Hooks(
        record=lambda r: events.append(f"record {r['step']}"),
        observe=lambda step, loss: events.append(f"observe {step + 1}"),
        sync=lambda: events.append("sync"),
        save=lambda step, state: events.append(f"save {step}"),
    )
    loop = Loop(
        state={"a": 0, "b": 0},
        feed=FakeFeed(3),
        compiler=FakeCompiler([]),
        gate=StepGate(),
        hooks=hooks,
        steps=range(3),
        learning_rates=np.arange(3, dtype=np.float32),
        checkpoint_every=2,
    )
    loop.run()
    one, two, three = (["observe " + n, "record " + n] for n in "123")
    assert events == [*one, *two, "sync", "save 2", *three, "sync", "save 3"]


def test_the_profiler_sees_where_steps_begin(monkeypatch):
    seen = []

    def annotation(name, *, step_num):
        seen.append((name, step_num))
        return contextlib.nullcontext()

    monkeypatch.setattr("jax.profiler.StepTraceAnnotation", annotation)
    run(monkeypatch, num_steps=3)
    assert seen == [("train", 1), ("train", 2), ("train", 3)]


def test_data_that_end_a_run_end_it_with_its_state_saved(monkeypatch):
    monkeypatch.setattr("jax.device_get", read_metrics)
    records, saved, feed = [], [], FakeFeed(5)
    take = feed.next

    def next_batch(*, wait=True, leave=None):
        if feed.batches[0].step == 3:
            raise DataError("storage: a could not be read")
        return take(wait=wait)

    monkeypatch.setattr(feed, "next", next_batch)
    loop = Loop(
        state={"a": 0, "b": 0, "c": 0},
        feed=feed,
        compiler=FakeCompiler([]),
        gate=StepGate(),
        hooks=Hooks(record=records.append, save=lambda step, state: saved.append((step, dict(state)))),
        steps=range(5),
        learning_rates=np.arange(5, dtype=np.float32),
        checkpoint_every=2,
    )
    with pytest.raises(DataError, match="could not be read"):
        loop.run()
    assert [r["step"] for r in records] == [1, 2, 3]
    assert saved == [(2, {"a": 2, "b": 2, "c": 0}), (3, {"a": 3, "b": 3, "c": 0})]


@pytest.mark.parametrize("awaited", ["batch", "graph"])
def test_a_stop_ends_a_wait_that_would_not_end(monkeypatch, awaited):
    """The data of step 3, or the graph of step 2, never come: what was done is saved."""
    monkeypatch.setattr("jax.device_get", read_metrics)
    asked, saved, feed, compiler = [], [], FakeFeed(5), FakeCompiler([])
    take, compiled = feed.next, compiler.get

    def leave_when_asked(leave):
        asked.append(1)
        assert leave()

    def next_batch(*, wait=True, leave=None):
        if awaited == "batch" and feed.batches[0].step == 3:
            return leave_when_asked(leave) if wait else None
        return take(wait=wait)

    def graph(structure, *, leave):
        return leave_when_asked(leave) if awaited == "graph" and structure.name == "s1" else compiled(structure)

    monkeypatch.setattr(feed, "next", next_batch)
    monkeypatch.setattr(compiler, "get", graph)
    loop = Loop(
        state={"a": 0, "b": 0, "c": 0},
        feed=feed,
        compiler=compiler,
        gate=StepGate(lambda: bool(asked)),
        hooks=Hooks(record=lambda record: None, save=lambda step, state: saved.append((step, state["a"]))),
        steps=range(5),
        learning_rates=np.arange(5, dtype=np.float32),
        checkpoint_every=10,
    )
    done = 3 if awaited == "batch" else 1
    assert loop.run() == done
    assert saved == [(done, done)]


class Disk:
    """Hooks whose files cannot be written from a step on. saves: how many are refused, the first."""

    def __init__(self, *, record_from=99, refused_saves=0):
        self.record_from, self.refused, self.records, self.saved = record_from, refused_saves, [], []

    def record(self, record):
        if record["step"] >= self.record_from:
            raise DataError("metrics.jsonl: no space left")
        self.records.append(record["step"])

    def save(self, step, state):
        if self.refused:
            self.refused -= 1
            raise DataError(f"checkpoint {step}: no space left")
        self.saved.append(step)


class ToldGate(StepGate):
    """Grants two steps more once it is told to end, as the gate of several processes may."""

    def __init__(self):
        super().__init__()
        self.told, self.more = [], 2

    def end(self, error):
        self.told.append(str(error))

    def next_action(self, step, *, wait=True):
        self.more -= bool(self.told)
        return NextAction.STOP if self.more < 0 else NextAction.STEP


def failing_loop(monkeypatch, disk, *, gate=None, bad=(), non_finite=None):
    monkeypatch.setattr("jax.device_get", read_metrics)
    return Loop(
        state={"a": 0, "b": 0},
        feed=FakeFeed(8),
        compiler=FakeCompiler([], bad=bad),
        gate=gate or StepGate(),
        hooks=Hooks(record=disk.record, save=disk.save),
        steps=range(8),
        learning_rates=np.arange(8, dtype=np.float32),
        checkpoint_every=3,
        non_finite=non_finite,
    )


@pytest.fixture
def no_waits(monkeypatch):
    monkeypatch.setattr(f"{__name__}.STEP_S", 0.0)
    monkeypatch.setattr(f"{__name__}.WAIT_S", 0.0)


def test_metrics_that_cannot_be_written_end_the_run_at_the_gate_with_its_state_saved(monkeypatch, no_waits):
    """The steps that all processes were granted are run by this one too: the others wait for it inside them."""
    disk, gate = Disk(record_from=2), ToldGate()
    with pytest.raises(DataError, match=r"^metrics\.jsonl: no space left$"):
        failing_loop(monkeypatch, disk, gate=gate).run()
    assert set(gate.told) == {"metrics.jsonl: no space left"} and disk.records == [1] and disk.saved[-1] in (4, 5)
    disk = Disk(record_from=2)
    with pytest.raises(DataError, match="no space left"):
        failing_loop(monkeypatch, disk).run()
    assert disk.records == [1] and disk.saved[-1] in (2, 3)


def test_a_save_that_is_refused_ends_the_run_and_is_tried_once_more(monkeypatch, no_waits):
    disk = Disk(refused_saves=1)
    with pytest.raises(DataError, match=r"^checkpoint 3: no space left$"):
        failing_loop(monkeypatch, disk).run()
    assert disk.saved == [3]
    disk = Disk(refused_saves=2)
    with pytest.raises(DataError, match=r"^checkpoint 3: no space left$"):
        failing_loop(monkeypatch, disk).run()
    assert disk.saved == []


def test_updates_that_were_not_finite_before_a_resume_count(monkeypatch, no_waits):
    monkeypatch.setattr("pipeline.train.loop.MAX_NON_FINITE", 3)
    counts = collections.Counter({"t": 2})
    with pytest.raises(DataError, match=r"step 2 \(t\): 4 updates of this task in a row"):
        failing_loop(monkeypatch, Disk(), bad=(0.0, 1.0), non_finite=counts).run()
    counts = collections.Counter({"t": 3})
    assert failing_loop(monkeypatch, Disk(), bad=(1.0, 7.0), non_finite=counts).run() == 8
    assert counts == {"t": 1}
