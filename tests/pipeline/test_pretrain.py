"""The main job's own files, when the same command is given again."""

import json

import pytest

from pipeline import pretrain

WHOLE = {"steps": 6, "time": {"total_s": 1.5}, "finished": True}


@pytest.mark.parametrize(
    ("content", "old"),
    [
        (json.dumps(WHOLE).encode(), WHOLE),
        (json.dumps(WHOLE | {"steps": 5}).encode(), None),
        (b"", None),
        (b'{"steps": 6, "ti', None),
        (b"[6]", None),
        (b'{"steps": 6, "finished": true}', None),
        (b"\xf5\x00\xff", None),
    ],
)
def test_a_damaged_summary_counts_as_none(tmp_path, content, old):
    """Evaluation and report are then made again."""
    for name in ("report.html", "eval.json"):
        (tmp_path / name).touch()
    assert not pretrain._is_finished(tmp_path, 6)
    (tmp_path / "summary.json").write_bytes(content)
    assert pretrain._old_summary(tmp_path, 6) == (old or {"steps": 6, "time": {}})
    assert pretrain._is_finished(tmp_path, 6) == bool(old)
