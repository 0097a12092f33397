"""From positions to rows: ids, substitutes, labels, positives, and the same samples whatever the number of ranks."""

import dataclasses
import hashlib
import types
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data import batches, prompts
from pipeline.data.batches import BatchMaker, SampleMaker
from pipeline.data.captions import usable_captions
from pipeline.data.columns import NOT_UTF8
from pipeline.data.known_rejects import NONE_KNOWN, Collector, KnownRejects
from pipeline.data.media.clip import Clip
from pipeline.data.media.errors import Reject
from pipeline.data.plan import Row, TaskPlan, group_arrays
from pipeline.data.sample_tokens import View
from pipeline.data.sources import MediaSource
from pipeline.data.spec import AudioSpec, TaskSpec, TokenSpec, Variant, VideoSpec
from pipeline.data.tokenizer import encode_text
from pipeline.data.tokens import patchify, spectrogram_tokens
from pipeline.errors import DataError
from pipeline.train.mixture.structures import structure_of
from pipeline.train.quarantine import Quarantine, known_bad
from pipeline.train.reject_limit import RejectCounts

NUM_ROWS, NUM_BATCHES = 12, 6
BAD = {4, 9}
CLASSES = ("red", "green", "blue")
VIDEO_VARIANT = Variant(name="8x32x32", global_batch_size=4, num_frames=8, size=32, grid=(2, 2, 2), num_vision_tokens=8)


def colour(number: int) -> tuple[int, int, int]:
    return (20 * number, 255 - 20 * number, 7)


@pytest.fixture(scope="module")
def images(tmp_path_factory, write_manifest, make_data_set):
    """Twelve images of one colour each, two of them damaged."""
    folder = tmp_path_factory.mktemp("images")
    rows = []
    for number in range(NUM_ROWS):
        Image.new("RGB", (32, 32), colour(number)).save(folder / f"{number}.png")
        if number in BAD:
            (folder / f"{number}.png").write_bytes(b"damaged")
        text = [f"a {CLASSES[number % 3]} cat", "the dog"]
        rows.append({"id": f"id-{number}", "image": f"{number}.png", "text": text, "labels": [CLASSES[number % 3]]})
    return make_data_set(write_manifest(folder / "m.parquet", rows), classes=CLASSES)


class SpyingSource:
    """A source that remembers which rows it was asked to decode."""

    def __init__(self, inner):
        self.inner, self.num_rows, self.decoded = inner, inner.num_rows, []

    def id(self, row: int) -> str:
        return self.inner.id(row)

    def media_path(self, row: int) -> str:
        return self.inner.media_path(row)

    def clip(self, row: int, *, next_rows=()) -> Clip:
        self.decoded.append(row)
        return self.inner.clip(row)


def make_batches(data_set, task, *, tokenizer=None, bad: KnownRejects | None = None, seed: int = 3) -> BatchMaker:
    media = tuple(m for m in task.modalities if m != "text")
    source = SpyingSource(MediaSource(data_set, modalities=media))
    plan = TaskPlan(task, seed=seed, num_rows=source.num_rows, num_batches=NUM_BATCHES)
    samples = SampleMaker(task, data_set, tokenizer=tokenizer, tokens=TokenSpec())
    return BatchMaker(plan, samples, source, known_bad=bad)


def known(reasons: dict) -> KnownRejects:
    """Rejects of an earlier part of a run. reasons: by their key."""
    collector = Collector()
    for key, reason in reasons.items():
        collector.add(key, reason)
    return collector.rejects()


def make_samples(data_set, task, *, tokenizer=None) -> SampleMaker:
    return SampleMaker(task, data_set, tokenizer=tokenizer, tokens=TokenSpec())


def expected_samples(plan: TaskPlan, index: int, bad: set[int]) -> tuple[list[int], list[int]]:
    """(rows of a batch, bad rows met on the way) by the rule: position, then its substitutes in turn."""
    kept, met = [], []
    for position in plan.batch(index, rank=0, world_size=1)[1]:
        row = first = int(plan.order.rows(np.array([position]))[0][0])
        attempt = 0
        while row in bad:
            met.append(row)
            row = plan.order.substitute(position, attempt, row=first)
            attempt += 1
        kept.append(row)
    return kept, met


def reasons(rows: list[Row]) -> list[tuple]:
    return [(r["id"], r["source"], r["reason"]) for row in rows for r in row.rejects]


def assert_equal_rows(found: Row, wanted: Row) -> None:
    assert (found.ids, list(found.arrays)) == (wanted.ids, list(wanted.arrays))
    assert reasons([found]) == reasons([wanted])
    for name, array in wanted.arrays.items():
        assert found.arrays[name].dtype == array.dtype and (found.arrays[name] == array).all(), name


# --- rows ---


