"""Results of measurements for people, on a terminal."""

from __future__ import annotations

from collections.abc import Iterable

# Metrics that are shown, by how their names end; the others are in the file.
_SHOWN = ("acc1", "mean_average_precision", "recall@1", "recall@5")


def print_table(results: Iterable[dict]) -> None:
    """Prints the first metrics of each entry beside their interval, chance and baseline."""
    from rich.console import Console
    from rich.table import Table

    results = list(results)
    if not results:
        print("nothing was evaluated: no data set has held-out rows that a task's heads can be measured on")
        return
    columns = ["data set", "task", "input", "metric", "value", "95 % interval", "chance", "examples"]
    if any(r.get("baseline") for r in results):
        columns.insert(7, "without learning")
    table = Table(title="held-out evaluation")
    for column in columns:
        # Folded where the terminal is narrow: what is cut off may be what tells two metrics apart.
        left = column in ("data set", "task", "input", "metric")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for result in results:
        for metric in (m for m in result["metrics"] if m.endswith(_SHOWN)):
            cells = _cells(result, metric)
            table.add_row(*(cells[column] for column in columns))
    Console().print(table)


def _cells(result: dict, metric: str) -> dict[str, str]:
    interval = result["intervals"].get(metric)
    return {
        "data set": result["dataset"],
        "task": result["task"],
        "input": result["input"],
        "metric": metric,
        "value": _percent(result["metrics"][metric]),
        "95 % interval": f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f} %" if interval else "",
        "chance": _percent(result["chance"].get(metric)),
        "without learning": _percent(result.get("baseline", {}).get(metric)),
        "examples": str(result["num_examples"]),
    }


def _percent(value: float | None) -> str:
    if value is None:
        return ""
    # Small shares, such as the chance of a thousand candidates, keep two digits.
    return f"{100 * value:.1f} %" if value >= 0.01 or not value else f"{100 * value:.2g} %"
