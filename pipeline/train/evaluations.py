"""Evaluation while a run trains: a look at its parameters between two steps, which changes nothing of the run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils

from model.imp import Imp
from pipeline.data.modalities import load
from pipeline.errors import DataError, RequestError
from pipeline.train.spec import RunSpec

# (the spec, the model) → a function of (step, parameters, heartbeat) that returns the entries of an evaluation.
EvaluatorMaker = Callable[[RunSpec, Imp], Callable[..., list[dict]]]


class Evaluations:
    """Measures the state of a run; rank 0 does, the others give it their parts of the parameters.

    results: takes (step, entries). heartbeat: as the watchdog's. Data that cannot be read cost a measurement, not the
    run: a line says so.
    """

    def __init__(
        self,
        spec: RunSpec,
        imp: Imp,
        *,
        rank: int,
        results: Callable[[int, list[dict]], None],
        heartbeat: Callable[[str], None],
    ) -> None:
        self._spec, self._imp = spec, imp
        self._rank = rank
        self._results = results
        self._heartbeat = heartbeat
        self._evaluate: Callable[..., list[dict]] | None = None
        # Whether a measurement runs, which may take as long as a save.
        self.busy = False

    def __call__(self, step: int, state: dict) -> None:
        """Measures the state after ``step`` updates. Every rank calls it."""
        params = _on_one_device({name: group["params"] for name, group in state.items()})
        if self._rank != 0:
            return
        self.busy = True
        try:
            if self._evaluate is None:
                # Named in the spec: training itself does not know evaluation.
                self._evaluate = load(self._spec.logging.evaluator)(self._spec, self._imp)
            entries = self._evaluate(step, params, heartbeat=self._heartbeat)
        except (DataError, RequestError) as e:
            print(f"warning: step {step} is not evaluated: {e}", file=sys.stderr, flush=True)
            return
        finally:
            self.busy = False
        self._results(step, entries)


def _on_one_device(params: dict) -> Any:
    """Whole copies of parameters that may lie in parts on the devices of several processes."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(params)):
        return jax.device_put(params, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    return multihost_utils.process_allgather(params, tiled=True)
