"""Metrics on matrices small enough to work out by hand."""

import numpy as np
import pytest

from pipeline.evaluate import metrics
from pipeline.evaluate.outcomes import AveragePrecision, Mean, MeanOfClasses, Median, interval


def values(measured) -> dict[str, float]:
    return {name: metric.value() for name, metric in measured[0].items()}


def classification(scores, labels) -> dict[str, float]:
    return values(metrics.classification(np.asarray(scores, float), labels))


def retrieval(images, texts, owner, *, keys=None) -> dict[str, float]:
    """owner: the image of each text. keys: of each text, those of the images follow; by default the owner's number."""
    of_texts = [frozenset([o]) for o in owner.tolist()] if keys is None else [frozenset([k]) for k in keys]
    of_images = [
        frozenset().union(*(t for t, o in zip(of_texts, owner, strict=True) if o == i)) for i in range(len(images))
    ]
    return values(metrics.retrieval(images, texts, (of_images, of_texts), ("image", "text")))


def by_similarity(similarity) -> tuple[np.ndarray, np.ndarray]:
    """(images, texts) whose products are the given (texts x images) similarities."""
    similarity = np.asarray(similarity, float)
    return np.eye(similarity.shape[1]), similarity


# --- classification ---


def test_accuracy_and_mean_recall():
    scores = np.array([[3, 1, 0], [0, 2, 1], [5, 4, 0], [0, 0, 1], [1, 0, 0]])
    found = classification(scores, np.array([0, 1, 1, 2, 0]))
    # Predictions 0 1 0 2 0: 4 of 5 right; recalls 2/2, 1/2, 1/1.
    assert found == {"acc1": pytest.approx(4 / 5), "mean_per_class_recall": pytest.approx((1 + 0.5 + 1) / 3)}


def test_top_five_needs_more_than_five_classes():
    assert "acc5" not in classification(np.zeros((2, 5)), np.array([0, 1]))
    scores = np.array([[9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4], [0, 0, 0, 0, 0, 1]])
    found = classification(scores, np.array([4, 5, 5]))
    assert found["acc5"] == pytest.approx(2 / 3) and found["acc1"] == pytest.approx(1 / 3)


def test_classes_that_never_occur_do_not_count():
    found = classification(np.eye(4)[[0, 0, 1]], np.array([0, 0, 0]))
    assert found == {"acc1": pytest.approx(2 / 3), "mean_per_class_recall": pytest.approx(2 / 3)}


def test_a_constant_classifier_gets_chance():
    found = classification(np.ones((8, 4)), np.repeat(np.arange(4), 2))
    assert found == {"acc1": 0.25, "mean_per_class_recall": 0.25}


def test_a_tie_is_broken_by_chance():
    # The right class shares the first place with one other, then with two: 1/2, 1/3.
    assert classification([[1, 1, 0], [2, 2, 2]], np.array([0, 1]))["acc1"] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_average_precision_by_hand():
    # Class 0: right rows at ranks 1 and 3: (1/1 + 2/3) / 2. Class 1: two rows are tied, one right: 1/2. Class 2: none.
    scores = np.array([[0.9, 0.5, 0.0], [0.8, 0.5, 0.0], [0.7, 0.1, 0.0]])
    targets = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0]], bool)
    found = AveragePrecision(scores, targets)
    assert found.of_classes() == {0: pytest.approx(5 / 6), 1: pytest.approx(1 / 2)}
    assert found.value() == pytest.approx(2 / 3)
    _, chance = metrics.several_labels(scores, targets)
    assert chance["mean_average_precision"] == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_average_precision_equals_scikit_learn():
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(1)
    scores, targets = rng.integers(0, 12, (200, 3)) / 4, rng.random((200, 3)) < 0.3
    expected = average_precision_score(targets, scores, average="macro")
    assert AveragePrecision(scores, targets).value() == pytest.approx(expected)


# --- retrieval ---


def test_recall_by_hand():
    # Text 0 → image 0 first; text 1 → image 1 second; text 2 → image 2 third.
    images, texts = by_similarity([[0.9, 0.1, 0.2], [0.8, 0.7, 0.1], [0.5, 0.4, 0.3]])
    found = retrieval(images, texts, np.arange(3))
    assert found["image_retrieval_recall@1"] == pytest.approx(1 / 3)
    assert found["image_retrieval_recall@5"] == found["image_retrieval_recall@10"] == 1.0
    assert found["image_retrieval_median_rank"] == 2.0
    # Columns: image 0 → text 0 (0.9) first; image 1 → 0.7 first; image 2 → 0.3 first.
    assert found["text_retrieval_recall@1"] == 1.0


def test_recall_at_five_and_ten():
    # The right one of 12 images is number 1, 5, 6 and 11 for four texts.
    similarity = np.zeros((4, 12))
    for text, rank in enumerate((1, 5, 6, 11)):
        similarity[text] = np.roll(np.linspace(1, 0.1, 12), text - rank + 1)
    images, texts = by_similarity(similarity)
    found = retrieval(images, texts, np.arange(4))
    assert [found[f"image_retrieval_recall@{k}"] for k in (1, 5, 10)] == [0.25, 0.5, 0.75]
    assert found["image_retrieval_median_rank"] == 5.5


