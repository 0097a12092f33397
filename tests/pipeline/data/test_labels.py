"""Counts of labels against counts by hand."""

from pipeline.data.labels import count_labels
from pipeline.data.manifest import Manifest


def test_labels_are_counted_by_row_and_by_name(tmp_path, write_raw_manifest):
    labels = [[b"cat"], [b"cat", b"dog"], [], None, [b"\xe9", None], [b"cow", b"cow"], [b"dog"]]
    rows = [{"id": f"{i}".encode(), "labels": value} for i, value in enumerate(labels)]
    path = write_raw_manifest(tmp_path / "m.parquet", rows, row_group_size=3)
    lists = {("cat", "dog"), ("cow",), ()}
    found = count_labels(Manifest(path), lists)
    assert found.looked_at == 7 and dict(found.counts) == {"cat": 2, "dog": 2, "cow": 2, "\\xe9": 1}
    # Without a class of the list; with none asked for, without any label.
    assert found.without == {("cat", "dog"): 4, ("cow",): 6, (): 2}
