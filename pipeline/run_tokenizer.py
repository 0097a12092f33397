"""The choice of a run's tokenizer, and the text that a new one is trained on."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator
from pathlib import Path

from pipeline.data import prompts
from pipeline.data.captions import CaptionCount, text_fault
from pipeline.data.columns import values
from pipeline.data.manifest import Manifest
from pipeline.data.media.errors import Reject
from pipeline.data.media.storage import read_bytes
from pipeline.data.run_data import DataSpec
from pipeline.data.spec import DataSetSpec, TaskSpec
from pipeline.data.tokenizer import EXPECTED, NoText, Tokenizer, train_tokenizer
from pipeline.errors import RequestError
from pipeline.recipe import Recipe, specs
from pipeline.reject_lines import counts_line
from pipeline.run_dir import CONFIG, TOKENIZER
from pipeline.store.path import run_path
from pipeline.train.checkpoint_folder import CheckpointFolder
from pipeline.train.init_source import source_tokenizer

# Maximum rows and characters of captions that a tokenizer learns from: more teach a vocabulary nothing new.
_MAX_CAPTIONS, _MAX_CHARACTERS = 1_000_000, 100_000_000


def choose_tokenizer(
    recipe: Recipe, data: DataSpec, *, run_dir: Path | None, init_step: int | None
) -> Tokenizer | None:
    """The run's own, the recipe's, that of ``init.from``, or a new one trained on the data sets' text, in this order.

    None if no task reads text. init_step: the step of the parameters of ``init.from`` that the run starts from.
    """
    readers = [task for task in data.tasks.values() if "text" in task.modalities]
    if not readers:
        return None
    if run_dir is not None and (own := _own_tokenizer(run_dir)):
        return own
    if recipe.text.tokenizer:
        return load_tokenizer(specs.locate(recipe.text.tokenizer))
    if init_step is not None and (stored := source_tokenizer(run_path(specs.locate(recipe.init.from_)), init_step)):
        return Tokenizer(stored)
    sentences = itertools.chain.from_iterable(_sentences(task, data.data_sets[task.data_set]) for task in readers)
    try:
        return train_tokenizer(sentences, vocab_size=recipe.text.vocab_size)
    except NoText as e:
        # Text of labels always has characters, those of the prompts: all readers read captions.
        raise RequestError(_no_captions(readers[0], data.data_sets[readers[0].data_set])) from e


def load_tokenizer(path: str) -> Tokenizer:
    """Reads a tokenizer file. Raises RequestError if there is none or it cannot be read."""
    try:
        return Tokenizer(read_bytes(path))
    except Reject as e:
        found = "no bytes" if e.reason == "empty_file" else "no file there"
        raise RequestError(f"{EXPECTED} at {path}, found {found}") from e
    except RequestError as e:
        raise RequestError(f"{e} ({path})") from e


def _own_tokenizer(run_dir: Path) -> Tokenizer | None:
    # The checkpoint's comes first: its parameters were trained with it, whatever became of the file.
    step = CheckpointFolder(run_dir).latest_step
    if step is not None and (stored := base64.b64decode(CheckpointFolder(run_dir).data(step)["tokenizer"])):
        return Tokenizer(stored)
    # Without a recipe beside it, the file is left from a start that failed and may belong to another recipe.
    if (run_dir / TOKENIZER).exists() and (run_dir / CONFIG).exists():
        return load_tokenizer(str(run_dir / TOKENIZER))
    return None


def _sentences(task: TaskSpec, data_set: DataSetSpec) -> Iterator[str]:
    """The text that a tokenizer should know of one task: its captions, or its labels in every prompt."""
    if task.text == "labels":
        templates = dict.fromkeys(prompts.train_templates(task.media[0]) + prompts.eval_templates(task.media[0]))
        for label in task.classes or data_set.classes:
            yield from (template.format(label) for template in templates)
        return
    yield from _captions(Manifest(data_set.manifest, media=data_set.media_columns), max_characters=task.max_characters)


def _no_captions(task: TaskSpec, data_set: DataSetSpec) -> str:
    """The error for a task whose data set has no caption that can be used."""
    manifest, count = Manifest(data_set.manifest, media=data_set.media_columns), CaptionCount(task.max_characters)
    for batch in manifest.batches(("text",), max_rows=min(manifest.num_rows, _MAX_CAPTIONS)):
        for texts in values(batch.column(0), "text"):
            count.add([text for text in texts or () if text is not None])
    why = f" ({counts_line(count.unusable)})" if count.unusable else ""
    return (
        f"{data_set.name}: none of the {count.rows:,} rows of {data_set.manifest} has a caption that can be used{why}, "
        f"and tasks.{task.name} reads them: fill the column text, take the labels as captions (tasks.{task.name}.text: "
        "labels), or leave the task out"
    )


def _captions(manifest: Manifest, *, max_characters: int) -> Iterator[str]:
    """Usable captions from all over a manifest: the first of a sorted one are all about the same thing."""
    rows = min(manifest.num_rows, _MAX_CAPTIONS)
    for batch in manifest.batches(("text",), max_rows=rows):
        left = _MAX_CHARACTERS * len(batch) / rows
        for caption in itertools.chain.from_iterable(texts or () for texts in values(batch.column(0), "text")):
            if left <= 0:
                break
            if text_fault(caption, max_characters=max_characters) is None:
                yield caption
                left -= len(caption)
