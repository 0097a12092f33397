"""Shows a run while it runs: a live panel on a terminal, elsewhere a plain line every few seconds."""

from __future__ import annotations

import collections
import dataclasses
import sys
import time
from typing import TYPE_CHECKING

import numpy as np

from pipeline.train.forecast import Forecast

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# Window of the displayed rates, in steps; short, so that start-up waits drop out soon.
_RECENT_STEPS = 64
# Seconds between two refreshes of the panel.
_PANEL_EVERY_S = 0.25
# Maximum number of alarms on the panel, and of measurements.
_MAX_ALARMS = 3
_MAX_MEASUREMENTS = 4


@dataclasses.dataclass(frozen=True)
class Overview:
    """The run as a whole, over the last steps. mfu: None if the devices' peak is unknown."""

    step: int
    num_steps: int
    time_left: str
    examples_per_s: float
    tokens_per_s: float
    wait_share: float
    mfu: float | None
    memory: str


class Progress:
    """The display of a run.

    mode: "rich" (the panel), "plain" (lines), "none", or "auto": the panel if stderr is a terminal. every_s: seconds
    between two lines. forecast: time of the steps to come.
    """

    def __init__(self, *, mode: str, steps: range, every_s: float, forecast: Forecast | None = None):
        if mode == "auto":
            mode = "rich" if sys.stderr.isatty() else "plain"
        self._num_steps = steps.stop
        self._every_s = every_s
        self._last_shown = 0.0
        self._plain = mode == "plain"
        self._panel: Panel | None = None
        self._forecast = forecast or Forecast()
        # (examples, tokens, seconds waiting for data, seconds in all, model FLOPs in seconds at peak).
        self._recent: collections.deque = collections.deque(maxlen=_RECENT_STEPS)
        if mode == "rich":
            self._panel = Panel(steps)
            self._every_s = _PANEL_EVERY_S

    def update(self, record: dict) -> None:
        """Takes a record of metrics.jsonl and refreshes the display if it is due."""
        wait_s, busy_s = record["data_wait_s"], record["data_wait_s"] + record["step_s"]
        at_peak_s = record.get("mfu", 0.0) * (busy_s + record["compile_wait_s"])
        self._recent.append((record["examples"], record["tokens"], wait_s, busy_s, at_peak_s))
        self._forecast.add(record)
        if self._panel:
            self._panel.add(record)
        now = time.monotonic()
        if now - self._last_shown < self._every_s and record["step"] != self._num_steps:
            return
        self._last_shown = now
        if self._panel:
            self._panel.show(self._overview(record))
        elif self._plain:
            print(self._line(record, self._overview(record)), flush=True)

    def evaluated(self, step: int, entries: list[dict]) -> None:
        """Takes the entries of an evaluation: on the panel the latest, elsewhere a line."""
        found = [text for entry in entries if (text := _first_metric(entry))]
        if self._panel:
            self._panel.evaluated(step, found)
        elif self._plain and found:
            print(f"evaluation after step {step} | " + " | ".join(found), flush=True)

    def _overview(self, record: dict) -> Overview:
        examples, tokens, wait_s, busy_s, at_peak_s = np.sum(self._recent, axis=0)
        busy_s = max(busy_s, 1e-9)
        steps_left = self._num_steps - record["step"]
        step_s = self._forecast.step_s()
        kinds = (("rss_bytes", "host"), ("device_peak_bytes", "device"))
        memory = [f"{record[key] / 1e9:.1f} GB {name}" for key, name in kinds if key in record]
        return Overview(
            step=record["step"],
            num_steps=self._num_steps,
            time_left="?" if step_s is None else _clock(step_s * steps_left),
            examples_per_s=examples / busy_s,
            tokens_per_s=tokens / busy_s,
            wait_share=wait_s / busy_s,
            mfu=at_peak_s / busy_s if "mfu" in record else None,
            memory=", ".join(memory),
        )

    def _line(self, record: dict, o: Overview) -> str:
        mfu = "" if o.mfu is None else f"MFU {o.mfu:.0%} | "
        chance = f" (chance {record['chance']:.4g})" if "chance" in record else ""
        return (
            f"step {o.step}/{o.num_steps} | {record['task']}/{record['variant']} loss {record['loss']:.4f}{chance} | "
            f"{_short(o.examples_per_s)} examples/s | {_short(o.tokens_per_s)} tokens/s | {mfu}"
            f"data wait {o.wait_share:.0%} | {o.time_left} left"
        )

    def close(self) -> None:
        """Ends the panel."""
        if self._panel:
            self._panel.close()


