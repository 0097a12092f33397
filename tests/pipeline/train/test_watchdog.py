"""A process that hangs ends in bounded time and says where; one that goes on is left alone."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

HANG = """
import sys, threading, time
from pathlib import Path
from pipeline.train.watchdog import Watchdog

dog = Watchdog(Path(sys.argv[1]), timeout_s=1.0, rank=3)

def busy_in_a_thread():
    time.sleep(60)

def stuck_in_the_loop():
    {how}

threading.Thread(target=busy_in_a_thread, daemon=True).start()
for step in range(5):
    time.sleep(0.4)
    dog.heartbeat(f"step {{step}}")
stuck_in_the_loop()
"""


def run(how: str, path: Path) -> tuple[subprocess.CompletedProcess, float]:
    began = time.monotonic()
    command = [sys.executable, "-c", HANG.format(how=how), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env={"PYTHONPATH": str(ROOT)})
    return done, time.monotonic() - began


def test_a_hang_ends_with_the_stack_of_every_thread(tmp_path):
    done, took_s = run("threading.Lock().acquire() and threading.Event().wait()", tmp_path / "stalls/rank-3.txt")
    assert done.returncode == 1 and took_s < 20
    text = (tmp_path / "stalls/rank-3.txt").read_text()
    assert "rank 3: nothing was finished for 1 s, the last was step 4" in done.stderr.splitlines()[0]
    for where in ("stuck_in_the_loop", "busy_in_a_thread"):
        assert where in text and where in done.stderr


def test_a_process_that_was_frozen_has_not_hung(tmp_path):
    """Ctrl-Z and fg, a paused container: it beats again within the limit once it runs."""
    how = "print('frozen', flush=True); sys.stdin.read(1); dog.heartbeat('a wait'); dog.close()"
    code = HANG.format(how=how).replace("range(5)", "range(1)").replace("timeout_s=1.0", "timeout_s=1.5")
    command = [sys.executable, "-c", code, str(tmp_path / "stalls/rank-3.txt")]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PYTHONPATH": str(ROOT)}
    )
    with process:
        assert process.stdout.readline() == b"frozen\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.8)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.3)
        assert process.communicate(b".", timeout=60) == (b"", b"")
    assert process.returncode == 0


@pytest.mark.parametrize("gone", ["closed", "never there"])
def test_a_hang_ends_where_nobody_reads_of_it(tmp_path, gone):
    """Within seconds: a watchdog that fails would leave it to the backstop, after half a minute and more."""
    code, path = HANG.format(how="time.sleep(60)").replace("range(5)", "range(1)"), tmp_path / "stalls/rank-3.txt"
    reader, writer = os.pipe()
    os.close(reader)
    began = time.monotonic()
    shell = ["sh", "-c", 'exec "$@" 2>&-' if gone == "never there" else 'exec "$@"', "sh"]
    command = [*shell, sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, stderr=writer, timeout=100, env={"PYTHONPATH": str(ROOT)})
    os.close(writer)
    assert done.returncode == 1 and time.monotonic() - began < 20
    assert "stuck_in_the_loop" in path.read_text()


def test_a_hang_that_holds_the_interpreter_ends_too(tmp_path, monkeypatch):
    """A call into C that never lets go: no Python thread runs any more."""
    how = "import ctypes; ctypes.PyDLL(None).sleep(90)"
    script = HANG.replace("dog = ", "import pipeline.train.watchdog as w; w._BACKSTOP_S = w._PATIENCE = 1.0; dog = ")
    path = tmp_path / "stalls/rank-3.txt"
    command = [sys.executable, "-c", script.format(how=how), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert "stuck_in_the_loop" in path.read_text()


def test_what_another_process_has_left_is_kept(tmp_path):
    from pipeline.train.watchdog import Watchdog

    path = tmp_path / "stalls/rank-0.txt"
    path.parent.mkdir()
    path.write_text("stacks of the process before")
    Watchdog(path, timeout_s=60).close()
    assert path.read_text() == "stacks of the process before"
    done, _ = run("threading.Event().wait()", tmp_path / "stalls/rank-0.txt")
    assert done.returncode == 1 and "stuck_in_the_loop" in (tmp_path / "stalls/rank-0-2.txt").read_text()


def test_a_compile_or_a_save_may_take_longer(tmp_path):
    from pipeline.train.watchdog import Watchdog

    dog = Watchdog(tmp_path / "rank-0.txt", timeout_s=0.4)
    dog.is_patient = lambda: True
    time.sleep(1.0)
    dog.close()


def test_a_process_that_computes_is_slow_and_gets_longer(tmp_path, monkeypatch, capfd):
    from pipeline.train import watchdog

    # An hour without a step: two cores at work, or idle streams that take a twentieth of one.
    assert watchdog.computes(3600, 7000) and not watchdog.computes(3600, 180)
    monkeypatch.setattr(watchdog, "computes", lambda silent_s, cpu_s: True)
    # Long enough that a busy machine cannot reach it here.
    monkeypatch.setattr(watchdog, "_PATIENCE", 1000)
    dog = watchdog.Watchdog(tmp_path / "rank-0.txt", timeout_s=0.1)
    text, deadline = "", time.monotonic() + 20
    while "slow, not hung" not in text and time.monotonic() < deadline:
        time.sleep(0.05)
        text += capfd.readouterr().err
    dog.close()
    assert (
        "nothing was finished for 0.1 s since the start, but the process computes: slow, not hung; it has 100" in text
    )


def test_a_wait_for_something_else_has_no_limit_and_is_announced(tmp_path, monkeypatch, capfd):
    """Three times the limit pass while others hold the CPUs; once they are free, a process that hangs ends."""
    from pipeline.train import watchdog

    ended = threading.Event()
    monkeypatch.setattr(watchdog, "end_process", lambda code: ended.set())
    dog = watchdog.Watchdog(tmp_path / "rank-0.txt", timeout_s=0.4)
    excuses = []

    def excuse():
        excuses.append(time.monotonic())
        if len(excuses) == 5:
            raise ConnectionError("the head does not answer")
        return "a free CPU" if len(excuses) < 14 else None

    dog.excuse = excuse
    assert ended.wait(30)
    dog.close()
    # The limit begins anew at each excuse, of which there were twelve.
    assert len(excuses) >= 14 and excuses[12] - excuses[0] > 3 * 0.4
    said = capfd.readouterr().err
    assert said.count("waiting for a free CPU (") == 12
    assert "nothing was finished for 0.4 s, the last was the start" in said


def test_a_run_that_goes_on_leaves_nothing_behind(tmp_path):
    from pipeline.train.watchdog import Watchdog

    dog = Watchdog(tmp_path / "stalls/rank-0.txt", timeout_s=0.5)
    for _ in range(10):
        time.sleep(0.1)
        dog.heartbeat("a step")
    dog.close()
    assert not (tmp_path / "stalls").exists()
    time.sleep(1.0)


@pytest.fixture(autouse=True)
def _no_backstop_left():
    import faulthandler

    yield
    faulthandler.cancel_dump_traceback_later()
