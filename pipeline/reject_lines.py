"""Lines on rows that training rejects or has no caption for."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.data.spec import DataSetSpec


def counts_line(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())


def allowed_line(data_set: DataSetSpec) -> str:
    return f"at most {100 * data_set.max_reject_fraction:.3g} % of rows may be rejected"


def no_caption_line(count: int, of: str, unusable: Mapping[str, int], data_set: DataSetSpec) -> str:
    why = f" ({counts_line(unusable)})" if unusable else ""
    return f"{count} of {of} have no caption that can be used{why}; {allowed_line(data_set)}"
