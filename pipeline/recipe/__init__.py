"""The recipe: strict YAML in, plain dataclasses out. The one place that knows pydantic.

Unknown keys are errors that name the nearest known one; every value is checked before anything starts.
"""

from pipeline.recipe.checks import check_evaluation
from pipeline.recipe.explain import explain_key
from pipeline.recipe.reading import evaluation_settings, from_dict, key_value, load
from pipeline.recipe.resume import check_resume, differences, from_stored
from pipeline.recipe.settings import EvaluationSettings, Recipe
from pipeline.recipe.yaml_text import dump, read_yaml

__all__ = [
    "EvaluationSettings",
    "Recipe",
    "check_evaluation",
    "check_resume",
    "differences",
    "dump",
    "evaluation_settings",
    "explain_key",
    "from_dict",
    "from_stored",
    "key_value",
    "load",
    "read_yaml",
]
