"""The display of a run: plain lines, and a panel that fits its terminal."""

import io

import pytest
from rich.console import Console

from pipeline.train.telemetry.progress import Panel, Progress, _clock, _short


def record(step: int, **fields) -> dict:
    defaults = {
        "task": "digits",
        "variant": "64x64",
        "loss": 2.5,
        "chance": 2.7726,
        "grad_norm": 0.75,
        "examples": 64,
        "tokens": 6400,
        "data_wait_s": 1.0,
        "compile_wait_s": 0.0,
        "step_s": 3.0,
        "task_steps": 1,
        "expected_steps": 0.9,
    }
    return {"step": step} | defaults | fields


def test_plain_lines(capsys):
    progress = Progress(mode="plain", steps=range(3), every_s=0.0)
    progress.update(record(1))
    progress.update(record(3, data_wait_s=3.0, step_s=1.0))
    progress.close()
    first, last = capsys.readouterr().out.splitlines()
    # 64 examples in 4 s of which 1 waited, at the start: two steps of 3 s are left; then 128 in 8 s of which 4 waited.
    assert first == (
        "step 1/3 | digits/64x64 loss 2.5000 (chance 2.773) | 16 examples/s | 1.6k tokens/s | data wait 25% | 0:06 left"
    )
    assert last.endswith("| 16 examples/s | 1.6k tokens/s | data wait 50% | 0:00 left")


def test_utilisation_where_it_is_known(capsys):
    """Half of 4 s and a tenth of 4 s at peak are 2.4 of 8 s."""
    progress = Progress(mode="plain", steps=range(9), every_s=0.0)
    progress.update(record(1, mfu=0.5))
    progress.update(record(2, mfu=0.1))
    assert "| MFU 50% |" in (lines := capsys.readouterr().out.splitlines())[0] and "| MFU 30% |" in lines[1]


def test_progress_forgets_a_slow_start_and_counts_no_compile_time(capsys):
    progress = Progress(mode="plain", steps=range(200), every_s=0.0)
    progress.update(record(1, data_wait_s=500.0, compile_wait_s=900.0))
    for step in range(2, 101):
        progress.update(record(step, data_wait_s=0.0, step_s=2.0))
    # 100 steps of 2 s are left.
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("| 32 examples/s | 3.2k tokens/s | data wait 0% | 3:20 left")


def test_plain_lines_come_seldom_but_the_last_comes(capsys):
    progress = Progress(mode="plain", steps=range(100), every_s=3600.0)
    for step in range(1, 101):
        progress.update(record(step))
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) <= 2 and shown[-1].startswith("step 100/100")


ENTRY = {
    "dataset": "digits",
    "task": "zero_shot_image",
    "metrics": {"acc1": 0.875, "acc5": 1.0},
    "chance": {"acc1": 0.1},
}


def test_an_evaluation_is_a_line(capsys):
    progress = Progress(mode="plain", steps=range(100), every_s=3600.0)
    progress.evaluated(50, [ENTRY, ENTRY | {"task": "knn_image"}])
    assert capsys.readouterr().out == (
        "evaluation after step 50 | digits/zero_shot_image acc1 0.875 (chance 0.1) | digits/knn_image acc1 0.875 "
        "(chance 0.1)\n"
    )
    Progress(mode="none", steps=range(100), every_s=1.0).evaluated(50, [ENTRY])
    progress.evaluated(51, [])
    assert capsys.readouterr().out == ""


def test_no_progress(capsys):
    progress = Progress(mode="none", steps=range(1), every_s=0.0)
    progress.update(record(1))
    progress.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3600, "1:00:00"), (7384, "2:03:04")]
)
def test_clock(seconds, text):
    assert _clock(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123, "0.0123"), (16, "16"), (999, "999"), (1600, "1.6k"), (2.34e6, "2.34M"), (3e9, "3G")]
)
def test_short_numbers(value, text):
    assert _short(value) == text


# --- the panel ---


def shown(num_tasks: int, *, width: int, height: int, evaluated: list[str] = ()) -> list[str]:
    """The last picture of a panel after two steps of each task, the first of which have had the most."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    panel = Panel(range(10_000), console=console)
    progress = Progress(mode="none", steps=range(10_000), every_s=0.0)
    for step in range(1, 2 * num_tasks + 1):
        task = (step - 1) % num_tasks
        line = record(
            step,
            task=f"task_{task:02}_image_text",
            task_steps=1000 - task,
            expected_steps=990.4,
            mfu=0.41,
            temperatures={"text_vision": 0.07, "audio_text": 0.2},
            rss_bytes=3.2e9,
            device_peak_bytes=61e9,
        )
        if step == 1:
            line["alarms"] = ["task_00_image_text: gradient norm 812, usually 3.1 " + "and more " * 20]
        progress.update(line)
        panel.add(line)
    panel.evaluated(1500, list(evaluated))
    panel.close()
    with console.capture() as capture:
        console.print(panel._render(progress._overview(line)))
    return capture.get().splitlines()


def test_the_panel_shows_the_latest_evaluation_in_place_of_tasks():
    lines = shown(40, width=80, height=24, evaluated=[f"data set {n} acc1 0.5" for n in range(9)])
    text = "\n".join(lines)
    assert len(lines) < 24 and "evaluation after step 1,500" in text
    # A line for its step, and the first four: five fewer tasks.
    assert [n for n in range(9) if f"data set {n}" in text] == [0, 1, 2, 3] and "and 30 more tasks" in text


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(("num_tasks", "height"), [(8, 24), (40, 24), (40, 60)])
def test_the_panel_fits_its_terminal(num_tasks, width, height):
    lines = shown(num_tasks, width=width, height=height)
    assert len(lines) < height and all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    rows = sum("_image_text  " in line for line in lines)
    # Of 24 lines: frame 2, bar, speed 2, head of the table, "and more", alarm, cursor.
    assert rows == {(8, 24): 8, (40, 24): 15, (40, 60): 40}[num_tasks, height]
    assert (f"and {num_tasks - rows} more tasks with fewer steps" in text) == (rows < num_tasks)
    assert "step 16 of 10,000" in text or "step 80 of 10,000" in text
    for part in ("16 examples/s", "1.6k tokens/s", "MFU 41%", "data wait 25%", "3.2 GB host", "step 1: task_00"):
        assert part in text
    first = next(line for line in lines if "task_00_image_text  " in line)
    assert first.strip("│ ").split() == [
        "task_00_image_text",
        "1,000",
        "of",
        "990",
        "2.5/2.77",
        "0.75",
        "25%",
        "0.07–0.2",
    ]


def test_a_name_is_no_markup():
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24, color_system=None)
    panel = Panel(range(9), console=console)
    progress = Progress(mode="none", steps=range(9), every_s=0.0)
    line = record(1, task="[bold]x[/bold]", alarms=["[/] torn"])
    progress.update(line)
    panel.add(line)
    panel.show(progress._overview(line))
    panel.close()
    assert "[bold]x[/bold]" in console.file.getvalue() and "[/] torn" in console.file.getvalue()
