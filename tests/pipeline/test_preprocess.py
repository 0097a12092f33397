"""What preprocessing says of rows that training will reject, without Ray."""

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
    job = preprocess._check(data_set, [task], tmp_path / "shards", DecodeLimits(), 4)
    capsys.readouterr()
    preprocess._write_index(job, [preprocess._make_shard._function(job, number) for number in range(2)])
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("MB, rejected: 6 missing_file of 6 rows; at most 12.5 % of rows may be rejected")
    assert said[1] == (
        "toy: 3 of 6 rows have no caption that can be used (1 bad_text, 2 no_text, 1 text_too_long); "
        "at most 12.5 % of rows may be rejected"
    )


def test_without_a_task_on_captions_nothing_is_said_of_them(tmp_path, make_data_set, make_task, write_manifest, capsys):
    rows = [{"id": "a", "image": "none.png", "text": [], "labels": ["x"]}]
    data_set = make_data_set(write_manifest(tmp_path / "m.parquet", rows))
    job = preprocess._check(data_set, [make_task()], tmp_path / "shards", DecodeLimits(), 4)
    preprocess._write_index(job, [preprocess._make_shard._function(job, 0)])
    assert "no caption" not in capsys.readouterr().out