def test_a_row_holds_the_samples_of_its_positions(images, make_task):
    maker = make_batches(images, make_task())
    met_any = False
    for index in range(NUM_BATCHES):
        row = maker.row(index, rank=0, world_size=1)
        kept, met = expected_samples(maker.plan, index, BAD)
        assert row.ids == [f"id-{i}" for i in kept] and [r["id"] for r in row.rejects] == [f"id-{i}" for i in met]
        assert (row.task, row.batch, row.rank, row.variant) == ("toy_task", index, 0, "32x32")
        tokens = row.arrays["vision/tokens"]
        assert tokens.shape == (4, 4, 768) and tokens.dtype == np.uint8
        assert (tokens.reshape(4, -1, 3) == np.array([colour(i) for i in kept])[:, None]).all()
        assert row.arrays["vision/positions"][0].tolist() == [[0, 0, 0], [0, 0, 16], [0, 16, 0], [0, 16, 16]]
        assert row.arrays["labels"].tolist() == [[int(i % 3 == c) for c in range(3)] for i in kept]
        met_any |= bool(met)
    assert met_any


def test_a_reject_says_what_where_and_why(images, make_task):
    maker = make_batches(images, make_task())
    rejects = [r for index in range(NUM_BATCHES) for r in maker.row(index, rank=0, world_size=1).rejects]
    for reject in rejects:
        number = reject["id"].removeprefix("id-")
        assert reject["source"].endswith(f"/{number}.png") and reject["data_set"] == "toy"
        assert reject["reason"] == "not_decodable" and "Pillow: damaged, or none of JPEG" in reject["detail"]
        assert set(reject) - {"substitute"} == {"id", "data_set", "source", "reason", "detail"}
    assert {r["id"] for r in rejects} == {"id-4", "id-9"}


def test_rejects_read_the_same_in_every_process(images, make_task):
    """The details too: they are written to a list that two runs of one recipe should share."""
    one, other = ([make_batches(images, make_task()).row(i, rank=0, world_size=1) for i in range(6)] for _ in range(2))
    assert [row.rejects for row in one] == [row.rejects for row in other]


