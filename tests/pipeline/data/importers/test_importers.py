"""Public layouts, made here as their tools make them, to manifests that decode."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.captions import text_fault
from pipeline.data.columns import NOT_UTF8
from pipeline.data.importers import LAYOUTS, help_text, import_layout
from pipeline.data.manifest import Manifest
from pipeline.data.media.errors import Reject
from pipeline.data.media.image import decode_image
from pipeline.data.media.storage import local_path_or_bytes, read_bytes
from pipeline.data.spec import ImageSpec
from pipeline.errors import RequestError


def picture(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((20, 24, 3), value, np.uint8)).save(out, format="png")
    return out.getvalue()


def put(path: Path, content: bytes | str = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_tar(path: Path, members: list[tuple[str, bytes]], extra: list[tarfile.TarInfo] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for info in extra:
            tar.addfile(info, io.BytesIO(b"?" * info.size))
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def imported(layout: str, source: Path, tmp_path: Path, **options) -> tuple[dict[str, dict], dict]:
    """({id: row as a reader sees it}, {reason: count})."""
    out = tmp_path / "out" / "train.parquet"
    done = import_layout(layout, str(source), out, options=options)
    manifest = Manifest(str(out))
    rows = [manifest.row(i) for i in range(manifest.num_rows)]
    assert done.rows == {str(out): len(rows)}
    return {row["id"]: row for row in rows}, {reason: count for reason, (count, _) in done.skipped.items()}


def test_class_folders(tmp_path):
    put(tmp_path / "d/train/cat/a.png")
    put(tmp_path / "d/train/dog/a.JPG")
    put(tmp_path / "d/train/dog/notes.doc")
    put(tmp_path / "d/loose.png")
    put(tmp_path / "d/train/cat/._a.png")
    put(tmp_path / "d/train/dog/.ipynb_checkpoints/a-checkpoint.png")
    rows, skipped = imported("class_folders", tmp_path / "d", tmp_path)
    assert rows["train/cat/a.png"] == {
        "id": "train/cat/a.png",
        "image": f"{tmp_path}/d/train/cat/a.png",
        "labels": ["cat"],
    }
    assert rows["train/dog/a.JPG"]["labels"] == ["dog"]
    assert len(rows) == 2
    assert skipped == {"not a media file": 1, "not in a class folder": 1, "a hidden file": 2}


def test_sidecar_text_has_a_caption_a_line(tmp_path):
    put(tmp_path / "a.mp4")
    put(tmp_path / "a.txt", "one\n\n two \n")
    put(tmp_path / "b.wav")
    put(tmp_path / "b.wav.txt", b"\xff bad")
    put(tmp_path / "c.png")
    put(tmp_path / "._a.mp4")
    put(tmp_path / "._a.txt", "resource fork")
    rows, skipped = imported("sidecar_text", tmp_path, tmp_path)
    assert rows["a.mp4"]["text"] == ["one", "two"] and rows["a.mp4"]["video"] == f"{tmp_path}/a.mp4"
    assert rows["b.wav"]["text"] == [NOT_UTF8 + "\\xff bad"]
    assert skipped == {"no caption beside it": 1}


TABLE = [
    {"key": "x", "path": "img/x.png", "title": "a cat; a pet", "from": "", "to": ""},
    {"key": "y", "path": "s3://b/y.png", "title": "", "from": "1.5", "to": "4"},
    {"key": "z", "path": "img/z.png", "title": "z", "from": "soon", "to": ""},
]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_with_columns_of_any_name(tmp_path, ending):
    path = tmp_path / f"t.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(TABLE), path)
    elif ending == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n\n" for r in TABLE))
    else:
        mark = "," if ending == "csv" else "\t"
        path.write_text("\n".join(mark.join(r) for r in [TABLE[0].keys(), *(r.values() for r in TABLE)]) + "\n")
    names = {"id": "key", "image": "path", "text": "title", "start_s": "from", "end_s": "to"}
    rows, skipped = imported("table", path, tmp_path, **names)
    assert rows["x"]["image"] == f"{tmp_path}/img/x.png"
    assert rows["x"]["text"] == ["a cat", "a pet"]
    assert rows["x"]["start_s"] is None
    assert (rows["y"]["image"], rows["y"]["start_s"], rows["y"]["end_s"]) == ("s3://b/y.png", 1.5, 4.0)
    assert sum(skipped.values()) == 1 and len(rows) == 2


def test_a_table_without_ids_numbers_its_rows_and_takes_its_folder(tmp_path):
    path = put(tmp_path / "t.csv", "video,labels\na.mp4,run;jump\n")
    rows, _ = imported("table", path, tmp_path, folder="/media")
    assert rows["row-0000000000"]["video"] == "/media/a.mp4"
    assert rows["row-0000000000"]["labels"] == ["run", "jump"]


@pytest.mark.parametrize("word", ["label", "class", "category"])
def test_columns_may_go_by_another_name_and_those_not_used_are_counted(tmp_path, word):
    path = put(
        tmp_path / "t.csv", f"image,caption,{word},width,note\na.png,a cat; x,cat;pet,64,\nb.png,,dog,,n\nc.png,,,,\n"
    )
    done = import_layout("table", str(path), tmp_path / "t.parquet")
    assert done.kept == {
        "column 'width' not used, no option names it": (1, "64"),
        "column 'note' not used, no option names it": (1, "n"),
    }
    rows, skipped = imported("table", path, tmp_path)
    assert [r.get("labels") for r in rows.values()] == [["cat", "pet"], ["dog"], []]
    assert rows["row-0000000000"]["text"] == ["a cat", "x"] and not skipped
    # A column of our own name, or one that an option names, comes first.
    path = put(tmp_path / "u.csv", f"image,labels,{word},title,texts\na.png,one,two,three,four\n")
    rows, _ = imported("table", path, tmp_path, text="title")
    assert rows["row-0000000000"]["labels"] == ["one"] and rows["row-0000000000"]["text"] == ["three"]
    done = import_layout("table", str(path), tmp_path / "u.parquet", options={"text": "title"})
    assert set(done.kept) == {f"column {name!r} not used, no option names it" for name in (word, "texts")}


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_a_table_of_a_spreadsheet_has_other_marks_between_its_columns(tmp_path, mark):
    text = f'\ufeffimage{mark}text{mark}labels\r\na.png{mark}"one, two{mark}\nthree"{mark}"cat;pet"\r\n'
    rows, _ = imported("table", put(tmp_path / "t.csv", text), tmp_path)
    (row,) = rows.values()
    assert row["image"] == f"{tmp_path}/a.png" and row["labels"] == ["cat", "pet"]
    assert " ".join(row["text"]).split() == f"one, two{mark.strip().strip(';')} three".split()


def test_a_wrong_column_is_named(tmp_path):
    path = put(tmp_path / "t.csv", "file\na.png\n")
    with pytest.raises(RequestError, match=r"--option image=path: .* has the columns file"):
        imported("table", path, tmp_path, image="path")
    with pytest.raises(RequestError, match="none of the columns file is named"):
        imported("table", path, tmp_path)


def test_webdataset_members_are_read_where_they_lie(tmp_path):
    tar = write_tar(
        tmp_path / "d/00.tar",
        [
            ("a/1.png", picture(10)),
            ("a/1.txt", b"ten\nlines"),
            ("a/1.json", b'{"label": "grey", "caption": "not used"}'),
            ("a/2.seg.png", picture(20)),
            ("a/2.json", b'{"caption": ["x", "y"], "labels": [3, "b"]}'),
            ("a/2.cls", b"7"),
            ("a/3.txt", b"alone"),
            ("README", b"no ending"),
        ],
    )
    write_tar(tmp_path / "d/01.tar", [("a/1.png", picture(30))])
    before = tar.stat()
    rows, skipped = imported("webdataset", tmp_path / "d", tmp_path)
    assert set(rows) == {"00/a/1", "00/a/2", "01/a/1"}
    assert (rows["00/a/1"]["text"], rows["00/a/1"]["labels"]) == (["ten", "lines"], ["grey"])
    assert (rows["00/a/2"]["text"], rows["00/a/2"]["labels"]) == (["x", "y"], ["7"])
    assert skipped == {"no media": 1, "no ending": 1}
    for key, value in (("00/a/1", 10), ("00/a/2", 20), ("01/a/1", 30)):
        assert read_bytes(rows[key]["image"]) == picture(value)
        assert local_path_or_bytes(rows[key]["image"]) == picture(value)
        assert (decode_image(read_bytes(rows[key]["image"]), ImageSpec(short_side=16)) == value).all()
    assert tar.stat() == before
    assert not list((tmp_path / "d").glob("**/*.png"))


def test_a_member_of_a_tar_that_shrank_or_went_is_a_reject(tmp_path):
    tar = write_tar(tmp_path / "d.tar", [("1.png", picture(1))])
    rows, _ = imported("webdataset", tar, tmp_path)
    path = rows["d/1"]["image"]
    tar.write_bytes(tar.read_bytes()[:530])
    with pytest.raises(Reject, match="the tar has 530 bytes"):
        read_bytes(path)
    tar.unlink()
    with pytest.raises(Reject, match="missing_file"):
        read_bytes(path)


def test_hostile_members_are_left_out_and_counted(tmp_path):
    def info(name, **fields):
        made = tarfile.TarInfo(name)
        for key, value in fields.items():
            setattr(made, key, value)
        return made

    extra = [
        info("up/../../x.png", size=4),
        info("/etc/x.png", size=4),
        info("link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        info("hard.png", type=tarfile.LNKTYPE, linkname="1.png"),
        info("pipe.png", type=tarfile.FIFOTYPE),
    ]
    tar = write_tar(tmp_path / "d.tar", [("1.png", picture(1))], extra)
    rows, skipped = imported("webdataset", tar, tmp_path)
    assert set(rows) == {"d/1"}
    assert skipped == {"a name that leaves the tar": 2, "not a plain file": 3}


def test_a_size_beyond_the_tar_is_refused(tmp_path):
    tar = write_tar(tmp_path / "d.tar", [("1.png", picture(1)), ("2.png", picture(2))])
    content = tar.read_bytes()
    second = content.index(b"2.png")
    forged = tarfile.TarInfo("2.png")
    forged.size = 10**15
    content = content[:second] + forged.tobuf(tarfile.GNU_FORMAT) + content[second + 512 :]
    tar.write_bytes(content)
    rows, skipped = imported("webdataset", tar, tmp_path)
    assert set(rows) == {"d/1"}
    assert skipped["larger than any sample"] == 1


def test_a_torn_tar_gives_what_came_before(tmp_path):
    tar = write_tar(tmp_path / "d.tar", [(f"{i}.png", picture(i)) for i in range(9)])
    tar.write_bytes(tar.read_bytes()[:3000])
    rows, skipped = imported("webdataset", tar, tmp_path)
    assert "d/0" in rows and 1 <= len(rows) < 9
    assert sum(skipped.values()) == 1
    for row in rows.values():
        assert read_bytes(row["image"])


def test_compressed_tars_are_refused(tmp_path):
    put(tmp_path / "d/00.tar.gz")
    with pytest.raises(RequestError, match="not compressed"):
        imported("webdataset", tmp_path / "d", tmp_path)


def test_img2dataset_takes_captions_from_the_table_beside_the_tar(tmp_path):
    members = [("000000000.jpg", picture(5)), ("000000000.txt", b"old"), ("000000000.json", b"{}")]
    write_tar(tmp_path / "d/00000.tar", [*members, ("000000001.jpg", picture(6))])
    rows = [{"key": "000000000", "caption": "new", "status": "success"}, {"key": "000000001", "caption": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d/00000.parquet")
    # A shard whose table is not there falls back to what its tar says.
    write_tar(tmp_path / "d/00001.tar", [("000010000.mp4", b"v"), ("000010000.txt", b"from the tar")])
    write_tar(tmp_path / "d/00002.tar", [("000020000.jpg", picture(7))])
    pq.write_table(
        pa.table({"key": ["000020000"], "caption": [["one", None, " ", "two"]]}), tmp_path / "d/00002.parquet"
    )
    found, _ = imported("img2dataset", tmp_path / "d", tmp_path)
    assert {key: row["text"] for key, row in found.items()} == {
        "00002/000020000": ["one", "two"],
        "00000/000000000": ["new"],
        "00000/000000001": [],
        "00001/000010000": ["from the tar"],
    }
    assert read_bytes(found["00000/000000001"]["image"]) == picture(6)
    assert read_bytes(found["00001/000010000"]["video"]) == b"v"


def test_coco_captions(tmp_path):
    put(tmp_path / "val/000000000139.jpg")
    data = {
        "images": [{"id": 139, "file_name": "000000000139.jpg"}, {"id": 7, "file_name": "7.jpg"}],
        "annotations": [{"image_id": 139, "caption": "A  room.\n"}, {"image_id": 139, "caption": "Chairs"}],
    }
    path = put(tmp_path / "captions.json", json.dumps(data))
    rows, skipped = imported("coco_captions", path, tmp_path, images=str(tmp_path / "val"))
    assert rows["139"]["text"] == ["A room.", "Chairs"]
    assert skipped == {"its media file is missing": 1}


def test_coco_images_of_one_name_in_two_folders_are_told_apart_by_their_paths_or_left_out(tmp_path):
    for folder in ("a", "b"):
        put(tmp_path / folder / "1.jpg")
    names = {1: "a/1.jpg", 2: "./b/1.jpg", 3: "1.jpg"}
    data = {
        "images": [{"id": n, "file_name": name} for n, name in names.items()],
        "annotations": [{"image_id": n, "caption": "a room"} for n in names],
    }
    rows, skipped = imported("coco_captions", put(tmp_path / "c.json", json.dumps(data)), tmp_path)
    assert {n: row["image"] for n, row in rows.items()} == {"1": f"{tmp_path}/a/1.jpg", "2": f"{tmp_path}/b/1.jpg"}
    assert skipped == {"its file name is that of several files": 1}
    data["annotations"][0]["caption"] = None
    with pytest.raises(RequestError, match="expected COCO captions"):
        imported("coco_captions", put(tmp_path / "d.json", json.dumps(data)), tmp_path)


AUDIOSET = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=4, num_segs=4
# YTID, start_seconds, end_seconds, positive_labels
--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
--aaaaaaaaa, 0.000, 10.000, "/m/09x0r"
--bbbbbbbbb, 5.000, 15.000, "/m/09x0r"
--ccccccccc, 5.000, 15.000, "/m/09x0r"
"""


