"""Writers: real TensorBoard files, stand-ins for the two services, and what happens when one fails."""

import math
import struct
import sys
import threading
import time
import types

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from pipeline.train.telemetry import writers
from pipeline.train.telemetry.writers import BackgroundWriter, RunIdentity, evaluation_scalars, open_writers, scalars


def identity(tmp_path, *, start_step=0, logged_step=0) -> RunIdentity:
    return RunIdentity(tmp_path, "pets", start_step, logged_step)


def write_steps(names, run: RunIdentity, steps) -> None:
    opened = open_writers(names, run)
    for step in steps:
        for writer in opened:
            writer.write(step, {"a/loss": step / 4, "run/learning_rate": 0.5})
    for writer in opened:
        writer.close()


# --- names ---


def test_scalars_of_an_evaluation():
    entry = {"dataset": "pets", "task": "knn_image", "metrics": {"knn_acc1": 0.5, "knn_acc5": float("nan")}}
    assert evaluation_scalars([entry]) == {"eval/pets/knn_image/knn_acc1": 0.5}


def test_scalars_of_a_record():
    record = {
        "step": 3,
        "task": "pets",
        "variant": "32x32",
        "loss": 1.5,
        "examples": 8,
        "tokens": 32,
        "step_s": 0.25,
        "data_wait_s": 0.0,
        "compile_wait_s": 0.0,
        "learning_rate": 1e-3,
        "grad_norm": math.inf,
        "finite": True,
        "temperatures": {"text_vision": 0.5},
        "losses": {"nce": 1.25},
        "mfu": 0.5,
        "rss_bytes": 7,
        "task_steps": 2,
        "moe": {"vision": {"unrouted_fraction": 0.25, "expert_load": [0.5, 0.5]}},
        "alarms": ["x"],
        "wall_s": 9.0,
    }
    assert scalars(record) == {
        "pets/loss": 1.5,
        "pets/data_wait_s": 0.0,
        "pets/task_steps": 2.0,
        "pets/32x32/loss": 1.5,
        "pets/32x32/step_s": 0.25,
        "pets/32x32/mfu": 0.5,
        "pets/losses/nce": 1.25,
        "temperature/text_vision": 0.5,
        "pets/vision_experts/unrouted_fraction": 0.25,
        "run/learning_rate": 1e-3,
        "run/rss_bytes": 7.0,
    }


# --- TensorBoard ---


def events(path):
    """Each is its length (8 bytes), a checksum (4), itself, and a checksum (4)."""
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def tensorboard_points(folder) -> list[tuple[int, str, float]]:
    """The points that TensorBoard shows: the start of a session hides earlier ones of its step and later."""
    points = []
    for path in sorted(folder.iterdir()):
        for event in events(path):
            if event.session_log.status == SessionLog.START:
                points = [p for p in points if p[0] < event.step]
            points += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return points


def test_tensorboard_shows_each_step_once(tmp_path):
    write_steps(("tensorboard",), identity(tmp_path), range(1, 8))
    time.sleep(1.05)  # a file is named after the second in which it begins
    write_steps(("tensorboard",), identity(tmp_path, start_step=5, logged_step=7), range(6, 10))
    found = tensorboard_points(tmp_path / "tensorboard")
    assert [(step, value) for step, tag, value in found if tag == "a/loss"] == [(s, s / 4) for s in range(1, 10)]
    assert [step for step, tag, _ in found if tag == "run/learning_rate"] == list(range(1, 10))


def test_tensorboard_is_there_by_default(monkeypatch):
    assert writers.default_writers() == ("tensorboard",)
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    assert writers.default_writers() == ()
    assert writers.missing(("tensorboard", "mlflow")) == {
        "tensorboard": "pip install tensorboardX",
        "mlflow": "pip install 'imp-pretrain[mlflow]'",
    }


# --- the services ---


