"""How a run is asked to stop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

ASKED = """
import os, signal, sys
from pathlib import Path
from pipeline.cli import run_job
from pipeline.errors import EXIT_RUN_AGAIN
from pipeline.pretrain import _stop_on_signals

def job(arguments):
    with _stop_on_signals() as stop:
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
        Path(sys.argv[2]).write_text(str(stop.is_set()))
    return EXIT_RUN_AGAIN

sys.exit(run_job(job, None))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("terminal", ["there", "gone"])
def test_a_signal_asks_for_a_stop_whether_or_not_someone_reads_the_terminal(tmp_path, name, terminal):
    read, write = os.pipe()
    if terminal == "gone":
        os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", ASKED, name, str(tmp_path / "asked")],
        stdout=write,
        stderr=write,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    os.close(write)
    assert (tmp_path / "asked").read_text() == "True"
    assert done.returncode == 75
