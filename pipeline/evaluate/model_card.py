"""README.md of an exported model: what it is, what it was trained on, how well it does, and where it ends."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.credentials import redacted
from pipeline.evaluate.trained_model import TrainedModel
from pipeline.export.hub.writing import has_vectors
from pipeline.export.inputs import Input

_UNKNOWN = "unknown"
# Settings of a task, of the model and of training that a reader compares runs by.
_MODEL = ("variant", "common_dim", "towers")
_TRAIN = ("num_steps", "learning_rate", "warmup_fraction", "weight_decay", "clip_norm")


def results_of(run_dir: Path, step: int) -> list[dict]:
    """The entries of a run's eval.json that were measured at a step; none where there is no such file."""
    try:
        found = json.loads((run_dir / "eval.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    entries = found if isinstance(found, list) else []
    return [e for e in entries if isinstance(e, dict) and e.get("step") == step and isinstance(e.get("metrics"), dict)]


def model_card(model: TrainedModel, inputs: list[Input], results: list[dict], licenses: Mapping[str, str]) -> str:
    """The card as Markdown with the front matter that model hubs read. licenses: by data set."""
    names = sorted({task.data_set for task in model.tasks.values()})
    title = f"{model.recipe.model.variant}, {model.step} steps"
    parts = [
        _front_matter(title, names, results),
        f"# {title}\n",
        "A multimodal encoder trained by alternating gradient descent (IMP, arXiv 2305.06324) with imp-pretrain "
        f"{__version__}.\n",
        *(["## Use\n", _usage(inputs)] if has_vectors(tuple(inputs)) else []),
        "## Data\n",
        _table(("data set", "manifest", "licence", "classes", "tasks"), _data_rows(model, names, licenses)),
        "## Recipe\n",
        _recipe(model),
        "## Results\n",
        _results(results, model.step),
        "## Limits\n",
        _limits(model, inputs),
    ]
    return "\n".join(parts)


def _front_matter(title: str, names: list[str], results: list[dict]) -> str:
    """JSON values, which are YAML too and need no quoting of their own."""
    measured = [
        {
            "task": {"type": str(r.get("task")), "name": str(r.get("task"))},
            "dataset": {"type": str(r.get("dataset")), "name": str(r.get("dataset"))},
            "metrics": [
                {"type": name, "value": value, "name": _named(name, r)} for name, value in r["metrics"].items()
            ],
        }
        for r in results
    ]
    values = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["sentence-transformers", "feature-extraction", "multimodal", "imp"],
        "license": _UNKNOWN,
        "datasets": names,
        **({"model-index": [{"name": title, "results": measured}]} if measured else {}),
    }
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return "\n".join(["---", *lines, "---", ""])


def _named(metric: str, result: dict) -> str:
    low_high = (result.get("intervals") or {}).get(metric)
    return f"{metric} (95 % interval {_number(low_high[0])} to {_number(low_high[1])})" if low_high else metric


def _usage(inputs: list[Input]) -> str:
    spaces = list(dict.fromkeys(one.space for one in inputs if one.pair))
    of_space = {s: sorted({one.modality for one in inputs if one.space == s}) for s in spaces}
    rows = [(f"`{space}`", ", ".join(names)) for space, names in of_space.items()]
    return f"""\
```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER", trust_remote_code=True)  # its own code, a few hundred lines beside this card
texts = model.encode(["a text"])
images = model.encode([Image.open("picture.jpg")])
sounds = model.encode([{{"audio": "sound.wav"}}])  # or {{"array": samples, "sampling_rate": Hz}}
videos = model.encode([{{"video": "clip.mp4"}}])  # or {{"array": frames, "video_metadata": {{"fps": F}}}}
print(model.similarity(texts, images))
```

A vector is the item's place in each of the spaces below, one after the other, with zeros where its modality has none.
The dot product of two modalities is their cosine in the space of their pair; `model_kwargs={{"space": "{spaces[0]}"}}`
gives that space alone, `"data_set"` prepares inputs as in that data set; else they are prepared in their largest form.
Files need pillow, soundfile and soxr, or av. A list holds items of one modality.

{_table(("space", "inputs"), rows)}"""


def _data_rows(model: TrainedModel, names: list[str], licenses: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    for name in names:
        data_set = model.data_sets[name]
        tasks = ", ".join(task.name for task in model.tasks.values() if task.data_set == name)
        classes = str(len(data_set.classes)) if data_set.classes else "none"
        yield name, _place(data_set.manifest), licenses.get(name, _UNKNOWN), classes, tasks


def _place(manifest: str) -> str:
    """A URI without credentials; of a local path the last two parts, for the rest is of one machine."""
    return redacted(manifest) if "://" in manifest else "/".join(Path(manifest).parts[-2:])


def _recipe(model: TrainedModel) -> str:
    recipe = model.recipe.to_dict()
    settings = [(key, recipe["model"].get(key)) for key in _MODEL] + [(key, recipe["train"].get(key)) for key in _TRAIN]
    settings.append(("dtype", model.imp.config.dtype))
    rows = [(f"`{key}`", _number(value)) for key, value in settings]
    tasks = [
        (
            task.name,
            " + ".join(f"{weight:g} {name}" if weight != 1 else name for name, weight in task.objectives),
            ", ".join(task.modalities),
            ", ".join(v.name for v in task.variants),
            str(task.variants[0].global_batch_size),
        )
        for task in model.tasks.values()
        if task.weight != 0
    ]
    columns = ("task", "objective", "modalities", "variants", "batch")
    return f"{_table(('setting', 'value'), rows)}\n{_table(columns, tasks)}"


def _results(results: list[dict], step: int) -> str:
    if not results:
        return (
            f"Nothing was measured at step {step}: `imp evaluate` measures a run, and a new export has its results.\n"
        )
    rows = [
        (
            str(r.get("dataset")),
            str(r.get("task")),
            metric,
            _number(value),
            " to ".join(map(_number, (r.get("intervals") or {}).get(metric) or ())) or "not computed",
            _number((r.get("chance") or {}).get(metric)),
            str(r.get("num_examples")),
        )
        for r in results
        for metric, value in r["metrics"].items()
    ]
    columns = ("held out", "task", "metric", "value", "95 % interval", "chance", "examples")
    return f"By jax at step {step}, on held-out rows.\n\n{_table(columns, rows)}"


def _limits(model: TrainedModel, inputs: list[Input]) -> str:
    length = max((one.text_length for one in inputs), default=0)
    unseen = sorted({one.modality for one in inputs if one.pair} - {"text", "image", "video", "audio"})
    lines = [
        "The results are for the data sets above; nothing else was measured, bias and safety included.",
        "It knows what its data hold. Whoever passes it on must see to their licences; `unknown`: nobody said.",
        "PyTorch computes in float32 and agrees with jax within 1e-5, unless rounding decides which of two tokens an "
        "expert takes.",
    ]
    if length:
        lines.append(f"Texts are cut after at most {length} tokens.")
    if unseen:
        lines.append(f"In sentence-transformers without {', '.join(unseen)}, which the recipe added.")
    if model.imp.config.moe:
        lines.append("Experts choose among the tokens of one sample, so no vector depends on its neighbours.")
    return "\n".join(f"* {line}" for line in lines) + "\n"


def _table(columns: tuple[str, ...], rows: Any) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "".join("| " + " | ".join(_cell(str(v)) for v in line) + " |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
