"""Runs without Ray, for the tests of training."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bare_run():
    """The module ``bare_run.py``, which tests also start as a process. Its runs in this process share their graphs."""
    from pipeline.train import rank

    path = Path(__file__).with_name("bare_run.py")
    spec = importlib.util.spec_from_file_location("bare_run", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank, "compile_step", compiled_once(rank.compile_step))
        yield module


def compiled_once(compile_step: Callable) -> Callable:
    """``compile_step`` with a memory: tracing and loading a graph again takes a run most of its time."""
    known = {}

    def compiled(imp, structure, optimizer, **options):
        groups = (imp.groups, tuple(imp.classifiers.items()))
        key = (imp.config, groups, structure, optimizer, *sorted(options.items()))
        if key not in known:
            known[key] = compile_step(imp, structure, optimizer, **options)
        return known[key]

    return compiled
