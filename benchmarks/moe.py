"""A Mixture-of-Experts layer against a dense feed-forward of the same FLOPs. JSON on standard output.

    python -m benchmarks.moe [--quick]

Forward and backward, with gradients of weights and input, of 16 experts of imp-b at capacity 1, 16,384 tokens in
routing groups of 2,048: experts-choose by index (what trains), by the authors' one-hot einsum, and tokens-choose of one
expert by index. Aim for the first, over dense: 1.25 on CPUs, 1.15 on GPUs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import timing
from model.config import ModelConfig, from_variant
from model.encoder import FeedForward
from model.moe import MoEFeedForward, dispatch_form, group_samples

NUM_TOKENS = 256  # of a sample
SIZES = {
    "quick": {"width": 64, "mlp_dim": 256, "num_samples": 16, "group_size": 1024, "rounds": 2, "calls": 1},
    "cpu": {"width": 768, "mlp_dim": 3072, "num_samples": 64, "group_size": 2048, "rounds": 7, "calls": 1},
    "gpu": {"width": 768, "mlp_dim": 3072, "num_samples": 64, "group_size": 2048, "rounds": 11, "calls": 20},
}
LAYERS = {
    "experts choose, index": {"dispatch": "index"},
    "experts choose, einsum": {"dispatch": "einsum"},
    "tokens choose, index": {"dispatch": "index", "router": "tokens_choose", "num_selected": 1},
}


def make_config(sizes: dict, **moe) -> ModelConfig:
    moe = {"group": "tokens", "group_size": sizes["group_size"], "capacity_factor": 1.0} | moe
    width = {"width": sizes["width"], "num_heads": sizes["width"] // 64, "mlp_dim": sizes["mlp_dim"]}
    return from_variant("imp-b-moe", moe=moe, dtype=sizes["dtype"], **width)


def layer_side(layer: nnx.Module, x, cotangent, *, group: int) -> timing.Side:
    """Gradients of weights and input for a given gradient of the output."""
    graph, params = nnx.split(layer)

    def output(params, x) -> jax.Array:
        return nnx.merge(graph, params)(x, None, group_samples=group)[0]

    @jax.jit
    def gradients(params, x, cotangent) -> tuple:
        out, backward = jax.vjp(output, params, x)
        return out, backward(cotangent)

    compiled = gradients.lower(params, x, cotangent).compile()
    return timing.waiting(lambda: compiled(params, x, cotangent))


def main() -> None:
    args = timing.arguments(__doc__)
    sizes = timing.pick(SIZES, quick=args.quick)
    config = make_config(sizes)
    shape = (sizes["num_samples"], NUM_TOKENS, sizes["width"])
    x, cotangent = (jax.random.normal(jax.random.key(i), shape, jnp.dtype(sizes["dtype"])) for i in range(2))
    group = group_samples(config.moe, batch_size=sizes["num_samples"], num_tokens=NUM_TOKENS)
    sides = {"dense": layer_side(FeedForward(config, rngs=nnx.Rngs(0)), x, cotangent, group=group)}
    for name, moe in LAYERS.items():
        timing.say(f"compiling {name}")
        layer = MoEFeedForward(make_config(sizes, **moe), rngs=nnx.Rngs(0))
        sides[name] = layer_side(layer, x, cotangent, group=group)
    times = timing.in_turns(sides, rounds=sizes["rounds"], calls=sizes["calls"])
    seconds, over = times.seconds(), times.over("dense")
    # Two products forward, four backward.
    flops = 6 * 2 * sizes["num_samples"] * NUM_TOKENS * sizes["width"] * sizes["mlp_dim"]
    timing.show(
        {
            "machine": timing.machine(),
            "sizes": sizes | {"tokens": sizes["num_samples"] * NUM_TOKENS, "num_experts": config.moe.num_experts},
            "moe over dense": over["experts choose, index"],
            "aim": 1.25 if timing.on_cpu() else 1.15,
            "dispatch by default": dispatch_form(config.moe, sizes["group_size"]),
            "over dense": over,
            "over dense, processor time": times.cpu_over("dense"),
            "index over einsum": times.over("experts choose, einsum")["experts choose, index"],
            "ms": {name: 1000 * s for name, s in seconds.items()},
            "TFLOP/s of feed-forward products": {name: flops / s / 1e12 for name, s in seconds.items()},
        }
    )


if __name__ == "__main__":
    main()
