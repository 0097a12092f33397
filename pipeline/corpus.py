"""The demo corpus, for jobs whose recipe uses it."""

from __future__ import annotations

from pipeline import recipe as recipes
from pipeline.errors import RequestError
from pipeline.recipe import Recipe


def build_corpus(recipe: Recipe) -> None:
    """Builds the demo corpus where the recipe uses it and it does not exist yet."""
    if recipes.uses_demo(recipe):
        from pipeline.data import demo

        try:
            demo.build(demo.cache_dir())
        except ImportError as e:
            raise RequestError(str(e)) from e
