"""The section of a report that shows what the experts were used for."""

from __future__ import annotations

import math

import numpy as np

from pipeline.report.charts import heat_map, line_chart, smooth_line
from pipeline.report.elements import Html, escape, fixed, grid, percent, table
from pipeline.report.pictures import expert_maps
from pipeline.report.run_files import Run, first_and_last_tenth
from pipeline.report.values import mapping, number

# Part of an even share below which an expert is idle.
_IDLE = 0.1
# Alignment from which experts are called specialists of a modality, and below which they are called shared.
_SPECIALISED, _SHARED = 0.5, 0.1


def experts(run: Run) -> Html:
    """The section of the experts: in words, unrouted tokens, the load of each expert, and its load layer by layer."""
    modalities = run.metrics.names("moe")
    if not modalities:
        return Html(_layers(run) + expert_maps(run))
    loads = {name: found.last_tenth() for name, found in run.metrics.loads.items()}
    columns = ("Modality", "Unrouted, first tenth", "Last tenth", "Busiest expert (× even)", "Idlest", "Below 0.1×")
    rows = [_modality_row(run, modality, loads.get(modality)) for modality in modalities]
    content = _words(run, modalities) + expert_maps(run) + _unrouted_chart(run, modalities) + _load_map(loads)
    return Html(content + table(columns, rows) + _layers(run))


def _words(run: Run, modalities: list[str]) -> str:
    """Unrouted tokens and the alignment with modalities, in sentences."""
    lines = []
    for modality in modalities:
        share = first_and_last_tenth(run.metrics.series("moe", modality).values)[1]
        if math.isfinite(share):
            lines.append(f"<li><b>{escape(modality)}</b>: {escape(_unrouted_words(run, share))}</li>")
    out = f"<ul>{''.join(lines)}</ul>" if lines else ""
    alignment = modality_alignment(run)
    return out + (f"<p>{escape(_alignment_words(alignment))}</p>" if math.isfinite(alignment) else "")


def _unrouted_words(run: Run, share: float) -> str:
    moe = mapping(mapping(run.config.get("model")).get("moe"))
    factor, count = number(moe.get("capacity_factor")), number(moe.get("num_experts"))
    text = f"{share:.0%} of the tokens were taken by no expert and went on unchanged"
    if moe.get("router") == "experts_choose" and count > 1 and 0 < factor <= count:
        # Of experts that take their part of the tokens without regard to each other.
        usual = (1 - factor / count) ** count
        verdict = "normal" if share <= usual + 0.05 else "more than usual"
        words = f"experts that choose independently of each other would leave {usual:.0%}"
        return f"{text}: {verdict} for experts-choose at capacity {factor:g} ({words})."
    return f"{text}, because the experts that they asked for were full." if share > 0 else f"{text}."


def _alignment_words(alignment: float) -> str:
    kind = "in between: some experts prefer a modality"
    if alignment >= _SPECIALISED:
        kind = "experts are specialists of a modality"
    elif alignment < _SHARED:
        kind = "all modalities share all experts"
    return (
        f"Experts and modalities: {alignment:.3f} of 1, {kind}. (Normalised mutual information of modality and expert "
        "by the router's probabilities, the mean over layers and tasks: 0 = alike in every modality, 1 = one tells "
        "the other.)"
    )


def modality_alignment(run: Run) -> float:
    """Mutual information of modality and expert over the smaller of their entropies, mean over layers; NaN if unknown.

    Each modality counts alike, by its load in all tasks.
    """
    by_modality: dict[str, list[np.ndarray]] = {}
    for (_, modality), load in _layer_loads(run).items():
        by_modality.setdefault(modality, []).append(load)
    means = [np.mean(found, axis=0) for found in by_modality.values() if len({x.shape for x in found}) == 1]
    if len(means) < 2 or len({x.shape for x in means}) != 1 or means[0].shape[1] < 2:
        return math.nan
    # (L, M, E): the joint distribution of each layer.
    joint = np.stack(means, axis=1) / (len(means) * means[0].shape[1])
    return float(np.mean([_normalised_information(layer) for layer in joint]))


def _normalised_information(joint: np.ndarray) -> float:
    def entropy(p: np.ndarray) -> float:
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    rows, columns = entropy(joint.sum(1)), entropy(joint.sum(0))
    smaller = min(rows, columns)
    return (rows + columns - entropy(joint.ravel())) / smaller if smaller > 0 else 0.0


def _modality_row(run: Run, modality: str, load: np.ndarray | None) -> tuple:
    first, last = first_and_last_tenth(run.metrics.series("moe", modality).values)
    idle = None if load is None else int(np.sum(load < _IDLE))
    busiest, idlest = (math.nan, math.nan) if load is None else (load.max(), load.min())
    return modality, percent(first), percent(last), fixed(busiest, ".2f"), fixed(idlest, ".2f"), idle


def _unrouted_chart(run: Run, modalities: list[str]) -> Html:
    lines = [smooth_line(name, run.metrics.series("moe", name), number=i) for i, name in enumerate(modalities)]
    title = "Share of tokens that no expert took"
    chart = line_chart(lines, title=title, x_end=run.metrics.last_step, form="{:.0%}".format, zero=True)
    return grid([chart]) if chart else Html("")


def _load_map(loads: dict[str, np.ndarray]) -> Html:
    """One row per modality; empty without loads."""
    if not loads:
        return Html("")
    cells = np.full((len(loads), max(map(len, loads.values()))), math.nan)
    for row, load in zip(cells, loads.values(), strict=True):
        row[: len(load)] = load
    note = "the router's probability in the last tenth; 1 = an even share"
    top = max(2.0, float(np.nanmax(np.nan_to_num(cells))))
    return heat_map(cells, rows=list(loads), title="Load of each expert", note=note, top=top, columns="expert")


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
    top = max(float(load.max()) for load in found.values())
    maps = [
        heat_map(
            load,
            rows=[f"layer {i}" for i in range(len(load))],
            title=f"{task}, {modality}",
            note=f"{load.min():.2f} to {load.max():.2f}",
            top=top,
            columns="expert",
        )
        for (task, modality), load in found.items()
    ]
    note = "<p class='quiet'>Experts across, layers with experts down; running means, 1 = an even share.</p>"
    return Html("<h3>Load by layer</h3>" + note + grid(maps))
