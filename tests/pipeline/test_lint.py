"""Problems of data that are reported before a run, and those that refuse it."""

import collections
import itertools
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import facts as facts_module
from pipeline import lint
from pipeline import recipe as recipes
from pipeline.data.ids import Overlap, Repeats
from pipeline.data.labels import LabelCounts
from pipeline.errors import RequestError
from pipeline.plan import plan

TASK = {"data_set": "pets", "objective": "nce", "modalities": ["image", "text"], "batch_size": 8, "text_length": 16}
TASK["variants"] = [{"size": 64}]
CLASSES = TASK | {"objective": "softmax", "modalities": ["image"], "variants": [{"size": 64}]}


@pytest.fixture
def told(tmp_path, write_manifest, capsys):
    """(error of ``plan`` on these rows or "", warnings). Images are empty files; "gone" does not exist."""
    (tmp_path / "a.png").touch()
    number = itertools.count()

    def tell(rows, *, task=TASK, tasks=None, held_out=None, num_steps=10, **data_set) -> tuple[str, list[str]]:
        folder = tmp_path / f"{next(number)}"
        rows = [
            {"id": f"r{i}", "image": f"{tmp_path}/a.png", "text": ["a cat"], "labels": ["cat"]} | r
            for i, r in enumerate(rows)
        ]
        pets = {"manifest": write_manifest(folder / "m.parquet", rows, row_group_size=7), "classes": ["cat", "dog"]}
        if held_out is not None:
            held_out = [
                {"id": f"h{i}", "image": f"{tmp_path}/h{i}.png", "text": [], "labels": []} | r
                for i, r in enumerate(held_out)
            ]
            pets["held_out"] = write_manifest(folder / "h.parquet", held_out)
        raw = {"data_sets": {"pets": pets | data_set}, "tasks": tasks or {"pet": task}}
        raw |= {"train": {"num_steps": num_steps}, "text": {"vocab_size": 32}}
        error = ""
        try:
            plan(recipes.from_dict(raw), folder / "run")
        except RequestError as e:
            error = str(e)
        assert "\n" not in error and not (folder / "run").exists()
        return error, capsys.readouterr().err.splitlines()

    return tell


def rows(count: int, **changed) -> list[dict]:
    return [dict(changed) for _ in range(count)]


def test_good_rows_are_passed_over_in_silence(told):
    assert told(rows(30)) == ("", [])
    assert told(rows(30), held_out=rows(5)) == ("", [])


def test_an_id_of_several_rows_refuses_the_run(told):
    found, _ = told([*rows(30), {"id": "r3"}, {"id": "r3"}, {"id": "r9"}])
    assert found.startswith("pets: 5 of 33 rows share an id with another one (2 such ids, e.g. 'r")
    assert found.endswith("one bad row would reject all rows of its id: give every row its own")


def test_a_label_that_is_no_class_refuses_the_run_where_too_many_rows_have_it(told):
    found, _ = told([*rows(27), *rows(3, labels=["dgo"])], task=CLASSES)
    assert found == (
        "pets: 3 of 30 rows have none of the classes of task pet: the label 'dgo' (3 rows) is not one of them; the "
        "nearest class is 'dog'; at most 5% of the rows may be left out: correct the labels or the classes"
    )
    found, warned = told([*rows(38), {"labels": ["dgo"]}, {"labels": ["dog"]}], task=CLASSES)
    assert not found and warned == [
        "warning: pets: 1 of 40 rows have none of the classes of task pet: the label 'dgo' (1 row) is not one of them; "
        "the nearest class is 'dog'"
    ]
    found, _ = told(rows(30, labels=[]), task=CLASSES)
    assert ": 30 of 30 rows have none of the classes of task pet, since they have no label; at most" in found
    # Captions need no label.
    assert told(rows(30, labels=["dgo"]))[0] == ""


def test_the_limit_on_rejects_is_on_all_draws_from_a_data_set(told):
    """One row in ten is of no use to one of two tasks: 1 / 19 of the draws where both get as many steps."""
    some = [*rows(36), *rows(4, labels=["x"])]
    assert told(some, tasks={"a": TASK, "b": CLASSES}, max_reject_fraction=0.06)[0] == ""
    assert "4 of 40 rows" in told(some, tasks={"a": TASK, "b": CLASSES}, max_reject_fraction=0.05)[0]
    nothing = rows(40, labels=["x"])
    assert "40 of 40 rows" in told(nothing, tasks={"a": TASK, "b": CLASSES}, max_reject_fraction=1.0)[0]
    # A task that never runs needs nothing.
    assert told(nothing, tasks={"a": TASK, "b": CLASSES | {"weight": 0}})[0] == ""


def test_media_of_which_none_is_there_refuse_the_run(told, tmp_path):
    found, _ = told(rows(30, image="gone/1.png"))
    assert found == (
        f"pets: image files: none of the 30 looked for exists, e.g. of row 'r29': {tmp_path}/0/gone/1.png; relative "
        f"paths start at the folder of {tmp_path}/0/m.parquet"
    )
    found, _ = told(rows(30, image=None))
    assert "none of the 30 looked for exists, e.g. of row 'r29': column 'image' is empty" in found
    assert "none of the 30" in told(rows(30, image="a cat on a mat " * 30))[0]
    found, warned = told([*rows(20), *rows(10, image="gone.png")])
    assert not found and warned[0].startswith("warning: pets: image files: 10 are missing of the 30 looked for, e.g.")
    # Storage that cannot be asked says nothing of its files.
    assert told(rows(30, image="nosuchscheme://x/1.png"), schemes=["nosuchscheme"])[0] == ""