def test_a_row_does_not_depend_on_what_was_made_before(images, make_task):
    task = make_task(augment=dataclasses.replace(make_task().augment, area=(0.3, 1.0), flip=True))
    in_turn = make_batches(images, task)
    rows = [in_turn.row(index, rank=0, world_size=1) for index in range(NUM_BATCHES)]
    for index in reversed(range(NUM_BATCHES)):
        assert_equal_rows(make_batches(images, task).row(index, rank=0, world_size=1), rows[index])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_hold_the_same_batch(images, make_task, tokenizer, world_size):
    task = make_task(objective="nce", modalities=("image", "text"), text_length=16)
    for index in range(NUM_BATCHES):
        whole = make_batches(images, task, tokenizer=tokenizer).row(index, rank=0, world_size=1)
        maker = make_batches(images, task, tokenizer=tokenizer)
        parts = [maker.row(index, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert [i for part in parts for i in part.ids] == whole.ids
        assert reasons(parts) == reasons([whole])
        for name, array in whole.arrays.items():
            assert (np.concatenate([part.arrays[name] for part in parts]) == array).all()


class SortedSource:
    """Rows of which a share, all at the beginning, is bad."""

    def __init__(self, num_rows: int, share: float):
        self.num_rows, self.num_bad = num_rows, round(share * num_rows)

    def id(self, row: int) -> str:
        return str(row)

    def media_path(self, row: int) -> str:
        return ""

    def clip(self, row: int, *, next_rows) -> None:
        if row < self.num_bad:
            raise Reject("missing_file", "")


@pytest.mark.parametrize("world_size", [1, 8])
@pytest.mark.parametrize("num_rows", [10**5, 10**9])
def test_bad_rows_that_lie_together_count_as_scattered_ones(tmp_path, make_task, num_rows, world_size):
    """3 % bad under a limit of 5 % go on, 8 % end within 2,000 samples: also in manifests whose substitutes are
    neighbours."""
    variant = dataclasses.replace(VIDEO_VARIANT, global_batch_size=256)
    plan = TaskPlan(make_task(variants=(variant,)), seed=1, num_rows=num_rows, num_batches=20)
    samples = types.SimpleNamespace(arrays=lambda *_, **__: {}, data_set=types.SimpleNamespace(name="pets"))
    ended = {}
    for share in (0.03, 0.08):
        maker, counts = BatchMaker(plan, samples, SortedSource(num_rows, share)), RejectCounts({"pets": 0.05})
        journals = [Quarantine(tmp_path / str(share), rank=rank) for rank in range(world_size)]
        for batch in range(20):
            rows = [maker.row(batch, rank=rank, world_size=world_size) for rank in range(world_size)]
            draws = [one.record(row, step=batch, data_set="pets") for one, row in zip(journals, rows, strict=True)]
            _, drawn, _ = counts.add(draws)
            if counts.fault(draws):
                ended[share] = drawn
                break
        assert drawn == 256 * (batch + 1)
    assert list(ended) == [0.08] and ended[0.08] <= 2000


def test_known_bad_ids_are_not_tried_again(images, make_task):
    first = make_batches(images, make_task())
    rows = [first.row(index, rank=0, world_size=1) for index in range(NUM_BATCHES)]
    again = make_batches(images, make_task(), bad=known({r["id"]: r["reason"] for row in rows for r in row.rejects}))
    for index, row in enumerate(rows):
        assert_equal_rows(again.row(index, rank=0, world_size=1), row)
    assert set(again.source.decoded).isdisjoint(BAD)
    assert sorted(i for i in first.source.decoded if i in BAD) == sorted(BAD)


def test_known_bad_ids_get_their_substitutes_even_where_the_file_is_good(images, make_task):
    maker = make_batches(images, make_task(), bad=known({"id-0": "not_decodable"}))
    for index in range(NUM_BATCHES):
        row = maker.row(index, rank=0, world_size=1)
        assert row.ids == [f"id-{i}" for i in expected_samples(maker.plan, index, BAD | {0})[0]]
        for reject in (r for r in row.rejects if r["id"] == "id-0"):
            assert reject["journalled"] and (reject["reason"], reject["data_set"]) == ("not_decodable", "toy")
            assert reject["source"] == maker.source.media_path(0)


def test_nothing_but_bad_samples_stop_the_run(tmp_path, write_manifest, make_data_set, make_task):
    manifest = write_manifest(
        tmp_path / "m.parquet", [{"id": f"id-{i}", "image": "none.png", "labels": ["red"]} for i in range(5)]
    )
    maker = make_batches(make_data_set(manifest, classes=CLASSES), make_task())
    with pytest.raises(DataError, match=r"data set toy: 64 samples in a row are bad, the last 'id-\d' \(missing_file"):
        maker.row(0, rank=0, world_size=1)


def test_dropped_tokens_do_not_travel(images, make_task):
    variant = Variant("64x64-drop0.75", 4, size=64, drop_rate=0.75, grid=(1, 4, 4), num_vision_tokens=4)
    row = make_batches(images, make_task(variants=(variant,))).row(0, rank=0, world_size=1)
    positions = row.arrays["vision/positions"]
    assert row.arrays["vision/tokens"].shape == (4, 4, 768) and positions.shape == (4, 4, 3)
    # Every sample has its own choice, in order.
    flat = positions[..., 1] // 8 * 4 + positions[..., 2] // 8
    assert (np.diff(flat, axis=1) > 0).all() and len({tuple(f) for f in flat.tolist()}) > 1


# --- samples ---


def clip(**fields) -> Clip:
    media = {"image": np.zeros((32, 32, 3), np.uint8)}
    return Clip(**{"id": "x", "media": media, "text": ("a red cat",), "labels": ("red",)} | fields)


def test_evaluation_takes_everything_and_draws_nothing(make_data_set, make_task, tokenizer):
    variant = Variant("64x64-drop0.75", 4, size=64, drop_rate=0.75, grid=(1, 4, 4), num_vision_tokens=4)
    task = make_task(objective="nce", modalities=("image", "text"), text_length=16)
    maker = make_samples(make_data_set(), task, tokenizer=tokenizer)
    arrays = maker.arrays(clip(text=("", "a cat", "the dog")), View(variant))
    assert arrays["vision/tokens"].shape == (16, 768)
    assert (arrays["text/tokens"] == tokenizer.encode("a cat", 16)).all()


def test_text_arrays(make_data_set, make_task, tokenizer):
    task = make_task(objective="nce", modalities=("image", "text"), text_length=16)
    arrays = encode_text(tokenizer, "a cat", task.text_length)
    length = int((tokenizer.encode("a cat", 16) != 0).sum())
    assert arrays["text/mask"].tolist() == [True] * length + [False] * (16 - length)
    assert arrays["text/positions"].tolist() == [[i] for i in range(16)]
    assert arrays["text/tokens"].dtype == arrays["text/positions"].dtype == np.int32


def test_labels_are_multi_hot_over_the_classes_of_the_data_set(make_data_set, make_task):
    data_set = make_data_set(classes=CLASSES)
    maker = make_samples(data_set, make_task(objective="sigmoid"))
    arrays = maker.arrays(clip(labels=("blue", "red", "unknown")), View(make_task().variants[0]))
    assert arrays["labels"].tolist() == [1, 0, 1] and arrays["labels"].dtype == np.uint8
    some = make_samples(data_set, make_task(classes=("green", "blue")))
    assert some.multi_hot(clip(labels=("blue", "red"))).tolist() == [0, 0, 1]
    with pytest.raises(Reject, match=r"no_label: labels \['red'\] are none of the task's classes"):
        some.multi_hot(clip(labels=("red",)))


def test_a_weighted_sum_of_losses_finds_ids_and_labels_in_one_batch(images, make_task, tokenizer):
    """Each array is what a task of that term alone would see of the same samples."""
    fields = {"modalities": ("image", "text"), "text": "labels", "positives": "labels", "text_length": 16}
    both = make_task(objective={"nce": 1.0, "softmax": 0.5}, **fields)
    row = make_batches(images, both, tokenizer=tokenizer).row(0, rank=0, world_size=1)
    alone = make_batches(images, make_task(objective="nce", **fields), tokenizer=tokenizer).row(0, rank=0, world_size=1)
    assert row.ids == alone.ids and set(row.arrays) == {*alone.arrays, "labels"}
    for name, array in alone.arrays.items():
        assert (row.arrays[name] == array).all()
    kept = [int(i.removeprefix("id-")) for i in row.ids]
    assert row.arrays["labels"].tolist() == [[int(i % 3 == c) for c in range(3)] for i in kept]
    shapes = structure_of(both, both.variants[0], images, TokenSpec()).batch_shapes()
    found = group_arrays(row.arrays)
    assert {k: v.shape for k, v in found["vision"].items()} == {k: v.shape for k, v in shapes["vision"].items()}
    assert found["labels"].shape == shapes["labels"].shape and found["positive_ids"].shape == (4, 2)


def test_a_row_needs_what_every_term_needs(make_data_set, make_task, tokenizer):
    task = make_task(objective={"nce": 1.0, "softmax": 1.0}, modalities=("image", "text"), text_length=16)
    maker = make_samples(make_data_set(classes=CLASSES), task, tokenizer=tokenizer)
    assert set(maker.arrays(clip(), View(task.variants[0]))) >= {"text/tokens", "positive_ids", "labels"}
    for missing, reason in (({"labels": ("unknown",)}, "no_label"), ({"text": ()}, "no_text")):
        with pytest.raises(Reject, match=reason):
            maker.arrays(clip(**missing), View(task.variants[0]))


@pytest.mark.parametrize("text", [(), ("", "  \n")])
def test_a_row_without_text_is_rejected(make_data_set, make_task, tokenizer, text):
    maker = make_samples(make_data_set(), make_task(objective="nce", modalities=("image", "text")), tokenizer=tokenizer)
    with pytest.raises(Reject, match="no_text"):
        maker.arrays(clip(text=text), View(make_task().variants[0]))


def test_captions_and_prompts_are_drawn(make_data_set, make_task, tokenizer):
    def texts(task, sample) -> set[bytes]:
        maker = make_samples(make_data_set(classes=CLASSES), task, tokenizer=tokenizer)
        rngs = (np.random.default_rng(seed) for seed in range(200))
        return {maker.arrays(sample, View(task.variants[0], rng=rng))["text/tokens"].tobytes() for rng in rngs}

    def encoded(sentences) -> set[bytes]:
        return {tokenizer.encode(sentence, 64).tobytes() for sentence in sentences}

    nce = make_task(objective="nce", modalities=("image", "text"))
    assert texts(nce, clip(text=("a cat", "the dog"))) == encoded(["a cat", "the dog"])
    labelled = dataclasses.replace(nce, text="labels")
    assert texts(labelled, clip()) == encoded(t.format("red") for t in prompts.train_templates("image"))


def positive_ids(maker: SampleMaker, *samples: Clip) -> list[tuple[int, int]]:
    variant = maker.task.variants[0]
    return [
        tuple(maker.arrays(s, View(variant, rng=np.random.default_rng(0)))["positive_ids"].tolist()) for s in samples
    ]


def test_equal_labels_are_positives(make_data_set, make_task, tokenizer):
    task = make_task(objective="nce", modalities=("image", "text"), text="labels", positives="labels")
    maker = make_samples(make_data_set(classes=CLASSES), task, tokenizer=tokenizer)
    one, same, both, other, swapped = positive_ids(
        maker,
        clip(),
        clip(id="y", labels=("red", "unknown")),
        clip(labels=("red", "blue")),
        clip(labels=("green",)),
        clip(labels=("blue", "red")),
    )
    assert one == same and both == swapped and len({one, both, other}) == 3


def test_equal_captions_are_positives(make_data_set, make_task, tokenizer):
    maker = make_samples(make_data_set(), make_task(objective="nce", modalities=("image", "text")), tokenizer=tokenizer)
    one, same, other = positive_ids(
        maker, clip(text=("a cat",)), clip(id="y", text=(" A Cat ",)), clip(text=("the dog",))
    )
    assert one == same != other


def test_instances_are_positives_of_themselves_only(make_data_set, make_task, tokenizer):
    task = make_task(objective="nce", modalities=("image", "text"), positives="instance")
    maker = make_samples(make_data_set(), task, tokenizer=tokenizer)
    one, same, other = positive_ids(maker, clip(), clip(text=("the dog",)), clip(id="y"))
    assert one == same != other
    arrays = maker.arrays(clip(), View(task.variants[0], rng=np.random.default_rng(0)))
    assert arrays["positive_ids"].dtype == np.int32 and arrays["positive_ids"].shape == (2,)


def test_positives_are_told_apart_by_64_bits(make_data_set, make_task, tokenizer):
    """Of these two words the CRC32 is the same. The bits are blake2b's, the least significant byte first."""
    maker = make_samples(make_data_set(), make_task(objective="nce", modalities=("image", "text")), tokenizer=tokenizer)
    one, other = positive_ids(maker, clip(text=("plumless",)), clip(text=("buckeroo",)))
    assert zlib.crc32(b"plumless") == zlib.crc32(b"buckeroo")
    assert one != other
    expected = hashlib.blake2b(b"plumless", digest_size=8).digest()
    assert np.array(one, "<i4").tobytes() == expected


def test_whether_a_row_has_text_does_not_depend_on_the_draw(make_data_set, make_task, tokenizer):
    """A zero-width space is no text. Rejects are remembered, by one process and not by another, so a row that is bad
    in one visit must be bad in all."""
    maker = make_samples(make_data_set(), make_task(objective="nce", modalities=("image", "text")), tokenizer=tokenizer)
    assert not tokenizer.encode("\u200b", 8).any()
    outcomes = set()
    for seed in range(20):
        try:
            maker.arrays(clip(text=("a cat", "\u200b")), View(make_task().variants[0], rng=np.random.default_rng(seed)))
            outcomes.add("good")
        except Reject as e:
            outcomes.add(e.reason)
    assert len(outcomes) == 1


# --- text that cannot be used ---

LONG, NO_TEXT, NO_UTF8 = "a" * 101, " \t\u3000\n", NOT_UTF8 + "caf\\xe9"


def captioned(make_task, **fields) -> TaskSpec:
    return make_task(objective="nce", modalities=("image", "text"), max_characters=100, **fields)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ((), "no_text"),
        (("", NO_TEXT), "no_text"),
        (("", LONG), "text_too_long"),
        ((LONG, "", NO_UTF8), "bad_text"),
        ((NO_UTF8,), "bad_text"),
    ],
)
def test_a_row_without_usable_text_says_what_tells_most(make_data_set, make_task, tokenizer, text, reason):
    task = captioned(make_task)
    maker = make_samples(make_data_set(), task, tokenizer=tokenizer)
    for rng in (None, np.random.default_rng(0)):
        with pytest.raises(Reject) as caught:
            maker.arrays(clip(text=text), View(task.variants[0], rng=rng))
        assert caught.value.reason == reason
    assert usable_captions(text, tokenizer, max_characters=100) == ()