def test_an_image_may_have_several_texts():
    # Image 0 has texts 0 and 1, image 1 has text 2. Its best text counts.
    images, texts = by_similarity([[0.2, 0.1], [0.9, 0.3], [0.8, 0.5]])
    found = retrieval(images, texts, np.array([0, 0, 1]))
    assert found["text_retrieval_recall@1"] == 1.0
    # Texts 0 and 1 find image 0; text 2 prefers image 0.
    assert found["image_retrieval_recall@1"] == pytest.approx(2 / 3)


def test_a_tie_with_another_is_broken_by_chance():
    images, texts = by_similarity([[0.5, 0.5], [0.1, 0.9]])
    found = retrieval(images, texts, np.arange(2))
    # Text 0 cannot tell its image from the other: first in half of the orders, rank 1.5 on average.
    assert found["image_retrieval_recall@1"] == 0.75 and found["text_retrieval_recall@1"] == 1.0
    assert found["image_retrieval_median_rank"] == 1.25


def test_a_constant_model_gets_chance():
    measured = metrics.retrieval(
        np.ones((20, 3)), np.ones((20, 3)), ([frozenset([i % 10]) for i in range(20)],) * 2, ("video", "audio")
    )
    found = values(measured)
    # Two of 20 are right: 1 - (18/20)(17/19)(16/18)(15/17)(14/16) = 0.447; the first of two is at (20 + 1) / 3.
    assert found["video_audio_retrieval_recall@1"] == pytest.approx(0.1)
    assert found["audio_video_retrieval_recall@5"] == pytest.approx(1 - (15 * 14) / (20 * 19))
    assert found["video_audio_retrieval_median_rank"] == pytest.approx(7.0)
    assert found == pytest.approx(measured[1])


def test_equal_captions_of_other_images_are_right():
    """128 sounds of 8 names: a model that knows the names alone finds one of its name, whichever it is."""
    names = np.arange(128) % 8
    vectors = np.eye(8)[names]
    keys = [frozenset([f"name {n}"]) for n in names]
    found = values(metrics.retrieval(vectors, vectors, (keys, keys), ("audio", "text")))
    assert {value for name, value in found.items() if "recall" in name} == {1.0}
    assert "audio_text_retrieval_recall@5" in found and not any("image" in name for name in found)


def test_two_equal_captions_of_one_image_do_not_count_against_each_other():
    # A perfect model; image 0 has the same caption twice. Both of the nearest texts are its own.
    images, texts = by_similarity([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found = retrieval(images, texts, np.array([0, 0, 1]))
    assert found["text_retrieval_recall@1"] == 1.0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_model_without_finite_values_gets_nothing():
    found = retrieval(np.full((4, 3), np.nan), np.full((4, 3), np.nan), np.arange(4))
    assert found["image_retrieval_recall@1"] == found["text_retrieval_recall@1"] == 0.0


def test_a_random_model_is_at_chance():
    rng = np.random.default_rng(0)
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.standard_normal((2, 1000, 32)))
    found = retrieval(images, texts, np.arange(1000))
    # 10 of 1000 on average, standard deviation 3.1.
    assert abs(found["image_retrieval_recall@10"] - 0.01) < 0.016
    assert abs(found["image_retrieval_median_rank"] - 500) < 60


# --- intervals ---


def by_rows(statistic, rows: int, *, resamples: int = 4000) -> np.ndarray:
    """95 % of the statistic over rows that are drawn one by one."""
    rng = np.random.default_rng(5)
    drawn = [statistic(rng.integers(0, rows, rows)) for _ in range(resamples)]
    return np.nanquantile(drawn, [0.025, 0.975])


def test_intervals_are_those_of_drawn_rows():
    rng = np.random.default_rng(3)
    hits, labels, ranks = (
        (rng.random(60) < 0.3).astype(float),
        rng.integers(0, 3, 60),
        rng.integers(1, 9, 60).astype(float),
    )
    scores, targets = rng.random((60, 2)), rng.random((60, 2)) < 0.4
    with np.errstate(invalid="ignore"):
        cases = [
            (Mean(hits), lambda i: hits[i].mean()),
            (MeanOfClasses(hits, labels), lambda i: np.mean([hits[i][labels[i] == c].mean() for c in range(3)])),
            (AveragePrecision(scores, targets), lambda i: AveragePrecision(scores[i], targets[i]).value()),
        ]
        for metric, statistic in cases:
            np.testing.assert_allclose(interval(metric, resamples=4000), by_rows(statistic, 60), atol=0.02)
    low, high = interval(Median(ranks), resamples=2000)
    assert low <= np.median(ranks) <= high and high - low <= 3


def test_values_and_intervals_do_not_depend_on_the_order_of_rows():
    rng = np.random.default_rng(4)
    outcomes, labels, order = rng.random(999), rng.integers(0, 7, 999), rng.permutation(999)
    for one, other in (
        (Mean(outcomes), Mean(outcomes[order])),
        (MeanOfClasses(outcomes, labels), MeanOfClasses(outcomes[order], labels[order])),
        (Median(outcomes), Median(outcomes[order])),
    ):
        assert one.value() == other.value() and interval(one, resamples=200) == interval(other, resamples=200)


def test_intervals_that_would_take_long_are_left_out():
    rows = np.random.default_rng(0).random((40_000, 1))
    assert interval(AveragePrecision(np.tile(rows, 40), np.tile(rows > 0.5, 40)), resamples=1000) is None
    assert interval(Mean(rows[:50, 0]), resamples=0) is None