def test_audioset(tmp_path):
    put(tmp_path / "w/--PJHxphWEs_30000_40000.wav")
    put(tmp_path / "w/Y--aaaaaaaaa_0.flac")
    put(tmp_path / "w/--bbbbbbbbb.mp4")
    names = put(tmp_path / "names.csv", 'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/t/dd00088,"Gush"\n')
    path = put(tmp_path / "segments.csv", AUDIOSET)
    rows, skipped = imported("audioset", path, tmp_path, media=str(tmp_path / "w"), names=str(names))
    cut, other, whole = rows["--PJHxphWEs_30_40"], rows["--aaaaaaaaa_0_10"], rows["--bbbbbbbbb_5_15"]
    assert cut["labels"] == ["Speech", "Gush"] and cut["audio"].endswith("_30000_40000.wav")
    assert cut["start_s"] is None and other["start_s"] is None
    assert (whole["start_s"], whole["end_s"]) == (5.0, 15.0) and whole["video"].endswith("--bbbbbbbbb.mp4")
    assert skipped == {"its media file is missing": 1}


def test_kinetics_official_form(tmp_path):
    put(tmp_path / "v/abseiling/0347ZoDXyP0_000095_000105.mp4")
    put(tmp_path / "v/3E7Jib8Yq5M.mp4")
    content = "label,youtube_id,time_start,time_end,split\nabseiling,0347ZoDXyP0,95,105,train\n"
    content += "abseiling,3E7Jib8Yq5M,118,128,train\nabseiling,gone,1,11,train\nabseiling,other,1,11,val\n"
    path = put(tmp_path / "k.csv", content)
    rows, skipped = imported("kinetics", path, tmp_path, videos=str(tmp_path / "v"), split="train")
    cut, whole = rows["0347ZoDXyP0_000095_000105"], rows["3E7Jib8Yq5M_000118_000128"]
    assert cut["labels"] == ["abseiling"] and cut["start_s"] is None
    assert (whole["start_s"], whole["end_s"]) == (118.0, 128.0)
    assert skipped == {"its media file is missing": 1}


