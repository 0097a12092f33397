"""What a report says of a run that is under way, was stopped, has failed or was killed; reports by command."""

import fcntl
import json
import re
import time

import pytest

from pipeline.cli import main
from pipeline.report import live
from pipeline.report.live import live_report, report_so_far
from pipeline.report.report import write_report
from pipeline.train.attempts import command_attempt
from tests.pipeline.report.test_report import write_run


def unfinished(run_dir):
    """A run of 40 of 100 steps without an evaluation."""
    write_run(run_dir)
    (run_dir / "eval.json").unlink()
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("num_steps: 40", "num_steps: 100"))
    return run_dir


def result(run_dir) -> str:
    text = write_report(run_dir).read_text()
    return re.sub(r"<[^>]*>", " ", re.search(r'<p class="result">.*?</p>(<p class="more">.*?</p>)?', text).group())


def test_a_run_whose_directory_is_held_is_under_way(tmp_path):
    run_dir = unfinished(tmp_path / "run")
    assert "After 40 of 100 steps" in result(run_dir)
    with open(run_dir / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "This run is under way: 40 of 100 steps so far." in result(run_dir)
        assert "below that of guessing, and falls, on 2 of 2 tasks" in result(run_dir)


def test_a_stop_a_failure_and_a_kill_are_said(tmp_path):
    for name in ("stopped", "failed", "killed"):
        unfinished(tmp_path / name)
    with command_attempt(tmp_path / "stopped", began=time.time()) as attempt:
        attempt.outcome = "stopped"
    with pytest.raises(ValueError), command_attempt(tmp_path / "failed", began=time.time()):
        raise ValueError("the disk <is> full")
    # A kill leaves no last line.
    with command_attempt(tmp_path / "killed", began=time.time(), facts={"command": "imp pretrain", "commit": "abc"}):
        pass
    path = tmp_path / "killed/attempts/command.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with open(tmp_path / "stopped/.lock", "w") as lock:
        # The command writes the page itself, at its end.
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "was stopped after 40 of 100 steps and can go on" in result(tmp_path / "stopped")
    assert "failed after 40 of 100 steps" in result(tmp_path / "failed")
    assert "the disk &lt;is&gt; full" in result(tmp_path / "failed")
    assert "ended without a word after 40 of 100 steps" in result(tmp_path / "killed")
    text = (tmp_path / "killed/report.html").read_text()
    assert "<dd>imp pretrain</dd>" in text and "<dd>abc</dd>" in text


def test_a_finished_run_says_its_best_and_its_weakest_test(tmp_path):
    run_dir = write_run(tmp_path / "run")
    entry = {"dataset": "moving", "task": "retrieval_video", "num_examples": 400}
    entry |= {
        "metrics": {"r_recall@1": 0.004, "r_recall@5": 0.3},
        "chance": {"r_recall@1": 0.0025, "r_recall@5": 0.0125},
    }
    found = json.loads((run_dir / "eval.json").read_text())
    (run_dir / "eval.json").write_text(json.dumps([*found, entry]))
    text = " ".join(result(run_dir).split())
    assert text.startswith("The model beats guessing in all 2 held-out tests.")
    # (0.5 - 0.1) / 0.9 is more than (0.3 - 0.0125) / 0.9875.
    assert "Best: cifar10, zeroshot classification, 50% right (guessing: 10%)." in text
    assert "Weakest: moving, video found by text and back, 30% among the first five (guessing: 1.2%)." in text


def test_a_new_checkpoint_is_followed_by_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "_POLL_S", 0.01)
    run_dir = unfinished(tmp_path / "run")
    with live_report(run_dir):
        (run_dir / "checkpoints/40").mkdir(parents=True)
        (run_dir / "checkpoints/40/run.json").write_text("{}")
        until = time.monotonic() + 200
        while not (run_dir / "report.html").exists() and time.monotonic() < until:
            time.sleep(0.05)
    assert (run_dir / "report.html").read_text().count("</html>") == 1


def test_a_report_that_cannot_be_written_is_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pipeline.report.live.write_report", lambda run_dir: 1 / 0)
    report_so_far(tmp_path)
    assert "warning: no report could be written: " in capsys.readouterr().err


def test_runs_are_reported_again_and_compared_by_command(tmp_path, capsys):
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second", tasks=("align", "other"))
    found = json.loads((second / "eval.json").read_text())
    found[0]["metrics"]["acc1"] = 0.75
    (second / "eval.json").write_text(json.dumps(found))
    assert main(["report", str(first), str(second)]) == 0 and (second / "report.html").exists()
    out = tmp_path / "pages/both.html"
    assert main(["report", "--compare", str(first), str(second), "--out", str(out)]) == 0
    text = out.read_text()
    assert "2 runs side by side" in text and '<b class="number">0.75</b>' in text
    assert text.count('aria-label="align"') == 1 and "tasks.other.objective" in text
    for arguments in ([str(tmp_path)], ["--compare", str(first)], [str(first), "--out", str(out)]):
        assert main(["report", *arguments]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_page_of_a_run_in_a_browser(tmp_path, browser):
    run_dir = write_run(
        tmp_path / "run", tasks=("a_task_with_a_name_that_is_as_long_as_names_ever_are_in_recipes", "b")
    )
    for width in (400, 1280):
        page = browser.opened(write_report(run_dir), width=width)
        assert page.complaints == [] and page.too_wide() == []
        # Nothing lies in a box that scrolls, so paper and phones show it all.
        scrolls = "[...document.querySelectorAll('main *')].filter(e => ['auto', 'scroll'].includes("
        assert page.run(scrolls + "getComputedStyle(e).overflowY)).length") == 0
        page.screenshot(f"plain-report-{width}")
