"""The IMP model as named parameter groups, and the forward pass and loss of one task structure.

Groups: ``encoder``; ``embed_<modality>``; ``pair_<a>_<b>`` (both heads and the temperature of a modality pair, names in
alphabetical order); ``classifier_<data set>``. A task touches only its own groups, so a new task changes no other
task's graph. Parameters are plain nested dicts of float32 arrays; NNX modules are only their definition.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from model import objectives
from model.config import MODALITIES, ModelConfig
from model.embed import ModalityLayers
from model.encoder import Encoder
from model.heads import Classifier, Pair
from model.moe import group_samples


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Shapes of one modality in a global batch. num_values: values of a patch; 0 for token ids."""

    modality: str
    num_tokens: int
    num_values: int
    num_axes: int


@dataclasses.dataclass(frozen=True)
class Structure:
    """Everything that decides the compiled graph of a (task, variant): one structure, one compile.

    classifier: the data set whose classifier the task uses. classes: columns of that classifier the loss looks at.
    """

    objective: str
    global_batch_size: int
    inputs: tuple[Inputs, ...]
    classifier: str | None = None
    num_classes: int = 0
    classes: tuple[int, ...] = ()

    def __post_init__(self):
        if self.objective not in objectives.OBJECTIVES:
            raise ValueError(f"unknown objective {self.objective!r}; known: {', '.join(objectives.OBJECTIVES)}")
        unknown = {i.modality for i in self.inputs} - set(MODALITIES)
        if unknown:
            raise ValueError(f"unknown modalities {sorted(unknown)}; known: {', '.join(MODALITIES)}")
        names = [i.modality for i in self.inputs]
        if len(set(names)) != len(names):
            raise ValueError(f"expected each modality once, found {names}")
        if self.objective == "nce" and len(names) < 2:
            raise ValueError(f"nce needs two modalities or more, found {names}")
        if self.objective != "nce" and (len(self.inputs) != 1 or not self.classifier):
            raise ValueError(f"{self.objective} needs one modality and a classifier")
        wrong = [c for c in self.classes if not 0 <= c < self.num_classes]
        if self.objective != "nce" and (wrong or not self.classes):
            raise ValueError(f"expected class columns from 0 to {self.num_classes - 1}, found {wrong or 'none'}")

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        names = sorted(i.modality for i in self.inputs)
        return tuple(itertools.combinations(names, 2)) if self.objective == "nce" else ()

    @property
    def groups(self) -> tuple[str, ...]:
        """The parameter groups that enter the graph."""
        heads = [pair_group(*pair) for pair in self.pairs] or [f"classifier_{self.classifier}"]
        return ("encoder", *(f"embed_{i.modality}" for i in self.inputs), *heads)

    def batch_shapes(self) -> dict:
        """The global batch as jax.ShapeDtypeStruct leaves, in the form ``Imp.loss`` takes."""
        size = self.global_batch_size
        array = jax.ShapeDtypeStruct
        batch = {}
        for i in self.inputs:
            positions = array((size, i.num_tokens, i.num_axes), jnp.int32)
            if i.modality == "text":
                tokens, mask = (array((size, i.num_tokens), t) for t in (jnp.int32, jnp.bool_))
                batch["text"] = {"tokens": tokens, "positions": positions, "mask": mask}
                continue
            dtype = jnp.uint8 if i.modality == "vision" else jnp.float32
            batch[i.modality] = {"tokens": array((size, i.num_tokens, i.num_values), dtype), "positions": positions}
        if self.objective == "nce":
            batch["positive_ids"] = array((size,), jnp.int32)
        else:
            batch["labels"] = array((size, self.num_classes), jnp.uint8)
        return batch


def pair_group(first: str, second: str) -> str:
    """Name of the group of an unordered modality pair."""
    return "pair_" + "_".join(sorted((first, second)))


