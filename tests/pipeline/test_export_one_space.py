"""An exported model with one head a modality: one space for all, whose leading dimensions serve alone."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.cli import main
from pipeline.errors import RequestError
from pipeline.evaluate import measure
from pipeline.evaluate.trained_model import TrainedModel
from pipeline.export import load
from pipeline.recipe import EvaluationSettings
from tests.pipeline.test_export_encoder import files
from tests.toy_recipe import DIGITS
from tests.toy_run import save_toy_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, make_toy_recipe):
    raw = make_toy_recipe()
    raw["model"] |= {"heads": "per_modality", "matryoshka": [4, 8, 16]}
    return save_toy_run(tmp_path_factory.mktemp("one_space") / "run", raw)


@pytest.fixture(scope="module")
def model(run_dir):
    return TrainedModel(run_dir)


@pytest.fixture(scope="module")
def encoder(run_dir):
    out = run_dir.parent / "exported"
    assert main(["export", "--run", str(run_dir), "--out", str(out)]) == 0
    return load(out)


def test_sounds_and_texts_meet_though_no_task_compared_them(encoder, model, toy_corpus):
    assert encoder.spaces == ("audio_text_vision",)
    sounds, texts = files(toy_corpus, "audio")[:3], [f"the digit {d}" for d in DIGITS]
    found = encoder.embed(audio=sounds, texts=texts, data_set="moving")
    features = encoder.embed(audio=sounds, texts=texts, data_set="moving", space="features")
    for name, source in (("audio", "audio"), ("texts", "text")):
        expected = model.project(features[name], source=source, target="vision")
        np.testing.assert_array_equal(found[name], expected / np.linalg.norm(expected, axis=1, keepdims=True))
    # Probabilities at the temperatures that the space was trained with.
    named = encoder.zero_shot(audio=sounds[:1], classes=DIGITS, prompts=["the digit {}"], data_set="moving")[0]
    cosines = found["audio"][:1] @ found["texts"].T / model.temperature("audio", "text")
    powers = np.exp(cosines[0] - cosines.max())
    assert [named[d] for d in DIGITS] == pytest.approx(powers / powers.sum(), rel=1e-4)


def test_leading_dimensions_alone(encoder, toy_corpus):
    sounds = files(toy_corpus, "audio")[:3]
    whole, few = (encoder.embed(audio=sounds, dim=dim)["audio"] for dim in (None, 4))
    cut = whole[:, :4] / np.linalg.norm(whole[:, :4], axis=1, keepdims=True)
    assert whole.shape == (3, 16)
    np.testing.assert_allclose(few, cut, rtol=1e-6)
    assert encoder.embed(audio=[], dim=4)["audio"].shape == (0, 4)
    with pytest.raises(RequestError, match="dim: expected one that was trained: 4, 8, 16; found 5"):
        encoder.embed(audio=sounds, dim=5)
    with pytest.raises(RequestError, match="dim: expected one of a common space, not of 'features'"):
        encoder.embed(audio=sounds, dim=4, space="features")


def test_evaluation_by_dimension(model, encoder, toy_corpus):
    """The accuracy of the leading dimensions, worked out from the export's vectors."""
    prompts = ["the digit {}"]
    entry = EvaluationSettings(data_set="digits", kind="zero_shot", modality="image", prompts=prompts)
    model.recipe = model.recipe.model_copy(update={"evaluate": [entry]})
    (result,) = measure.evaluate_run(None, model)
    pictures, texts = files(toy_corpus, "image"), [prompts[0].format(d) for d in DIGITS]
    right = np.array([DIGITS.index(row[0]) for row in held_out_labels(toy_corpus)])
    accuracy = {}
    for dim in (4, 8, 16):
        cosines = encoder.similarity(images=pictures, texts=texts, dim=dim, data_set="digits")
        best = cosines == cosines.max(1, keepdims=True)
        # Classes that the model cannot tell apart share the point.
        accuracy[dim] = np.mean(best[np.arange(len(right)), right] / best.sum(1))
    assert result["metrics"]["acc1"] == pytest.approx(accuracy[16])
    assert {dim: values["acc1"] for dim, values in result["by_dim"].items()} == pytest.approx(
        {str(dim): accuracy[dim] for dim in (4, 8)}
    )


def held_out_labels(corpus) -> list[list[str]]:
    return pq.read_table(corpus / "digits/held_out.parquet")["labels"].to_pylist()
