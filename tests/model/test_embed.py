"""From pixels, spectrogram patches and token ids to the width and back, with numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.embed import ModalityLayers, PatchProjection, PositionEmbedding


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def layers(config, modality: str, *, positions_off: bool = True) -> ModalityLayers:
    """Identity pre- and post-projections; position embeddings of zero unless asked for."""
    module = ModalityLayers(config, modality=modality, rngs=nnx.Rngs(0))
    for linear in (module.pre, module.post):
        linear.kernel[...] = jnp.asarray(np.eye(config.width, dtype=np.float32))
    if positions_off:
        module.position.norm.scale[...] = jnp.asarray(np.zeros(config.width, np.float32))
    return module


def zeros(batch: int, num_tokens: int, num_axes: int) -> np.ndarray:
    return np.zeros((batch, num_tokens, num_axes), np.int32)


def test_one_frame_equals_the_frame_tiled_over_time(tiny):
    graph, params = nnx.split(PatchProjection(tiny(), patch_values=48, rngs=nnx.Rngs(0)))
    params["linear"]["bias"][...] = jnp.asarray(normal(16, seed=1))
    image = normal(2, 3, 12, seed=2)
    still = np.tile(image, (1, 1, 4))  # four frames of 12 values, one after the other

    @jax.jit
    def value_and_gradient(params, patches):
        def loss(params):
            out = nnx.merge(graph, params)(patches)
            return jnp.sin(out).sum(), out

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, out), gradient = value_and_gradient(params, image)
    (_, tiled), tiled_gradient = value_and_gradient(params, still)
    kernel, bias = (np.asarray(params["linear"][name][...], np.float64) for name in ("kernel", "bias"))
    expected = still @ kernel + bias
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tiled, expected, rtol=1e-4, atol=1e-5)
    expected_gradient = np.einsum("bnp,bnd->pd", still, np.cos(expected))
    for found in (gradient, tiled_gradient):
        np.testing.assert_allclose(found["linear"]["kernel"][...], expected_gradient, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found["linear"]["bias"][...], np.cos(expected).sum((0, 1)), rtol=1e-4, atol=1e-4)


def test_sums_of_a_bfloat16_model_are_in_float32(tiny):
    """300 tokens of one id: a sum of ones in bfloat16 stops at 256. Pixels keep all of bfloat16's eight bits."""
    text = layers(tiny(dtype="bfloat16"), "text")
    graph, params = nnx.split(text)
    ids, places = jnp.zeros((1, 300), jnp.int32), jnp.asarray(zeros(1, 300, 1))
    gradient = jax.grad(lambda params: nnx.merge(graph, params).embed(ids, places).astype(jnp.float32).sum())(params)
    assert gradient["table"][...][0].tolist() == [300.0] * 16
    vision = layers(tiny(dtype="bfloat16"), "vision")
    seen, vision.patch = [], lambda x: seen.append(x) or jnp.zeros((*x.shape[:-1], 16), x.dtype)
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 256)
    vision.embed(jnp.asarray(pixels), jnp.asarray(zeros(1, 1, 3)))
    assert np.abs(np.asarray(seen[0], np.float64) - (pixels / 127.5 - 1)).max() <= 2**-9  # half of the last bit


def test_frames_of_a_tubelet_have_rows_of_their_own(tiny):
    patch = PatchProjection(tiny(), patch_values=8, rngs=nnx.Rngs(0))
    kernel = normal(8, 16, seed=1)
    patch.linear.kernel[...] = jnp.asarray(kernel)
    frames = np.zeros((1, 4, 8), np.float32)
    for t in range(4):
        frames[0, t, 2 * t : 2 * t + 2] = [1.0, 10.0]  # token t: only frame t is not black
    np.testing.assert_allclose(jax.jit(patch)(frames)[0], kernel[0::2] + 10 * kernel[1::2], rtol=1e-5, atol=1e-5)