class Imp:
    """Definitions of all parameter groups of a run. Holds no parameters.

    classifiers: data set → number of classes. pairs: the modality pairs that have heads.
    """

    def __init__(
        self, config: ModelConfig, *, modalities: tuple[str, ...], pairs: tuple[tuple[str, str], ...], classifiers: dict
    ):
        self.config = config
        self._build = {"encoder": lambda rngs: Encoder(config, rngs=rngs)}
        for m in modalities:
            self._build[f"embed_{m}"] = lambda rngs, m=m: ModalityLayers(config, modality=m, rngs=rngs)
        for p in pairs:
            p = tuple(sorted(p))
            self._build[pair_group(*p)] = lambda rngs, p=p: Pair(config, modalities=p, rngs=rngs)
        for name, num in classifiers.items():
            self._build[f"classifier_{name}"] = lambda rngs, n=num: Classifier(config, num_classes=n, rngs=rngs)
        self._graphs, self._shapes = {}, {}
        for name, build in self._build.items():
            self._graphs[name], abstract = nnx.split(nnx.eval_shape(lambda build=build: build(nnx.Rngs(0))))
            self._shapes[name] = nnx.to_pure_dict(abstract)

    @classmethod
    def for_structures(cls, config: ModelConfig, structures: list[Structure]) -> Imp:
        """The groups that a list of structures needs, in a fixed order."""
        modalities = {i.modality for s in structures for i in s.inputs}
        pairs = {p for s in structures for p in s.pairs}
        classifiers = {s.classifier: s.num_classes for s in structures if s.classifier}
        return cls(
            config,
            modalities=tuple(sorted(modalities)),
            pairs=tuple(sorted(pairs)),
            classifiers=dict(sorted(classifiers.items())),
        )

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(self._build)

    def shapes(self) -> dict:
        """Group → parameters as jax.ShapeDtypeStruct leaves."""
        return self._shapes

    def init(self, seed: int) -> dict:
        """Group → parameters. Each group has a key of its own (seed, name): a new group changes no other.

        seed: a concrete integer; values are drawn by numpy, so this cannot be traced.
        """
        return {name: self._init_group(name, seed) for name in self._build}

    def _init_group(self, name: str, seed: int) -> dict:
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        return nnx.to_pure_dict(nnx.state(self._build[name](nnx.Rngs(key))))

    def module(self, params: dict, group: str) -> nnx.Module:
        """The module of a group over its parameters."""
        if group not in self._graphs:
            raise ValueError(f"unknown parameter group {group!r}; known: {', '.join(self._graphs)}")
        return nnx.merge(self._graphs[group], nnx.State(params[group]))

    def encode(self, params: dict, modality: str, tokens, positions, mask=None, *, group_samples: int = 1):
        """Pooled features (B, D) float32 of one modality, and the routing statistics of its pass.

        tokens, positions, mask: as ``ModalityLayers.embed`` takes them; mask True = a real token.
        """
        layers = self.module(params, f"embed_{modality}")
        x = layers.embed(tokens, positions)
        x, statistics = self.module(params, "encoder")(x, mask, group_samples=group_samples)
        return layers.pool(x, mask), statistics

    def project(self, params: dict, features, *, source: str, target: str):
        """``source`` features (B, K) in the space it shares with ``target``, before they are taken to unit length."""
        return self.module(params, pair_group(source, target)).project(features, source)

    def loss(self, params: dict, batch: dict, structure: Structure):
        """The loss of one batch and its metrics (a dict of small arrays): mean over the pairs for nce."""
        features, metrics = {}, {"moe": {}, "temperatures": {}}
        for i in structure.inputs:
            arrays = batch[i.modality]
            group = self._group_samples(structure, i)
            features[i.modality], statistics = self.encode(
                params, i.modality, arrays["tokens"], arrays["positions"], arrays.get("mask"), group_samples=group
            )
            if statistics:
                metrics["moe"][i.modality] = jax.tree.map(lambda s: s.mean(0), statistics)
        if structure.objective == "nce":
            loss, metrics["temperatures"] = self._nce(params, features, batch["positive_ids"], structure)
            return loss, metrics
        (pooled,) = features.values()
        logits = self.module(params, f"classifier_{structure.classifier}")(pooled)
        columns = jnp.asarray(structure.classes)
        labels = batch["labels"].astype(jnp.float32)
        return objectives.CLASSIFICATION[structure.objective](logits[:, columns], labels[:, columns]), metrics

    def _nce(self, params: dict, features: dict, positive_ids, structure: Structure):
        losses, temperatures = [], {}
        for a, b in structure.pairs:
            pair = self.module(params, pair_group(a, b))
            temperatures[f"{a}_{b}"] = pair.temperature
            losses.append(
                objectives.nce(
                    pair.project(features[a], a),
                    pair.project(features[b], b),
                    temperature=pair.temperature,
                    positive_ids=positive_ids,
                )
            )
        return sum(losses) / len(losses), temperatures

    def _group_samples(self, structure: Structure, inputs: Inputs) -> int:
        if self.config.moe is None:
            return 1
        return group_samples(
            self.config.moe, global_batch_size=structure.global_batch_size, num_tokens=inputs.num_tokens
        )
