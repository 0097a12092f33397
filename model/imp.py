"""The IMP model as named parameter groups, and the forward pass and loss of one task structure.

Groups: ``encoder``, or ``encoder_<modality>`` with towers; ``embed_<modality>``; ``head_<modality>``, with one head a
modality; ``pair_<a>_<b>`` (the temperature of a modality pair and, with heads per pair, both heads; names in
alphabetical order); ``offset_<a>_<b>``; ``classifier_<data set>``. A task touches only its own groups, so a new task
changes no other task's graph. Parameters are plain nested dicts of float32 arrays; NNX modules are only their
definition.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model import objectives, sharding, terms
from model.config import ModelConfig
from model.embed import ModalityLayers
from model.encoder import Encoder
from model.groups import classifier_group, embed_group, encoder_group, head_group, head_groups, offset_group, pair_group
from model.heads import Classifier, CommonSpaceHead, Offset, Pair
from model.moe import auxiliary_loss
from model.structure import Structure


@functools.lru_cache(maxsize=1024)
def _definition(layer: Callable[..., nnx.Module], arguments: tuple, keywords: tuple) -> tuple[nnx.GraphDef, nnx.State]:
    """The graph and the abstract parameters of a group. Of equal sizes they are the same in every ``Imp``.

    A run makes an ``Imp`` for each of its structures, and tracing one takes a tenth of a second.
    """
    return nnx.split(nnx.eval_shape(lambda: layer(*arguments, **dict(keywords), rngs=nnx.Rngs(0))))


class Imp:
    """Definitions of all parameter groups of a run. Holds no parameters.

    classifiers: data set → number of classes. pairs: the modality pairs that have heads. offsets: those of them that
    the sigmoid pair loss trains.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        modalities: tuple[str, ...],
        pairs: tuple[tuple[str, str], ...] = (),
        offsets: tuple[tuple[str, str], ...] = (),
        classifiers: dict[str, int] | None = None,
    ):
        self.config, self.classifiers = config, dict(classifiers or {})
        self.modalities = tuple(modalities)
        unknown = set(modalities) - set(config.modalities)
        if unknown:
            raise ValueError(f"unknown modalities {sorted(unknown)}; known: {', '.join(config.modalities)}")
        self.pairs = tuple(tuple(sorted(p)) for p in pairs)
        self.offsets = tuple(tuple(sorted(p)) for p in offsets)
        self._build: dict[str, functools.partial] = {}
        for m in self.modalities:
            self._build[encoder_group(config, m)] = functools.partial(Encoder, config)
        for m in self.modalities:
            self._build[embed_group(m)] = functools.partial(ModalityLayers, config, modality=m)
        for group in head_groups(config, self.pairs):
            self._build[group] = functools.partial(CommonSpaceHead, config)
        for p in self.pairs:
            self._build[pair_group(*p)] = functools.partial(Pair, config, modalities=p)
        for p in self.offsets:
            self._build[offset_group(*p)] = functools.partial(Offset)
        for name, num in self.classifiers.items():
            self._build[classifier_group(name)] = functools.partial(Classifier, config, num_classes=num)
        self._graphs, self._shapes = {}, {}
        for name, build in self._build.items():
            self._graphs[name], abstract = _definition(build.func, build.args, tuple(build.keywords.items()))
            self._shapes[name] = nnx.to_pure_dict(abstract)

    @classmethod
    def for_structures(cls, config: ModelConfig, structures: list[Structure]) -> Imp:
        """The groups that a list of structures needs, in a fixed order.

        Raises ValueError for tokens that are not the model's patches.
        """
        for structure in structures:
            structure.check_patches(config)
        modalities = {i.modality for s in structures for i in s.inputs}
        classifiers = {s.classifier: s.num_classes for s in structures if s.classification}
        return cls(
            config,
            modalities=tuple(sorted(modalities)),
            pairs=tuple(sorted({p for s in structures for p in s.pairs})),
            offsets=tuple(sorted({p for s in structures for p in s.offsets})),
            classifiers=dict(sorted(classifiers.items())),
        )

    def with_config(self, config: ModelConfig) -> Imp:
        """The same groups by another config."""
        parts = {"pairs": self.pairs, "offsets": self.offsets, "classifiers": self.classifiers}
        return Imp(config, modalities=self.modalities, **parts)

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(self._build)

    def shapes(self) -> dict:
        """Group → parameters as jax.ShapeDtypeStruct leaves."""
        return self._shapes

    def init(self, seed: int) -> dict:
        """Group → parameters. Each group's key is (seed, name), so a new group changes no other.

        seed: a concrete integer; values are drawn by numpy, so this cannot be traced.
        """
        return {name: self._init_group(name, seed) for name in self._build}

    def _init_group(self, name: str, seed: int) -> dict:
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        return nnx.to_pure_dict(nnx.state(self._build[name](rngs=nnx.Rngs(key))))

    def module(self, params: dict, group: str) -> nnx.Module:
        """The module of a group over its parameters."""
        if group not in self._graphs:
            raise ValueError(f"unknown parameter group {group!r}; known: {', '.join(self._graphs)}")
        # Stacks of layers come together layer by layer, inside the encoder's scan.
        own = params[group]
        own = own if group.startswith("encoder") else sharding.gather_params(own)
        return nnx.merge(self._graphs[group], nnx.State(own))

    def encode(self, params: dict, modality: str, tokens, positions, mask=None) -> jax.Array:
        """Pooled features (B, width) float32 of one modality; no sample's depend on the others in the batch.

        tokens: of vision (B, N, 3072 or 768) uint8, of audio (B, N, 256) float32, of text (B, N) int32 ids. positions:
        (B, N, axes) int32 rows of the position tables. mask: (B, N) bool, True = a real token; None: all are.
        """
        return self.forward(params, modality, tokens, positions, mask, group_samples=1)[0]

    def forward(
        self, params: dict, modality: str, tokens, positions, mask=None, *, group_samples: int
    ) -> tuple[jax.Array, Any]:
        """``encode``, and the routing statistics of the pass. group_samples: in a routing group."""
        layers = self.module(params, embed_group(modality))
        x = layers.embed(tokens, positions)
        encoder = self.module(params, encoder_group(self.config, modality))
        x, statistics = encoder(x, mask, group_samples=group_samples)
        return layers.pool(x, mask), statistics

    def project(self, params: dict, features, *, source: str, target: str) -> jax.Array:
        """``source`` features (B, K) in the space it shares with ``target``, before they are taken to unit length."""
        if self.config.heads == "per_modality":
            return self.module(params, head_group(source))(features)
        return self.module(params, pair_group(source, target)).project(features, source)

    @property
    def spaces(self) -> tuple[tuple[str, ...], ...]:
        """The common spaces by the modalities that can be compared there (``terms.spaces``)."""
        return terms.spaces(self.pairs, heads=self.config.heads)

    def temperature(self, params: dict, a: str, b: str) -> jax.Array:
        """The temperature at which two modalities of a common space are compared.

        Two that no task compared have none of their own: the geometric mean of those of their space.
        """
        if (group := pair_group(a, b)) in self._graphs:
            return self.module(params, group).temperature
        space = next((s for s in self.spaces if {a, b} <= set(s)), None)
        if space is None:
            raise ValueError(f"{a} and {b} share no common space; known: {', '.join(map('_'.join, self.spaces))}")
        trained = [self.module(params, pair_group(*p)).temperature for p in self.pairs if set(p) <= set(space)]
        return jnp.exp(jnp.mean(jnp.log(jnp.stack(trained))))

    def loss(self, params: dict, batch: dict, structure: Structure) -> tuple[jax.Array, dict]:
        """The loss of one batch and its metrics, a dict of small arrays.

        moe: modality → ``moe.routing_statistics``, stacked by sparse layer. losses: the terms of a weighted sum and the
        pairs of a mean, before weighting, if there are several, and the sum of the router's own losses.
        """
        features, auxiliary = {}, 0.0
        metrics = {"moe": {}, "temperatures": {}, "losses": {}}
        groups = structure.group_samples(self.config)
        for i in structure.inputs:
            m, arrays = i.modality, batch[i.modality]
            features[m], statistics = self.forward(
                params, m, arrays["tokens"], arrays["positions"], arrays.get("mask"), group_samples=groups.get(m, 1)
            )
            if statistics:
                metrics["moe"][m] = statistics
                auxiliary += auxiliary_loss(statistics, self.config.moe)
        terms = {}
        for name in structure.contrastive:
            terms[name], of_pairs = self._contrast(name, params, features, batch["positive_ids"], structure)
            metrics = {key: values | of_pairs.get(key, {}) for key, values in metrics.items()}
        for name in structure.classification:
            terms[name] = self._classify(name, params, features[structure.classified], batch["labels"], structure)
        loss = sum(weight * terms[name] for name, weight in structure.objectives)
        if len(terms) > 1:
            metrics["losses"] |= terms
        if self.config.moe and (self.config.moe.z_loss_weight or self.config.moe.load_balance_weight):
            metrics["losses"]["router"] = auxiliary
            loss += auxiliary
        return loss, metrics

    def _classify(self, name: str, params: dict, features, labels, structure: Structure) -> jax.Array:
        logits = self.module(params, classifier_group(structure.classifier))(features)
        labels = labels.astype(jnp.float32)
        # A loss over all columns needs no gather; on CPUs it is kept for the sake of the same bits.
        if sharding.platform() == "cpu" or structure.classes != tuple(range(structure.num_classes)):
            columns = jnp.asarray(structure.classes)
            logits, labels = logits[:, columns], labels[:, columns]
        return objectives.CLASSIFICATION[name](logits, labels)

    def _contrast(
        self, name: str, params: dict, features: dict, positive_ids, structure: Structure
    ) -> tuple[jax.Array, dict]:
        """The weighted mean over the pairs, and their metrics: temperatures, and losses if there are several."""
        metrics = {"temperatures": {}, "losses": {}}
        weights = {"_".join(p): 1.0 for p in structure.pairs} | dict(structure.pair_weights)
        dims, project = self.config.matryoshka, self._projections(params, features)
        total, weight_sum = 0.0, 0.0
        for a, b in structure.pairs:
            key, more = f"{a}_{b}", {}
            pair = self.module(params, pair_group(a, b))
            if name == "sigmoid_pairs":
                more["offset"] = self.module(params, offset_group(a, b)).value[...]
            metrics["temperatures"][key] = pair.temperature
            parts = objectives.nested(
                objectives.CONTRASTIVE[name],
                project(a, b),
                project(b, a),
                dims or (self.config.common_dim,),
                temperature=pair.temperature,
                positive_ids=positive_ids,
                chunk_size=self.config.contrastive_chunk,
                **more,
            )
            loss = sum(parts) / len(parts) if dims else parts[0]
            if len(structure.pairs) > 1:
                metrics["losses"][f"{name}_{key}"] = loss
            if len(dims) > 1:
                of_dims = (f"{name}_{key}_dim{dim}" for dim in dims)
                metrics["losses"] |= dict(zip(of_dims, parts, strict=True))
            total, weight_sum = total + weights[key] * loss, weight_sum + weights[key]
        return total / weight_sum, metrics

    def _projections(self, params: dict, features: dict) -> Callable[[str, str], jax.Array]:
        """``project`` of a batch's features as a function of source and target; a head is applied once."""
        found: dict[tuple[str, ...], jax.Array] = {}

        def project(source: str, target: str) -> jax.Array:
            key = (source,) if self.config.heads == "per_modality" else (source, target)
            if key not in found:
                found[key] = self.project(params, features[source], source=source, target=target)
            return found[key]

        return project
