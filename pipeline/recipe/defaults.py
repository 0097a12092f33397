"""Values for what a recipe leaves open: optimiser and temperature follow the batch, the model its variant.

The paper trains with batches of 65,536, where its values hold; other values were measured to learn at 64. In between a
value grows by the same factor with every doubling of the batch. Why so: docs/decisions/small-runs-that-learn.md.
"""

from __future__ import annotations

import math

from model import terms
from model.config import NO_VOCABULARY, VARIANTS, ModelConfig
from pipeline.recipe import specs
from pipeline.recipe.settings import MoESettings, Recipe, TaskSettings

_SMALL_BATCH, _LARGE_BATCH = 64, 65_536
# Key of ``train`` → its values at the small and at the large batch.
_BY_BATCH = {"learning_rate": (5e-4, 1e-3), "clip_norm": (0.1, 1.0), "patch_learning_rate_scale": (0.1, 1.0)}
_SMALL_TEMPERATURE = 0.1


def at_batch(batch: int, *, small: float, large: float) -> float:
    """A value between those at batches of 64 and of 65,536, which hold outside of them too; two digits."""
    doublings = math.log2(_LARGE_BATCH / _SMALL_BATCH)
    share = min(1.0, max(0.0, math.log2(batch / _SMALL_BATCH) / doublings))
    return float(f"{small ** (1 - share) * large**share:.2g}")


def batch_rules() -> dict[str, str]:
    """Key whose null follows the largest batch → how."""
    ends = {f"train.{key}": (f"{small:g}", f"{large:g}") for key, (small, large) in _BY_BATCH.items()}
    ends["model.temperature_init"] = (f"{_SMALL_TEMPERATURE:g}", "the variant's own")
    text = f"{{}} up to {_SMALL_BATCH} samples, rising to {{}} at {_LARGE_BATCH:,}"
    return {key: text.format(small, large) for key, (small, large) in ends.items()}


def with_batch_defaults(recipe: Recipe, *, stored: dict) -> Recipe:
    """The recipe with a number for every null of ``train``, by its largest batch, and for the initial temperature, by
    the largest batch of a task that compares modalities.

    stored: the resolved recipe of a run to resume, whose numbers are kept.
    """
    batches = [task.batch_size for task in recipe.tasks.values()]
    contrasted = [
        task.batch_size for task in recipe.tasks.values() if terms.contrastive(name for name, _ in task.objectives)
    ]
    train = {
        key: _number(stored, "train", key) or at_batch(max(batches), small=small, large=large)
        for key, (small, large) in _BY_BATCH.items()
        if getattr(recipe.train, key) is None
    }
    model = {}
    if recipe.model.temperature_init is None:
        found = _number(stored, "model", "temperature_init")
        model["temperature_init"] = found or _temperature(recipe, max(contrasted or batches))
    return _updated(recipe, train=train, model=model)


def _number(stored: dict, section: str, key: str) -> float | None:
    part = stored.get(section)
    value = part.get(key) if isinstance(part, dict) else None
    return value if isinstance(value, float) and value > 0 else None


def _temperature(recipe: Recipe, batch: int) -> float:
    """At the large batch the variant's own."""
    field = ModelConfig.__dataclass_fields__["temperature_init"]
    large = VARIANTS.get(recipe.model.variant, {}).get("temperature_init", field.default)
    return max(at_batch(batch, small=_SMALL_TEMPERATURE, large=large), recipe.model.temperature_floor or 0.0)


def with_model_values(recipe: Recipe) -> Recipe:
    """The recipe with the variant's value for every null of ``model``; a dense model has none of ``moe``."""
    config = specs.model_config(recipe, vocab_size=NO_VOCABULARY)
    moe = MoESettings()
    if config.moe:
        moe = MoESettings(**{name: getattr(config.moe, name) for name in MoESettings.model_fields})
    kept = {"variant", "moe"}
    values = {name: getattr(config, name) for name in type(recipe.model).model_fields if name not in kept}
    return _updated(recipe, model=values | {"moe": moe})


def with_data_values(recipe: Recipe) -> Recipe:
    """The recipe with the limit of rejects of every data set, and with the rows that are positives in every task."""
    limit = recipe.max_reject_fraction
    data_sets = {
        name: s.model_copy(update={"max_reject_fraction": limit}) if s.max_reject_fraction is None else s
        for name, s in recipe.data_sets.items()
    }
    tasks = {
        name: t.model_copy(update={"positives": _positives(t)}) if t.positives is None else t
        for name, t in recipe.tasks.items()
    }
    return recipe.model_copy(update={"data_sets": data_sets, "tasks": tasks})


def _positives(task: TaskSettings) -> str:
    if task.text == "labels":
        return "labels"
    return "text" if "text" in task.modalities else "instance"


def _updated(recipe: Recipe, **sections: dict) -> Recipe:
    changed = {name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
    return recipe.model_copy(update=changed)
