"""The tokenizer: ids, padding, training, and files that are none. Prompts around labels."""

import pickle

import numpy as np
import pytest
import sentencepiece

from pipeline.data import prompts
from pipeline.data.text import load_tokenizer, train_tokenizer
from pipeline.errors import RequestError

SENTENCES = ["the quick brown fox jumps over the lazy dog", "a picture of a cat", "this is a red dog"] * 3


def test_ids_decode_to_the_text(tokenizer):
    ids = tokenizer.encode("a picture of the dog", 32)
    assert ids.shape == (32,) and ids.dtype == np.int32
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    used = ids[ids != 0]
    assert processor.decode(used.tolist()) == "a picture of the dog"
    # Padding follows the text and is nowhere inside it.
    assert (ids[: len(used)] == used).all() and used.max() < tokenizer.vocab_size == processor.get_piece_size()


def test_special_ids(tokenizer):
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    assert (processor.pad_id(), processor.unk_id(), processor.bos_id(), processor.eos_id()) == (0, 1, -1, -1)
    assert 1 in tokenizer.encode("ж", 8).tolist()
    assert not tokenizer.encode("", 8).any()


def test_long_text_is_cut(tokenizer):
    whole = tokenizer.encode("the lazy dog jumps over the quick fox", 64)
    assert (tokenizer.encode("the lazy dog jumps over the quick fox", 5) == whole[:5]).all()
    assert whole[:5].all()


def test_a_tokenizer_travels(tokenizer):
    other = pickle.loads(pickle.dumps(tokenizer))
    assert other.model == tokenizer.model
    assert (other.encode("a red cat", 8) == tokenizer.encode("a red cat", 8)).all()


def test_training_is_deterministic(tmp_path):
    models = [train_tokenizer(iter(SENTENCES), vocab_size=60, into=tmp_path / name / "t.model") for name in "ab"]
    assert models[0].model == models[1].model == (tmp_path / "a" / "t.model").read_bytes()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["t.model"]
    assert load_tokenizer(str(tmp_path / "a" / "t.model")).vocab_size == models[0].vocab_size


def test_the_vocabulary_shrinks_to_the_text(tmp_path):
    trained = train_tokenizer(["a b c"], vocab_size=1000, into=tmp_path / "t.model")
    assert trained.vocab_size < 20 and trained.encode("c b a", 8).any()


def test_a_vocabulary_smaller_than_the_alphabet_is_a_wrong_request(tmp_path):
    """text.vocab_size may be 16, the alphabet here has 27 letters: the error must say so in one line."""
    with pytest.raises(RequestError, match="vocab_size"):
        train_tokenizer(SENTENCES, vocab_size=16, into=tmp_path / "t.model")


def test_no_text_at_all_is_a_wrong_request(tmp_path):
    with pytest.raises(RequestError):
        train_tokenizer([], vocab_size=100, into=tmp_path / "t.model")


@pytest.mark.parametrize("content", [b"not a model", b"\x00" * 100, b"{}"])
def test_another_file_is_no_tokenizer(tmp_path, content):
    (tmp_path / "t.model").write_bytes(content)
    with pytest.raises(RequestError, match=r"text\.tokenizer: expected a sentencepiece model"):
        load_tokenizer(str(tmp_path / "t.model"))


@pytest.mark.parametrize("exists", [False, True])
def test_a_tokenizer_that_is_not_there_is_a_wrong_request(tmp_path, exists):
    if exists:
        (tmp_path / "t.model").touch()
    with pytest.raises(RequestError, match=r"t\.model"):
        load_tokenizer(str(tmp_path / "t.model"))


def test_a_model_with_another_pad_id_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(tmp_path / "t"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(RequestError, match="expected pad id 0, found -1"):
        load_tokenizer(str(tmp_path / "t.model"))


@pytest.mark.parametrize("media", ["image", "video", "audio"])
def test_prompts_hold_one_label(media):
    for template in prompts.train_templates(media) + prompts.EVAL[media]:
        assert template.count("{}") == 1 and template.format("dog") == template.replace("{}", "dog")
    assert len(set(prompts.train_templates(media))) == len(prompts.train_templates(media))
