"""Parameter counts of the published sizes, and what a config refuses."""

import math
import re

import jax
import pytest
from flax import nnx

from model.config import ModelConfig, MoEConfig, from_variant
from model.encoder import Encoder
from model.imp import Imp


def count(shapes) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def encoder_parameters(config: ModelConfig) -> int:
    return count(nnx.state(nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0)))))


@pytest.mark.parametrize(("name", "expected"), [("imp-s", 21_243_648), ("imp-b", 84_954_624), ("imp-l", 302_041_088)])
def test_dense_encoder_has_the_published_number_of_parameters(name, expected):
    assert encoder_parameters(from_variant(name)) == expected


@pytest.mark.parametrize(
    ("name", "num_layers", "num_experts", "expected"),
    [
        ("imp-s-moe", 6, 4, 42_488_064),
        ("imp-s-moe", 6, 16, 127_450_368),
        ("imp-s-moe", 12, 16, 233_655_552),
        ("imp-b-moe", 6, 4, 169_909_248),
        ("imp-b-moe", 6, 16, 509_703_168),
        ("imp-b-moe", 12, 16, 934_450_176),
        ("imp-l-moe", 6, 16, 1_057_117_184),
        ("imp-l-moe", 12, 16, 1_812_190_208),
        ("imp-l-moe", 24, 16, 3_322_336_256),
    ],
)
def test_sparse_encoder_has_the_published_number_of_parameters(name, num_layers, num_experts, expected):
    config = from_variant(name, moe={"num_layers": num_layers, "num_experts": num_experts})
    assert encoder_parameters(config) == expected


def test_parameters_around_the_base_encoder():
    pairs, classifiers = (("vision", "text"),), {"digits": 10}
    imp = Imp(
        from_variant("imp-b"), modalities=("vision", "audio", "text"), pairs=pairs, classifiers=classifiers
    ).shapes()
    projections = 2 * (768 * 768 + 768)
    assert count(imp["embed_vision"]) == (3072 * 768 + 768) + (16 + 32 + 32) * 768 + 2 * 768 + projections
    assert count(imp["embed_audio"]) == (256 * 768 + 768) + (64 + 8) * 768 + 2 * 768 + projections
    assert count(imp["embed_text"]) == 32_100 * 768 + 4096 * 768 + 2 * 768 + projections
    head = (768 * 1024 + 1024) + (1024 * 1024 + 1024) + 2 * 1024
    assert count(imp["pair_text_vision"]) == 2 * head + 1  # a head each way and the temperature
    assert count(imp["classifier_digits"]) == 7690


def test_sparse_variants_normalise_queries_and_start_warm():
    dense, sparse = from_variant("imp-b"), from_variant("imp-b-moe")
    assert (dense.moe, dense.qk_norm, dense.temperature_init) == (None, False, 0.2)
    assert (sparse.moe, sparse.qk_norm, sparse.temperature_init) == (MoEConfig(16, 6), True, 1.0)


def test_equal_settings_make_equal_configs():
    moe = {"num_experts": 8, "capacity_factor": 2.0}
    first, second = (from_variant("imp-s-moe", moe=moe, dtype="bfloat16") for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert first.moe == MoEConfig(8, 6, capacity_factor=2.0)
    assert first.dtype == "bfloat16"
    assert first != from_variant("imp-s-moe", moe=moe)


def test_unknown_variant_names_the_nearest_and_the_known():
    with pytest.raises(ValueError, match=r"'imp-b_moe'; did you mean 'imp-b-moe'\? Known: imp-tiny, .*imp-l-moe"):
        from_variant("imp-b_moe")
    with pytest.raises(ValueError, match=r"'resnet' Known: imp-tiny"):
        from_variant("resnet")


def test_unknown_settings_raise():
    with pytest.raises(ValueError, match=r"unknown model settings \['dropout'\]"):
        from_variant("imp-s", dropout=0.1)
    with pytest.raises((TypeError, ValueError), match="num_expert"):
        from_variant("imp-s-moe", moe={"num_expert": 8})


def test_moe_settings_on_a_dense_variant_raise():
    with pytest.raises(ValueError, match=r"'imp-s' is dense; moe settings \['num_experts'\] need a -moe variant"):
        from_variant("imp-s", moe={"num_experts": 8})


def test_heads_that_do_not_divide_the_width_raise():
    with pytest.raises(ValueError, match="width 384 must be num_heads 5 x head_dim 64 = 320"):
        from_variant("imp-s", num_heads=5)


@pytest.mark.parametrize("num_layers", [0, 13])
def test_more_sparse_layers_than_layers_raise(num_layers):
    with pytest.raises(ValueError, match=f"num_layers {num_layers} must be between 1 and depth 12"):
        from_variant("imp-s-moe", moe={"num_layers": num_layers})


def test_unknown_routing_group_raises():
    with pytest.raises(ValueError, match=r"moe\.group is 'batch'; known: sample, tokens"):
        from_variant("imp-s-moe", moe={"group": "batch"})


def test_position_buckets_of_each_modality():
    config = from_variant("imp-l")
    assert config.positions("vision") == (16, 32, 32)
    assert config.positions("audio") == (64, 8)
    assert config.positions("text") == (4096,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"remat": "some"}, "remat is 'some'; known: attention, auto, dots, full, none, products"),
        ({"towers": "two"}, "towers is 'two'; known: per_modality, shared"),
        ({"attention": "flash"}, "attention is 'flash'; known: auto, cudnn, pallas, xla"),
        ({"contrastive_chunk": 0}, "contrastive_chunk must be at least 1, found 0"),
        ({"text_embedding_std": 0.0}, "text_embedding_std must be above 0, found 0.0"),
        ({"temperature_floor": 2.0}, "expected 0 < temperature_floor <= temperature_init, found 2.0 and 1.0"),
        ({"moe": {"router": "hash"}}, "moe.router is 'hash'; known: experts_choose, tokens_choose"),
        ({"moe": {"dispatch": "sort"}}, "moe.dispatch is 'sort'; known: auto, einsum, index"),
        ({"moe": {"num_selected": 9, "num_experts": 8}}, "moe.num_selected 9 must be from 1 to num_experts 8"),
        ({"moe": {"capacity_factor": 0.0}}, "capacity_factor 0.0"),
        ({"moe": {"placement": "interleaved", "num_layers": 5}}, "found depth 12 and moe.num_layers 5"),
    ],
)
def test_settings_that_make_no_sense_raise(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_variant("imp-s-moe", **fields)


def test_where_sparse_layers_stand():
    assert from_variant("imp-l-moe").sparse_layers == tuple(range(12, 24))
    interleaved = from_variant("imp-b-moe", moe={"placement": "interleaved"})
    assert interleaved.sparse_layers == (1, 3, 5, 7, 9, 11)
    assert from_variant("imp-b").sparse_layers == ()
    assert encoder_parameters(interleaved) == encoder_parameters(from_variant("imp-b-moe"))
