"""Known rejects in Ray's object store: put there once a start, read in place by every process of a machine."""

from __future__ import annotations

import ray

from pipeline.data.known_rejects import KnownRejects


class SharedRejects:
    """Stands for rejects in ``StreamSpec.known_bad`` and travels as a reference, however many they are."""

    def __init__(self, rejects: KnownRejects) -> None:
        self._reference = ray.put(rejects)

    def open(self) -> KnownRejects:
        """The rejects; a machine's first process to ask fetches them."""
        return ray.get(self._reference)


def shared(rejects: dict[str, KnownRejects]) -> dict[str, SharedRejects]:
    """Task → its rejects, in the object store."""
    return {task: SharedRejects(known) for task, known in rejects.items()}
