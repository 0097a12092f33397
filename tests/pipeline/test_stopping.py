"""Requests to stop, at any moment of a job."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import stopping

ROOT = Path(__file__).resolve().parents[2]

# A job that says when it has come to a phase, and then does what the test asks for.
JOB = """
import os, signal, sys, time
from pathlib import Path
from pipeline.cli import run_job
from pipeline.errors import EXIT_RUN_AGAIN

def job(arguments, stop):
    {phase}
    Path(sys.argv[1]).touch()
    {work}
    return EXIT_RUN_AGAIN

sys.exit(run_job(job, None))
"""
# Seconds for what must come, on any machine; what must not come takes longer.
PATIENCE_S = 200
SLEEP = "time.sleep(1000)"
UNTIL_ASKED = "while not stop.is_set(): time.sleep(0.01)"


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def _heed_signals() -> None:
    """In the job's process: nohup, under which these tests may run, has hangups ignored, a shell in the background
    interrupts."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def stopped(tmp_path, *signals, phase="pass", work=SLEEP, terminal=True) -> tuple[int, list[str], float]:
    """(exit code, lines, seconds from the first signal on) of a job in ``tmp_path`` that is sent signals, each once it
    spoke."""
    path, (read, write) = tmp_path / "there", os.pipe()
    if not terminal:
        os.close(read)
    code = JOB.format(phase=phase, work=work)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(path)]
    options = {"stdout": write, "stderr": write, "env": environment, "cwd": tmp_path}
    process = subprocess.Popen(command, preexec_fn=_heed_signals, **options)
    os.close(write)
    try:
        _await(path.exists)
        with open(read) if terminal else open(os.devnull) as file:
            began, said = time.monotonic(), ""
            for count, number in enumerate(signals):
                # The same signal twice is one for a process that has not run in between.
                said += file.readline() if count else ""
                process.send_signal(number)
            returned = process.wait(PATIENCE_S)
            took_s = time.monotonic() - began
            return returned, (said + file.read()).splitlines(), took_s
    finally:
        process.kill()


def _await(ready) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("terminal", [True, False], ids=["there", "gone"])
def test_a_stop_is_noted_once_there_is_something_to_save(tmp_path, number, terminal):
    code, lines, _ = stopped(tmp_path, number, phase="stop.defer()", work=UNTIL_ASKED, terminal=terminal)
    assert code == 75
    told = ["stopping after this step, saving the state ... (once more: at once, without saving)"]
    assert lines == (told if terminal else [])


@pytest.mark.parametrize("number", SIGNALS)
def test_before_that_a_stop_ends_the_job_at_once_with_one_line(tmp_path, number):
    code, lines, _ = stopped(tmp_path, number)
    assert code == 75 and lines == ["stopped; run the same command again"]


def test_a_stop_is_obeyed_while_the_main_thread_is_in_a_library(tmp_path):
    """A call into C that no signal interrupts, which lets other threads run: a lock that is never free."""
    work = "import ctypes; c, m = ctypes.CDLL(None), ctypes.create_string_buffer(128); c.pthread_mutex_lock(m)"
    code, lines, _ = stopped(tmp_path, signal.SIGTERM, work=f"{work}; c.pthread_mutex_lock(m)")
    assert code == 75 and len(lines) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_at_once(tmp_path, number, code):
    found, lines, _ = stopped(tmp_path, number, number, phase="stop.defer()")
    assert found == code
    assert lines[1:] == ["stopped at once, without saving; run the same command again"]


def test_a_stop_that_takes_too_long_ends_without_a_save(tmp_path):
    """A step, a compile or a save that never ends; one that ends in time is not cut off."""
    phase = "stop.limit_s = 0.5\n    stop.defer()"
    code, lines, took_s = stopped(tmp_path, signal.SIGTERM, phase=phase)
    assert code == 75 and took_s >= 0.5
    assert lines[1:] == ["stopped 0.5 s after it was asked for, without saving; run the same command again"]
    (tmp_path / "there").unlink()
    code, lines, _ = stopped(tmp_path, signal.SIGTERM, phase="stop.limit_s = 1000\n    stop.defer()", work=UNTIL_ASKED)
    assert code == 75 and len(lines) == 1


def test_a_stop_that_came_with_the_last_step_holds(tmp_path):
    work = UNTIL_ASKED + "\n    stop.at_once('stopped before evaluation')\n    time.sleep(1000)"
    code, lines, _ = stopped(tmp_path, signal.SIGTERM, phase="stop.defer()", work=work)
    assert code == 75 and lines[1:] == ["stopped before evaluation"]


def test_a_signal_of_a_forked_child_is_the_child_s(tmp_path):
    """One Ctrl-C reaches a terminal's whole group: pooled children must not look like a second one."""
    work = (
        "child = os.fork()\n    if not child: os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
        "    assert os.waitpid(child, 0)[1] == signal.SIGINT\n    time.sleep(0.2)\n    assert not stop.is_set()"
    )
    code, lines, _ = stopped(tmp_path, phase="stop.defer()", work=work)
    assert code == 75 and lines == []


def test_what_the_job_has_started_ends_with_it(tmp_path):
    """A child, and a child's child that is in a session of its own."""
    pids = tmp_path / "pids"
    inner = "echo $$ >> pids; sleep 1000; true"
    phase = (
        f"import subprocess; subprocess.Popen(['sh', '-c', 'echo $$ >> pids; setsid sh -c \"{inner}\"; true'])\n"
        "    while not Path('pids').exists() or len(Path('pids').read_text().split()) < 2: time.sleep(0.01)"
    )
    code, lines, _ = stopped(tmp_path, signal.SIGTERM, phase=phase)
    assert code == 75 and len(lines) == 1
    _await(lambda: not any(_runs(pid) for pid in pids.read_text().split()))


def test_what_is_started_while_the_job_ends_ends_too(tmp_path):
    """By a child that was found and is not killed yet."""
    child = "while [ ! -e go ]; do sleep 0.01; done; sh -c 'echo $$ > pid; exec sleep 1000'"
    phase = (
        f"import subprocess; from pipeline import stopping; subprocess.Popen(['sh', '-c', {child!r}])\n"
        "    look = stopping._descendants\n"
        "    def slow(root):\n"
        "        found = look(root); Path('go').touch()\n"
        "        while not (Path('pid').exists() and Path('pid').read_text()): time.sleep(0.01)\n"
        "        return found\n"
        "    stopping._descendants = slow"
    )
    code, lines, _ = stopped(tmp_path, signal.SIGTERM, phase=phase)
    assert code == 75 and len(lines) == 1
    _await(lambda: not _runs((tmp_path / "pid").read_text().strip()))


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_nohup_ignores_stays_ignored():
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)" + JOB.format(
        phase="os.kill(os.getpid(), signal.SIGHUP)", work="time.sleep(0.1); assert not stop.is_set()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, os.devnull], env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=PATIENCE_S
    )
    assert done.returncode == 75


def test_a_stop_that_the_job_asks_for_itself_is_no_second_one(monkeypatch):
    ended = []
    monkeypatch.setattr(stopping, "end_process", ended.append)
    stop = stopping.Stop("stopped")
    stop.defer()
    stop.ask()
    assert stop.is_set()
    stop.ask()
    stop.close()
    assert ended == []
    # Without anything to save it ends the process.
    early = stopping.Stop("stopped")
    early.ask()
    assert ended == [75]
