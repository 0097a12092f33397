"""The parts of a rank close in reverse order, whatever one of them raises."""

import pytest

from pipeline import recipe as recipes
from pipeline.errors import DataError, RequestError
from pipeline.plan import plan
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.run import train
from pipeline.train.watchdog import Watchdog


@pytest.fixture
def closed(monkeypatch) -> list[str]:
    """Names of the parts that were closed, in order."""
    names = []
    for cls in (Checkpoints, Watchdog):

        def close(self, original=cls.close, name=cls.__name__):
            names.append(name)
            original(self)

        monkeypatch.setattr(cls, "close", close)
    return names


def no_queues(schedule):
    raise DataError("the streams could not start")


def test_a_rank_that_cannot_open_closes_what_it_opened(toy_recipe, tmp_path, closed, monkeypatch):
    monkeypatch.setattr("pipeline.train.rank.measured_flops_per_s", lambda config: 1e9)
    with pytest.raises(DataError, match="could not start"):
        train(plan(recipes.from_dict(toy_recipe), tmp_path), no_queues)
    assert closed == ["Checkpoints", "Watchdog"]


def test_a_rank_that_is_refused_closes_what_it_opened(toy_recipe, tmp_path, closed):
    toy_recipe["cluster"] = {"expert_parallel": 2}
    with pytest.raises(RequestError, match="cannot be split into 2 expert groups"):
        train(plan(recipes.from_dict(toy_recipe), tmp_path), no_queues)
    assert closed == ["Checkpoints", "Watchdog"]


def test_a_part_that_fails_to_close_keeps_no_other_from_closing(toy_recipe, tmp_path, closed, monkeypatch):
    def close(self):
        raise OSError("the disk is gone")

    monkeypatch.setattr("pipeline.train.rank.measured_flops_per_s", lambda config: 1e9)
    monkeypatch.setattr(Checkpoints, "close", close)
    with pytest.raises(OSError, match="the disk is gone"):
        train(plan(recipes.from_dict(toy_recipe), tmp_path), no_queues)
    assert closed == ["Watchdog"]
