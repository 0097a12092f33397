"""A process that hangs ends in bounded time and says where; one that goes on is left alone.

Limits hold for processes that hang, and on a clock that only the test moves: a loaded machine may miss one.
"""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from pipeline.train import watchdog
from pipeline.train.watchdog import Watchdog

ROOT = Path(__file__).resolve().parents[3]
# Seconds for a process that hangs to end.
PATIENCE_S = 200

HANG = """
import sys, threading, time
from pathlib import Path
from pipeline.train import watchdog

# One that fails is not helped out.
watchdog._BACKSTOP_S = {backstop_s}
dog = watchdog.Watchdog(Path(sys.argv[1]), timeout_s=1000.0, rank=3)

def busy_in_a_thread():
    time.sleep(1000)

def stuck_in_the_loop():
    dog._timeout_s = 1.0
    {how}

threading.Thread(target=busy_in_a_thread, daemon=True).start()
for step in range(5):
    dog.heartbeat(f"step {{step}}")
stuck_in_the_loop()
"""
FOR_EVER = "threading.Event().wait()"


def command(path: Path, how: str = FOR_EVER, *, backstop_s: float = 1000.0) -> list[str]:
    return [sys.executable, "-c", HANG.format(how=how, backstop_s=backstop_s), str(path)]


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, text=True, timeout=PATIENCE_S, env={"PYTHONPATH": str(ROOT)}, **options)


def test_a_hang_ends_with_the_stack_of_every_thread(tmp_path):
    path = tmp_path / "stalls/rank-3.txt"
    done = run(command(path, "threading.Lock().acquire() and threading.Event().wait()"), capture_output=True)
    assert done.returncode == 1
    text = path.read_text()
    assert "rank 3: nothing was finished for 1 s, the last was step 4" in done.stderr.splitlines()[0]
    for where in ("stuck_in_the_loop", "busy_in_a_thread"):
        assert where in text and where in done.stderr


@pytest.mark.parametrize("gone", ["closed", "never there"])
def test_a_hang_ends_where_nobody_reads_of_it(tmp_path, gone):
    path = tmp_path / "stalls/rank-3.txt"
    reader, writer = os.pipe()
    os.close(reader)
    shell = ["sh", "-c", 'exec "$@" 2>&-' if gone == "never there" else 'exec "$@"', "sh"]
    done = run([*shell, *command(path)], stderr=writer)
    os.close(writer)
    assert done.returncode == 1 and "stuck_in_the_loop" in path.read_text()


def test_a_hang_that_holds_the_interpreter_ends_too(tmp_path):
    """A call into C that never lets go: no Python thread runs any more."""
    how = "watchdog._PATIENCE = 1.0; dog._look(); import ctypes; ctypes.PyDLL(None).sleep(1000)"
    path = tmp_path / "stalls/rank-3.txt"
    assert run(command(path, how, backstop_s=1.0), capture_output=True).returncode == 1
    assert "stuck_in_the_loop" in path.read_text()


def test_what_another_process_has_left_is_kept(tmp_path):
    path = tmp_path / "stalls/rank-0.txt"
    path.parent.mkdir()
    path.write_text("stacks of the process before")
    Watchdog(path, timeout_s=1000).close()
    assert path.read_text() == "stacks of the process before"
    assert run(command(path), capture_output=True).returncode == 1
    assert "stuck_in_the_loop" in (tmp_path / "stalls/rank-0-2.txt").read_text()


class Clock:
    """The time, and the CPU time of the process."""

    def __init__(self):
        self.now = self.cpu_s = 0.0

    def look_at(self, dog: Watchdog, now: float) -> None:
        self.now = now
        dog._look()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    times = types.SimpleNamespace(monotonic=lambda: clock.now, process_time=lambda: clock.cpu_s)
    monkeypatch.setattr(watchdog, "time", times)
    return clock


@pytest.fixture
def codes(monkeypatch):
    """The exit codes with which the process would have ended."""
    codes = []
    monkeypatch.setattr(watchdog, "end_process", codes.append)
    return codes


@pytest.fixture
def dog(clock, codes, tmp_path):
    """One with a limit of 100 s, which looks when the test says so."""
    dog = Watchdog(tmp_path / "stalls/rank-0.txt", timeout_s=100)
    dog._closed.set()
    dog._thread.join()
    yield dog
    dog.close()


