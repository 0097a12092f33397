"""Bounds on the source tree itself: files, functions, return types, circles, the cost of reading a recipe."""

from __future__ import annotations

from benchmarks import house


def test_sizes_and_return_types():
    assert list(house.problems_of_sizes()) == []


def test_modules_do_not_import_each_other_in_circles():
    assert house.circles() == []


def test_a_recipe_is_read_without_jax_and_ray():
    assert house.loaded_by_recipe() == []


def test_percentiles_are_values_that_occur():
    assert [house.percentile([4, 1, 3, 2], share) for share in (0.25, 0.5, 0.9, 1.0)] == [1, 2, 4, 4]