@settings(max_examples=50, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(["a cat", "the dog", "a" * 100, "", NO_TEXT, LONG, NO_UTF8, "\u200b"]), min_size=1, max_size=5
    ),
    seed=st.integers(0, 2**32),
)
def test_unusable_captions_are_never_drawn(make_data_set, make_task, tokenizer, text, seed):
    task = captioned(make_task, text_length=16)
    maker = make_samples(make_data_set(), task, tokenizer=tokenizer)
    usable = [t for t in text if t in ("a cat", "the dog", "a" * 100)]
    sample = clip(text=tuple(text))
    assert usable_captions(text, tokenizer, max_characters=100) == tuple(usable)
    if usable:
        found = maker.arrays(sample, View(task.variants[0], rng=np.random.default_rng(seed)))["text/tokens"]
        assert found.tobytes() in {tokenizer.encode(t, 16).tobytes() for t in usable}
    else:
        with pytest.raises(Reject):
            maker.arrays(sample, View(task.variants[0], rng=np.random.default_rng(seed)))


@pytest.mark.parametrize(
    ("classes", "labels", "reason"),
    [
        (CLASSES, (NO_UTF8,), "bad_text"),
        (CLASSES, ("unknown", NO_UTF8), "bad_text"),
        (CLASSES, ("unknown", ""), "no_label"),
        (CLASSES, (NO_UTF8, "red"), None),
        ((), (NO_UTF8,), "bad_text"),
        ((), (LONG,), "text_too_long"),
        ((), ("", " "), "no_label"),
        ((), (), "no_label"),
        ((), (NO_UTF8, LONG, " ", "red"), None),
    ],
)
def test_labels_that_cannot_be_used(make_data_set, make_task, tokenizer, classes, labels, reason):
    task = captioned(make_task, text="labels", positives="labels", text_length=16)
    maker = make_samples(make_data_set(classes=classes), task, tokenizer=tokenizer)

    def arrays(labels) -> dict:
        return maker.arrays(clip(labels=labels), View(task.variants[0], rng=np.random.default_rng(5)))

    if reason is None:
        found, wanted = arrays(labels), arrays(("red",))
        assert (found["positive_ids"] == wanted["positive_ids"]).all()
        assert (found["text/tokens"] == wanted["text/tokens"]).all()
    else:
        with pytest.raises(Reject) as caught:
            arrays(labels)
        assert caught.value.reason == reason


