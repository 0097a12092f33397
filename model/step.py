"""One training step of one task structure: a jitted function that takes, donates and returns only its task's groups.

State: {group: {"params", "mu", "nu", "count"}}, plain nested dicts. The learning rate is a function of the global
step and an argument of the compiled step, so that another schedule needs no other graph; only Adam's bias correction
uses the group's own count of updates.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from model.imp import Imp, Structure


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam without weight decay, warmup then cosine (paper section 4.1; b2, eps and clipping as in the release).

    patch_scale: factor on the learning rate of the patch projections. Their inputs are thousands of correlated values
      far from zero, so that Adam's equal steps on every weight add up; at high rates that drowns all samples in one
      common output (Chen et al. 2021, arXiv 2104.02057, freeze the layer for the same reason).
    """

    peak_learning_rate: float
    warmup_steps: int
    num_steps: int
    end_learning_rate: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-7
    clip_norm: float = 1.0
    patch_scale: float = 1.0

    def schedule(self) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=self.peak_learning_rate,
            warmup_steps=self.warmup_steps,
            decay_steps=max(self.num_steps, self.warmup_steps + 1),
            end_value=self.end_learning_rate,
        )

    def learning_rates(self) -> np.ndarray:
        """The schedule at every step of the run, (num_steps,) float32."""
        return np.asarray(self.schedule()(jnp.arange(self.num_steps)), np.float32)


def init_state(params: dict) -> dict:
    """Group → parameters with zero moments and a zero count."""
    return {name: {"params": p, **_zero_moments(p)} for name, p in params.items()}


def _zero_moments(params: dict) -> dict:
    zeros = jax.tree.map(jnp.zeros_like, params)
    return {"mu": zeros, "nu": jax.tree.map(jnp.zeros_like, params), "count": jnp.zeros((), jnp.int32)}


def state_shapes(imp: Imp) -> dict:
    """The state as jax.ShapeDtypeStruct leaves."""
    return jax.eval_shape(init_state, imp.shapes())


def make_step(imp: Imp, structure: Structure, optimizer: OptimizerConfig):
    """The function (state of the structure's groups, batch, learning rate) → (new state, metrics), not yet jitted.

    learning_rate: float32 scalar. metrics: loss, grad_norm (before clipping), learning_rate, finite,
    temperatures, moe. An update with a non-finite loss or gradient leaves the state as it was, and ``finite`` is False.
    """

    def step_fn(state: dict, batch: dict, learning_rate):
        params = {name: group["params"] for name, group in state.items()}
        (loss, metrics), grads = jax.value_and_grad(imp.loss, has_aux=True)(params, batch, structure)
        # Without the barrier XLA's CPU compiler (jaxlib 0.10.2) reads gradient buffers for the norm when they are
        # already reused: the norm then differs from run to run (tests/model/test_step.py).
        grads = jax.lax.optimization_barrier(grads)
        grad_norm = optax.global_norm(grads)
        scale = jnp.minimum(1.0, optimizer.clip_norm / jnp.maximum(grad_norm, 1e-12))
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new = {}
        for name, group in state.items():
            scaled = jax.tree.map(lambda g: g * scale, grads[name])
            updated = _adam(group, scaled, learning_rate=learning_rate, optimizer=optimizer)
            new[name] = jax.tree.map(lambda a, b: jnp.where(finite, a, b), updated, group)
        scalars = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate, "finite": finite}
        return new, metrics | scalars

    return step_fn


def _adam(group: dict, grads: dict, *, learning_rate, optimizer: OptimizerConfig) -> dict:
    transform = optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps)
    moments = optax.ScaleByAdamState(count=group["count"], mu=group["mu"], nu=group["nu"])
    updates, moments = transform.update(grads, moments)
    if "patch" in updates:
        updates["patch"] = jax.tree.map(lambda u: u * optimizer.patch_scale, updates["patch"])
    params = jax.tree.map(lambda p, u: p - learning_rate * u, group["params"], updates)
    return {"params": params, "mu": moments.mu, "nu": moments.nu, "count": moments.count}


def compile_step(imp: Imp, structure: Structure, optimizer: OptimizerConfig, *, shardings=None):
    """The compiled step of a structure for the given shardings, ahead of its first use.

    shardings: (state sharding, batch sharding, scalar sharding) as in ``sharding.step_shardings``; None: one device.
    """
    shapes = {name: state_shapes(imp)[name] for name in structure.groups}
    learning_rate = jax.ShapeDtypeStruct((), jnp.float32)
    kwargs = {}
    if shardings is not None:
        state_sharding, batch_sharding, scalar_sharding = shardings
        kwargs["in_shardings"] = (state_sharding, batch_sharding, scalar_sharding)
        kwargs["out_shardings"] = (state_sharding, scalar_sharding)
    jitted = jax.jit(make_step(imp, structure, optimizer), donate_argnums=0, **kwargs)
    # Matrix products come from a library on CPUs: LLVM's higher levels cost a quarter more compile time there and
    # give no faster steps (benchmarks/cpu_step.py).
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else {}
    return jitted.lower(shapes, structure.batch_shapes(), learning_rate).compile(compiler_options=options)
