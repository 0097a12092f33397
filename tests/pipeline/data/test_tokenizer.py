"""The tokenizer: ids, padding, training, both forms, and files that are none. Unusable text. Prompts around labels."""

import json
import os
import pickle

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from pipeline.data import prompts
from pipeline.data.tokenizer import NoText, Tokenizer, _pieces, train_tokenizer
from pipeline.errors import RequestError
from pipeline.run_tokenizer import load_tokenizer

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


@pytest.mark.parametrize(
    "text", ["a cat on a mat " * 400, "abcdefghij" * 2000, "漢字仮名" * 3000, "a\nb\0c \u2028" * 2000]
)
def test_captions_of_any_length_train_a_tokenizer(tmp_path, text):
    """sentencepiece leaves out what is longer than 4,192 bytes, and fails where that is everything."""
    found = train_tokenizer([text], vocab_size=64, into=tmp_path / "m")
    assert found.encode(text, 64).all() and found.count(text) > 64


def test_a_long_text_is_trained_on_to_its_end():
    text = " ".join(f"word{i}" for i in range(3000))
    pieces = list(_pieces([text, "x" * 2500, ""]))
    assert max(map(len, pieces)) <= 1000 and "".join(pieces) == text + "x" * 2500
    assert all(piece.split()[-1].startswith("word") for piece in pieces if "w" in piece)


def test_the_vocabulary_shrinks_to_the_text(tmp_path):
    trained = train_tokenizer(["a b c"], vocab_size=1000, into=tmp_path / "t.model")
    assert trained.vocab_size < 20 and trained.encode("c b a", 8).any()


def test_a_vocabulary_smaller_than_the_alphabet_is_a_wrong_request(tmp_path):
    """text.vocab_size may be 16, the alphabet here has 27 letters: the error must say so in one line."""
    with pytest.raises(RequestError, match="vocab_size"):
        train_tokenizer(SENTENCES, vocab_size=16, into=tmp_path / "t.model")


@pytest.mark.parametrize("sentences", [[], [""], [" \n"], ["\u200b", "\x01"]])
def test_no_text_at_all_is_a_wrong_request(tmp_path, sentences):
    with pytest.raises(NoText, match="the text has no characters"):
        train_tokenizer(sentences, vocab_size=100, into=tmp_path / "t.model")
    assert issubclass(NoText, RequestError) and not (tmp_path / "t.model").exists()


# --- tokenizer.json ---

PAD_FIRST = {"<pad>": 0, "<unk>": 1, "a": 2, "red": 3, "cat": 4}
UNKNOWN_FIRST = {"<unk>": 0, "a": 1, "red": 2, "cat": 3}


