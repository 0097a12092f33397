"""The section of a report that says what the experts were used for."""

import math

import numpy as np

from pipeline.report import page
from pipeline.report.learning import steps_axis
from pipeline.report.page import COLORS, NEUTRAL, Html, percent, table
from pipeline.report.run_files import Run, first_and_last_tenth, mapping, number


def expert_load(run: Run) -> dict[str, np.ndarray]:
    """Per modality: the mean load of each expert in the last tenth of the rows that logged it; 1 = an even share."""
    loads = {}
    for modality in run.keys("moe"):
        found = [mapping(mapping(row.get("moe")).get(modality)).get("expert_load") for row in run.metrics]
        rows = [[number(load) for load in row] for row in found if isinstance(row, list) and row]
        rows = [row for row in rows if len(row) == len(rows[-1])]
        if rows:
            mean = np.mean(rows[-max(1, len(rows) // 10) :], axis=0)
            loads[modality] = mean / mean.mean() if mean.mean() > 0 else np.full(len(mean), math.nan)
    return loads


def experts(run: Run) -> Html:
    modalities, loads = run.keys("moe"), expert_load(run)
    content, rows = [], []
    traces = []
    for index, modality in enumerate(modalities):
        steps, fractions = run.values("moe", modality, "unrouted_fraction")
        traces += page.curve(steps, fractions, name=modality, color=COLORS[index % len(COLORS)])
    if traces:
        title = "Share of tokens that no expert took"
        axis = {"tickformat": ".0%", "rangemode": "tozero"}
        content.append(page.figure(traces, height=280, title=title, showlegend=True, xaxis=steps_axis(run), yaxis=axis))
    if loads:
        content.append(load_heatmap(loads))
    for modality in modalities:
        first, last = first_and_last_tenth(run.values("moe", modality, "unrouted_fraction")[1])
        load = loads.get(modality, np.array([math.nan]))
        idle = int(np.sum(load < 0.1)) if modality in loads else None
        extremes = [page.fixed(value, ".2f") for value in (load.max(), load.min())]
        rows.append((modality, percent(first), percent(last), *extremes, idle))
    columns = ("Modality", "Unrouted, first tenth", "Last tenth", "Busiest expert (× even)", "Idlest", "Below 0.1×")
    return Html("".join(content) + table(columns, rows) + layers(run)) if rows else layers(run)


def load_heatmap(loads: dict[str, np.ndarray]) -> Html:
    num_experts = max(len(load) for load in loads.values())
    grid = np.full((len(loads), num_experts), math.nan)
    for row, load in zip(grid, loads.values(), strict=True):
        row[: len(load)] = load
    return page.figure(
        [heatmap(grid) | {"texttemplate": "%{z:.2f}"}], height=90 + 46 * len(loads), title="Load of each expert",
        note="last tenth; 1 = an even share", hovermode="closest",
        xaxis={"dtick": max(1, num_experts // 16), "showgrid": False, "title": {"text": "expert"}},
        yaxis={
            "tickvals": np.arange(len(loads)), "ticktext": [page.label(name) for name in loads],
            "showgrid": False, "autorange": "reversed",
        },
    )  # fmt: skip


def heatmap(grid: np.ndarray, *, most: float = 2.0) -> dict:
    """A trace of loads (rows, experts), 1 = an even share. most: the scale ends there, or higher where a load does."""
    return {
        "type": "heatmap", "z": grid, "zmin": 0, "zmax": max(most, float(np.nanmax(np.nan_to_num(grid)))),
        "colorscale": [[0, "#f4efe3"], [0.5, "#6fa5d8"], [1, "#17386b"]], "xgap": 2, "ygap": 2,
        "hovertemplate": "expert %{x}, row %{y}: %{z:.3f}<extra></extra>",
        "colorbar": {"thickness": 10, "outlinewidth": 0, "tickfont": {"color": NEUTRAL}},
    }  # fmt: skip


def layer_loads(run: Run) -> dict[tuple[str, str], np.ndarray]:
    """(task, modality) → load of each layer's experts (L, E) at the end of the run, 1 = an even share: running means,
    those of a task's variants by their steps."""
    sums: dict[tuple[str, str], list[tuple[np.ndarray, float]]] = {}
    for task, variants in run.experts.items():
        for modalities in mapping(variants).values():
            for modality, entry in mapping(modalities).items():
                found, steps = loads_of(mapping(entry)), number(mapping(entry).get("steps"))
                if found is not None and steps > 0:
                    sums.setdefault((task, modality), []).append((found, steps))
    return {
        key: np.average([load for load, _ in parts], axis=0, weights=[steps for _, steps in parts])
        for key, parts in sums.items()
        if len({load.shape for load, _ in parts}) == 1
    }


def loads_of(entry: dict) -> np.ndarray | None:
    try:
        load = np.array(entry.get("expert_load"), dtype=np.float64)
    except (TypeError, ValueError):
        return None
    known = load.ndim == 2 and load.size > 0 and np.isfinite(load).all()
    return load * load.shape[1] if known else None


def layers(run: Run) -> Html:
    """A small heat map, layers down and experts across, of every task and modality."""
    found = layer_loads(run)
    most = max((float(load.max()) for load in found.values()), default=2.0)  # one scale for all
    figures = [
        page.figure(
            [heatmap(load, most=most) | {"showscale": False}], height=90 + 16 * len(load), bar=False,
            title=f"{task}, {modality}", note=f"{load.min():.2f} to {load.max():.2f}", hovermode="closest",
            xaxis={"dtick": max(1, load.shape[1] // 8), "showgrid": False},
            yaxis={"dtick": max(1, len(load) // 8), "showgrid": False, "autorange": "reversed"},
        )
        for (task, modality), load in found.items()
    ]  # fmt: skip
    note = "<p class='quiet'>Experts across, layers with experts down; running means, 1 = an even share.</p>"
    return Html("<h3>Load by layer</h3>" + note + page.grid(figures)) if figures else Html("")