def test_a_patch_that_does_not_fit_raises(tiny):
    patch = PatchProjection(tiny(), patch_values=48, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="patches of 10 values do not fit a kernel for 48 values"):
        patch(jnp.zeros((1, 2, 10)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pixels_map_to_minus_one_and_one(tiny, dtype):
    module = layers(tiny(vision_patch=(4, 1, 1), dtype=dtype), "vision")
    module.patch.linear.kernel[...] = jnp.asarray(np.full((12, 16), 0.125, np.float32))
    # Whole tubelets of one value, and the same as one frame: 12 * 0.125 = 1.5 times the pixel.
    pixels = np.array([0, 255, 51, 204], np.uint8)
    expected = 1.5 * np.array([-1.0, 1.0, -0.6, 0.6])
    embed = jax.jit(module.embed)
    tolerance = 1e-6 if dtype == "float32" else 1e-2
    for num_values in (12, 3):
        tubelets = np.broadcast_to(pixels[None, :, None], (1, 4, num_values))
        out = embed(np.ascontiguousarray(tubelets), zeros(1, 4, 3))
        assert out.dtype == jnp.dtype(dtype)
        np.testing.assert_allclose(
            np.asarray(out[0], np.float32), np.tile(expected[:, None], 16), rtol=tolerance, atol=tolerance
        )


def test_spectrograms_are_taken_as_they_are(tiny):
    module = layers(tiny(), "audio")
    patches = 7 * normal(2, 3, 4, seed=1)
    expected = patches @ np.asarray(module.patch.linear.kernel[...], np.float64)
    np.testing.assert_allclose(jax.jit(module.embed)(patches, zeros(2, 3, 2)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("buckets", [(4, 3, 2), (8, 4), (32,)])
def test_positions_are_summed_over_axes_then_normalised(tiny, buckets):
    embedding = PositionEmbedding(tiny(), buckets=buckets, rngs=nnx.Rngs(0))
    tables = [normal(size, 16, seed=axis) for axis, size in enumerate(buckets)]
    for axis, table in enumerate(tables):
        assert embedding.tables[f"axis_{axis}"].shape == (buckets[axis], 16)
        embedding.tables[f"axis_{axis}"][...] = jnp.asarray(table)
    scale, bias = normal(16, seed=8), normal(16, seed=9)
    embedding.norm.scale[...], embedding.norm.bias[...] = jnp.asarray(scale), jnp.asarray(bias)

    rng = np.random.default_rng(1)
    positions = np.stack([rng.integers(0, size, (2, 5)) for size in buckets], axis=-1).astype(np.int32)
    expected = np.zeros((2, 5, 16))
    for b, n in np.ndindex(2, 5):
        row = sum(tables[axis][positions[b, n, axis]].astype(np.float64) for axis in range(len(buckets)))
        expected[b, n] = (row - row.mean()) / np.sqrt(row.var() + 1e-6) * scale + bias
    np.testing.assert_allclose(embedding(jnp.asarray(positions)), expected, rtol=1e-4, atol=1e-4)


def test_text_tokens_start_at_their_scale(tiny):
    table = ModalityLayers(tiny(text_embedding_std=0.25), modality="text", rngs=nnx.Rngs(0)).table
    np.testing.assert_allclose(np.std(table[...]), 0.25, rtol=0.1)  # 640 values


def test_positions_start_at_their_scale(tiny):
    embedding = PositionEmbedding(tiny(position_scale=0.25), buckets=(8, 4), rngs=nnx.Rngs(0))
    rows = np.asarray(embedding(jnp.asarray([[[0, 0], [7, 3], [2, 1]]], jnp.int32)))
    # A LayerNorm's output has a variance of 1 - epsilon / variance before its scale; tables start at 0.02.
    np.testing.assert_allclose(rows.std(-1), 0.25, rtol=0.01)


def test_text_is_looked_up_placed_and_projected(tiny):
    module = ModalityLayers(tiny(), modality="text", rngs=nnx.Rngs(0))
    ids, positions = np.array([[3, 39, 0, 3]], np.int32), np.array([[[0], [1], [2], [31]]], np.int32)
    table, places, kernel = (
        np.asarray(p[...], np.float64) for p in (module.table, module.position.tables["axis_0"], module.pre.kernel)
    )
    bias = normal(16, seed=1)
    module.pre.bias[...] = jnp.asarray(bias)
    rows = places[[0, 1, 2, 31]]
    rows = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-6)
    expected = (table[[3, 39, 0, 3]] + rows) @ kernel + bias
    np.testing.assert_allclose(jax.jit(module.embed)(ids, positions)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def pool(tiny):
    module = layers(tiny(width=2, num_heads=1, head_dim=2), "audio")
    module.post.kernel[...] = jnp.asarray(np.array([[1.0, 0.0], [0.0, 10.0]], np.float32))
    module.post.bias[...] = jnp.asarray(np.array([0.0, 1.0], np.float32))
    return jax.jit(module.pool)


TOKENS = np.array([[[1, 1], [2, 2], [6, 9]], [[4, 0], [1, 5], [1, 1]], [[8, 8], [8, 8], [8, 8]]], np.float32)


def test_pool_is_the_mean_of_the_projected_tokens(pool):
    np.testing.assert_allclose(pool(TOKENS, None), [[3, 41], [2, 21], [8, 81]], rtol=1e-6)


def test_pool_leaves_padding_out(pool):
    real = np.array([[True, True, False], [False, False, True], [False, False, False]])
    # The bias counts once a real token; a sample without any is zero, not a division by zero.
    np.testing.assert_allclose(pool(TOKENS, real), [[1.5, 16], [1, 11], [0, 0]], rtol=1e-6)


def test_pool_is_float32_in_a_bfloat16_model(tiny):
    module = layers(tiny(dtype="bfloat16"), "text")
    x = np.full((1, 512, 16), 1.0, jnp.bfloat16)
    x[0, 0] = 3.0  # a bfloat16 mean would round 1 + 2 / 512 to 1
    pooled = module.pool(jnp.asarray(x), None)
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled[0], 514 / 512, rtol=1e-6)
