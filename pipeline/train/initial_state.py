"""The state a run starts with: its newest checkpoint, another run's parameters, or fresh values."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from model import sharding
from model.imp import Imp
from model.step import init_state, state_shapes
from pipeline.data.spec import DataSetSpec
from pipeline.errors import RequestError
from pipeline.store.path import run_path
from pipeline.train.checkpoint import Checkpoints, parameter_shapes
from pipeline.train.devices import host_device
from pipeline.train.init_source import InitSource, open_source
from pipeline.train.spec import RunSpec


def start_state(imp: Imp, spec: RunSpec, checkpoints: Checkpoints, step: int, *, mesh: Mesh) -> tuple[dict, list[str]]:
    """(state on the devices, lines on what was and was not loaded). step: that of a checkpoint, or 0.

    A resume takes all that the checkpoint has of a group, its moments and count too, and starts the groups that it
    lacks anew: those of tasks that came with a change of the mixture. Raises RequestError if the checkpoint is of
    another model.
    """
    freeze = spec.optimizer.freeze
    shapes = state_shapes(imp, freeze)
    shardings = sharding.state_shardings(shapes, mesh, fsdp=spec.placement.fsdp)
    if step:
        return _resumed(imp, spec, checkpoints, step, shapes=shapes, shardings=shardings)
    params, lines = _fresh(imp, spec.mixture.seed), []
    source = spec.checkpoints
    if source.init_from:
        taken_from = open_source(run_path(source.init_from, option="init.from"), source.init_step)
        params, lines = _taken_over(params, taken_from, classes=_classes(spec.data.data_sets))
    return sharding.put_state(_on_host(init_state, params, freeze), shardings), lines


def _fresh(imp: Imp, seed: int) -> dict:
    # On the host: the devices may only hold the state in parts.
    return _on_host(imp.init, seed)


def _on_host(function: Callable[..., dict], *args) -> dict:
    with jax.default_device(host_device()):
        return function(*args)


def _resumed(
    imp: Imp, spec: RunSpec, checkpoints: Checkpoints, step: int, *, shapes: dict, shardings: dict
) -> tuple[dict, list[str]]:
    stored, wanted = checkpoints.data(step)["groups"], parameter_shapes(shapes)
    for group in wanted.keys() & stored.keys():
        if wanted[group] != stored[group]:
            raise RequestError(
                f"checkpoint {step} holds {group} in other shapes than this recipe's model; use another --run-dir"
            )
    old = [group for group in shapes if group in stored]
    new = [group for group in shapes if group not in stored]
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        {group: shapes[group] for group in old},
        {group: shardings[group] for group in old},
    )
    state, lines = checkpoints.state(abstract, step=step), []
    if new:
        params = _fresh(imp, spec.mixture.seed)
        fresh = _on_host(init_state, {group: params[group] for group in new}, spec.optimizer.freeze)
        state |= sharding.put_state(fresh, {group: shardings[group] for group in new})
        lines.append(f"new, with fresh values: {', '.join(new)}")
    gone = sorted(stored.keys() - shapes.keys())
    if gone:
        lines.append(f"no longer used by any task; kept only in checkpoint {step}: {', '.join(gone)}")
    return {group: state[group] for group in shapes}, lines


def _classes(data_sets: dict[str, DataSetSpec]) -> dict[str, list[str]]:
    return {f"classifier_{name}": list(d.classes) for name, d in data_sets.items()}


def _taken_over(params: dict, source: InitSource, *, classes: dict[str, list[str]]) -> tuple[dict, list[str]]:
    """(parameters of a source where they have the same path and shape, lines on them); moments start anew."""
    wanted = parameter_shapes({g: {"params": p} for g, p in params.items()})
    lines: list[str] = []
    take: dict[str, set[str]] = {}
    for group in params:
        same, why_fresh = _same_parameters(group, source, wanted[group], classes=classes)
        if same:
            take[group] = same
            fresh = f"; fresh: {why_fresh}" if why_fresh else ""
            lines.append(f"{group}: {len(same)} of {len(wanted[group])} arrays{fresh}")
        else:
            lines.append(f"{group}: fresh, {why_fresh}")
    if unused := sorted(source.shapes.keys() - params.keys()):
        lines.append(f"not used: {', '.join(unused)}")
    if not take:
        raise RequestError(f"init.from {source.name}: none of its parameters fits this model; {'; '.join(lines)}")
    loaded = source.arrays(params, take)
    params = {
        group: jax.tree.map_with_path(lambda path, x, g=group: loaded.get((g, jax.tree_util.keystr(path)), x), tree)
        for group, tree in params.items()
    }
    return params, [f"parameters from {source.name}, step {source.step}:", *(f"  {line}" for line in lines)]


def _same_parameters(
    group: str, source: InitSource, wanted: dict[str, list[int]], *, classes: dict[str, list[str]]
) -> tuple[set[str], str]:
    """(paths of the parameters of a group that a source has in the same shape, why the others start anew)."""
    if group not in source.shapes:
        return set(), "not in the checkpoint"
    if group in classes and classes[group] != source.classes.get(group.removeprefix("classifier_")):
        return set(), "another list of classes"
    stored = source.shapes[group]
    same = {path for path, shape in wanted.items() if stored.get(path) == shape}
    other = sorted(wanted.keys() - same)
    more = " and more" if len(other) > 3 else ""
    return same, f"{', '.join(other[:3])}{more} of another shape" if other else ""
