"""The number of CPUs that a rank's decoding asks its cluster for. Knows nothing of Ray."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

# Minimum share of a window that training waits for data before more CPUs are asked for.
_WAIT_SHARE = 0.05
# Minimum share of the decoders that are busy, for their number to be what training waits for.
_ALL_BUSY = 0.8
# Growth of one request. A machine takes minutes to come, and what it brings is seen before the next request.
_GROWTH = 1.5
# Spare CPUs that are kept: a share of the most that decoded at a time during those windows.
_SPARE = 1.25


class DecodeDemand:
    """Asks for more CPUs while training waits for decoders that are all busy, and for fewer after minutes of calm.

    low, high: bounds of what is asked for. decoders: the number that the machines of the moment hold.
    """

    # Seconds that are judged together.
    window_s = 10.0
    # Windows without a wait before CPUs are given back.
    calm_windows = 30

    def __init__(
        self,
        low: float,
        high: float,
        decoders: Callable[[], int],
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._low = math.ceil(low)
        self._high = high
        self._decoders = decoders
        self._clock = clock
        self.cpus = int(min(max(self._low, decoders()), self._high))
        self._noted_at = self._window_ends = 0.0
        # Of the current window: seconds waited for data, and seconds times busy decoders.
        self._waited_s = self._busy_s = 0.0
        # The busy decoders of the last windows, all of them without a wait.
        self._calm: deque[float] = deque(maxlen=self.calm_windows)

    def note(self, unfinished: int, *, waits: bool) -> None:
        """Notes the state of the stream at the moment, which has lasted since the last call.

        unfinished: the number of blocks that decoders have. waits: whether training waits for data.
        """
        now = self._clock()
        if not self._noted_at:
            self._noted_at, self._window_ends = now, now + self.window_s
            return
        lasted_s = min(now - self._noted_at, self.window_s)
        self._noted_at = now
        self._waited_s += lasted_s * waits
        self._busy_s += lasted_s * min(unfinished, self._decoders())
        if now >= self._window_ends:
            self._judge(self._waited_s / self.window_s, self._busy_s / self.window_s)
            self._waited_s = self._busy_s = 0.0
            self._window_ends = now + self.window_s

    def _judge(self, wait_share: float, busy: float) -> None:
        """Decides at the end of a window. busy: mean number of busy decoders."""
        if wait_share >= _WAIT_SHARE:
            self._calm.clear()
            decoders = min(self._decoders(), self.cpus)
            # Decoders that are not all busy wait for something else than CPUs.
            if busy >= _ALL_BUSY * decoders:
                self.cpus = self._within(max(self.cpus, math.ceil(_GROWTH * decoders)))
            return
        self._calm.append(busy)
        if len(self._calm) == self._calm.maxlen:
            self.cpus = self._within(min(self.cpus, math.ceil(_SPARE * max(self._calm))))

    def _within(self, cpus: int) -> int:
        return int(min(max(cpus, self._low, 1), self._high))
