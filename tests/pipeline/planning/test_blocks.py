"""The time of a step from small blocks of its model, by hand."""

import jax
import pytest
from jax.sharding import AbstractMesh, Mesh

from model.config import from_variant
from model.sharding import AXES, make_mesh
from model.structure import InputShape, Structure
from pipeline.planning import blocks

IMAGES = (InputShape("vision", 16, 768, 3),)


@pytest.fixture
def mesh() -> Mesh:
    return make_mesh(jax.devices()[:1])


def classes(batch: int, **more) -> Structure:
    return Structure("softmax", batch, IMAGES, classifier="a", num_classes=5, classes=(0, 1, 2, 3, 4), **more)


@pytest.mark.parametrize(
    ("variant", "layers", "times"),
    # 12 dense layers; 6 dense and 6 sparse; 3 sparse.
    [("imp-s", 1, 12), ("imp-s-moe", 2, 6), ("imp-tiny-moe", 1, 3)],
)
def test_blocks_have_the_kinds_of_layers_of_the_model(variant, layers, times):
    config = from_variant(variant)
    assert blocks.unit(config) == (layers, times)
    double = blocks.with_units(config, 2)
    assert double.depth == 2 * layers and blocks.with_units(config, times) == config
    share = len(config.sparse_layers) / config.depth
    assert len(double.sparse_layers) / double.depth == share


def test_a_step_is_linear_in_layers(mesh):
    """0.2 s for all but the layers, 0.05 s a layer: 12 layers take 0.8 s."""
    asked = []

    def timed(config, structure):
        asked.append((config.depth, structure.global_batch_size))
        return 0.2 + 0.05 * config.depth

    config = from_variant("imp-s")
    assert blocks.step_seconds(config, classes(4), mesh, timed) == pytest.approx(0.8)
    assert asked == [(1, 4), (2, 4)]


def test_a_large_batch_is_timed_in_part(mesh, monkeypatch):
    """0.1 s of any batch and 0.01 s a layer and sample: 4,096 samples in 12 layers take 491.62 s."""
    asked = []

    def timed(config, structure):
        asked.append((config.depth, structure.global_batch_size))
        return 0.1 + 0.01 * config.depth * structure.global_batch_size

    config = from_variant("imp-s")
    one = blocks.sizes.structure_flops(blocks.with_units(config, 2), classes(1))
    monkeypatch.setattr(blocks, "_CPU_FLOPS", 70 * one)
    assert blocks.step_seconds(config, classes(4096), mesh, timed) == pytest.approx(0.1 + 0.01 * 12 * 4096)
    assert asked == [(1, 64), (2, 64), (1, 32), (2, 32)]
    # Microbatches stay as many, and each holds one sample at least.
    asked.clear()
    blocks.step_seconds(config, classes(4096, microbatches=64), mesh, timed)
    assert [size for _, size in asked] == [64, 64]


def test_devices_share_the_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "_CPU_FLOPS", 1.0)
    four = AbstractMesh((4, 1), AXES)
    assert blocks.block_sizes(from_variant("imp-s"), classes(64), four, on_cpu=True) == [4]
    assert blocks.block_sizes(from_variant("imp-s"), classes(64), four, on_cpu=False) == [64]
