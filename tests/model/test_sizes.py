"""Parameters and FLOPs against numbers by hand, the published sizes, and what XLA counts in a compiled graph."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from model import sizes
from model.config import ModelConfig, MoEConfig, OptimizerConfig, from_variant
from model.imp import Imp
from model.step import compile_step
from model.structure import InputShape, Structure

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("name", "encoder", "millions_per_token"),
    [
        ("imp-s", 21_243_648, 24),
        ("imp-b", 84_954_624, 90),
        ("imp-l", 302_041_088, 309),
        ("imp-s-moe", 42_488_064, 24),
        ("imp-b-moe", 509_703_168, 90),
        ("imp-l-moe", 1_812_190_208, 310),
    ],
)
def test_parameters_are_the_published_ones(name, encoder, millions_per_token):
    """The paper's parameters per token: 90 M for MoE-B; its 350 M for MoE-L are not explained this way."""
    found = sizes.parameters(from_variant(name))
    assert found["encoder"] == encoder
    assert round(found["per_token"]["vision"] / 1e6) == millions_per_token


def test_parameters_that_a_token_of_the_base_model_meets():
    dense, sparse = (sizes.parameters(from_variant(name))["per_token"] for name in ("imp-b", "imp-b-moe"))
    around = 2 * 768 + 2 * (768 * 768 + 768)  # LayerNorm of positions, pre- and post-projection
    head = (768 * 1024 + 1024) + (1024 * 1024 + 1024) + 2 * 1024
    patch = {"vision": 3072 * 768 + 768, "audio": 256 * 768 + 768, "text": 768}
    rows = {"vision": 3 * 768, "audio": 2 * 768, "text": 768}
    assert dense == {m: 84_954_624 + patch[m] + rows[m] + around + head for m in dense}
    routers, norms = 6 * 768 * 16, 2 * 12 * 64
    assert sparse == {m: dense[m] + routers + norms for m in dense}


def test_all_parameters_have_three_modalities_and_three_pairs():
    head = (768 * 1024 + 1024) + (1024 * 1024 + 1024) + 2 * 1024
    projections = 2 * 768 + 2 * (768 * 768 + 768)
    vision = 3072 * 768 + 768 + (16 + 32 + 32) * 768 + projections
    audio = 256 * 768 + 768 + (64 + 8) * 768 + projections
    text = (32_100 + 4096) * 768 + projections
    expected = 84_954_624 + vision + audio + text + 3 * (2 * head + 1)
    assert sizes.parameters(from_variant("imp-b"))["all"] == expected


@pytest.mark.parametrize(
    ("fields", "experts"),
    [
        ({}, 1),
        ({"capacity_factor": 2.5}, 2.5),
        ({"capacity_factor": 9.0}, 4),
        ({"router": "tokens_choose", "num_selected": 2, "capacity_factor": 1.5}, 2),
        ({"router": "tokens_choose", "num_selected": 2, "capacity_factor": 0.5}, 1),
    ],
)
def test_experts_that_a_token_meets(tiny, fields, experts):
    one_expert = 2 * 16 * 32
    dense = sizes.parameters(tiny())["per_token"]["text"]
    sparse = sizes.parameters(tiny(moe=MoEConfig(4, 1, **fields)))["per_token"]["text"]
    assert sparse == dense + 4 * 16 + round((experts - 1) * one_expert)


def test_one_image_through_the_base_model():
    layer = 905_969_664 + 2 * 100_663_296 + 301_989_888 + 2_415_919_104  # qkv, scores and values, out, feed-forward
    around = 301_989_888 + 603_979_776  # 256 patches of 768 values; pre- and post-projection
    dense, sparse = from_variant("imp-b"), from_variant("imp-b-moe")
    assert sizes.encoder_flops(dense, 256) == 12 * layer == 45_902_462_976
    assert sizes.sample_flops(dense, "vision", 256, num_values=768) == 12 * layer + around == 46_808_432_640
    # Capacity 1: the experts' 16 x 16 slots are as many as tokens, and the routers come on top.
    routers = 6 * 2 * 256 * 768 * 16
    assert sizes.sample_flops(sparse, "vision", 256, num_values=768) == 46_808_432_640 + routers


def test_tubelets_have_four_times_the_values_of_an_image_patch():
    config = from_variant("imp-b")
    image, tubelets = (sizes.sample_flops(config, "vision", 256, num_values=v) for v in (768, None))
    assert tubelets - image == 2 * 256 * (3072 - 768) * 768


