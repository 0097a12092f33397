"""Captions of a row: which of them are usable, and why the others are not."""

from __future__ import annotations

import collections
from collections.abc import Iterable

from pipeline.data.columns import NOT_UTF8
from pipeline.data.tokenizer import Tokenizer, no_tokens

# Reasons for which a row without a usable text may be rejected; the first one found among its texts is given.
_REASONS = ("bad_text", "text_too_long", "no_text")
# Maximum characters shown of a text.
_MAX_SHOWN = 40


def text_fault(text: str, *, max_characters: int) -> tuple[str, str] | None:
    """(reason, detail) why a text is unusable whatever the tokenizer; None for a usable one."""
    if text.startswith(NOT_UTF8):
        return "bad_text", f"not UTF-8: {text[len(NOT_UTF8) :]}"
    if len(text) > max_characters:
        return "text_too_long", f"{len(text)} characters, at most {max_characters} are allowed: {text[:_MAX_SHOWN]!r}"
    if not text.strip():
        return "no_text", f"only whitespace: {text[:_MAX_SHOWN]!r}"
    return None


def caption_fault(text: str, tokenizer: Tokenizer, *, max_characters: int) -> tuple[str, str] | None:
    """(reason, detail) why a caption cannot be used with a tokenizer; None for a usable one."""
    fault = text_fault(text, max_characters=max_characters)
    if fault is None and not tokenizer.has_tokens(text):
        return no_tokens(text)
    return fault


def usable_captions(texts: Iterable[str], tokenizer: Tokenizer, *, max_characters: int) -> tuple[str, ...]:
    """The captions that can be used: UTF-8, not too long, with at least one token."""
    return tuple(t for t in texts if caption_fault(t, tokenizer, max_characters=max_characters) is None)


def best_reason(faults: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """The most informative of the faults of a row that has no usable text."""
    return min(faults, key=lambda fault: _REASONS.index(fault[0]), default=("no_text", "no text"))


class CaptionCount:
    """Counts rows without a usable caption, and unusable captions by reason."""

    def __init__(self, max_characters: int):
        self.rows = 0
        self.rows_without = 0
        self.unusable: collections.Counter[str] = collections.Counter()
        self._max_characters = max_characters

    def add(self, texts: list[str]) -> list[str]:
        """Counts a row and returns its usable captions."""
        faults = [text_fault(text, max_characters=self._max_characters) for text in texts]
        usable = [text for text, fault in zip(texts, faults, strict=True) if fault is None]
        self.unusable.update(fault[0] for fault in faults if fault)
        self.rows += 1
        self.rows_without += not usable
        return usable
