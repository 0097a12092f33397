"""Problems of a recipe's data that would stop or spoil a run, found before its first step."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping

from pipeline.data.labels import LabelCounts
from pipeline.data.spec import DataSetSpec, TaskSpec
from pipeline.errors import some_of
from pipeline.facts import Facts, classes_of, needs_label

# Number of steps below which a task is short of them, if an even share would be at least twice as many.
_FEW_STEPS = 50
# Part of an even share below which a task is short of steps, if it gets less than one in a hundred.
_FEW_OF_EVEN = 0.1


@dataclasses.dataclass
class Problems:
    """Lines. errors: problems that would certainly stop or spoil a run. warnings: those that are worth a look."""

    errors: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def add(self, line: str, *, is_error: bool) -> None:
        if is_error:
            self.errors.append(line)
        else:
            self.warnings.append(line)

    def __iadd__(self, other: Problems) -> Problems:
        self.errors += other.errors
        self.warnings += other.warnings
        return self


def draws_of(tasks: Iterable[TaskSpec], shares: Mapping[str, float]) -> dict[str, float]:
    """Task → its samples in an average step of the run."""
    return {t.name: shares[t.name] * sum(v.global_batch_size for v in t.variants) / len(t.variants) for t in tasks}


def problems_of(facts: Facts, tasks: list[TaskSpec], *, draws: Mapping[str, float]) -> Problems:
    """All problems of a data set. draws: task → its samples in an average step of the run."""
    out = Problems()
    for part in (_of_media(facts), _of_labels(facts, tasks, draws), _of_ids(facts), _of_held_out(facts)):
        out += part
    return out


def _of_media(facts: Facts) -> Problems:
    out, name = Problems(), facts.data_set.name
    for modality, found in facts.media.items():
        if not found.missing:
            continue
        (row, path), all_missing = found.example, found.missing == found.looked_at
        example = f"e.g. of row {row!r}: {path}"
        if all_missing:
            out.errors.append(
                f"{name}: {modality} files: none of the {found.looked_at} looked for exists, {example}; relative paths "
                f"start at the folder of {facts.data_set.manifest}"
            )
        elif found.missing > facts.data_set.max_reject_fraction * found.looked_at:
            out.warnings.append(
                f"{name}: {modality} files: {found.missing} are missing of the {found.looked_at} looked for, "
                f"{example}; at most {facts.data_set.max_reject_fraction:.0%} may be bad"
            )
    return out


def _of_labels(facts: Facts, tasks: list[TaskSpec], draws: Mapping[str, float]) -> Problems:
    """Rows without a class are rejects of the tasks that need one; the limit is on all draws from the data set."""
    out, data_set = Problems(), facts.data_set
    labels = facts.labels
    if labels is None:
        return out
    shares = {t.name: labels.without[classes_of(t, data_set)] / labels.looked_at for t in tasks if needs_label(t)}
    # A draw that is a reject is followed by another one.
    drawn = {t.name: draws.get(t.name, 0.0) / max(1e-9, 1 - shares.get(t.name, 0.0)) for t in tasks}
    rejected = sum(share * drawn[name] for name, share in shares.items())
    over = rejected > data_set.max_reject_fraction * sum(drawn.values())
    for classes, without in labels.without.items():
        mine = [t.name for t in tasks if t.name in shares and classes_of(t, data_set) == classes and without]
        if not mine:
            continue
        line = f"{data_set.name}: {without:,} of {labels.looked_at:,} rows have none of the classes of "
        line += f"{_named('task', mine)}{_unknown_label(labels, classes)}"
        runs = any(draws.get(name, 0.0) > 0 for name in mine)
        if runs and (over or without == labels.looked_at):
            limit = f"{data_set.max_reject_fraction:.0%}"
            out.errors.append(f"{line}; at most {limit} of the rows may be left out: correct the labels or the classes")
        else:
            out.warnings.append(line)
    unseen = [c for c in data_set.classes if shares and c not in labels.counts]
    if unseen:
        some = "" if len(unseen) == 1 else f" (and {len(unseen) - 1} more of {len(data_set.classes)})"
        whole = labels.looked_at == facts.num_rows
        none = "no row has" if whole else f"none of the {labels.looked_at:,} rows looked at has"
        out.warnings.append(f"{data_set.name}: {none} the class {unseen[0]!r}{some}")
    return out


def _unknown_label(labels: LabelCounts, classes: tuple[str, ...]) -> str:
    known = set(classes)
    unknown = [(label, count) for label, count in labels.counts.most_common() if label not in known]
    if not unknown or not classes:
        return ", since they have no label"
    label, count = unknown[0]
    nearest = difflib.get_close_matches(label, classes, n=1)
    near = f"the nearest class is {nearest[0]!r}" if nearest else f"the classes are {some_of(map(repr, classes))}"
    return f": the label '{label}' ({_named_count(count, 'row')}) is not one of them; {near}"


def _of_ids(facts: Facts) -> Problems:
    found = facts.repeats
    if not found.ids:
        return Problems()
    example, rows = found.example
    all_of = f"{found.looked_at:,} rows"
    if found.looked_at < facts.num_rows:
        all_of += f" looked at, of {facts.num_rows:,} in all,"
    such = f"{_named_count(found.ids, 'such id')}, e.g. {example!r} of {rows:,} rows"
    return Problems(
        errors=[
            f"{facts.data_set.name}: {found.rows:,} of {all_of} share an id with another one ({such}); one bad row "
            "would reject all rows of its id: give every row its own"
        ]
    )


def _of_held_out(facts: Facts) -> Problems:
    out, name = Problems(), facts.data_set.name
    for key, found in facts.held_out.items():
        if found is None:
            out.warnings.append(
                f"{name}: {key} is the training manifest itself, so results will say nothing of new data"
            )
        elif found.ids or found.media:
            parts = ((found.ids, "id"), (found.media, "media file"))
            same = " and ".join(_named_count(count, what) for count, what in parts if count)
            out.warnings.append(f"{name}: {same} of the {found.rows:,} rows of {key} are in the training data too")
    return out


def batches_of(tasks: Iterable[TaskSpec], num_rows: Mapping[str, int]) -> Problems:
    """Contrastive batches larger than their data set, which would hold some rows twice."""
    out = Problems()
    for task in tasks:
        rows = num_rows[task.data_set]
        large = [v for v in task.variants if v.global_batch_size > rows]
        if task.contrasts and large:
            out.errors.append(
                f"tasks.{task.name}: a batch of {large[0].global_batch_size} (variant {large[0].name}) is more than "
                f"the {rows:,} rows of {task.data_set}: rows would be compared with themselves; lower batch_size"
            )
    return out


def steps_of(shares: Mapping[str, float], *, num_steps: int) -> Problems:
    """Tasks that get few steps. shares: task → its share of the steps."""
    running = {name: share for name, share in shares.items() if share > 0}
    even = 1 / max(1, len(running))
    few = {
        name: share * num_steps
        for name, share in running.items()
        if (share * num_steps < _FEW_STEPS and share < even / 2) or share < min(0.01, _FEW_OF_EVEN * even)
    }
    if not few:
        return Problems()
    counts, first = some_of(f"{name} ({steps:.0f})" for name, steps in few.items()), next(iter(few))
    line = f"few steps of {num_steps:,} are expected for {counts}; raise sampler.temperature, or tasks.{first}.weight"
    return Problems(warnings=[line])


def variants_of(tasks: Iterable[TaskSpec]) -> Problems:
    """Variants whose batch was rounded: their vision tokens in a step beside those of the first one."""
    lines = []
    for task in tasks:
        token_budget = task.variants[0].global_batch_size * task.variants[0].num_vision_tokens
        parts = [(v, v.global_batch_size * v.num_vision_tokens) for v in task.variants]
        uneven = [
            f"{v.name} {n / token_budget:.1%} (batch {v.global_batch_size})" for v, n in parts if n != token_budget
        ]
        if uneven:
            lines.append(
                f"tasks.{task.name}: of the {token_budget:,} vision tokens a step, variants have {', '.join(uneven)}"
            )
    return Problems(warnings=lines)


def sizes_of(tasks: Iterable[TaskSpec], data_sets: Mapping[str, DataSetSpec]) -> Problems:
    """Variants larger than what is decoded, whose pictures are small ones enlarged."""
    lines = []
    for task in tasks:
        for modality in (m for m in ("image", "video") if m in task.modalities):
            short_side = getattr(data_sets[task.data_set], modality).short_side
            large = [v for v in task.variants if v.size and v.size > short_side]
            if large:
                largest = max(v.size for v in large)
                lines.append(
                    f"tasks.{task.name}: variant {large[0].name} is larger than data_sets.{task.data_set}.{modality}."
                    f"short_side = {short_side}, so its pictures are small ones enlarged: set short_side to {largest}"
                )
    return Problems(warnings=lines)


def _named(what: str, names: list[str]) -> str:
    return f"{what if len(names) == 1 else what + 's'} {some_of(names)}"


def _named_count(count: int, what: str) -> str:
    return f"{count:,} {what if count == 1 else what + 's'}"
