"""What a command prints: to a reader that has gone, to a disk that is full, in a locale without its characters."""

import os
import pty
import subprocess
import sys

import pytest

# A job that prints more than a pipe holds, then does its work.
JOB = """
import sys
from pipeline.cli.job import run_job
def job(arguments, stop):
    for _ in range(3):
        print("\\u2013" * 40_000, flush=True)
        print("warning", file=sys.stderr)
    open(sys.argv[1], "w").write("done")
    return 0
sys.exit(run_job(job, None))
"""


@pytest.fixture(params=["", "1"], ids=["buffered", "unbuffered"])
def run(tmp_path, request):
    def start(*, stdout, stderr=subprocess.PIPE, **environment):
        command = [sys.executable, "-c", JOB, str(tmp_path / "work")]
        environment["PYTHONUNBUFFERED"] = request.param
        done = subprocess.run(command, stdout=stdout, stderr=stderr, env=os.environ | environment, timeout=200)
        assert (tmp_path / "work").read_text() == "done"
        return done

    return start


def test_a_reader_that_has_gone_does_not_end_a_job(run):
    reader, writer = os.pipe()
    os.close(reader)
    done = run(stdout=writer)
    assert (done.returncode, done.stderr.split()) == (0, [b"warning"] * 3)
    assert run(stdout=writer, stderr=writer).returncode == 0
    os.close(writer)


def test_a_terminal_that_was_closed_does_not_end_a_job(run):
    master, terminal = pty.openpty()
    os.close(master)
    assert run(stdout=terminal, stderr=terminal).returncode == 0
    os.close(terminal)


def test_output_that_a_full_disk_lost_is_said_once_all_else_is_done(run):
    with open("/dev/full", "w") as full:
        done = run(stdout=full)
    assert done.returncode == 1
    assert done.stderr.decode().splitlines()[3:] == [
        "failed: the output could not be written: [Errno 28] No space left on device; all else is done"
    ]


def test_a_locale_without_a_character_has_its_number(run):
    done = run(stdout=subprocess.PIPE, PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, (b"\\u2013" * 40_000 + b"\n") * 3)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_was_closed_lends_its_number_to_no_file(tmp_path, closed):
    """What a library prints by number would land in that file."""
    job = f"""
import os, sys
from pipeline.cli.job import run_job
def job(arguments, stop):
    with open({str(tmp_path / "work")!r}, "w") as file:
        file.write("done")
        for number in (1, 2):
            os.write(number, b"from a library")
        print("–", file=sys.stderr)
        print("–", sys.stdin.read())
    return 0
sys.exit(run_job(job, None))
"""
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, job],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        timeout=60,
    )
    assert (done.returncode, (tmp_path / "work").read_text()) == (0, "done")


@pytest.mark.parametrize(("ends", "code"), [("return 0", 0), ("return 75", 75), ("raise RuntimeError('bug')", 1)])
@pytest.mark.parametrize(
    "start",
    ["threading.Thread(target=time.sleep, args=(600,)).start()", "ThreadPoolExecutor().submit(time.sleep, 600)"],
)
def test_a_thread_that_never_ends_does_not_keep_a_job_that_has(start, ends, code):
    job = f"""
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pipeline import stopping
from pipeline.cli.job import run_job
stopping.LIMIT_S = 0.2
def job(arguments, stop):
    {start}
    {ends}
sys.exit(run_job(job, None))
"""
    done = subprocess.run([sys.executable, "-c", job], capture_output=True, timeout=200)
    assert done.returncode == code and b"a thread of this process has not ended within 0.2 s" in done.stderr
    assert (b"RuntimeError: bug" in done.stderr) == (code == 1)