def test_kinetics_list_of_paths(tmp_path):
    put(tmp_path / "v/a b.mp4")
    names = put(tmp_path / "names.txt", "abseiling\nzumba\n")
    path = put(tmp_path / "train.csv", f"{tmp_path}/v/a b.mp4 1\nmissing.mp4 0\n")
    rows, skipped = imported("kinetics", path, tmp_path, videos=str(tmp_path / "v"), names=str(names))
    assert rows["a b.mp4"]["labels"] == ["zumba"]
    assert skipped == {"its media file is missing": 1}
    put(path, "a.mp4 9\n")
    with pytest.raises(RequestError, match="class 9 is not among the 2"):
        imported("kinetics", path, tmp_path, videos=str(tmp_path / "v"), names=str(names))


def test_esc50(tmp_path):
    put(tmp_path / "ESC-50/audio/1-100032-A-0.wav")
    put(tmp_path / "ESC-50/audio/5-1-A-1.wav")
    content = "filename,fold,target,category,esc10,src_file,take\n1-100032-A-0.wav,1,0,door_wood_knock,True,100032,A\n"
    content += "5-1-A-1.wav,5,1,rooster,False,1,A\n1-2-A-1.wav,1,1,rooster,False,1,A\n"
    path = put(tmp_path / "ESC-50/meta/esc50.csv", content)
    rows, skipped = imported("esc50", path, tmp_path, folds="1,2,3,4")
    assert {key: row["labels"] for key, row in rows.items()} == {"1-100032-A-0": ["door wood knock"]}
    assert skipped == {"its media file is missing": 1}


