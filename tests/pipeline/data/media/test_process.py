"""Decoding in a process of its own: equal to decoding here, and whatever kills or hangs it costs its sample alone."""

import contextlib
import dataclasses
import errno
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from pipeline.data.media import child, process
from pipeline.data.media.child import Child
from pipeline.data.media.clip import decode_media
from pipeline.data.media.decoders import run
from pipeline.data.media.errors import Reject
from pipeline.data.media.process import DecodeLimits, DecodeProcess
from pipeline.errors import DataError, RequestError


@pytest.fixture(scope="module")
def decoders():
    decoders = DecodeProcess(DecodeLimits(timeout_s=60.0, memory_bytes=1 << 30))
    yield decoders
    decoders.close()


@pytest.fixture
def hasty():
    """With a deadline that a loaded machine may miss: for what hangs alone."""
    decoders = DecodeProcess(DecodeLimits(timeout_s=1.0))
    yield decoders
    decoders.close()


@pytest.fixture
def data_set(make_data_set):
    image = dataclasses.replace(make_data_set().image, decoder="tests.decoders:deadly_image")
    return dataclasses.replace(make_data_set(), image=image)


@pytest.fixture
def good(tmp_path) -> dict:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "good.png")
    return {"image": str(tmp_path / "good.png")}


@pytest.fixture
def deadly(tmp_path):
    """A row whose file tells the decoder what to do."""

    def make(word: str) -> dict:
        (tmp_path / f"{word}.png").write_bytes(word.encode() + b" and then nothing")
        return {"image": str(tmp_path / f"{word}.png")}

    return make


def test_arrays_are_those_of_decoding_here(decoders, tmp_path, make_data_set, write_video, good):
    data_set = make_data_set()
    row = good | {"video": write_video(tmp_path / "a.mp4", sound_hz=500, num_frames=48), "start_s": 0.5, "end_s": 1.5}
    for modality in ("image", "video", "audio"):
        here, there = decode_media(row, data_set, modality), decoders.decode(row, data_set, modality)
        assert here.dtype == there.dtype and here.shape == there.shape and (here == there).all()
    assert decoders.cpu_s > 0


@pytest.fixture
def asked(monkeypatch):
    """The number of files of each request."""
    sizes, ask = [], Child.ask_together

    def counted(self, requests):
        sizes.append(len(requests))
        return ask(self, requests)

    monkeypatch.setattr(Child, "ask_together", counted)
    return sizes


