"""Text to token ids, by sentencepiece or by a Hugging Face tokenizer.json. Pad id 0, no begin or end marks."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from pipeline.data.media.errors import Reject
from pipeline.errors import RequestError, one_line
from pipeline.files import write_bytes

# What RequestErrors say that a file should be.
EXPECTED = "text.tokenizer: expected a sentencepiece model or a Hugging Face tokenizer.json"
# Characters in which most texts that have a token have their first.
_BEGINNING = 256
# Maximum characters shown of a library's message, and of a text.
_MAX_SHOWN, _MAX_TEXT = 160, 40


class Tokenizer:
    """A sentencepiece model or a tokenizer.json from its bytes, so that it can travel to decode processes and into
    checkpoints. Its first byte tells which: no sentencepiece model starts with "{", every tokenizer.json does.

    Raises RequestError if the bytes are neither.
    """

    def __init__(self, model: bytes):
        self.model = model
        self._backend = _HuggingFace(model) if model.startswith(b"{") else _SentencePiece(model)

    def __reduce__(self) -> tuple:
        return Tokenizer, (self.model,)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return self._backend.vocab_size

    def count(self, text: str) -> int:
        """The number of tokens of a whole text, before anything is cut."""
        return len(self._backend.ids(text))

    def has_tokens(self, text: str) -> bool:
        """Whether a text has a token. Of a long text the beginning is tried first: it nearly always has one."""
        return bool(self._backend.ids(text[:_BEGINNING])) or bool(self._backend.ids(text))

    def pieces(self, ids: list[int]) -> list[str]:
        """Each token as text, for people to read."""
        return [self._backend.piece(i) for i in ids]

    def encode(self, text: str, length: int) -> np.ndarray:
        """(length,) int32, cut or padded with 0; no token of the text is 0."""
        ids = self._backend.ids(text)[:length]
        out = np.zeros(length, np.int32)
        out[: len(ids)] = ids
        return out


class _SentencePiece:
    """A sentencepiece model. It never makes control symbols from text, so no token of a text has the pad id."""

    def __init__(self, model: bytes):
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as e:
            raise RequestError(f"{EXPECTED}: {one_line(e, limit=_MAX_SHOWN)}") from e
        if self._processor.pad_id() != 0:
            raise RequestError(f"text.tokenizer: expected pad id 0, found {self._processor.pad_id()}")
        self.vocab_size = self._processor.get_piece_size()

    def ids(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(token)


class _HuggingFace:
    """A tokenizer.json without its own padding, truncation and special tokens.

    Masks expect the pad at id 0; many files have it elsewhere or have none. If id 0 is another token, all ids are
    shifted up by one and the vocabulary is one larger.
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
            # A caption that spells "[CLS]" or "</s>" is plain text, as it is for sentencepiece.
            self._tokenizer.encode_special_tokens = True
            self._shift = 0 if first is None or _is_pad(first, padding) else 1
            vocabulary = self._tokenizer.get_vocab()
            if not vocabulary:
                raise ValueError("it has no tokens")
            # Ids may have gaps, so this is not always the number of tokens.
            self.vocab_size = max(vocabulary.values()) + 1 + self._shift
            # Some files have no unknown token and would fail only at the first caption that needs it.
            self.ids("ж 漢 ت 😀 ½")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # a Rust panic is not an Exception
            raise RequestError(f"{EXPECTED}: {one_line(e, limit=_MAX_SHOWN)}") from e

    def ids(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        # In a plain vocabulary a caption can spell the pad token, which would make a hole in the mask.
        return [i + 1 for i in ids] if self._shift else [i for i in ids if i]

    def piece(self, token: int) -> str:
        return self._tokenizer.id_to_token(token - self._shift) or "?"


def _is_pad(token: str, padding: dict | None) -> bool:
    """Whether token 0 is the pad, by its name or by the file's own settings.

    The settings count only if they name this token: their default is id 0, whatever that token is.
    """
    named = padding is not None and padding["pad_id"] == 0 and padding["pad_token"] == token
    return named or re.fullmatch(r"[<\[]\|?pad(ding)?\|?[>\]]", token, re.IGNORECASE) is not None


class NoText(RequestError):
    """Text without a character that a tokenizer could learn from."""


# What sentencepiece says of no sentences, and of sentences of whitespace and control characters alone.
_NO_TEXT = ("sentences_.empty()", "all_chars_count")


def encode_text(tokenizer: Tokenizer, text: str, length: int) -> dict[str, np.ndarray]:
    """The arrays of one text of a sample. Raises Reject for a text without tokens."""
    ids = tokenizer.encode(text, length)
    if not ids.any():
        raise Reject(*no_tokens(text))
    positions = np.arange(len(ids), dtype=np.int32)[:, None]
    return {"text/tokens": ids, "text/positions": positions, "text/mask": ids != 0}


def no_tokens(text: str) -> tuple[str, str]:
    """(reason, detail) of a text without tokens."""
    return "no_text", f"no tokens in {text[:_MAX_TEXT]!r}"


def train_tokenizer(sentences: Iterable[str], *, vocab_size: int, into: Path | None = None) -> Tokenizer:
    """Trains a unigram model on the sentences and writes it to ``into``; short text gives a smaller vocabulary.

    Raises NoText if the text has no characters, and RequestError if it has more different ones than the vocabulary
    holds.
    """
    model = io.BytesIO()
    try:
        _train(sentences, model, vocab_size)
    except RuntimeError as e:
        # sentencepiece names the limit at the end of a message that starts with its own source line.
        reason = one_line(e)
        if any(check in reason for check in _NO_TEXT):
            raise NoText("no tokenizer can be trained: the text has no characters") from e
        raise RequestError(
            f"text.vocab_size = {vocab_size}: no tokenizer could be trained on this text: {reason[-_MAX_SHOWN:]}"
        ) from e
    if into is not None:
        into.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(into, model.getvalue())
    return Tokenizer(model.getvalue())


# Maximum characters of a training sentence: sentencepiece skips those of more than 4,192 bytes, and a character has at
# most four.
_MAX_TRAINED = 1000


def _pieces(sentences: Iterable[str]) -> Iterator[str]:
    """The sentences, long ones cut into pieces, at a blank if possible."""
    for text in sentences:
        start = 0
        while len(text) - start > _MAX_TRAINED:
            end = text.rfind(" ", start + 1, start + _MAX_TRAINED)
            end = end if end > 0 else start + _MAX_TRAINED
            yield text[start:end]
            start = end
        yield text[start:]


def _train(sentences: Iterable[str], model: io.BytesIO, vocab_size: int) -> None:
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
