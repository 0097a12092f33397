"""From a recipe to plain data."""

import pytest

from pipeline.recipe.specs import feed_advice


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            {"from_shards": False, "on_cluster": False, "clip_cache_mb": 0},
            "decode films once (python jobs/preprocess.py) and set its shards, or use a machine or a cluster with more "
            "CPUs, or raise cluster.clip_cache_mb (0) if the clips fit into memory, or where CPUs are idle, raise "
            "cluster.queue_blocks",
        ),
        (
            {"from_shards": True, "on_cluster": True, "clip_cache_mb": 0},
            "add decode CPUs to the cluster, or where CPUs are idle, raise cluster.queue_blocks",
        ),
    ],
)
def test_advice_fits_the_run(found, expected):
    assert feed_advice("films", **found) == expected
