"""Text to token ids by sentencepiece or by a Hugging Face tokenizer.json, and what makes a text unusable.

Pad id 0, no begin or end marks.
"""

from __future__ import annotations

import collections
import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from pipeline.data.columns import NOT_UTF8
from pipeline.data.media.errors import Reject
from pipeline.data.media.storage import read_bytes
from pipeline.errors import RequestError
from pipeline.files import write_bytes

_EXPECTED = "text.tokenizer: expected a sentencepiece model or a Hugging Face tokenizer.json"
# Enough of a text to find a token in it, where it has any.
_BEGINNING = 256


class Tokenizer:
    """A sentencepiece model or a tokenizer.json from its bytes, so that it can travel to decode processes and into
    checkpoints. Its first byte tells which: no sentencepiece model starts with "{", every tokenizer.json does.

    Raises RequestError where the bytes are neither.
    """

    def __init__(self, model: bytes):
        self.model = model
        self._backend = _HuggingFace(model) if model.startswith(b"{") else _SentencePiece(model)

    def __reduce__(self):
        return Tokenizer, (self.model,)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return self._backend.vocab_size

    def count(self, text: str) -> int:
        """How many tokens a text has before anything is cut."""
        return len(self._backend.ids(text))

    def has_tokens(self, text: str) -> bool:
        """Whether a text has a token. Long texts mostly have one at their beginning; the rest is then not looked at."""
        return bool(self._backend.ids(text[:_BEGINNING])) or bool(self._backend.ids(text))

    def encode(self, text: str, length: int) -> np.ndarray:
        """(length,) int32, cut or padded with 0; no token of the text is 0."""
        ids = self._backend.ids(text)[:length]
        out = np.zeros(length, np.int32)
        out[: len(ids)] = ids
        return out


class _SentencePiece:
    """Control symbols are never made from text, so the pad id is not."""

    def __init__(self, model: bytes):
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as e:
            raise RequestError(f"{_EXPECTED}: {_one_line(e)}") from e
        if self._processor.pad_id() != 0:
            raise RequestError(f"text.tokenizer: expected pad id 0, found {self._processor.pad_id()}")
        self.vocab_size = self._processor.get_piece_size()

    def ids(self, text: str) -> list[int]:
        return self._processor.encode(text)


class _HuggingFace:
    """A tokenizer.json without its own padding, cuts and marks.

    Many have no pad, or have it elsewhere than at 0, where this pipeline's masks look for it. Where id 0 is a token of
    another kind, all ids are one higher here, and the vocabulary is one larger.
    """

    def __init__(self, model: bytes):
        # Encoding one text uses no threads; unset, the library warns of them in every process that forks.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(model)
            first, padding = self._tokenizer.id_to_token(0), self._tokenizer.padding
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            # A caption that spells "[CLS]" or "</s>" is letters, as it is for sentencepiece.
            self._tokenizer.encode_special_tokens = True
            self._shift = 0 if first is None or _is_pad(first, padding) else 1
            vocabulary = self._tokenizer.get_vocab()
            if not vocabulary:
                raise ValueError("it has no tokens")
            # Ids may have gaps, so this is not always the number of tokens.
            self.vocab_size = max(vocabulary.values()) + 1 + self._shift
            # Some have no token for what they do not know and would only say so at the first such caption.
            self.ids("ж 漢 ت 😀 ½")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # a panic of the library is no Exception
            raise RequestError(f"{_EXPECTED}: {_one_line(e)}") from e

    def ids(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        # A plain vocabulary can make its pad from a caption that spells it: a hole in the mask.
        return [i + 1 for i in ids] if self._shift else [i for i in ids if i]


def _is_pad(token: str, padding: dict | None) -> bool:
    """Whether token 0 is the pad, by its name or by the file's own settings.

    These count only where they name the token: their default is id 0, whatever stands there.
    """
    named = padding is not None and padding["pad_id"] == 0 and padding["pad_token"] == token
    return named or re.fullmatch(r"[<\[]\|?pad(ding)?\|?[>\]]", token, re.IGNORECASE) is not None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def load_tokenizer(path: str) -> Tokenizer:
    """Raises RequestError where there is no tokenizer."""
    try:
        return Tokenizer(read_bytes(path))
    except Reject as e:
        found = "no bytes" if e.reason == "empty_file" else "no file there"
        raise RequestError(f"{_EXPECTED} at {path}, found {found}") from e


# A row without a usable text is rejected for the first of these that one of its texts has.
_MOST_TELLING = ("bad_text", "text_too_long", "no_text")


def text_fault(text: str, *, max_characters: int) -> tuple[str, str] | None:
    """(reason, detail) where a text is of no use to any tokenizer, whatever stands beside it."""
    if text.startswith(NOT_UTF8):
        return "bad_text", f"no UTF-8: {text[len(NOT_UTF8) :]}"
    if len(text) > max_characters:
        return "text_too_long", f"{len(text)} characters, at most {max_characters} may be: {text[:40]!r}"
    if not text.strip():
        return "no_text", f"nothing but blanks: {text[:40]!r}"
    return None


class CaptionCount:
    """Rows without a caption that can be used, and the captions that cannot, by reason."""

    def __init__(self, max_characters: int):
        self.rows = self.rows_without = 0
        self.unusable: collections.Counter[str] = collections.Counter()
        self._max_characters = max_characters

    def add(self, texts: list[str]) -> list[str]:
        """Counts a row; returns those of its captions that can be used."""
        faults = [text_fault(text, max_characters=self._max_characters) for text in texts]
        usable = [text for text, fault in zip(texts, faults, strict=True) if fault is None]
        self.unusable.update(fault[0] for fault in faults if fault)
        self.rows, self.rows_without = self.rows + 1, self.rows_without + (not usable)
        return usable


def most_telling(faults: list[tuple[str, str]]) -> tuple[str, str]:
    """The fault that says most of a row none of whose texts is usable."""
    return min(faults, key=lambda fault: _MOST_TELLING.index(fault[0]), default=("no_text", "no text"))


def train_tokenizer(sentences: Iterable[str], *, vocab_size: int, into: Path | None = None) -> Tokenizer:
    """Trains a unigram model on the sentences; the vocabulary shrinks where text is short. into: a file to write it to.

    Raises RequestError where the text has no characters or more kinds of them than the vocabulary.
    """
    model = io.BytesIO()
    try:
        _train(sentences, model, vocab_size)
    except RuntimeError as e:
        # sentencepiece names the limit at the end of a message that starts with its own source line.
        reason = " ".join(str(e).split())[-160:]
        raise RequestError(
            f"text.vocab_size = {vocab_size}: no tokenizer could be trained on this text: {reason}"
        ) from e
    if into is not None:
        into.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(into, model.getvalue())
    return Tokenizer(model.getvalue())


# Characters of one piece of text that sentencepiece trains on: it leaves out what has more than 4,192 bytes, and no
# character has more than four.
_MOST_TRAINED = 1000


def _pieces(sentences: Iterable[str]) -> Iterator[str]:
    """The sentences, long ones in pieces that end at a blank where there is one."""
    for text in sentences:
        start = 0
        while len(text) - start > _MOST_TRAINED:
            end = text.rfind(" ", start + 1, start + _MOST_TRAINED)
            end = end if end > 0 else start + _MOST_TRAINED
            yield text[start:end]
            start = end
        yield text[start:]


def _train(sentences, model: io.BytesIO, vocab_size: int) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_pieces(sentences),
        model_writer=model,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=0.9995,
        byte_fallback=False,
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
