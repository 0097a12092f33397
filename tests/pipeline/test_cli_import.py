"""The import command as a user types it."""

import pyarrow.parquet as pq
import pytest

from pipeline.cli import main


def test_import_says_what_it_wrote_and_what_it_left_out(tmp_path, capsys):
    (tmp_path / "d/cat").mkdir(parents=True)
    (tmp_path / "d/cat/a.png").write_bytes(b"x")
    (tmp_path / "d/cat/a.doc").write_bytes(b"x")
    out = tmp_path / "train.parquet"
    assert main(["import", "class_folders", str(tmp_path / "d"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: 1 rows, columns id, image, labels",
        "1 rows, 1 left out: not a media file × 1, e.g. cat/a.doc",
    ]
    assert pq.read_table(out).num_rows == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["class_folders", "nowhere"], "error: nowhere: expected a file or a folder, found nothing there"),
        (["table", "x.csv", "--option", "image"], "error: --option image: expected KEY=VALUE"),
        (["folders", "."], "error: layout 'folders': expected one of class_folders, "),
    ],
)
def test_wrong_requests_are_one_line_and_exit_2(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["import", *arguments, "--out", str(tmp_path / "o.parquet")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)
    assert not (tmp_path / "o.parquet").exists()


def test_help_lists_the_layouts(capsys):
    with pytest.raises(SystemExit):
        # As jobs/preprocess.py import --help.
        main(["preprocess", "import", "--help"])
    assert "webdataset" in capsys.readouterr().out