def test_a_long_caption_is_cut_to_the_length_of_the_text(make_data_set, make_task, tokenizer):
    """A megabyte that a recipe allows gives the same tokens as its beginning."""
    task = make_task(objective="nce", modalities=("image", "text"), max_characters=2_000_000, text_length=16)
    maker = make_samples(make_data_set(), task, tokenizer=tokenizer)
    found = maker.arrays(clip(text=("the red dog " * 87_000,)), View(task.variants[0]))
    assert (found["text/tokens"] == tokenizer.encode("the red dog " * 20, 16)).all() and found["text/mask"].all()


@pytest.mark.parametrize("text_length", [1, 2, 16, 64, 512])
def test_every_length_of_text(make_data_set, make_task, tokenizer, text_length):
    task = captioned(make_task, text_length=text_length)
    arrays = make_samples(make_data_set(), task, tokenizer=tokenizer).arrays(clip(), View(task.variants[0]))
    whole = tokenizer.encode("a red cat", 600)
    used = min(text_length, int((whole != 0).sum()))
    assert (arrays["text/tokens"] == whole[:text_length]).all()
    assert arrays["text/mask"].tolist() == [True] * used + [False] * (text_length - used)
    assert arrays["text/positions"].shape == (text_length, 1)


class CaptionedSource:
    """Twelve rows of one black image; row n has n % 4 + 1 captions of its own, one that is too long among them."""

    num_rows = 12

    def id(self, row: int) -> str:
        return f"id-{row}"

    def clip(self, row: int, *, next_rows=()) -> Clip:
        return clip(id=self.id(row), text=(LONG, *self.captions(row)))

    @staticmethod
    def captions(row: int) -> list[str]:
        return [f"{'abcdefghijkl'[row]} {name}" for name in ("cat", "dog", "fox", "box")[: row % 4 + 1]]


