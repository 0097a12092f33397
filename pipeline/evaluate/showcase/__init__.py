"""showcase.json: held-out samples and what a model makes of them, in small pictures, for the report of a run.

A part of each held-out set, evenly spread, is embedded once. All numbers are of that part alone; ``measure`` has those
of the whole sets.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.evaluate.showcase.answers import Classes, Texts, confusion
from pipeline.evaluate.showcase.cards import choice_cards, film_cards, search_cards
from pipeline.evaluate.showcase.expert_maps import expert_map
from pipeline.evaluate.showcase.maps import encoder_map, pair_map
from pipeline.evaluate.showcase.sample import Sample, take_sample
from pipeline.evaluate.trained_model import TrainedModel
from pipeline.files import write_json

# The file of a run directory (also in ``report.run_files``, which does not know this room).
FILE = "showcase.json"
# Maximum number of data sets.
_MAX_DATA_SETS = 6


def write_showcase(run_dir: Path, model: TrainedModel) -> None:
    """Writes the file of a run directory, whole or not at all."""
    write_json(run_dir / FILE, showcase(model))


def showcase(model: TrainedModel) -> dict:
    """The content of the file: plain values, pictures as data URIs. ``report.pictures`` says how each part looks."""
    names = ("choices", "searches", "films", "confusions", "maps", "expert_maps")
    out: dict = {"step": model.step} | {name: [] for name in names}
    samples = []
    for data_set in [d for d in model.data_sets.values() if d.held_out][:_MAX_DATA_SETS]:
        tasks = [t for t in model.tasks.values() if t.data_set == data_set.name and t.weight != 0]
        sample = take_sample(model, data_set, tasks)
        if sample.rows:
            samples.append(sample)
            _show(model, sample, out)
    if found := encoder_map(samples):
        out["maps"].insert(0, found)
    return out


def _show(model: TrainedModel, sample: Sample, out: dict) -> None:
    texts: dict[str, Texts | Classes] = {}
    for modality in sample.features:
        name = f"{sample.data_set.name}: {modality}"
        by_text, by_classes = Texts.of(model, sample, modality), Classes.of(model, sample, modality)
        answers = by_text or by_classes
        if answers:
            texts[modality] = answers
            out["choices"].append(
                {"title": f"{name} → {answers.title}", "cards": choice_cards(sample, modality, answers)}
            )
        if by_text:
            out["searches"].append({"title": f"{name} found by text", "cards": search_cards(sample, modality, by_text)})
            out["maps"].append(pair_map(sample, modality, by_text))
        found = confusion(sample, modality, by_classes) or confusion(sample, modality, by_text)
        out["confusions"] += [found] if found else []
        found = expert_map(model, sample, modality)
        out["expert_maps"] += [found] if found else []
    out["films"] += film_cards(sample, texts)
