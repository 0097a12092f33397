"""All data of a run as plain data."""

from __future__ import annotations

import dataclasses

from pipeline.data.spec import DataSetSpec, TaskSpec, TokenSpec


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """The data of a run, and how they become tokens.

    fingerprints: data set → digests of its training rows (``columns.Fingerprint.digests``). tokenizer: its bytes, None
    if no task reads text.
    """

    tasks: dict[str, TaskSpec]
    data_sets: dict[str, DataSetSpec]
    tokens: TokenSpec
    fingerprints: dict[str, dict]
    tokenizer: bytes | None = None

    @property
    def num_rows(self) -> dict[str, int]:
        """Data set → rows of its training manifest."""
        return {name: fingerprint["num_rows"] for name, fingerprint in self.fingerprints.items()}