def test_columns_that_no_row_fills_are_left_out(tmp_path):
    put(tmp_path / "d/cat/a.png")
    done = import_layout("class_folders", str(tmp_path / "d"), tmp_path / "d/train.parquet")
    assert done.columns == ["id", "image", "labels"]
    # Media below the manifest's folder are named from there: both can move together.
    assert pq.read_table(tmp_path / "d/train.parquet")["image"].to_pylist() == ["cat/a.png"]


def test_a_held_out_share_depends_on_ids_alone(tmp_path):
    for i in range(200):
        put(tmp_path / f"d/c/{i}.png")

    def split(folder):
        done = import_layout("class_folders", str(tmp_path / "d"), tmp_path / folder / "t.parquet", held_out_share=0.25)
        assert sum(done.rows.values()) == 200
        return [set(pq.read_table(path)["id"].to_pylist()) for path in done.rows]

    train, held_out = split("one")
    assert 25 < len(held_out) < 75 and not train & held_out
    for i in range(200, 300):
        put(tmp_path / f"d/c/{i}.png")
    (tmp_path / "d/c/0.png").unlink()
    done = import_layout("class_folders", str(tmp_path / "d"), tmp_path / "two/t.parquet", held_out_share=0.25)
    grown = set(pq.read_table(list(done.rows)[1])["id"].to_pylist())
    assert held_out - {"c/0.png"} <= grown and not train & grown