def test_unknown_modality_is_one_line(tiny):
    with pytest.raises(ValueError, match="unknown modality 'depth'; known: vision, audio, text"):
        sizes.sample_flops(tiny(), "depth", 4)


def test_a_contrastive_step_by_hand(tiny, inputs):
    structure = Structure("nce", 6, (inputs("text", 3), inputs("vision", 5)))
    vision = 2 * 5 * 12 * 16 + 2 * 2 * 5 * 16 * 16 + 2 * 5 * 16 * 48 + 2 * 2 * 5 * 5 * 16 + 2 * 5 * 16 * 16
    vision += 2 * 2 * 5 * 16 * 32
    text = 2 * 2 * 3 * 16 * 16 + 2 * 3 * 16 * 48 + 2 * 2 * 3 * 3 * 16 + 2 * 3 * 16 * 16 + 2 * 2 * 3 * 16 * 32
    heads, cosines = 2 * (2 * 16 * 12 + 2 * 12 * 12), 2 * 6 * 6 * 12
    assert (vision, text, heads, cosines) == (29_120, 15_936, 1344, 864)
    assert sizes.structure_flops(tiny(), structure) == 3 * (6 * (vision + text + heads) + cosines)


def test_pairs_of_weight_zero_and_further_objectives(tiny, inputs):
    given = (inputs("text", 3), inputs("vision", 5), inputs("audio", 4))
    three = Structure("nce", 6, given)
    two = Structure("nce", 6, given, pair_weights=(("audio_text", 0.0),))
    both = Structure((("nce", 1.0), ("sigmoid_pairs", 0.5)), 6, given)
    pair, cosines = 6 * 1344 + 864, 864
    flops = {name: sizes.structure_flops(tiny(), s) for name, s in {"three": three, "two": two, "both": both}.items()}
    assert flops["three"] - flops["two"] == 3 * pair
    assert flops["both"] - flops["three"] == 3 * 3 * cosines


def test_one_head_a_modality_is_counted_once_and_leading_dimensions_each(tiny, inputs):
    given = (inputs("text", 3), inputs("vision", 5), inputs("audio", 4))
    structure = Structure("nce", 6, given)
    per_pair, one = (tiny(heads=heads) for heads in ("per_pair", "per_modality"))
    flops = {config: sizes.structure_flops(config, structure) for config in (per_pair, one)}
    assert flops[per_pair] - flops[one] == 3 * 3 * 6 * 672  # three heads fewer
    nested = tiny(heads="per_modality", matryoshka=(4, 8, 12))
    assert sizes.structure_flops(nested, structure) - flops[one] == 3 * 3 * (2 * 6 * 6 * (4 + 8))
    assert sizes.parameters(one)["per_token"] == sizes.parameters(per_pair)["per_token"]


def test_a_classification_step_counts_its_groups_and_classes_but_not_its_microbatches(tiny, inputs):
    # Six tokens and four experts: 2 slots an expert for one sample, 3 for two that share a group.
    one, two = (tiny(moe=MoEConfig(4, 1, group=g, group_size=12)) for g in ("sample", "tokens"))
    classified = {"classifier": "toy", "num_classes": 7, "classes": (0, 1)}
    structure = Structure("softmax", 8, (inputs("text", 6),), **classified)
    attention = 2 * 2 * 6 * 16 * 16 + 2 * 6 * 16 * 48 + 2 * 2 * 6 * 6 * 16 + 2 * 6 * 16 * 16
    sample, slot, classes = attention + 2 * 6 * 16 * 4, 2 * 2 * 16 * 32, 2 * 16 * 7
    assert sizes.structure_flops(one, structure) == 3 * 8 * (sample + 8 * slot + classes)
    assert sizes.structure_flops(two, structure) == 3 * 8 * (sample + 6 * slot + classes)
    in_parts = Structure("softmax", 8, (inputs("text", 6),), **classified, microbatches=2)
    assert sizes.structure_flops(two, in_parts) == sizes.structure_flops(two, structure)


def plain(**fields) -> ModelConfig:
    """Unrolled, nothing computed twice, wide enough that norms and activations are a hundredth of the whole."""
    shape = {"width": 256, "depth": 2, "num_heads": 4, "mlp_dim": 1024, "common_dim": 512, "vocab_size": 100}
    return ModelConfig(**shape, scan=False, remat="none", attention="xla", **fields)


