"""Listings of Google's store that are known to be whole.

tensorstore takes an answer that refuses a listing (401, 403, 404 and others that it does not retry) for a page without
objects: a run would go on as if it had no checkpoints. Its counters of HTTP answers tell the two apart. They count the
requests of all threads: a listing beside a request that failed is made again.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import TypeVar

_COUNTERS = "/tensorstore/http/response_codes"
# Statuses that tensorstore retries; in the end it raises an error.
_RETRIED = {"408", "429", "500", "502", "503", "504"}
_NAMES = {"401": "UNAUTHENTICATED", "403": "PERMISSION_DENIED", "404": "NOT_FOUND"}
# Maximum number of listings beside failing requests, and seconds between two.
_TRIES, _PAUSE_S = 40, 0.25
T = TypeVar("T")


def whole_listing(make: Callable[[], T]) -> T:
    """The listing that ``make`` returns. Raises ValueError, as tensorstore does, if the store refuses it."""
    for _ in range(_TRIES):
        before = _answers()
        found = make()
        given = _answers() - before
        succeeded = any(code.startswith("2") for code in given)
        failed = sorted(code for code in given if not code.startswith("2") and code not in _RETRIED)
        if not failed and succeeded:
            return found
        if failed and not succeeded:
            raise ValueError(f"{_NAMES.get(failed[0], 'REFUSED')}: no listing (HTTP status {failed[0]})")
        time.sleep(_PAUSE_S)
    raise ValueError("other requests fail all the time, so no listing is known to be whole")


def _answers() -> collections.Counter[str]:
    """The number of HTTP answers by status code in this process."""
    import tensorstore

    (metric,) = tensorstore.experimental_collect_matching_metrics(_COUNTERS, include_zero_metrics=True)
    return collections.Counter({each["code"]: each["value"] for each in metric["values"]})
