"""Runs without Ray, for the tests of training."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bare_run():
    """The module ``bare_run.py``, which tests also start as a process."""
    path = Path(__file__).with_name("bare_run.py")
    spec = importlib.util.spec_from_file_location("bare_run", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