@pytest.fixture
def wandb(monkeypatch):
    """A module that keeps what it is given: [(how a run was opened, its points)]."""
    fake = types.ModuleType("wandb")
    fake.runs, fake.finished = [], 0

    def init(**kwargs):
        points = []
        fake.runs.append((kwargs, points))

        def finish():
            fake.finished += 1

        return types.SimpleNamespace(log=lambda values, step: points.append((step, values)), finish=finish)

    fake.init, fake.Settings = init, lambda **kwargs: kwargs
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_goes_on_with_its_run(tmp_path, wandb):
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    write_steps(("wandb",), identity(tmp_path), range(1, 8))
    write_steps(("wandb",), identity(tmp_path, start_step=5, logged_step=7), range(6, 10))
    (first, points), (second, more) = wandb.runs
    assert first == second and len(first["id"]) == 12 and first["resume"] == "allow"
    assert (first["project"], first["name"], first["config"]) == ("pets", tmp_path.name, {"seed": 3})
    assert [step for step, _ in points + more] == list(range(1, 10)) and wandb.finished == 2
    assert points[3] == (4, {"a/loss": 1.0, "run/learning_rate": 0.5})


@pytest.fixture
def mlflow(monkeypatch):
    """A server of one experiment name → id, and run id → [(step, name, value)]."""
    module, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    server = types.SimpleNamespace(experiments={}, runs={}, states=[])

    class Client:
        def get_experiment_by_name(self, name):
            found = server.experiments.get(name)
            return found and types.SimpleNamespace(experiment_id=found)

        def create_experiment(self, name):
            return server.experiments.setdefault(name, "7")

        def create_run(self, experiment, run_name):
            run_id = f"{run_name} {experiment} {len(server.runs)}"
            server.runs[run_id] = []
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

        def update_run(self, run_id, status):
            server.states.append(status)

        def log_batch(self, run_id, metrics):
            server.runs[run_id] += [(step, name, value) for name, value, _, step in metrics]

        def set_terminated(self, run_id):
            server.states.append("FINISHED")

    module.MlflowClient, entities.Metric = Client, lambda *values: values
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return server


def test_mlflow_goes_on_with_its_run(tmp_path, mlflow):
    write_steps(("mlflow",), identity(tmp_path), range(1, 8))
    write_steps(("mlflow",), identity(tmp_path, start_step=5, logged_step=7), range(6, 10))
    ((run_id, points),) = mlflow.runs.items()
    assert run_id == (tmp_path / "mlflow.id").read_text() == f"{tmp_path.name} 7 0"
    assert [(step, value) for step, name, value in points if name == "a/loss"] == [(s, s / 4) for s in range(1, 10)]
    assert mlflow.experiments == {"pets": "7"} and mlflow.states == ["RUNNING", "FINISHED"] * 2


# --- failures ---


class Broken:
    """Fails at its third point."""

    def __init__(self):
        self.points, self.closed = [], False

    def write(self, step, values):
        if len(self.points) == 2:
            raise ConnectionError("no route\nto host")
        self.points.append(step)

    def close(self):
        self.closed = True


def test_a_writer_that_fails_is_left_out_with_one_line(capsys):
    broken = Broken()
    writer = BackgroundWriter("mlflow", lambda: broken)
    for step in range(1, 9):
        writer.write(step, {})
    writer.close()
    writer.write(9, {})
    assert broken.points == [1, 2]
    assert capsys.readouterr().err == (
        "warning: logging.writers: mlflow failed: ConnectionError: no route to host; the run goes on without it\n"
    )


def test_a_writer_that_cannot_be_opened_is_left_out(capsys):
    def refuse():
        raise ValueError("no API key")

    writer = BackgroundWriter("wandb", refuse)
    writer.write(1, {})
    writer.close()
    assert "warning: logging.writers: wandb failed: ValueError: no API key;" in capsys.readouterr().err


def test_a_writer_that_hangs_holds_nothing_up(capsys, monkeypatch):
    monkeypatch.setattr(writers, "_MAX_WAITING", 3)
    monkeypatch.setattr(writers, "_CLOSE_S", 0.05)
    go_on = threading.Event()
    writer = BackgroundWriter("wandb", lambda: types.SimpleNamespace(write=lambda *_: go_on.wait(), close=lambda: None))
    for step in range(9):
        writer.write(step, {})
    writer.close()
    assert capsys.readouterr().err.splitlines() == [
        "warning: logging.writers: wandb does not keep up; the run goes on without it"
    ]
    go_on.set()


def test_the_end_waits_for_what_is_written_and_not_for_ever(capsys, monkeypatch):
    monkeypatch.setattr(writers, "_CLOSE_S", 0.05)
    go_on = threading.Event()
    writer = BackgroundWriter("wandb", lambda: types.SimpleNamespace(write=lambda *_: go_on.wait(), close=lambda: None))
    writer.write(1, {})
    writer.close()
    assert "wandb did not finish in time" in capsys.readouterr().err
    go_on.set()