def words(vocab: dict[str, int], *, unknown: str | None = "<unk>") -> tokenizers.Tokenizer:
    """One token a word."""
    made = tokenizers.Tokenizer(models.WordLevel(vocab, **({"unk_token": unknown} if unknown else {})))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def letters() -> tokenizers.Tokenizer:
    """As GPT-2's: the bytes of a text, no pad, no unknown."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


def ours(made: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(made.to_str().encode())


@pytest.mark.parametrize("length", [1, 2, 3, 16, 77])
def test_a_pad_at_0_leaves_the_ids_as_they_are(length):
    ids = ours(words(PAD_FIRST)).encode("a red dog", length)
    assert ids.tolist() == ([2, 3, 1] + [0] * length)[:length] and ids.dtype == np.int32
    assert ours(words(PAD_FIRST)).vocab_size == 5


@pytest.mark.parametrize("length", [1, 2, 3, 16, 77])
def test_another_token_at_0_moves_all_ids_up_by_one(length):
    ids = ours(words(UNKNOWN_FIRST)).encode("a red dog", length)
    assert ids.tolist() == ([2, 3, 1] + [0] * length)[:length] and ids.dtype == np.int32
    assert ours(words(UNKNOWN_FIRST)).vocab_size == 5


@pytest.mark.parametrize(
    ("vocab", "cat", "vocab_size"),
    [
        ({"[PAD]": 0, "<unk>": 1, "cat": 2}, 2, 3),
        ({"<|PADDING|>": 0, "<unk>": 1, "cat": 2}, 2, 3),
        ({"<s>": 0, "<pad>": 1, "<unk>": 2, "cat": 3}, 4, 5),
        ({"pad": 0, "<unk>": 1, "cat": 2}, 3, 4),
        ({"<pad>": 0, "<unk>": 3, "cat": 7}, 7, 8),
        ({"<unk>": 1, "cat": 2}, 2, 3),
    ],
)
def test_what_stands_at_0_decides(vocab, cat, vocab_size):
    """A word "pad" is no pad; ids may have gaps, and nothing at all may stand at 0."""
    found = ours(words(vocab))
    assert found.encode("cat", 2).tolist() == [cat, 0] and found.vocab_size == vocab_size


def test_the_settings_of_the_file_may_name_the_pad():
    named, default = words({"#": 0, "<unk>": 1, "cat": 2}), words({"#": 0, "<unk>": 1, "cat": 2})
    named.enable_padding(pad_id=0, pad_token="#")
    default.enable_padding()  # id 0 and "[PAD]", whatever the vocabulary says
    assert ours(named).encode("cat", 2).tolist() == [2, 0] and ours(default).encode("cat", 2).tolist() == [3, 0]


def test_padding_cuts_and_marks_of_the_file_do_not_count():
    made = words(PAD_FIRST)
    made.add_special_tokens(["<s>"])
    made.enable_padding(length=9, pad_id=0, pad_token="<pad>")
    made.enable_truncation(2)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 5)])
    found = ours(made)
    assert found.encode("a red cat", 4).tolist() == [2, 3, 4, 0]
    assert found.count("a red cat") == 3 and found.vocab_size == 6
    elsewhere = words(UNKNOWN_FIRST | {"<pad>": 4})
    elsewhere.enable_padding(length=9, pad_id=4, pad_token="<pad>")
    assert ours(elsewhere).encode("a red cat", 5).tolist() == [2, 3, 4, 0, 0]


def test_a_caption_that_spells_a_special_token_makes_none():
    """A pad from a caption would be a hole in the mask."""
    made = words(PAD_FIRST)
    made.add_special_tokens(["<s>"])
    assert ours(made).encode("<s> a cat", 5).tolist() == [1, 2, 4, 0, 0]
    # Here the words of the vocabulary are found by their letters, the pad's name too.
    assert ours(made).encode("<pad> a <pad> cat", 5).tolist() == [2, 4, 0, 0, 0]


def test_a_tokenizer_json_travels(tmp_path):
    found = ours(words(UNKNOWN_FIRST))
    other = pickle.loads(pickle.dumps(found))
    assert other.model == found.model and other.encode("red cat", 4).tolist() == [3, 4, 0, 0]
    # A run's copy has one name, whatever is in it.
    (tmp_path / "tokenizer.model").write_bytes(found.model)
    assert load_tokenizer(str(tmp_path / "tokenizer.model")).encode("red cat", 4).tolist() == [3, 4, 0, 0]


def test_no_warnings_of_threads(monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    ours(letters())
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    ours(letters())
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40), length=st.sampled_from([1, 16, 64]))
def test_ids_are_in_the_vocabulary_and_padding_only_follows(tokenizer, text, length):
    for one in (tokenizer, ours(words(PAD_FIRST)), ours(words(UNKNOWN_FIRST)), ours(letters())):
        ids, used = one.encode(text, length), min(one.count(text), length)
        assert ids.shape == (length,) and ids.dtype == np.int32
        assert (ids[:used] > 0).all() and not ids[used:].any() and ids.max() < one.vocab_size
        assert one.has_tokens(text) == bool(used)
        assert (one.encode(text, 100)[:length] == ids).all()


def test_tokens_far_behind_the_beginning_count(tokenizer):
    nothing = "\u200b" * 5000
    assert not tokenizer.has_tokens(nothing) and tokenizer.has_tokens(nothing + "a cat")
    assert tokenizer.has_tokens("a cat" + nothing)


BROKEN_NORMALIZER = json.loads(words(PAD_FIRST).to_str()) | {
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}
}


@pytest.mark.parametrize(
    "content",
    [
        b"not a model",
        b"\x00" * 100,
        b"{}",
        b'{"model_max_length": 512}',
        b"{" * 1000,
        b"{\xff\xfe}",
        words(UNKNOWN_FIRST).to_str().encode()[:-9],
        pytest.param(tokenizers.Tokenizer(models.BPE()).to_str().encode(), id="no-tokens"),
        pytest.param(words({}, unknown=None).to_str().encode(), id="no-words"),
        pytest.param(words({"a": 0}, unknown=None).to_str().encode(), id="nothing-for-unknown-words"),
        pytest.param(json.dumps(BROKEN_NORMALIZER).encode(), id="panic"),
    ],
)
def test_another_file_is_no_tokenizer(tmp_path, content):
    (tmp_path / "t.model").write_bytes(content)
    with pytest.raises(
        RequestError,
        match=r"text\.tokenizer: expected a sentencepiece model or a Hugging Face tokenizer\.json: .+t\.model\)$",
    ) as caught:
        load_tokenizer(str(tmp_path / "t.model"))
    assert "\n" not in str(caught.value)


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


# --- unusable text ---


@pytest.mark.parametrize("media", ["image", "video", "audio", "depth"])
def test_prompts_hold_one_label(media):
    for template in prompts.train_templates(media) + prompts.eval_templates(media):
        assert template.count("{}") == 1 and template.format("dog") == template.replace("{}", "dog")
    assert len(set(prompts.train_templates(media))) == len(prompts.train_templates(media))