def test_rows_with_the_id_of_an_earlier_one_are_left_out_and_counted(tmp_path):
    path = put(tmp_path / "t.csv", "id,image\na,a.png\na,b.png\nb,c.png\na,d.png\n")
    done = import_layout("table", str(path), tmp_path / "out/train.parquet")
    manifest = Manifest(str(tmp_path / "out/train.parquet"))
    assert [manifest.row(i)["image"] for i in range(2)] == [f"{tmp_path}/a.png", f"{tmp_path}/c.png"]
    assert done.skipped == {"the id of an earlier row": (2, "a")}


def test_a_doubled_key_in_a_tar_ends_nothing(tmp_path):
    """Neighbours are one sample, of which the first file of each ending counts; later ones are an id of their own."""
    members = [("a.png", picture(1)), ("a.png", picture(2)), ("a.txt", b"one"), ("b.png", picture(3))]
    write_tar(tmp_path / "d/0.tar", [*members, ("a.png", picture(4)), ("c.png", picture(5))])
    write_tar(tmp_path / "d/1.tar", [("a.png", picture(6))])
    rows, skipped = imported("webdataset", tmp_path / "d", tmp_path)
    assert set(rows) == {"0/a", "0/b", "0/c", "1/a"} and rows["0/a"]["text"] == ["one"]
    assert read_bytes(rows["0/a"]["image"]) == picture(1) and read_bytes(rows["1/a"]["image"]) == picture(6)
    assert skipped == {"a file whose key and ending another has": 1, "the id of an earlier row": 1}