def test_over_many_epochs_every_caption_is_drawn_once_a_visit(make_data_set, make_task, tokenizer):
    task = captioned(make_task, text_length=16)
    source, num_batches = CaptionedSource(), 120  # forty epochs of three batches
    plan = TaskPlan(task, seed=3, num_rows=12, num_batches=num_batches)
    samples = SampleMaker(task, make_data_set(), tokenizer=tokenizer, tokens=TokenSpec())
    rows = [BatchMaker(plan, samples, source).row(index, rank=0, world_size=1) for index in range(num_batches)]
    drawn: dict[str, list[bytes]] = {}
    for row in rows:
        assert not row.rejects and row.arrays["text/tokens"].shape == (4, 16)
        for sample_id, tokens in zip(row.ids, row.arrays["text/tokens"], strict=True):
            drawn.setdefault(sample_id, []).append(tokens.tobytes())
    for number in range(12):
        found, captions = drawn[f"id-{number}"], source.captions(number)
        assert len(found) == 40
        assert set(found) == {tokenizer.encode(c, 16).tobytes() for c in captions}
        # No caption is drawn much more often than another.
        assert max(found.count(f) for f in set(found)) <= 40 / len(captions) + 15
    again = BatchMaker(plan, samples, source).row(num_batches - 1, rank=0, world_size=1)
    assert_equal_rows(again, rows[-1])


@pytest.fixture
def bad_captions(tmp_path, write_raw_manifest, make_data_set):
    """Good, not UTF-8, empty, a megabyte; the bytes of one path and one id are not UTF-8 either."""
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    texts = [[b"a cat"], [b"\xff\xfe"], [b"  "], [b"x" * 1_000_000], [b"a cat"], [b"the dog", b"\xff"]]
    rows = [{"id": f"id-{i}".encode(), "image": b"0.png", "text": text} for i, text in enumerate(texts)]
    rows[4]["image"], rows[5]["id"] = b"caf\xe9.png", b"id-\xff"
    return make_data_set(write_raw_manifest(tmp_path / "m.parquet", rows))


def test_bad_captions_of_a_manifest_are_rejects(bad_captions, make_task, tokenizer):
    task = make_task(objective="nce", modalities=("image", "text"), text_length=16)
    maker = make_batches(bad_captions, task, tokenizer=tokenizer)
    rows = [maker.row(index, rank=0, world_size=1) for index in range(NUM_BATCHES)]
    found = {r["id"]: r["reason"] for row in rows for r in row.rejects}
    assert found == {"id-1": "bad_text", "id-2": "no_text", "id-3": "text_too_long", "id-4": "missing_file"}
    assert {i for row in rows for i in row.ids} == {"id-0", "id-\\xff"}
    assert all(len(r["detail"]) <= 300 for row in rows for r in row.rejects)


