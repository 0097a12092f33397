"""Compiled steps, one for each structure: compiled in the background in order of first use."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from model.structure import Structure
from pipeline.train.memory_need import Layout, peak_bytes

log = logging.getLogger(__name__)

# Seconds between two looks for a stop while a graph is waited for.
_LOOK_S = 0.2


class StepCompiler:
    """Compiles in a background thread; a step waits only for its own graph.

    compile_fn: structure → compiled step. budget: the structures known before step 0, in order of first use.
    on_compiled: called after each.
    """

    def __init__(
        self,
        compile_fn: Callable[[Structure], Callable],
        budget: list[Structure],
        *,
        on_compiled: Callable[[], None] = lambda: None,
    ) -> None:
        self._compile = compile_fn
        self._budget = set(budget)
        self._on_compiled = on_compiled
        self._compiled: dict[Structure, Callable] = {}
        self.compile_s: dict[Structure, float] = {}
        self.alarms: list[Structure] = []
        # Alarms that ``new_alarms`` has returned.
        self._reported = 0
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._next = list(budget)
        self._busy: Structure | None = None
        self._failure: BaseException | None = None
        self._start()

    def _start(self) -> None:
        self._running = True
        self._thread = threading.Thread(target=self._work, name="compiler", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether something is being compiled."""
        return self._busy is not None

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._next or self._failure:
                    self._running = False
                    return
                structure = self._next.pop(0)
                if structure in self._compiled:
                    continue
                self._busy = structure
            try:
                self._build(structure)
            except BaseException as e:
                with self._changed:
                    self._failure = e
                    self._busy = None
                    self._running = False
                    self._changed.notify_all()
                return

    def _build(self, structure: Structure) -> None:
        start = time.perf_counter()
        step = self._compile(structure)
        with self._changed:
            self._compiled[structure], self._busy = step, None
            self.compile_s[structure] = time.perf_counter() - start
            self._changed.notify_all()
        self._on_compiled()

    def ready(self, structure: Structure) -> Callable | None:
        """The compiled step; None before it is compiled."""
        with self._lock:
            return self._compiled.get(structure)

    def await_graph(self, structure: Structure, leave: Callable[[], bool]) -> None:
        """Waits until a structure is compiled, or cannot be, or ``leave()``. ``get`` raises the error."""
        with self._changed:
            self._put_first(structure)
            while not (structure in self._compiled or self._failure or leave()):
                self._changed.wait(_LOOK_S)

    def get(self, structure: Structure, *, leave: Callable[[], bool] = lambda: False) -> Callable | None:
        """The compiled step. A structure outside the budget is compiled here and now, with an alarm.

        leave: asked again and again while waiting; None once it is true.
        """
        with self._changed:
            self._put_first(structure)
            while not self._changed.wait_for(lambda: structure in self._compiled or self._failure, _LOOK_S):
                if leave():
                    return None
            if structure not in self._compiled:
                assert self._failure is not None
                raise self._failure
            return self._compiled[structure]

    def _put_first(self, structure: Structure) -> None:
        """Has a structure compiled next, if it is not yet. The caller holds the lock."""
        if structure not in self._budget:
            self.alarms.append(structure)
            self._budget.add(structure)
            self._next.insert(0, structure)
            log.warning("compiling a graph that was not on the list: %s", _in_words(structure))
            if not self._running:
                self._start()
        elif structure in self._next:
            self._next.remove(structure)
            self._next.insert(0, structure)

    def new_alarms(self) -> list[str]:
        """A line for every compile since the last call that was not on the list."""
        with self._lock:
            new = self.alarms[self._reported :]
            self._reported = len(self.alarms)
        return [f"compiled a graph that was not on the list: {_in_words(structure)}" for structure in new]

    def memory_bytes(self, structure: Structure, layout: Layout) -> int | None:
        """Memory that the compiler plans for a step (``memory_need.peak_bytes``).

        None before it is compiled, and if the compiler does not tell.
        """
        step = self.ready(structure)
        plan = step.executable.memory_analysis() if step is not None else None
        return None if plan is None else peak_bytes(plan, layout)

    def close(self) -> None:
        """Drops the remaining structures and waits for the compile in progress: exiting during one aborts."""
        with self._changed:
            self._next.clear()
        self._thread.join()

    @property
    def num_compiled(self) -> int:
        """The number of structures compiled so far."""
        return len(self.compile_s)


def _in_words(structure: Structure) -> str:
    inputs = ", ".join(f"{i.num_tokens} {i.modality} tokens" for i in structure.inputs)
    return f"{'+'.join(name for name, _ in structure.objectives)} of {structure.global_batch_size} x ({inputs})"