@pytest.mark.parametrize("size", ["-1", "-512", "-100000", "0", "1", "99999999999999999999", "many"])
def test_what_follows_a_member_with_a_wrong_size_is_read(tmp_path, size):
    """The extended header lies; the member's own header says where the next one begins."""
    tar = tmp_path / "d.tar"
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as file:
        for i in range(4):
            info = tarfile.TarInfo(f"{i}.png")
            info.size, info.pax_headers = len(picture(i)), {"size": size} if i == 1 else {}
            file.addfile(info, io.BytesIO(picture(i)))
    rows, skipped = imported("webdataset", tar, tmp_path)
    assert set(rows) == {"d/0", "d/2", "d/3"} and sum(skipped.values()) == 1
    assert read_bytes(rows["d/3"]["image"]) == picture(3)


def header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("tail", ["negative", "garbage", "another tar", "nothing"])
def test_a_tar_that_ends_before_its_end_is_named(tmp_path, tail):
    tar = write_tar(tmp_path / "d.tar", [("1.png", picture(1))])
    whole, other = tar.read_bytes(), write_tar(tmp_path / "other.tar", [("2.png", picture(2))]).read_bytes()
    blocks = whole[: 512 + -(-len(picture(1)) // 512) * 512]
    more = {
        "negative": header("2.png", -1536),
        "garbage": b"x" * 2048,
        "another tar": bytes(10240) + other,
        "nothing": b"",
    }
    tar.write_bytes(blocks + more[tail])
    done = import_layout("webdataset", str(tar), tmp_path / "o.parquet")
    assert sum(done.rows.values()) == 1
    if tail == "nothing":
        assert done.kept == {"a tar without an end mark, perhaps cut short": (1, "d.tar")}
    else:
        assert "a tar that cannot be read to its end" in done.skipped


def test_nothing_of_a_sample_is_lost_in_silence(tmp_path):
    members = [
        *(("a.png", picture(1)), ("a.txt", b"caf\xe9\nfine"), ("a.cls", b"\xff")),
        *(("b.png", picture(2)), ("b.json", b"{broken"), ("b.seg.png", picture(3))),
        *(("c.png", picture(4)), ("c.json", b'["no object"]')),
        *(("d.png", picture(5)), ("d.txt", b"x" * (1 << 21))),
        *(("e.png", picture(6)), ("e.json", b'{"caption": "half \\ud83d", "label": "caf\xe9"}')),
        *((".png", picture(7)), ("f/.txt", b"no key")),
    ]
    tar = write_tar(tmp_path / "d.tar", members)
    done = import_layout("webdataset", str(tar), tmp_path / "o.parquet")
    manifest = Manifest(str(tmp_path / "o.parquet"))
    rows = {row["id"]: row for row in (manifest.row(i) for i in range(manifest.num_rows))}
    assert rows["d/a"]["text"] == [NOT_UTF8 + "caf\\xe9", "fine"] and rows["d/a"]["labels"] == [NOT_UTF8 + "\\xff"]
    assert rows["d/e"]["text"] == [NOT_UTF8 + "half \\xed\\xa0\\xbd"] and rows["d/e"]["labels"] == [
        NOT_UTF8 + "caf\\xe9"
    ]
    assert [text_fault(text, max_characters=99)[0] for text in (*rows["d/a"]["text"][:1], *rows["d/e"]["text"])] == [
        "bad_text",
        "bad_text",
    ]
    assert done.skipped == {"no name before its ending": (2, "d.tar: .png")}
    assert done.kept == {
        "a text that is not UTF-8, which no task uses": (2, "d/a"),
        "a .json that cannot be read": (2, "d/b.json"),
        "a sample with a second image, which is not used": (1, "d/b.seg.png"),
        "a text file too large to be a caption": (1, "d/d.txt"),
    }
    kept, last = done.lines()[1:]
    assert kept.startswith("kept with defects: a text that is not UTF-8, which no task uses × 2, e.g. d/a; ")
    assert last == "5 rows, 2 left out: no name before its ending × 2, e.g. d.tar: .png"


def test_parquet_beside_tars_and_alone_and_coco_of_another_encoding_are_marked(tmp_path):
    write_tar(tmp_path / "d/0.tar", [("a.jpg", picture(1)), ("b.jpg", picture(2))])
    raw = pa.array([b"caf\xe9", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"key": ["a", "b"], "caption": raw}), tmp_path / "d/0.parquet")
    rows, _ = imported("img2dataset", tmp_path / "d", tmp_path)
    assert [row["text"] for row in rows.values()] == [[NOT_UTF8 + "caf\\xe9"], ["fine"]]
    lists = pa.ListArray.from_arrays([0, 2, 2], raw)
    pq.write_table(pa.table({"id": ["x", "y"], "image": ["x.png", "y.png"], "text": lists}), tmp_path / "t.parquet")
    rows, _ = imported("table", tmp_path / "t.parquet", tmp_path)
    assert rows["x"]["text"] == [NOT_UTF8 + "caf\\xe9", "fine"] and rows["y"]["text"] == []
    put(tmp_path / "coco/1.jpg")
    content = b'{"images":[{"id":1,"file_name":"1.jpg"}],"annotations":[{"image_id":1,"caption":"caf\xe9"}]}'
    rows, _ = imported("coco_captions", put(tmp_path / "coco/c.json", content), tmp_path)
    assert rows["1"]["text"] == [NOT_UTF8 + "caf\\xe9"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b"id,image,text\na,caf\xe9.png,caf\xe9\n\xe9,b.png,b\n"),
        ("t.tsv", b"id\timage\ttext\na\tcaf\xe9.png\tcaf\xe9\n\xe9\tb.png\tb\n"),
        (
            "t.jsonl",
            b'{"id":"a","image":"caf\xe9.png","text":"caf\xe9"}\n3\n{"id":"\xe9","image":"b.png","text":"b"}\n',
        ),
    ],
)
def test_tables_of_another_encoding_are_marked(tmp_path, name, content):
    rows, skipped = imported("table", put(tmp_path / name, content), tmp_path)
    assert rows["a"]["text"] == [NOT_UTF8 + "caf\\xe9"] and rows["a"]["image"] == f"{tmp_path}/caf\\xe9.png"
    assert rows["\\xe9"]["text"] == ["b"]
    assert skipped == ({"not a JSON object": 1} if name.endswith("l") else {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("classfolders", "."), "expected one of class_folders"),
        (("class_folders", "nowhere"), "found nothing there"),
        (("webdataset", "."), "expected .tar files"),
    ],
)
def test_wrong_requests(tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=message):
        import_layout(*arguments, tmp_path / "out.parquet")