# --- video with sound ---


def sounding_clip(make_data_set) -> tuple:
    """Sixteen frames and two seconds of noise."""
    data_set = make_data_set(video=VideoSpec(fps=8.0, short_side=32, max_frames=16))
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (16, 32, 32, 3), np.uint8)
    return data_set, clip(media={"video": video, "audio": rng.standard_normal(32_000).astype(np.float32)})


def test_sound_starts_with_the_window_of_the_video(make_data_set, make_task):
    data_set, sample = sounding_clip(make_data_set)
    task = make_task(objective="nce", modalities=("video", "audio"), variants=(VIDEO_VARIANT,), positives="instance")
    arrays = make_samples(data_set, task).arrays(sample, View(VIDEO_VARIANT))
    # The middle 8 of 16 frames start at frame 4: 0.5 s, 8000 samples.
    assert (arrays["audio/tokens"] == spectrogram_tokens(sample.media["audio"][8000:], data_set.audio)).all()
    assert arrays["vision/tokens"].shape == (8, 3072)
    assert sorted(set(arrays["vision/positions"][:, 0].tolist())) == [0, 8]
    assert arrays["audio/positions"].tolist() == [[0, 0], [0, 4], [32, 0], [32, 4]]


@pytest.mark.parametrize(("number", "first"), [(0, 0), (1, 4), (2, 8)])
def test_sound_starts_with_each_of_several_windows(make_data_set, make_task, number, first):
    data_set, sample = sounding_clip(make_data_set)
    task = make_task(objective="nce", modalities=("audio", "video"), variants=(VIDEO_VARIANT,), positives="instance")
    arrays = make_samples(data_set, task).arrays(sample, View(VIDEO_VARIANT, window=(number, 3)))
    view = sample.media["video"][first : first + 8]
    assert (arrays["vision/tokens"] == patchify(view, (4, 16, 16))).all()
    assert (arrays["audio/tokens"] == spectrogram_tokens(sample.media["audio"][2000 * first :], data_set.audio)).all()


def test_sound_alone_has_windows_of_its_own(make_data_set, make_task):
    """Of 32,000 samples a spectrogram covers 4096: three windows start at 0, 13,952 and 27,904, one at 0."""
    data_set, sample = sounding_clip(make_data_set)
    maker = make_samples(data_set, make_task(objective="nce", modalities=("audio",), positives="instance"))
    for window, start in {(0, 1): 0, (0, 3): 0, (1, 3): 13_952, (2, 3): 27_904}.items():
        tokens = maker.arrays(sample, View(Variant("all", 4), window=window))["audio/tokens"]
        assert (tokens == spectrogram_tokens(sample.media["audio"][start:], data_set.audio)).all()
    short = dataclasses.replace(sample, media={"audio": sample.media["audio"][:3000]})
    tokens = maker.arrays(short, View(Variant("all", 4), window=(2, 3)))["audio/tokens"]
    assert (tokens == spectrogram_tokens(short.media["audio"], data_set.audio)).all()


def test_the_order_of_modalities_changes_nothing(make_data_set, make_task):
    data_set, sample = sounding_clip(make_data_set)
    found = []
    for modalities in (("video", "audio"), ("audio", "video")):
        task = make_task(objective="nce", modalities=modalities, variants=(VIDEO_VARIANT,), positives="instance")
        found.append(make_samples(data_set, task).arrays(sample, View(VIDEO_VARIANT, rng=np.random.default_rng(1))))
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        assert (found[0][name] == found[1][name]).all(), name


def test_a_later_window_has_its_sound_too(tmp_path, write_video, write_manifest, make_data_set, make_task):
    """Two seconds of video and sound, one second a view: the sound must reach to the end of every view."""
    write_video(tmp_path / "a.mp4", num_frames=48, sound_hz=1000)
    one_second = AudioSpec(frame_length=1024, hop_length=500, num_frames=32, num_mels=32)
    data_set = make_data_set(
        write_manifest(tmp_path / "m.parquet", [{"id": "x", "video": "a.mp4"}]),
        audio=one_second,
        video=VideoSpec(fps=8.0, short_side=32, max_frames=16),
    )
    task = make_task(objective="nce", modalities=("video", "audio"), variants=(VIDEO_VARIANT,), positives="instance")
    sample = MediaSource(data_set, modalities=("video", "audio")).clip(0)
    tokens = make_samples(data_set, task).arrays(sample, View(VIDEO_VARIANT))["audio/tokens"]
    # Two patches of 16 frames in time, two in frequency; silence is log(1e-6) = -13.8.
    assert tokens.reshape(2, 2, 16, 16).max(axis=(1, 3)).min() > -8


