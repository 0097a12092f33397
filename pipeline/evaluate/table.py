"""Results of measurements for people, on a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable

# Metrics that are shown, by how their names end; the others are in the file.
_SHOWN = ("acc1", "mean_average_precision", "recall@1", "recall@5")
_COLUMNS = "{:<36}{:>8}{:>18}{:>8}{:>10}"


def print_table(results: Iterable[dict]) -> None:
    """Prints the first metrics of each entry with their interval, chance, and the baseline without learning."""
    results = list(results)
    if not results:
        print("nothing was evaluated: no data set has held-out rows that a task's heads can be measured on")
        return
    baseline = "baseline" if any(r.get("baseline") for r in results) else ""
    lines = [_COLUMNS.format("held-out evaluation", "value", "95 % interval", "chance", baseline)]
    for result in results:
        lines.append(f"{result['dataset']} {result['task']}, {result['input']}, {result['num_examples']} examples")
        for name in (name for name in result["metrics"] if name.endswith(_SHOWN)):
            lines += [_line(result, name), *_fewer_lines(result, name)]
    print("\n".join(line.rstrip() for line in lines))


def _line(result: dict, metric: str) -> str:
    interval = result["intervals"].get(metric)
    return _COLUMNS.format(
        f"  {metric}",
        _percent(result["metrics"][metric]),
        f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f} %" if interval else "",
        _percent(result["chance"].get(metric)),
        _percent(result.get("baseline", {}).get(metric)),
    )


def _fewer_lines(result: dict, metric: str) -> list[str]:
    """The metric with the leading dimensions of the space alone."""
    by_dim = result.get("by_dim", {})
    return [_COLUMNS.format(f"    {dim} dimensions", _percent(of[metric]), "", "", "") for dim, of in by_dim.items()]


def _percent(value: float | None) -> str:
    if value is None:
        return ""
    # Small shares, such as the chance of a thousand candidates, keep two digits.
    return f"{100 * value:.1f} %" if value >= 0.01 or not value else f"{100 * value:.2g} %"
