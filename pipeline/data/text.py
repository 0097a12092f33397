"""Text to token ids by sentencepiece. Pad id 0, no begin or end marks."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from pipeline.data.media.errors import REASONS, Reject
from pipeline.data.media.storage import read_bytes
from pipeline.errors import RequestError
from pipeline.files import write_bytes


class Tokenizer:
    """A sentencepiece model from its bytes, so that it can travel to decode processes and into checkpoints."""

    def __init__(self, model: bytes):
        import sentencepiece

        self.model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as e:
            raise RequestError(f"text.tokenizer: expected a sentencepiece model: {e}") from e
        if self._processor.pad_id() != 0:
            raise RequestError(f"text.tokenizer: expected pad id 0, found {self._processor.pad_id()}")

    def __reduce__(self):
        return Tokenizer, (self.model,)

    @property
    def vocab_size(self) -> int:
        return self._processor.get_piece_size()

    def count(self, text: str) -> int:
        """How many tokens a text has before anything is cut."""
        return len(self._processor.encode(text))

    def encode(self, text: str, length: int) -> np.ndarray:
        """(length,) int32, cut or padded with 0."""
        ids = self._processor.encode(text)[:length]
        out = np.zeros(length, np.int32)
        out[: len(ids)] = ids
        return out


def load_tokenizer(path: str) -> Tokenizer:
    """Raises RequestError where there is no sentencepiece model."""
    try:
        return Tokenizer(read_bytes(path))
    except Reject as e:
        raise RequestError(f"text.tokenizer: expected a sentencepiece model at {path}: {REASONS[e.reason]}") from e


def train_tokenizer(sentences, *, vocab_size: int, into: Path) -> Tokenizer:
    """Trains a unigram model on the sentences and writes it to ``into``; the vocabulary shrinks where text is short.

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
    into.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(into, model.getvalue())
    return Tokenizer(model.getvalue())


def _train(sentences, model: io.BytesIO, vocab_size: int) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
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