# --- rejects of one task ---


def bad_for(run_dir, task) -> KnownRejects:
    """The rejects that a resume passes to the streams of a task."""
    return known_bad(run_dir).get(task.name, NONE_KNOWN)


def test_what_one_task_rejects_stays_good_for_another_after_a_resume(
    tmp_path, write_video, write_manifest, make_data_set, make_task
):
    """A video without sound is bad for a task on sound and good for one on frames, before and after a resume."""
    rows = [{"id": f"id-{i}", "video": f"{i}.mp4", "labels": ["red"]} for i in range(4)]
    for number in range(4):
        write_video(tmp_path / f"{number}.mp4", num_frames=24, sound_hz=500 if number else None)
    data_set = make_data_set(write_manifest(tmp_path / "m.parquet", rows), classes=CLASSES)
    frames = make_task(name="frames", modalities=("video",), variants=(VIDEO_VARIANT,))
    sound = make_task(name="sound", modalities=("audio",), variants=(Variant("all", 4),))

    journal = Quarantine(tmp_path / "run", rank=0)
    for index in range(NUM_BATCHES):
        journal.record(make_batches(data_set, sound).row(index, rank=0, world_size=1), step=index, data_set="toy")
    assert bad_for(tmp_path / "run", sound).reason("id-0")

    before = make_batches(data_set, frames)
    after = make_batches(data_set, frames, bad=bad_for(tmp_path / "run", frames))
    for index in range(NUM_BATCHES):
        assert_equal_rows(after.row(index, rank=0, world_size=1), before.row(index, rank=0, world_size=1))


def test_what_a_process_remembers_is_bounded(images, make_task, monkeypatch):
    """Samples that it has forgotten are tried again, and rows are the same."""
    monkeypatch.setattr(batches, "_MAX_MET", 1)
    small, whole = make_batches(images, make_task()), make_batches(images, make_task())
    for index in range(NUM_BATCHES):
        assert_equal_rows(small.row(index, rank=0, world_size=1), whole.row(index, rank=0, world_size=1))
        assert len(small._bad) <= 1


# --- rejects that depend on a clock ---


class Hanging:
    """A source some of whose visits hang. hangs: which calls of ``clip`` do, counted from 0."""

    def __init__(self, source, hangs=()):
        self._source, self._hangs, self._calls = source, set(hangs), 0
        self.id, self.media_path = source.id, source.media_path

    def clip(self, row, *, next_rows=()):
        self._calls += 1
        if self._calls - 1 in self._hangs:
            raise Reject("hung", "no end after 60 s")
        return self._source.clip(row)


def hanging_batches(data_set, task, *, hangs=(), bad=None) -> BatchMaker:
    maker = make_batches(data_set, task, bad=bad)
    maker.source = Hanging(maker.source, hangs)
    return maker


@pytest.mark.parametrize("seed", range(3))
def test_what_hung_before_a_kill_is_left_out_after_it_there_and_nowhere_else(images, make_task, tmp_path, seed):
    """A run is killed once the rejects of a batch are on disk; nothing hangs any more when it goes on."""
    task, quiet = (
        make_task(),
        [make_batches(images, make_task()).row(i, rank=0, world_size=1) for i in range(NUM_BATCHES)],
    )
    hangs = np.random.default_rng(seed).choice(4 * NUM_BATCHES, 2 * NUM_BATCHES, replace=False).tolist()
    alone, journal = hanging_batches(images, task, hangs=hangs), Quarantine(tmp_path, rank=0)
    rows = []
    for killed_at in range(NUM_BATCHES):
        rows.append(alone.row(killed_at, rank=0, world_size=1))
        journal.record(rows[-1], step=killed_at, data_set="toy")
        again = hanging_batches(images, task, bad=bad_for(tmp_path, task))
        for index in range(NUM_BATCHES):
            wanted = rows[index] if index <= killed_at else quiet[index]
            assert_equal_rows(again.row(index, rank=0, world_size=1), wanted)
    assert sum(r["reason"] == "hung" for row in rows for r in row.rejects) > NUM_BATCHES


def test_what_hung_once_is_tried_at_its_next_visit(images, make_task):
    """Whether another process has met it before must not matter."""
    maker, fresh = hanging_batches(images, make_task(), hangs=[0]), make_batches(images, make_task())
    (reject,) = [r for r in maker.row(0, rank=0, world_size=1).rejects if r["reason"] == "hung"]
    assert (reject["position"], reject["attempt"]) == (0, 0)
    for index in range(1, NUM_BATCHES):
        assert_equal_rows(maker.row(index, rank=0, world_size=1), fresh.row(index, rank=0, world_size=1))