def test_media_that_may_not_be_opened_are_not_asked_for(told, monkeypatch):
    asked = []
    monkeypatch.setattr(facts_module, "present", lambda paths, *, timeout_s: asked.extend(paths) or [True] * len(paths))
    found, _ = told(rows(30, image="zip://a.png::file:///b.zip"))
    assert "none of the 30 looked for exists, e.g. of row 'r29': 'zip', allowed are " in found
    assert not asked


def test_columns_of_other_types_that_no_task_reads_are_passed_over(tmp_path, make_data_set):
    """Labels as numbers, pictures as bytes: as many tables have them."""
    paths = [str(tmp_path / f"{name}.parquet") for name in ("m", "h")]
    for path in paths:
        rows = {"id": ["a"], "text": [["x"]], "labels": [3], "image": [{"bytes": b"?"}], "audio": ["a.wav"]}
        pq.write_table(pa.table(rows), path)
    facts = facts_module.facts_of(make_data_set(paths[0], held_out={"h": paths[1]}), [])
    assert facts.labels is None and facts.held_out["h"] == Overlap(1, 1, 1)


def test_a_class_that_a_look_at_some_rows_has_not_met_is_not_said_to_have_none(make_data_set):
    data_set = make_data_set("m.parquet", classes=("cat", "dog"))
    task = types.SimpleNamespace(name="t", classes=(), classifies=True, contrasts=False, modalities=("image",), text="")
    labels = LabelCounts(10, collections.Counter(cat=10), {("cat", "dog"): 0})
    for num_rows, none in ((10, "no row has"), (11, "none of the 10 rows looked at has")):
        facts = facts_module.Facts(data_set, num_rows, Repeats(), labels, {}, {})
        assert lint.problems_of(facts, [task], draws={"t": 1.0}).warnings == [f"toy: {none} the class 'dog'"]


def test_a_label_that_is_no_class_is_found_at_once_among_many():
    classes = tuple(f"class {i}" for i in range(20_000))
    counts = collections.Counter(dict.fromkeys(classes, 2) | {"clas 7": 1})
    labels = LabelCounts(len(classes) + 1, counts, {classes: 1})
    assert "the nearest class is 'class 7'" in lint._unknown_label(labels, classes)


def test_a_contrastive_batch_of_more_rows_than_there_are(told):
    found, _ = told(rows(7))
    assert found == (
        "tasks.pet: a batch of 8 (variant 64x64) is more than the 7 rows of pets: rows would be compared with "
        "themselves; lower batch_size"
    )
    assert told(rows(7), task=CLASSES)[0] == "" and told(rows(8))[0] == ""


def test_variants_larger_than_what_is_decoded_are_named(told):
    task = TASK | {"variants": [{"size": 64}, {"size": 96, "drop_rate": 0.5}, {"size": 128}]}
    error, warned = told(rows(30), task=task, image={"short_side": 64})
    assert error == "" and warned[-1] == (
        "warning: tasks.pet: variant 96x96-drop0.5 is larger than data_sets.pets.image.short_side = 64, so its "
        "pictures are small ones enlarged: set short_side to 128"
    )
    # Frames have a size of their own.
    fits = told(rows(30), task=task, image={"short_side": 128}, video={"short_side": 64})[1]
    assert len(fits) == len(warned) - 1


def test_held_out_rows_that_are_trained_on_are_named(told, tmp_path):
    error, warned = told(rows(30), held_out=[{"id": "r1"}, {"id": "r2"}, {"image": f"{tmp_path}/a.png"}, {}])
    assert error == "" and warned == [
        "warning: pets: 2 ids and 1 media file of the 4 rows of held_out are in the training data too"
    ]


def test_a_held_out_manifest_that_is_the_training_manifest(tmp_path, make_data_set, write_manifest):
    path = write_manifest(tmp_path / "m.parquet", [{"id": "a", "text": ["x"]}])
    data_set = make_data_set(path, held_out={"again": f"{tmp_path}/x/../m.parquet"})
    (tmp_path / "x").mkdir()
    facts = facts_module.facts_of(data_set, [])
    assert lint.problems_of(facts, [], draws={}).warnings == [
        "toy: again is the training manifest itself, so results will say nothing of new data"
    ]


def test_tasks_that_get_few_steps_are_named():
    shares = {"a": 0.05, "b": 0.05, "c": 0.04, "d": 0.86}
    (line,) = lint.steps_of(shares, num_steps=300).warnings
    assert line == (
        "few steps of 300 are expected for a (15), b (15), c (12); raise sampler.temperature, or tasks.a.weight"
    )
    assert lint.steps_of(shares, num_steps=30_000).warnings == []
    assert "are expected for a (40)" in lint.steps_of({"a": 0.0004, "b": 0.9996}, num_steps=100_000).warnings[0]
    # Few steps in all, or many tasks alike, are no surprise; a task that never runs was asked for.
    assert lint.steps_of({"a": 0.5, "b": 0.5, "c": 0.0}, num_steps=10).warnings == []
    assert lint.steps_of(dict.fromkeys("abcdefgh", 1 / 8) | {"i": 0.0}, num_steps=300).warnings == []
