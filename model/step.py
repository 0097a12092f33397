"""One training step of one task structure: a jitted function that takes, donates and returns only its task's groups.

State: {group: {"params", "mu", "nu", "count"}}, plain nested dicts; a frozen group has "params" alone. The learning
rate is a function of the global step and an argument of the compiled step, so that another schedule needs no other
graph; only Adam's bias correction uses the group's own count of updates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from model import sharding
from model.config import ModelConfig, OptimizerConfig
from model.groups import named
from model.imp import Imp
from model.sizes import structure_memory
from model.structure import Structure


def rate_schedule(optimizer: OptimizerConfig) -> optax.Schedule:
    """The learning rate as a function of the step."""
    main = optax.warmup_cosine_decay_schedule(
        init_value=optimizer.initial_learning_rate,
        peak_value=optimizer.peak_learning_rate,
        warmup_steps=optimizer.warmup_steps,
        decay_steps=max(optimizer.num_steps - optimizer.pre_warmup_steps, optimizer.warmup_steps + 1),
        end_value=optimizer.end_learning_rate,
    )
    if not optimizer.pre_warmup_steps:
        return main
    before = optax.linear_schedule(
        optimizer.pre_warmup_learning_rate,
        optimizer.initial_learning_rate,
        transition_steps=optimizer.pre_warmup_steps,
    )
    return optax.join_schedules([before, main], boundaries=[optimizer.pre_warmup_steps])


def learning_rates(optimizer: OptimizerConfig) -> np.ndarray:
    """The schedule at every step of the run, (num_steps,) float32."""
    return np.asarray(rate_schedule(optimizer)(jnp.arange(optimizer.num_steps)), np.float32)


def init_state(params: dict, freeze: Sequence[str] = ()) -> dict:
    """Group → parameters with zero moments and a zero count; those that ``freeze`` names have parameters alone."""
    return {name: {"params": p, **({} if named(name, freeze) else _zero_moments(p))} for name, p in params.items()}


def _zero_moments(params: dict) -> dict:
    zeros = jax.tree.map(jnp.zeros_like, params)
    return {"mu": zeros, "nu": jax.tree.map(jnp.zeros_like, params), "count": jnp.zeros((), jnp.int32)}


def state_shapes(imp: Imp, freeze: Sequence[str] = ()) -> dict:
    """The state as jax.ShapeDtypeStruct leaves."""
    return jax.eval_shape(lambda params: init_state(params, freeze), imp.shapes())


def step_groups(imp: Imp, structure: Structure, optimizer: OptimizerConfig) -> tuple[str, ...]:
    """The groups that a step takes and returns."""
    return imp.groups if optimizer.dense_update else structure.groups(imp.config)


def make_step(imp: Imp, structure: Structure, optimizer: OptimizerConfig) -> Callable[..., tuple[dict, dict]]:
    """The function (state of the step's groups, batch, learning rate) → (new state, metrics), not yet jitted.

    learning_rate: float32 scalar. metrics: loss, grad_norm (before clipping), learning_rate, finite,
    temperatures, moe, losses. An update with a non-finite loss or gradient leaves the state as it was, and ``finite``
    is False.
    """

    def loss_and_gradients(params: dict, batch: dict) -> tuple[tuple[jax.Array, dict], dict]:
        """Of the groups that are trained: what frozen ones alone need is never computed."""
        frozen = {name: p for name, p in params.items() if named(name, optimizer.freeze)}
        trained = {name: p for name, p in params.items() if name not in frozen}

        def loss(trained: dict, batch: dict) -> tuple[jax.Array, dict]:
            return imp.loss(trained | frozen, batch, structure)

        return jax.value_and_grad(loss, has_aux=True)(trained, batch)

    def step_fn(state: dict, batch: dict, learning_rate: Any) -> tuple[dict, dict]:
        params = {name: group["params"] for name, group in state.items()}
        (loss, metrics), grads = _over_microbatches(loss_and_gradients, params, batch, imp=imp, structure=structure)
        if sharding.platform() != "gpu":
            # Without the barrier XLA's CPU compiler (jaxlib 0.10.2) reads gradient buffers for the norm when they are
            # already reused: the norm then differs from run to run (tests/model/test_step.py). On GPUs the gradients of
            # stacked layers then need not be put together before they are used.
            grads = jax.lax.optimization_barrier(grads)
        with jax.named_scope("optimizer"):
            grad_norm = optax.global_norm(grads)
            scale = jnp.minimum(1.0, optimizer.clip_norm / jnp.maximum(grad_norm, 1e-12))
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            new = {}
            for name, group in state.items():
                if name not in grads:
                    new[name] = group
                    continue
                scaled = jax.tree.map(lambda g: g * scale, grads[name])
                rate = _group_rate(name, learning_rate, optimizer)
                updated = _adam(group, scaled, learning_rate=rate, optimizer=optimizer)
                if "tau" in updated["params"]:
                    # A temperature below its floor would have no gradient, and stay there.
                    updated["params"]["tau"] = jnp.maximum(updated["params"]["tau"], imp.config.temperature_floor)
                new[name] = jax.tree.map(lambda a, b: jnp.where(finite, a, b), updated, group)
        scalars = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate, "finite": finite}
        return new, metrics | scalars

    return step_fn


def _over_microbatches(
    loss_and_gradients: Callable, params: dict, batch: dict, *, imp: Imp, structure: Structure
) -> tuple[tuple[jax.Array, dict], dict]:
    """((loss, metrics), gradients) of the whole batch, as means over its microbatches.

    A microbatch takes every M-th routing group, so that each device keeps its own rows and no group is cut.
    """
    parts = structure.microbatches
    if parts == 1:
        return loss_and_gradients(params, batch)
    (group,) = set(structure.group_samples(imp.config).values()) or {1}

    def cut(x: jax.Array) -> jax.Array:
        rest = x.shape[1:]
        x = x.reshape(-1, parts, group, *rest)
        return jnp.swapaxes(x, 0, 1).reshape(parts, -1, *rest)

    def body(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, loss_and_gradients(params, part)), None

    microbatches = jax.tree.map(cut, batch)
    like = jax.eval_shape(loss_and_gradients, params, jax.tree.map(lambda x: x[0], microbatches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    total, _ = jax.lax.scan(body, zeros, microbatches)
    return jax.tree.map(lambda x: x / parts, total)


def _group_rate(group: str, learning_rate: Any, optimizer: OptimizerConfig) -> Any:
    scales = dict(optimizer.learning_rate_scales)
    name = named(group, scales)
    return learning_rate if name is None else learning_rate * scales[name]


def _adam(group: dict, grads: dict, *, learning_rate, optimizer: OptimizerConfig) -> dict:
    transform = optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps)
    moments = optax.ScaleByAdamState(count=group["count"], mu=group["mu"], nu=group["nu"])
    updates, moments = transform.update(grads, moments)
    if optimizer.weight_decay:
        updates = jax.tree.map_with_path(functools.partial(_decayed, optimizer.weight_decay), updates, group["params"])
    if "patch" in updates:
        updates["patch"] = jax.tree.map(lambda u: u * optimizer.patch_scale, updates["patch"])
    params = jax.tree.map(lambda p, u: p - learning_rate * u, group["params"], updates)
    return {"params": params, "mu": moments.mu, "nu": moments.nu, "count": moments.count}


def _decayed(weight_decay: float, path: Any, update: Any, param: Any) -> Any:
    """The update with weight decay, for the matrices of layers and experts; biases, scales and tables have none."""
    names = sharding.path_keys(path)
    return update + weight_decay * param if names[-1] == "kernel" or "experts" in names else update


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled step. executable: what jax compiled, with its memory_analysis() and cost_analysis()."""

    executable: jax.stages.Compiled
    groups: tuple[str, ...]

    def __call__(self, state: dict, batch: dict, learning_rate) -> dict:
        """Updates its groups of ``state`` in place, whose old arrays are gone, and returns the metrics."""
        new, metrics = self.executable({name: state[name] for name in self.groups}, batch, learning_rate)
        state.update(new)
        return metrics


# Matrix products come from a library on CPUs: LLVM's higher levels cost a quarter more compile time there and give no
# faster steps (benchmarks/cpu_step.py).
_CPU_OPTIONS = {"xla_backend_optimization_level": 1}
# Excludes kernels whose results depend on the order of their threads, such as adding by index, and autotuning, whose
# choice may differ from run to run.
_DETERMINISTIC = {"xla_gpu_deterministic_ops": True}


# Maximum estimated need of a step, as a share of a device's memory. The estimate misses little (benchmarks/gpu.py), but
# prefetched batches and fragmentation need room too.
USABLE = 0.8


def _settled(
    imp: Imp, structure: Structure, devices: list, *, fsdp: bool, deterministic: bool, freeze: Sequence[str]
) -> Imp:
    """The model with its "auto" settings resolved for GPUs.

    Of the remat policies whose step fits into memory it gets the one that recomputes least, and plain attention if
    steps must be deterministic.
    """
    if devices[0].platform != "gpu":
        return imp
    config = imp.config
    if deterministic and config.attention == "auto":
        # Steps with cuDNN's kernel do not run that way in jax 0.11.2: they end with "IndexError: raw_hash_map::at".
        config = dataclasses.replace(config, attention="xla")
    # A process can ask its own devices alone. All must come to the same program, so a run's devices are of one kind.
    own = next((d for d in devices if d.process_index == jax.process_index()), None)
    limit = None if own is None else (own.memory_stats() or {}).get("bytes_limit")
    if config.remat == "auto" and limit is not None:
        fixed = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state_shapes(imp, freeze)))
        fixed //= len(devices) if fsdp else 1
        room = USABLE * limit - fixed
        fused = config.attention != "xla" and config.dtype == "bfloat16"

        def fits(config: ModelConfig) -> bool:
            memory = structure_memory(config, structure, fused=fused, freeze=freeze)
            return memory["gradients"] + (memory["activations"] + memory["batch"]) // len(devices) < room

        config = least_recomputed(config, fits)
    return imp if config == imp.config else imp.with_config(config)


