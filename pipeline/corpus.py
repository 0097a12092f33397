"""The demo corpus of recipes that use it."""

from __future__ import annotations

from pipeline.errors import RequestError
from pipeline.recipe import Recipe
from pipeline.recipe.specs import uses_demo


def build_corpus(recipe: Recipe) -> None:
    """Makes the demo corpus if the recipe uses it and it is missing."""
    if not uses_demo(recipe):
        return
    from pipeline.data import demo

    try:
        demo.build(demo.cache_dir())
    except ImportError as e:
        raise RequestError(str(e)) from e
