"""Packs configs/ (recipes and their schema) into the wheel as ``pipeline/configs``. The rest is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["model*", "pipeline*"]), "pipeline.configs"],
    package_dir={"pipeline.configs": "configs"},
    package_data={
        "pipeline.configs": ["*.yaml", "*.json"],
        "model": ["py.typed"],
        "pipeline": ["py.typed", "embed/*.css", "embed/*.js"],
    },
)