def least_recomputed(config: ModelConfig, fits: Callable[[ModelConfig], bool]) -> ModelConfig:
    """The config with the policy that recomputes least of those with which it fits; "full" if none does."""
    policies = [dataclasses.replace(config, remat=remat) for remat in ("none", "products", "attention", "full")]
    return next(filter(fits, policies), policies[-1])


def compile_step(
    imp: Imp,
    structure: Structure,
    optimizer: OptimizerConfig,
    *,
    mesh: Mesh | None = None,
    fsdp: bool = False,
    deterministic: bool = False,
) -> CompiledStep:
    """The compiled step of a structure, ahead of its first use.

    mesh: the devices that share it, as ``sharding`` lays arrays over them; None: one device. fsdp: see
    ``sharding.state_shardings``. deterministic: on GPUs, the same bits in every run; on CPUs they always are.
    "auto" values of ``remat`` and ``attention`` are resolved here, for this structure and these devices.
    Raises ValueError if the devices cannot share the batch (``sharding.check_batch``).
    """
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    freeze = optimizer.freeze
    imp = _settled(imp, structure, devices, fsdp=fsdp, deterministic=deterministic, freeze=freeze)
    groups = step_groups(imp, structure, optimizer)
    shapes = {name: state for name, state in state_shapes(imp, freeze).items() if name in groups}
    kwargs = {}
    if mesh is not None:
        sharding.check_batch(structure, structure.group_samples(imp.config), mesh)
        of_state, everywhere = sharding.state_shardings(shapes, mesh, fsdp=fsdp), sharding.replicated(mesh)
        kwargs["in_shardings"] = (of_state, sharding.over_batch(mesh), everywhere)
        kwargs["out_shardings"] = (of_state, everywhere)
    jitted = jax.jit(make_step(imp, structure, optimizer), donate_argnums=0, **kwargs)
    options = {"cpu": _CPU_OPTIONS, "gpu": _DETERMINISTIC if deterministic else {}}.get(devices[0].platform, {})
    # The user's XLA_FLAGS take precedence; options passed here would override them.
    options = {name: value for name, value in options.items() if name not in os.environ.get("XLA_FLAGS", "")}
    learning_rate = jax.ShapeDtypeStruct((), jnp.float32)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        lowered = jitted.lower(shapes, structure.batch_shapes(), learning_rate)
        return CompiledStep(lowered.compile(compiler_options=options), groups)
