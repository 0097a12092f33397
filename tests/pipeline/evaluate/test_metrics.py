"""Metrics on matrices small enough to work out by hand."""

import numpy as np
import pytest

from pipeline.evaluate.metrics import classification, retrieval


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


def test_a_constant_classifier_gets_one_class():
    found = classification(np.ones((8, 4)), np.repeat(np.arange(4), 2))
    assert found == {"acc1": 0.25, "mean_per_class_recall": 0.25}


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


def test_a_tie_with_another_counts_against():
    images, texts = by_similarity([[0.5, 0.5], [0.1, 0.9]])
    found = retrieval(images, texts, np.arange(2))
    # Text 0 cannot tell its image from the other: rank 2.
    assert found["image_retrieval_recall@1"] == 0.5 and found["text_retrieval_recall@1"] == 1.0
    assert found["image_retrieval_median_rank"] == 1.5


def test_a_constant_model_gets_nothing():
    found = retrieval(np.ones((20, 3)), np.ones((20, 3)), np.arange(20))
    assert all(value == 0 for name, value in found.items() if "recall" in name)
    assert found["image_retrieval_median_rank"] == 20


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
