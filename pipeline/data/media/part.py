"""The part of a media file that a row asks for."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Part:
    """column: manifest column that names the file. start_s, end_s: the row's range, None for the file's end.

    clip_s: seconds of the data set's canonical video clip.
    """

    column: str
    start_s: float = 0.0
    end_s: float | None = None
    clip_s: float = 0.0