def test_a_compile_or_a_save_may_take_longer(dog, clock, codes):
    dog.is_patient = lambda: True
    clock.look_at(dog, 399)
    assert codes == []
    clock.look_at(dog, 401)
    assert codes == [1]


def test_a_process_that_computes_is_slow_and_gets_longer(dog, clock, codes, capfd):
    # An hour without a step: two cores at work, or idle streams that take a twentieth of one.
    assert watchdog.computes(3600, 7000) and not watchdog.computes(3600, 180)
    clock.cpu_s = 300
    clock.look_at(dog, 99)
    assert capfd.readouterr().err == ""
    for now in (101, 399):
        clock.look_at(dog, now)
    assert codes == [] and capfd.readouterr().err == (
        "rank 0: nothing was finished for 100 s since the start, but the process computes: slow, not hung; it has "
        "400 s in all (cluster.stall_timeout_s)\n"
    )
    clock.look_at(dog, 401)
    assert codes == [1]


def watch(dog: Watchdog, clock: Clock, seconds: list[float]) -> None:
    """Runs the watch through waits of these lengths."""
    left = iter(seconds)

    def wait(interval):
        lasts = next(left, None)
        clock.now += lasts or 0
        return lasts is None

    closed, dog._closed = dog._closed, types.SimpleNamespace(wait=wait)
    dog._watch()
    dog._closed = closed


def test_a_process_that_was_frozen_has_not_hung(dog, clock, codes):
    """Ctrl-Z and fg, a paused container: one second of the wait during which it was frozen counts."""
    watch(dog, clock, [1, 1000, *[1] * 98])
    assert codes == []
    watch(dog, clock, [1])
    assert codes == [1]


def test_a_cluster_that_takes_long_to_answer_is_no_frozen_process(dog, clock, codes):
    def excuse():
        clock.now += 30

    dog.excuse = excuse
    watch(dog, clock, [1] * 60)
    assert codes


def test_a_wait_for_something_else_has_no_limit_and_is_announced(dog, clock, codes, capfd):
    """Three times the limit pass while others hold the CPUs; once they are free, a process that hangs ends."""
    excuses = []

    def excuse():
        excuses.append(clock.now)
        if len(excuses) == 5:
            raise ConnectionError("the head does not answer")
        return "a free CPU" if len(excuses) < 14 else None

    dog.excuse = excuse
    for now in range(25, 450, 25):
        clock.look_at(dog, now)
        assert codes == []
    # The limit begins anew at each excuse, of which there were twelve, the last at 325 s.
    said = capfd.readouterr().err
    assert excuses[12] == 325 and said.count("waiting for a free CPU (") == 12 and "failed" not in said
    clock.look_at(dog, 450)
    assert codes == [1]
    assert "nothing was finished for 100 s, the last was the start" in capfd.readouterr().err


@pytest.mark.parametrize("rank", [0, 3])
def test_what_a_process_waits_for_is_said_again_and_again_and_in_the_end(dog, clock, codes, capfd, rank):
    """Of ranks other than 0 once: hundreds of them may wait for the same."""
    dog._rank = rank
    dog.waits_for = lambda: f"a batch of films (given to a decoder {clock.now} s ago)"
    for now in (50, 60, 80, 101):
        clock.look_at(dog, now)
    who = "rank 3: " if rank else ""
    line = f"{who}waiting for a batch of films (given to a decoder {{0}} s ago) ({{0}} s since the start)"
    said = [line.format(now) for now in ((50,) if rank else (50, 80))]
    assert codes == [1]
    found = capfd.readouterr().err.splitlines()
    assert found[: len(said)] == said
    assert found[len(said)].startswith(
        f"failed: rank {rank}: nothing was finished for 100 s, the last was the start; it waits for a batch of films "
        "(given to a decoder 80 s ago). "
    )


def test_a_run_that_goes_on_leaves_nothing_behind(dog, clock, codes, tmp_path):
    for step in range(10):
        clock.look_at(dog, 90 * step + 90)
        dog.heartbeat("a step")
    assert codes == [] and (tmp_path / "stalls").exists()
    dog.close()
    assert not (tmp_path / "stalls").exists() and not dog._thread.is_alive()


@pytest.fixture(autouse=True)
def _no_backstop_left():
    import faulthandler

    yield
    faulthandler.cancel_dump_traceback_later()
