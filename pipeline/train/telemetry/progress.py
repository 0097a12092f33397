"""How a run is shown while it runs: a live panel on a terminal, a plain line every now and then elsewhere."""

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

# What the display speaks of: the waits of the start are soon forgotten.
_RECENT_STEPS = 64
# Seconds between two pictures of the panel.
_PANEL_EVERY_S = 0.25
_MOST_ALARMS = 3


@dataclasses.dataclass(frozen=True)
class Overview:
    """The run as a whole, over the last steps. mfu: None where the devices' peak is not known."""

    step: int
    num_steps: int
    left: str
    examples_per_s: float
    tokens_per_s: float
    wait_share: float
    mfu: float | None
    memory: str


class Progress:
    """mode: "rich" (the panel), "plain" (lines), "none", or "auto": the panel where stderr is a terminal. forecast: of
    the steps to come."""

    def __init__(self, *, mode: str, steps: range, every_s: float, forecast: Forecast | None = None):
        if mode == "auto":
            mode = "rich" if sys.stderr.isatty() else "plain"
        self._num_steps, self._every_s, self._last = steps.stop, every_s, 0.0
        self._plain, self._panel = mode == "plain", None
        self._forecast = forecast or Forecast()
        # (examples, tokens, seconds waiting for data, seconds in all, model FLOPs in seconds at peak).
        self._recent: collections.deque = collections.deque(maxlen=_RECENT_STEPS)
        if mode == "rich":
            self._panel, self._every_s = Panel(steps), _PANEL_EVERY_S

    def update(self, record: dict) -> None:
        """record: a line of metrics.jsonl."""
        wait_s, busy_s = record["data_wait_s"], record["data_wait_s"] + record["step_s"]
        at_peak_s = record.get("mfu", 0.0) * (busy_s + record["compile_wait_s"])
        self._recent.append((record["examples"], record["tokens"], wait_s, busy_s, at_peak_s))
        self._forecast.add(record)
        if self._panel:
            self._panel.add(record)
        now, last = time.monotonic(), record["step"] == self._num_steps
        if now - self._last < self._every_s and not last:
            return
        self._last = now
        if self._panel:
            self._panel.show(self._overview(record))
        elif self._plain:
            print(self._line(record, self._overview(record)), flush=True)

    def _overview(self, record: dict) -> Overview:
        examples, tokens, wait_s, busy_s, at_peak_s = np.sum(self._recent, axis=0)
        busy_s = max(busy_s, 1e-9)
        steps_left = self._num_steps - record["step"]
        step_s = self._forecast.step_s()
        held = (("rss_bytes", "host"), ("device_peak_bytes", "device"))
        memory = [f"{record[key] / 1e9:.1f} GB {name}" for key, name in held if key in record]
        return Overview(
            step=record["step"],
            num_steps=self._num_steps,
            left="?" if step_s is None else _clock(step_s * steps_left),
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
            f"data wait {o.wait_share:.0%} | {o.left} left"
        )

    def close(self) -> None:
        if self._panel:
            self._panel.close()


class Panel:
    """The live panel: a bar, the speed, a row a task, the last alarms. Never higher or wider than the terminal."""

    def __init__(self, steps: range, *, console: Console | None = None):
        from rich.console import Console
        from rich.live import Live

        self._tasks: dict[str, _Task] = {}
        self._alarms: collections.deque = collections.deque(maxlen=_MOST_ALARMS)
        # Drawn when there is news: a thread that draws would take its share of a small machine.
        self._live = Live(console=console or Console(stderr=True), auto_refresh=False)
        self._live.start()
        self._live.update(f"step {steps.start:,} of {steps.stop:,}: waiting for the first batch", refresh=True)

    def add(self, record: dict) -> None:
        self._tasks.setdefault(record["task"], _Task(record["task"])).add(record)
        self._alarms.extend(f"step {record['step']:,}: {text}" for text in record.get("alarms", ()))

    def show(self, overview: Overview) -> None:
        self._live.update(self._render(overview), refresh=True)

    def close(self) -> None:
        self._live.stop()

    def _render(self, o: Overview) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel as Frame
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(padding=(0, 2), expand=True)
        for ratio in (None, 1, None):
            head.add_column(no_wrap=True, ratio=ratio)
        head.add_row(f"step {o.step:,} of {o.num_steps:,}", ProgressBar(o.num_steps, o.step), f"{o.left} left")
        mfu = [] if o.mfu is None else [f"MFU {o.mfu:.0%}"]
        speed = [f"{_short(o.examples_per_s)} examples/s", f"{_short(o.tokens_per_s)} tokens/s", *mfu]
        alarms = [Text(text, style="yellow", no_wrap=True, overflow="ellipsis") for text in self._alarms]
        # Frame, bar, two lines of speed, the table's head, "and more", and the cursor's line.
        rows = max(1, self._live.console.height - 8 - len(alarms))
        table, more = self._table(rows)
        left_out = [Text(f"and {more} more tasks with fewer steps", style="dim")] if more else []
        state = " · ".join(filter(None, [*speed, f"data wait {o.wait_share:.0%}", o.memory]))
        return Frame(Group(head, Text(state), table, *left_out, *alarms), border_style="dim")

    def _table(self, most: int) -> tuple[RenderableType, int]:
        """(the tasks with the most steps, in the order in which they came; how many are left out)."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), expand=True, header_style="dim")
        table.add_column("task", no_wrap=True, overflow="ellipsis", ratio=1)
        for name in ("steps of due", "loss", "grad norm", "wait", "temperature"):
            table.add_column(name, justify="right", no_wrap=True)
        busiest = set(sorted(self._tasks, key=lambda name: -self._tasks[name].steps)[:most])
        for name in self._tasks:
            if name in busiest:
                # As text, so that no name is read as markup.
                table.add_row(*map(Text, self._tasks[name].cells()))
        return table, len(self._tasks) - len(busiest)


class _Task:
    """One row: where a task stands."""

    def __init__(self, name: str):
        self._name, self._record, self.steps = name, {}, 0
        self._recent: collections.deque = collections.deque(maxlen=_RECENT_STEPS)

    def add(self, record: dict) -> None:
        self._record, self.steps = record, record["task_steps"]
        self._recent.append((record["data_wait_s"], record["data_wait_s"] + record["step_s"]))

    def cells(self) -> list[str]:
        r, (wait_s, busy_s) = self._record, np.sum(self._recent, axis=0)
        degrees = [f"{t:.2g}" for t in sorted(r.get("temperatures", {}).values())]
        return [
            self._name,
            f"{self.steps:,} of {r['expected_steps']:,.0f}",
            # Behind the stroke: the loss of guessing.
            f"{r['loss']:.4g}" + (f"/{r['chance']:.3g}" if "chance" in r else ""),
            f"{r['grad_norm']:.3g}",
            f"{wait_s / max(busy_s, 1e-9):.0%}",
            "–".join(dict.fromkeys([*degrees[:1], *degrees[-1:]])),
        ]


def _short(value: float) -> str:
    """Three digits, and k, M or G for what is left out."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
