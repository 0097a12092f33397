"""How a rank asks for its steps: by itself, or through groups that stand for it before the coordinator.

```text
rank ─ StepRequests ─┐
rank ─ StepRequests ─┴ StepGroup ─┐
                                  ├ StepCoordinator       one call a step on every line
rank ─ StepRequests ─┬ StepGroup ─┘
rank ─ StepRequests ─┘
```

Knows nothing of Ray: ``pipeline/cluster/step_actors.py`` makes an actor of a group.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from threading import Lock

from pipeline.train.reject_limit import Draws
from pipeline.train.step_coordinator import REFUSED, Grant


class StepGroup:
    """Stands for the ranks of a group: one call a step in the place of one a caller.

    num_callers: ranks, or groups of them, that call this one. ask: the ``step`` of the group or coordinator above for
    this group: (step, draws) → the answer.
    """

    def __init__(self, num_callers: int, ask: Callable[[int, Draws], Awaitable[Grant]]) -> None:
        self._num_callers = num_callers
        self._ask = ask
        self._draws: dict[int, dict[int, Draws]] = collections.defaultdict(dict)
        self._answers: dict[int, asyncio.Future] = {}

    async def step(self, caller: int, step: int, draws: Draws) -> Grant:
        """A caller asks for a step, as ``StepCoordinator.step`` says. The answer is the same for all."""
        answer = self._answers.setdefault(step, asyncio.get_running_loop().create_future())
        self._draws[step][caller] = draws
        if len(self._draws[step]) < self._num_callers:
            return await answer
        drawn = self._draws.pop(step)
        try:
            answer.set_result(await self._ask(step, Draws.of_ranks([drawn[first] for first in sorted(drawn)])))
        except Exception as e:
            # Each caller raises it.
            answer.set_exception(e)
        del self._answers[step]
        return await answer


class StepRequests:
    """One rank's requests for steps. A step is asked for once the rank has its batch, and runs the step before.

    ask: the ``step`` of a group or of the coordinator for this rank: (step, draws) → a future of the answer.
    over: a future of the coordinator's answer to ``over``.
    """

    def __init__(self, start_step: int, *, ask: Callable[[int, Draws], Future], over: Future) -> None:
        self._ask = ask
        self._next, self._wanted = start_step, start_step - 1
        self._over = over
        self._draws: dict[int, Draws] = {}
        self._answers: dict[int, Future] = {}
        # The feed's thread, the loop's and those that bring answers.
        self._lock = Lock()
        over.add_done_callback(self._end)

    def ready(self, step: int, draws: Draws) -> None:
        """This rank has the batch of a step."""
        with self._lock:
            self._draws[step] = draws
        self._ask_for_more()

    def answer(self, step: int) -> Future:
        """The answer for a step that is about to begin; that for the next one is asked for while it runs."""
        with self._lock:
            self._wanted = max(self._wanted, step + 1)
            # Answers are fetched in order, each until its step begins.
            for done in [done for done in self._answers if done < step]:
                del self._answers[done]
            answer = self._answers.setdefault(step, Future())
        if self._over.done():
            self._end(self._over)
        self._ask_for_more()
        return answer

    def _ask_for_more(self) -> None:
        with self._lock:
            asked = []
            while self._next <= self._wanted and self._next in self._draws:
                answer = self._answers.setdefault(self._next, Future())
                asked.append((self._next, self._draws.pop(self._next), answer))
                self._next += 1
        for step, draws, answer in asked:
            self._ask(step, draws).add_done_callback(lambda came, answer=answer: self._pass_on(came, answer))

    def _end(self, over: Future) -> None:
        """Refuses what was not granted when the run had ended, or fails all where the coordinator was lost."""
        last = -1 if over.exception() else over.result()
        with self._lock:
            left = [answer for step, answer in self._answers.items() if step > last]
        refused: Future = Future()
        refused.set_result(REFUSED)
        for answer in left:
            self._pass_on(over if over.exception() else refused, answer)

    def _pass_on(self, came: Future, answer: Future) -> None:
        with self._lock:
            if answer.done():
                return
            if error := came.exception():
                answer.set_exception(error)
            else:
                answer.set_result(came.result())