def xla_flops(function, *shapes) -> float:
    with jax.default_device(jax.devices("cpu")[0]):  # on others products may be calls that XLA does not look into
        return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("moe", "modality", "num_tokens", "num_values"),
    [
        (None, "vision", 256, 768),
        (MoEConfig(4, 1, dispatch="index"), "vision", 256, 3072),
        (MoEConfig(4, 2, capacity_factor=2.0, dispatch="index"), "audio", 64, 256),
        (MoEConfig(4, 2, router="tokens_choose", dispatch="index"), "text", 128, 0),
    ],
)
def test_a_forward_pass_against_what_xla_counts(moe, modality, num_tokens, num_values):
    config = plain(moe=moe)
    imp = Imp(config, modalities=(modality,))
    axes = len(config.positions(modality))
    shape, dtype = ((2, num_tokens, num_values), jnp.float32) if num_values else ((2, num_tokens), jnp.int32)
    arrays = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((2, num_tokens, axes), jnp.int32)
    counted = xla_flops(lambda params, *given: imp.encode(params, modality, *given), imp.shapes(), *arrays)
    ours = 2 * sizes.sample_flops(config, modality, num_tokens, num_values=num_values)
    assert 1.0 < counted / ours < 1.02


def test_a_training_step_against_what_xla_counts():
    config = plain(moe=MoEConfig(4, 1, dispatch="index"), contrastive_chunk=64)
    given = (InputShape("audio", num_tokens=64, num_values=256, num_axes=2), InputShape("text", 64, 0, 1))
    structure = Structure("nce", 16, given)
    imp = Imp.for_structures(config, [structure])
    gradients = jax.grad(lambda params, batch: imp.loss(params, batch, structure)[0])
    counted = xla_flops(gradients, imp.shapes(), structure.batch_shapes())
    # XLA leaves the gradient of the spectrogram out.
    unneeded = 16 * 2 * 64 * 256 * 256
    assert 1.0 < counted / (sizes.structure_flops(config, structure) - unneeded) < 1.03


def test_tables_and_json_show_the_same(capsys):
    assert sizes.main(["imp-b", "imp-tiny-moe"]) == 0
    out = capsys.readouterr().out
    blocks = out.split("\n\n")
    assert [block.split("\n")[1].split()[:2] for block in blocks] == [
        ["imp-b", "84,954,624"],
        ["imp-b", "46.808"],
        ["imp-b", "140.425"],
        ["imp-tiny-moe", "1"],  # effective capacity, of sparse models alone
    ]
    assert all(len({len(line) for line in block.rstrip("\n").split("\n")}) == 1 for block in blocks)
    assert max(map(len, out.split("\n"))) <= 120
    assert sizes.main(["imp-b", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out).values()
    assert found["parameters"]["encoder"] == 84_954_624
    assert found["forward_flops"]["image 256"] == 46_808_432_640
    assert found["training_flops"]["image 256"] == 3 * 46_808_432_640


def test_unknown_names_are_one_line_and_exit_2():
    command = [sys.executable, "-m", "model.sizes", "imp-tiny", "imp-bb"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: unknown model variant 'imp-bb'; did you mean 'imp-b'? Known: imp-tiny, ")


@pytest.mark.parametrize(
    ("remat", "num_tokens", "batch"),
    [
        pytest.param("attention", 16, 64, marks=pytest.mark.slow),
        ("attention", 256, 8),
        pytest.param("none", 64, 8, marks=pytest.mark.slow),
    ],
)
def test_the_memory_of_a_step_before_it_is_compiled(remat, num_tokens, batch):
    """Against XLA's plan of the compiled step: arguments and temporaries."""
    config = from_variant("imp-tiny-moe", remat=remat, dtype="float32")
    inputs = (InputShape("vision", num_tokens, 768, 3), InputShape("text", 12, 0, 1))
    structure = Structure((("nce", 1.0),), batch, inputs)
    step = compile_step(Imp.for_structures(config, [structure]), structure, OptimizerConfig(1e-3, 1, 10))
    plan = step.executable.memory_analysis()
    estimate = sizes.structure_memory(config, structure)
    # Weights and moments are exact; the batch is what a step is given beside them.
    assert estimate["state"] + estimate["batch"] == pytest.approx(plan.argument_size_in_bytes, rel=1e-3)
    assert 0.65 < sum(estimate.values()) / (plan.argument_size_in_bytes + plan.temp_size_in_bytes) < 1.5