def test_a_manifest_replaces_no_folder_and_no_source(tmp_path):
    path = put(tmp_path / "t.csv", "image\na.png\n")
    import_layout("table", str(path), tmp_path / "t.parquet")
    before = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "d.parquet").mkdir()
    for source, out, message in (
        (path, path, r"expected a file that ends in \.parquet"),
        (path, tmp_path, r"expected a file that ends in \.parquet, e\.g\. .*/train\.parquet"),
        (path, tmp_path / "d.parquet", "expected a file, found a folder"),
        (tmp_path / "t.parquet", tmp_path / "d/../t.parquet", "would replace the table that it is made from"),
    ):
        (tmp_path / "d").mkdir(exist_ok=True)
        with pytest.raises(RequestError, match=message):
            import_layout("table", str(source), out)
    assert (tmp_path / "t.parquet").read_bytes() == before and path.read_text().startswith("image")


def test_wrong_options_and_empty_sources_say_what_is_there(tmp_path):
    put(tmp_path / "d/notes.doc")
    with pytest.raises(RequestError, match="esc50 has audio, folds"):
        import_layout("esc50", str(tmp_path), tmp_path / "o.parquet", options={"fold": "1"})
    with pytest.raises(RequestError, match=r"found none: not a media file × 1, e\.g\. notes\.doc"):
        import_layout("class_folders", str(tmp_path / "d"), tmp_path / "o.parquet")
    assert not (tmp_path / "o.parquet").exists()


def test_help_names_every_layout():
    assert all(f"  {name} " in help_text() for name in LAYOUTS)
    assert "separator: between several captions or labels in one cell" in " ".join(help_text().split())
