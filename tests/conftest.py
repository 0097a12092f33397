"""Shared by all tests: a small demo corpus and a recipe of four tasks over it."""

from __future__ import annotations

import os

from tests.xla_flags import quick_compile

# Before anything imports ray or jax: no network features, no accelerators, the machine's normal priority for decode.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# librosa, which spectrograms are compared with, compiles when it is imported.
os.environ.setdefault("NUMBA_OPT", "0")
# Of this process and of those that tests start.
os.environ.setdefault("XLA_FLAGS", quick_compile())

import hypothesis
import pytest

from tests.browser import Browser
from tests.toy_recipe import toy_recipe_of

# The same examples in each run, however long one takes; --hypothesis-profile=default looks for others.
hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def toy_corpus(tmp_path_factory):
    """The demo corpus cut to a few dozen rows a set."""
    from pipeline.data import demo

    return demo.build(tmp_path_factory.mktemp("corpus"), limit=48, progress=False)


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory):
    """Compiled steps for all tests that run the toy recipe."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def make_toy_recipe(toy_corpus):
    """Makes ``toy_recipe``, for fixtures that several tests share."""
    return lambda: toy_recipe_of(toy_corpus)


@pytest.fixture
def toy_recipe(make_toy_recipe):
    """A recipe as a plain dict, each test's own to change."""
    return make_toy_recipe()


@pytest.fixture(scope="session")
def browser():
    """A real browser for pages; tests that use it are skipped where none is installed."""
    with Browser.started() as started:
        yield started


# Files whose tests take longest, in minutes of their own, the longest first.
_LONGEST = ("test_jobs.py", "test_three_nodes.py", "test_runs.py", "test_submit.py", "test_campaign.py")
_LONGEST += ("test_autoscaler.py", "test_initial_state.py", "test_run.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: at the end one would run alone, with the other processes idle."""
    place = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
