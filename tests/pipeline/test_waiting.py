"""Lines while a job waits, and a bound for what nothing can stop."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import waiting

ROOT = Path(__file__).resolve().parents[2]


# Seconds for what must come, on any machine.
PATIENCE_S = 200


@pytest.fixture(autouse=True)
def no_lines_of_waits():
    """Here they are looked at."""


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(waiting, "EVERY_S", 0.05)


def await_text(capfd, text: str) -> str:
    found, deadline = "", time.monotonic() + PATIENCE_S
    while text not in found and time.monotonic() < deadline:
        time.sleep(0.02)
        found += capfd.readouterr().err
    return found


def said_after_the_last_wait(capfd) -> list[str]:
    """The lines until the thread that says them has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while waiting._thread is not None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return capfd.readouterr().err.splitlines()


def test_the_innermost_wait_is_said_again_and_again(often, capfd):
    state = "none"
    with waiting.waiting_for("all of it"):
        with waiting.waiting_for(lambda: f"graphs, {state}") as wait:
            assert re.search(r"^waiting for graphs, none \(\d+ s\)$", await_text(capfd, "graphs, none"), re.MULTILINE)
            state = "one"
            assert "waiting for graphs, one (" in await_text(capfd, "graphs, one")
            wait.what = "data"
            assert "waiting for data (" in await_text(capfd, "data")
        assert "waiting for all of it (" in await_text(capfd, "all of it")
    assert all(line.startswith("waiting for all of it (") for line in said_after_the_last_wait(capfd))


def test_short_waits_one_after_the_other_are_no_silence(monkeypatch, capfd):
    """No wait lasts as long as the time between two lines."""
    monkeypatch.setattr(waiting, "EVERY_S", 0.4)
    found, deadline = "", time.monotonic() + PATIENCE_S
    while "waiting for a short one" not in found and time.monotonic() < deadline:
        with waiting.waiting_for("a short one"):
            time.sleep(0.15)
        found += capfd.readouterr().err
    assert "waiting for a short one (" in found


def test_what_is_quiet_or_done_says_nothing(often, capfd):
    with waiting.waiting_for("other ranks", quiet=True), waiting.waiting_for("a step") as wait:
        await_text(capfd, "a step")
        wait.done()
        capfd.readouterr()
        # One line may have been on its way.
        said = said_after_the_last_wait(capfd)
    assert len(said) <= 1 and not any("other ranks" in line for line in said)


def test_what_cannot_be_stopped_ends_with_a_line():
    code = (
        "import ctypes; from pipeline.waiting import at_most\n"
        "with at_most(1000, 'never', code=1): pass\n"
        "with at_most(0.2, 'error: no answer', code=2): ctypes.CDLL(None).sleep(1000)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, env={"PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stderr) == (2, "error: no answer\n")


def test_a_wait_of_hours_has_a_line_a_minute_after_the_first(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    short, long = waiting.Wait("a step"), waiting.Wait("machines", long=True)
    assert short.every_s() == long.every_s() == 5
    now[0] = 60
    assert (short.every_s(), long.every_s()) == (5, 60)
    assert short.line() == "waiting for a step (60 s)"
