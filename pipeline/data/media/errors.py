"""Rejects: bad media are data, with a reason from a fixed list and a line of detail."""

from __future__ import annotations

import re

from pipeline.credentials import redacted

# Memory addresses and clock times in libraries' messages: the same file must give the same reject.
_PASSING = re.compile(r"\b0x[0-9a-fA-F]{6,}|\[\d\d:\d\d:\d\d\]")

REASONS = {
    "no_media": "the row names no file for a modality its task needs",
    "unknown_scheme": "the row names a URI of a kind that the recipe does not allow",
    "bad_uri": "the row names a URI that no file can have",
    "missing_file": "the file the row names does not exist",
    "empty_file": "the file has no bytes",
    "not_decodable": "no decoder could read it",
    "no_frames": "the video has no frame in the asked range",
    "no_sound": "the file has no sound track, or none in the asked range",
    "too_large": "more pixels or bytes than the recipe's caps",
    "too_long": "more seconds or frames than the recipe's caps",
    "crashed": "the decoder's process died of it, twice",
    "hung": "decoding took longer than cluster.decode_timeout_s, twice",
    "out_of_memory": "decoding took more memory than cluster.decode_memory_mb, twice",
    "bad_times": "start_s or end_s is not a time",
    "no_text": "the row has no usable text",
    "bad_text": "the text is not UTF-8",
    "text_too_long": "more characters than the recipe's cap",
    "no_label": "the row has none of the classes its task asks for",
}


# Reasons that depend on time or memory, not on the file alone: the next visit may succeed.
TRANSIENT = frozenset({"crashed", "hung", "out_of_memory"})


class Reject(Exception):
    """Raised for one bad sample; caught where batches are made.

    Its detail is stored in journals and shards, without credentials.
    """

    def __init__(self, reason: str, detail: str):
        if reason not in REASONS:
            raise ValueError(f"unknown reject reason {reason!r}; known: {', '.join(REASONS)}")
        detail = redacted(detail)
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, " ".join(_PASSING.sub("", detail).split())[:300]