def make_pictures(folder, number: int) -> list[dict]:
    rows = []
    for index in range(number):
        pixels = np.random.default_rng(index).integers(0, 256, (24 + index, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        rows.append({"id": index, "image": str(folder / f"{index}.png")})
    return rows


def test_files_that_are_decoded_together_are_those_of_decoding_here(
    decoders, tmp_path, make_data_set, asked, monkeypatch
):
    """Cheap ones, sixteen at a time; one that is not there and one without a file among them, and two left out."""
    # However long one took.
    monkeypatch.setattr(process, "_TOGETHER_S", 1e6)
    data_set, rows = make_data_set(), make_pictures(tmp_path, 24)
    os.unlink(rows[5]["image"])
    rows[7]["image"] = None
    decoders._mean_s[data_set.modality("image").decode] = 0.001
    for number in (n for n in range(24) if n not in (3, 20)):
        if number in (5, 7):
            with pytest.raises(Reject, match="missing_file" if number == 5 else "no_media"):
                decoders.decode(rows[number], data_set, "image", next_rows=rows[number + 1 :])
            continue
        there = decoders.decode(rows[number], data_set, "image", next_rows=rows[number + 1 :])
        np.testing.assert_array_equal(there, decode_media(rows[number], data_set, "image"))
    # The row without a file takes no place; the last one has nothing to come after it.
    assert asked == [16, 7]


def test_one_that_ends_the_child_costs_those_decoded_with_it_nothing(
    decoders, data_set, tmp_path, deadly, asked, monkeypatch
):
    monkeypatch.setattr(process, "_TOGETHER_S", 1e6)
    rows = make_pictures(tmp_path, 12)
    rows[4], rows[9] = deadly("SEGV"), deadly("EXIT")
    decoders._mean_s[data_set.modality("image").decode] = 0.001
    for number, row in enumerate(rows):
        if number in (4, 9):
            with pytest.raises(Reject) as found:
                decoders.decode(row, data_set, "image", next_rows=rows[number + 1 :])
            assert found.value.reason == "crashed"
            continue
        there = decoders.decode(row, data_set, "image", next_rows=rows[number + 1 :])
        np.testing.assert_array_equal(there, decode_media(row, data_set, "image"))
    # All at once, which one of them ends; then one by one, and the deadly ones twice.
    assert asked == [12, *[1] * 14]


def test_rejects_are_those_of_decoding_here(decoders, tmp_path, make_data_set):
    (tmp_path / "a.png").write_bytes(b"no picture")
    for row in ({"image": str(tmp_path / "a.png")}, {"image": str(tmp_path / "none.png")}, {}):
        found = []
        for decode in (decode_media, decoders.decode):
            with pytest.raises(Reject) as caught:
                decode(row, make_data_set(), "image")
            found.append((caught.value.reason, caught.value.detail))
        assert found[0] == found[1]


@pytest.mark.parametrize(
    ("word", "reason", "detail"),
    [
        ("SEGV", "crashed", "SIGSEGV"),
        ("NULL", "crashed", "SIGSEGV"),
        ("ABRT", "crashed", "SIGABRT"),
        ("EXIT", "crashed", "exit code 3"),
        ("HUGE", "out_of_memory", "more memory than cluster.decode_memory_mb"),
        ("QUIT", "not_decodable", "SystemExit: usage: decoder FILE"),
        ("RUST", "not_decodable", "PanicException: index out of bounds"),
    ],
)
def test_what_kills_a_decoder_is_a_reject(decoders, data_set, good, deadly, word, reason, detail):
    with pytest.raises(Reject) as caught:
        decoders.decode(deadly(word), data_set, "image")
    assert caught.value.reason == reason and detail in caught.value.detail
    assert decoders.decode(good, data_set, "image").shape == (32, 43, 3)


@pytest.mark.parametrize("word", ["LOCK", "SPIN"])
def test_a_decoder_that_hangs_is_a_reject(hasty, data_set, deadly, word):
    with pytest.raises(Reject, match="hung: no end after 1 s"):
        hasty.decode(deadly(word), data_set, "image")


def test_a_decoder_that_ends_and_leaves_a_process_is_not_waited_for(decoders, data_set, deadly):
    """The process keeps the pipe open, and the clock goes on: it is no decoder that hangs."""
    with pytest.raises(Reject, match=r"crashed.*exit code 3"):
        decoders.decode(deadly("LEFT"), data_set, "image")


def test_a_decoder_that_closes_the_pipe_is_not_waited_for(decoders, data_set, deadly, monkeypatch):
    monkeypatch.setattr(child, "_GRACE_S", 0.5)
    with pytest.raises(Reject, match=r"crashed.*SIGKILL"):
        decoders.decode(deadly("SHUT"), data_set, "image")


@pytest.mark.parametrize("word", ["READ", "FORK"])
def test_a_decoder_that_reads_its_input_or_forks_takes_no_request_of_another(data_set, tmp_path, deadly, word):
    rows = make_pictures(tmp_path, 5)
    with contextlib.closing(DecodeProcess(DecodeLimits(timeout_s=60.0))) as decoders:
        decoders._mean_s[data_set.modality("image").decode] = 0.001
        with pytest.raises(Reject, match="not_decodable"):
            decoders.decode(deadly(word), data_set, "image", next_rows=rows)
        pid = decoders._child.pid
        for number, row in enumerate(rows):
            there = decoders.decode(row, data_set, "image", next_rows=rows[number + 1 :])
            np.testing.assert_array_equal(there, decode_media(row, data_set, "image"))
        assert decoders._child.pid == pid


def test_a_program_that_a_decoder_waits_for_ends_with_its_sample(hasty, data_set, deadly):
    row = deadly("PROG")
    with pytest.raises(Reject, match="hung"):
        hasty.decode(row, data_set, "image")
    assert gone(int(open(row["image"] + ".pid").read()))


def test_a_death_that_does_not_come_again_costs_nothing(decoders, data_set, tmp_path, good):
    content = open(good["image"], "rb").read()
    (tmp_path / "once.gif").write_bytes(b"ONCE" + content)
    with pytest.raises(Reject) as caught:
        decoders.decode({"image": str(tmp_path / "once.gif")}, data_set, "image")
    # The second try came as far as Pillow, which does not know such a file.
    assert caught.value.reason == "not_decodable" and (tmp_path / "once.gif.tried").exists()


def test_a_child_killed_from_outside_is_replaced(decoders, data_set, good):
    before = decoders.decode(good, data_set, "image")
    os.kill(decoders._child.pid, signal.SIGKILL)
    assert (decoders.decode(good, data_set, "image") == before).all()


def test_a_process_that_grows_is_replaced(data_set, good, deadly):
    decoders = DecodeProcess(DecodeLimits(recycle_bytes=100 << 20))
    children = []
    for _ in range(6):
        with pytest.raises(Reject, match="not_decodable"):
            decoders.decode(deadly("LEAK"), data_set, "image")
        decoders.decode(good, data_set, "image")
        children.append(decoders._child.pid)
    decoders.close()
    # 64 MB are kept each time: each process lasts for two.
    assert len(set(children)) == 3 and children[0] == children[1] != children[2]


def test_a_decoder_that_kills_every_sample_stops_the_run(data_set, deadly, monkeypatch):
    monkeypatch.setattr(process, "_MAX_DEATHS_IN_A_ROW", 3)
    decoders = DecodeProcess(DecodeLimits())
    row = deadly("SEGV")
    for _ in range(2):
        with pytest.raises(Reject, match="crashed"):
            decoders.decode(row, data_set, "image")
    with pytest.raises(DataError, match=r"died of 3 samples in a row, the last .*SEGV.png.*is a decoder broken"):
        decoders.decode(row, data_set, "image")
    decoders.close()


def gone(pid: int) -> bool:
    """Whether a process ends, or has ended and nobody has asked for its exit code."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        try:
            if open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] in "ZX":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("word", ["LOCK", "LIVE"])
def test_the_child_ends_with_its_parent(tmp_path, good, word):
    """Also while it hangs, as its deadline is the kernel's, and while a thread of a decoder's runs."""
    script = f"""
import dataclasses, os, threading, time
from pipeline.data.media.process import DecodeLimits, DecodeProcess
from pipeline.data.spec import DataSetSpec, ImageSpec
decoders = DecodeProcess(DecodeLimits(timeout_s=2.0))
data_set = DataSetSpec(name="", manifest="", held_out={{}}, image=ImageSpec(decoder="tests.decoders:deadly_image"))
decoders.decode({{"image": {good["image"]!r}}}, data_set, "image")
print(decoders._child.pid, flush=True)
open({str(tmp_path / "lock.png")!r}, "w").write("{word}")
threading.Thread(target=decoders.decode, args=({{"image": {str(tmp_path / "lock.png")!r}}}, data_set, "image")).start()
time.sleep(0.5)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert gone(int(done.stdout))


def test_a_caller_that_ends_takes_no_answer_of_another(decoders, make_data_set, good):
    """Requests and answers stay in step over rejects and deaths."""
    data_set = make_data_set()
    whole = decoders.decode(good, data_set, "image")
    for _ in range(3):
        with pytest.raises(Reject):
            decoders.decode({"image": good["image"] + ".none"}, data_set, "image")
        assert (decoders.decode(good, data_set, "image") == whole).all()


def test_a_process_that_does_not_start_says_why(make_data_set, good, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/usr/bin/env")
    with pytest.raises(DataError, match=r"did not start: exit code \d+, last line of its output: .*env"):
        DecodeProcess().decode(good, make_data_set(), "image")


def test_more_files_open_than_select_can_take(make_data_set, good):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        decoders = DecodeProcess()
        assert decoders.decode(good, make_data_set(), "image").shape[2] == 3
        decoders.close()
    finally:
        for number in held:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_interrupted_request_leaves_no_answer_behind(decoders, make_data_set, good, monkeypatch):
    data_set = make_data_set()
    whole, read = decoders.decode(good, data_set, "image"), Child._read_lines

    def interrupted(self, number):
        raise KeyboardInterrupt

    monkeypatch.setattr(Child, "_read_lines", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoders.decode(good, data_set, "image")
    monkeypatch.setattr(Child, "_read_lines", read)
    with pytest.raises(Reject, match="missing_file"):
        decoders.decode({"image": "/none.png"}, data_set, "image")
    assert (decoders.decode(good, data_set, "image") == whole).all()


def test_what_an_old_process_has_kept_makes_no_reject(data_set, tmp_path, deadly):
    """A sample that a fresh process can decode is decoded, whatever the process did before."""
    Image.new("RGB", (5000, 4000)).save(tmp_path / "large.png")
    decoders = DecodeProcess(DecodeLimits(memory_bytes=256 << 20, recycle_bytes=1 << 40))
    for _ in range(3):
        with pytest.raises(Reject, match="not_decodable"):
            decoders.decode(deadly("LEAK"), data_set, "image")
        assert decoders.decode({"image": str(tmp_path / "large.png")}, data_set, "image").shape == (32, 40, 3)
    decoders.close()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "a\0b.png"}, "missing_file"),
        ({"image": "/" + 300 * "a"}, "missing_file"),
        ({"image": "/" + 3000 * "a/"}, "missing_file"),
        ({"video": "/bin/sh", "start_s": "1.5"}, "not_decodable"),
        ({"image": "/dev/zero"}, "missing_file"),
    ],
)
def test_rows_that_hold_anything(decoders, make_data_set, row, reason):
    modality = next(iter(row))
    with pytest.raises(Reject) as caught:
        decoders.decode(row, make_data_set(), modality)
    assert caught.value.reason == reason


def test_a_scheme_without_its_package_is_a_wrong_request_that_names_data_set_and_row(decoders, make_data_set):
    """The recipe allows the scheme, so it is not the row that is wrong."""
    allowed, row = make_data_set(schemes=("nowhere",)), {"id": "r7", "image": "nowhere://a.png"}
    with pytest.raises(RequestError, match=r"data set 'toy', row 'r7': storage: nowhere://a\.png cannot be opened"):
        decoders.decode(row, allowed, "image")
    with pytest.raises(Reject, match="unknown_scheme: 'nowhere'"):
        decoders.decode(row, make_data_set(), "image")


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError),
        (OSError("out of memory error when reading image file"), MemoryError),
        (OSError(errno.EINVAL, "Invalid argument"), Reject),
        (ValueError("no memory of this format"), Reject),
    ],
)
def test_a_lack_of_memory_is_known_by_whatever_a_library_makes_of_it(error, raised):
    def decode(source, spec, *, start_s, end_s):
        raise error

    with pytest.raises(raised):
        run("mine", b"", None, built_in={"mine": decode}, start_s=0.0, end_s=None)
