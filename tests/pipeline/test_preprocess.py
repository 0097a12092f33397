"""The lines of preprocessing on rows that training will reject, without Ray."""

import subprocess
import sys
from pathlib import Path

from pipeline import preprocess
from pipeline.data.columns import NOT_UTF8
from pipeline.data.media.process import DecodeLimits


def test_rejects_and_captions_of_no_use_are_named_with_the_share_allowed(
    tmp_path, make_data_set, make_task, write_manifest, capsys
):
    texts = [["a cat"], [" "], [NOT_UTF8 + "x", "y" * 50], [], ["good", ""], ["z" * 51]]
    rows = [{"id": str(i), "image": "none.png", "text": text} for i, text in enumerate(texts)]
    data_set = make_data_set(write_manifest(tmp_path / "m.parquet", rows), max_reject_fraction=0.125)
    task = make_task(objective="nce", modalities=("image", "text"), max_characters=50)
    job = preprocess._checked_job(data_set, [task], tmp_path / "shards", DecodeLimits(), 4)
    capsys.readouterr()
    for number in range(2):
        job.make(number)
    preprocess._write_index(job)
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("MB, rejected: 6 missing_file of 6 rows; at most 12.5 % of rows may be rejected")
    assert said[1] == (
        "toy: 3 of 6 rows have no caption that can be used (1 bad_text, 2 no_text, 1 text_too_long); "
        "at most 12.5 % of rows may be rejected"
    )


def test_without_a_task_on_captions_nothing_is_said_of_them(tmp_path, make_data_set, make_task, write_manifest, capsys):
    rows = [{"id": "a", "image": "none.png", "text": [], "labels": ["x"]}]
    data_set = make_data_set(write_manifest(tmp_path / "m.parquet", rows))
    job = preprocess._checked_job(data_set, [make_task()], tmp_path / "shards", DecodeLimits(), 4)
    job.make(0)
    preprocess._write_index(job)
    assert "no caption" not in capsys.readouterr().out


ROOT = Path(__file__).resolve().parents[2]
LOADED = "print(sorted({'ray', 'ray.data', 'ray.train', 'jax', 'flax', 'orbax', 'pydantic'} & set(sys.modules)))"


def loaded(imports: str) -> str:
    code = f"import sys; {imports}; {LOADED}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env={"PYTHONPATH": str(ROOT)}
    )
    return done.stdout.strip() or done.stderr


def test_processes_that_make_shards_load_no_more_than_it_takes():
    """Ray's processes import what they are sent by its name."""
    assert loaded("import pipeline.data.shard_job, pipeline.cluster.tasks") == "['ray']"


def test_the_job_itself_loads_nothing_of_training():
    found = loaded("import pipeline.preprocess")
    assert "'ray'" in found
    assert not {"ray.train", "ray.data", "orbax"} & set(found.strip("[]").replace("'", "").split(", "))


def test_finished_shards_are_kept_and_others_made_again(tmp_path, make_data_set, make_task, write_manifest):
    rows = [{"id": str(i), "image": "none.png", "labels": ["x"]} for i in range(6)]
    data_set = make_data_set(write_manifest(tmp_path / "m.parquet", rows))
    job = preprocess._checked_job(data_set, [make_task()], tmp_path / "shards", DecodeLimits(), 2)
    entries = {number: job.make(number) for number in range(3)}
    assert job.num_shards == 3 and job.finished() == dict.fromkeys(entries, 2)
    # A kill between a shard and its entry, and one in the middle of a shard.
    (job.folder / "shard-00000.json").unlink()
    with open(job.folder / "shard-00002.arrow", "r+b") as file:
        file.truncate(10)
    assert job.finished() == {1: 2} and job.entry(1) == entries[1]
