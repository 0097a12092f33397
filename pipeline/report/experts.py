"""The section of a report that shows what the experts were used for."""

from __future__ import annotations

import math

import numpy as np

from pipeline.report.elements import COLORS, NEUTRAL, Html, curve, figure, fixed, grid, label, percent, table
from pipeline.report.learning import steps_axis
from pipeline.report.run_files import Run, first_and_last_tenth
from pipeline.report.values import mapping, number


def experts(run: Run) -> Html:
    """The section of the experts: unrouted tokens, the load of each expert, and its load layer by layer."""
    modalities, loads = run.metrics.names("moe"), _expert_loads(run)
    if not modalities:
        return _layers(run)
    columns = ("Modality", "Unrouted, first tenth", "Last tenth", "Busiest expert (× even)", "Idlest", "Below 0.1×")
    rows = [_modality_row(run, modality, loads.get(modality)) for modality in modalities]
    return Html(_unrouted_chart(run, modalities) + _load_heatmap(loads) + table(columns, rows) + _layers(run))


def _expert_loads(run: Run) -> dict[str, np.ndarray]:
    """Modality → mean load of each expert in the last tenth of the lines that logged it, 1 = an even share."""
    loads = {}
    for modality, latest in run.metrics.loads.items():
        # Of a very long run fewer than a tenth are kept.
        last = list(latest)[-max(1, run.metrics.num_loads[modality] // 10) :]
        mean = np.mean([list(map(number, load)) for load in last if len(load) == len(last[-1])], axis=0)
        loads[modality] = mean / mean.mean() if mean.mean() > 0 else np.full(len(mean), math.nan)
    return loads


def _modality_row(run: Run, modality: str, load: np.ndarray | None) -> tuple:
    first, last = first_and_last_tenth(run.metrics.values("moe", modality, "unrouted_fraction")[1])
    idle = None if load is None else int(np.sum(load < 0.1))
    busiest, idlest = (math.nan, math.nan) if load is None else (load.max(), load.min())
    return modality, percent(first), percent(last), fixed(busiest, ".2f"), fixed(idlest, ".2f"), idle


def _unrouted_chart(run: Run, modalities: list[str]) -> Html:
    traces = []
    for index, modality in enumerate(modalities):
        steps, fractions = run.metrics.values("moe", modality, "unrouted_fraction")
        traces += curve(steps, fractions, name=modality, color=COLORS[index % len(COLORS)])
    title = "Share of tokens that no expert took"
    axis = {"tickformat": ".0%", "rangemode": "tozero"}
    return figure(traces, height=280, title=title, showlegend=True, xaxis=steps_axis(run), yaxis=axis)


def _load_heatmap(loads: dict[str, np.ndarray]) -> Html:
    """One row per modality; empty without loads."""
    if not loads:
        return Html("")
    num_experts = max(len(load) for load in loads.values())
    cells = np.full((len(loads), num_experts), math.nan)
    for row, load in zip(cells, loads.values(), strict=True):
        row[: len(load)] = load
    return figure(
        [_heatmap(cells) | {"texttemplate": "%{z:.2f}"}],
        height=90 + 46 * len(loads),
        title="Load of each expert",
        note="last tenth; 1 = an even share",
        hovermode="closest",
        xaxis={"dtick": max(1, num_experts // 16), "showgrid": False, "title": {"text": "expert"}},
        yaxis={
            "tickvals": np.arange(len(loads)),
            "ticktext": [label(name) for name in loads],
            "showgrid": False,
            "autorange": "reversed",
        },
    )


def _heatmap(loads: np.ndarray, *, scale_end: float = 2.0) -> dict:
    """A trace of loads (rows, experts), 1 = an even share. scale_end: the scale ends there, or at a higher load."""
    return {
        "type": "heatmap",
        "z": loads,
        "zmin": 0,
        "zmax": max(scale_end, float(np.nanmax(np.nan_to_num(loads)))),
        "colorscale": [[0, "#f4efe3"], [0.5, "#6fa5d8"], [1, "#17386b"]],
        "xgap": 2,
        "ygap": 2,
        "hovertemplate": "expert %{x}, row %{y}: %{z:.3f}<extra></extra>",
        "colorbar": {"thickness": 10, "outlinewidth": 0, "tickfont": {"color": NEUTRAL}},
    }


def _layer_loads(run: Run) -> dict[tuple[str, str], np.ndarray]:
    """(task, modality) → running mean of the load of each layer's experts (L, E) at the end of the run.

    1 = an even share. Variants of a task are weighted by their steps.
    """
    parts: dict[tuple[str, str], list[tuple[np.ndarray, float]]] = {}
    for task, variants in run.experts.items():
        for modalities in mapping(variants).values():
            for modality, entry in mapping(modalities).items():
                load, steps = _load_of(mapping(entry)), number(mapping(entry).get("steps"))
                if load is not None and steps > 0:
                    parts.setdefault((task, modality), []).append((load, steps))
    return {
        key: np.average([load for load, _ in found], axis=0, weights=[steps for _, steps in found])
        for key, found in parts.items()
        if len({load.shape for load, _ in found}) == 1
    }


def _load_of(entry: dict) -> np.ndarray | None:
    """The load in an entry of experts.json (L, E), 1 = an even share; None if it holds none."""
    try:
        load = np.array(entry.get("expert_load"), dtype=np.float64)
    except (TypeError, ValueError):
        return None
    known = load.ndim == 2 and load.size > 0 and np.isfinite(load).all()
    return load * load.shape[1] if known else None


def _layers(run: Run) -> Html:
    """A small heat map, layers down and experts across, for every task and modality."""
    found = _layer_loads(run)
    if not found:
        return Html("")
    # One scale for all of them.
    scale_end = max(float(load.max()) for load in found.values())
    figures = [
        figure(
            [_heatmap(load, scale_end=scale_end) | {"showscale": False}],
            height=90 + 16 * len(load),
            bar=False,
            title=f"{task}, {modality}",
            note=f"{load.min():.2f} to {load.max():.2f}",
            hovermode="closest",
            xaxis={"dtick": max(1, load.shape[1] // 8), "showgrid": False},
            yaxis={"dtick": max(1, len(load) // 8), "showgrid": False, "autorange": "reversed"},
        )
        for (task, modality), load in found.items()
    ]
    note = "<p class='quiet'>Experts across, layers with experts down; running means, 1 = an even share.</p>"
    return Html("<h3>Load by layer</h3>" + note + grid(figures))