class Panel:
    """The live panel: a bar, the speed, one row per task, the last alarms. Fits into the terminal."""

    def __init__(self, steps: range, *, console: Console | None = None):
        from rich.console import Console
        from rich.live import Live

        self._tasks: dict[str, _Task] = {}
        self._alarms: collections.deque = collections.deque(maxlen=_MAX_ALARMS)
        self._evaluation: list[str] = []
        # Drawn on demand: a thread that redraws would cost CPU time on a small machine.
        self._live = Live(console=console or Console(stderr=True), auto_refresh=False)
        self._live.start()
        self._live.update(f"step {steps.start:,} of {steps.stop:,}: waiting for the first batch", refresh=True)

    def add(self, record: dict) -> None:
        """Takes a record of metrics.jsonl."""
        self._tasks.setdefault(record["task"], _Task(record["task"])).add(record)
        self._alarms.extend(f"step {record['step']:,}: {text}" for text in record.get("alarms", ()))

    def evaluated(self, step: int, found: list[str]) -> None:
        """Takes the texts of the latest evaluation."""
        self._evaluation = [f"evaluation after step {step:,}", *found[:_MAX_MEASUREMENTS]] if found else []

    def show(self, overview: Overview) -> None:
        """Draws the panel."""
        self._live.update(self._render(overview), refresh=True)

    def close(self) -> None:
        """Leaves the last picture on the terminal."""
        self._live.stop()

    def _render(self, o: Overview) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel as Frame
        from rich.text import Text

        alarms = [Text(text, style="yellow", no_wrap=True, overflow="ellipsis") for text in self._alarms]
        measured = [Text(text, style="cyan", no_wrap=True, overflow="ellipsis") for text in self._evaluation]
        # Lines for other things: frame 2, bar, speed 2, table header, "and more", cursor.
        max_rows = max(1, self._live.console.height - 8 - len(alarms) - len(measured))
        table, num_omitted = self._table(max_rows)
        omitted = [Text(f"and {num_omitted} more tasks with fewer steps", style="dim")] if num_omitted else []
        return Frame(
            Group(self._head(o), Text(self._speed(o)), table, *omitted, *measured, *alarms), border_style="dim"
        )

    def _head(self, o: Overview) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        head = Table.grid(padding=(0, 2), expand=True)
        for ratio in (None, 1, None):
            head.add_column(no_wrap=True, ratio=ratio)
        head.add_row(f"step {o.step:,} of {o.num_steps:,}", ProgressBar(o.num_steps, o.step), f"{o.time_left} left")
        return head

    def _speed(self, o: Overview) -> str:
        mfu = "" if o.mfu is None else f"MFU {o.mfu:.0%}"
        rates = (f"{_short(o.examples_per_s)} examples/s", f"{_short(o.tokens_per_s)} tokens/s", mfu)
        return " · ".join(filter(None, [*rates, f"data wait {o.wait_share:.0%}", o.memory]))

    def _table(self, max_rows: int) -> tuple[RenderableType, int]:
        """Returns the tasks with the most steps, in order of their first step, and the number of tasks left out."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), expand=True, header_style="dim")
        table.add_column("task", no_wrap=True, overflow="ellipsis", ratio=1)
        for name in ("of expected", "loss", "grad norm", "wait", "temperature"):
            table.add_column(name, justify="right", no_wrap=True)
        busiest = set(sorted(self._tasks, key=lambda name: -self._tasks[name].steps)[:max_rows])
        for name in self._tasks:
            if name in busiest:
                # As Text: a task's name is not markup.
                table.add_row(*map(Text, self._tasks[name].cells()))
        return table, len(self._tasks) - len(busiest)


class _Task:
    """One row of the panel."""

    def __init__(self, name: str):
        self.steps = 0
        self._name = name
        self._record: dict = {}
        self._recent: collections.deque = collections.deque(maxlen=_RECENT_STEPS)

    def add(self, record: dict) -> None:
        self.steps = record["task_steps"]
        self._record = record
        self._recent.append((record["data_wait_s"], record["data_wait_s"] + record["step_s"]))

    def cells(self) -> list[str]:
        r = self._record
        wait_s, busy_s = np.sum(self._recent, axis=0)
        temperatures = [f"{t:.2g}" for t in sorted(r.get("temperatures", {}).values())]
        return [
            self._name,
            f"{self.steps:,} of {r['expected_steps']:,.0f}",
            # After the slash: the loss of guessing.
            f"{r['loss']:.4g}" + (f"/{r['chance']:.3g}" if "chance" in r else ""),
            f"{r['grad_norm']:.3g}",
            f"{wait_s / max(busy_s, 1e-9):.0%}",
            "–".join(dict.fromkeys([*temperatures[:1], *temperatures[-1:]])),
        ]


def _first_metric(entry: dict) -> str:
    """The first metric of an evaluation's entry beside chance; empty without one."""
    name, value = next(iter(entry["metrics"].items()), ("", 0.0))
    chance = entry["chance"].get(name)
    guess = "" if chance is None else f" (chance {chance:.3g})"
    return name and f"{entry['dataset']}/{entry['task']} {name} {value:.4g}{guess}"


def _short(value: float) -> str:
    """Three significant digits with the suffix k, M or G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
