"""The IMP model as named parameter groups, and the forward pass and loss of one task structure.

Groups: ``encoder``, or ``encoder_<modality>`` with towers; ``embed_<modality>``; ``pair_<a>_<b>`` (both heads and the
temperature of a modality pair, names in alphabetical order); ``offset_<a>_<b>``; ``classifier_<data set>``. A task
touches only its own groups, so a new task changes no other task's graph. Parameters are plain nested dicts of float32
arrays; NNX modules are only their definition.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from model import objectives, sharding
from model.config import MODALITIES, ModelConfig
from model.embed import ModalityLayers
from model.encoder import Encoder
from model.heads import Classifier, Offset, Pair
from model.moe import auxiliary_loss, group_samples


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

    objectives: a name, or (name, weight) of each term of a weighted sum over one batch (the paper's Table 2).
    classifier: the data set whose classifier the task uses. classes: columns of that classifier the loss looks at.
    pair_weights: (pair, weight) such as ("audio_text", 0.0) where it is not 1; the loss over several pairs is their
      weighted mean, and a pair of weight 0 is left out.
    microbatches: the number of parts that the batch is worked through in, one after the other, for one update; only for
      classification, since contrastive losses compare the whole batch.
    """

    objectives: str | tuple[tuple[str, float], ...]
    global_batch_size: int
    inputs: tuple[Inputs, ...]
    classifier: str | None = None
    num_classes: int = 0
    classes: tuple[int, ...] = ()
    pair_weights: tuple[tuple[str, float], ...] = ()
    microbatches: int = 1

    def __post_init__(self):
        if isinstance(self.objectives, str):
            object.__setattr__(self, "objectives", ((self.objectives, 1.0),))
        self._check_objectives()
        self._check_inputs()
        if self.global_batch_size < 1 or self.microbatches < 1 or self.global_batch_size % self.microbatches:
            raise ValueError(
                f"a batch of {self.global_batch_size} samples cannot be cut into {self.microbatches} microbatches"
            )
        if self.contrastive and self.microbatches > 1:
            raise ValueError(
                f"{self.contrastive[0]} compares the whole batch: expected 1 microbatch, found {self.microbatches}"
            )
        known = ["_".join(p) for p in self._all_pairs]
        wrong = [name for name, weight in self.pair_weights if name not in known or weight < 0]
        if wrong or (known and not self.pairs):
            raise ValueError(f"pair_weights: expected weights of {known}, not all 0, found {dict(self.pair_weights)}")

    def _check_objectives(self):
        names = [name for name, _ in self.objectives]
        unknown = [n for n in names if n not in objectives.OBJECTIVES]
        if unknown or not names:
            found = repr(unknown[0]) if unknown else "none"
            raise ValueError(f"unknown objective {found}; known: {', '.join(objectives.OBJECTIVES)}")
        if len(set(names)) != len(names) or any(not weight > 0 for _, weight in self.objectives):
            raise ValueError(f"expected different objectives with weights above 0, found {dict(self.objectives)}")

    def _check_inputs(self):
        names = [i.modality for i in self.inputs]
        unknown = set(names) - set(MODALITIES)
        if unknown:
            raise ValueError(f"unknown modalities {sorted(unknown)}; known: {', '.join(MODALITIES)}")
        if len(set(names)) != len(names):
            raise ValueError(f"expected each modality once, found {names}")
        if self.contrastive and len(names) < 2:
            raise ValueError(f"{self.contrastive[0]} needs two modalities or more, found {names}")
        if not self.classification:
            return
        if not self.classifier or not names or (len(names) != 1 and not self.contrastive):
            raise ValueError(f"{self.classification[0]} needs one modality and a classifier")
        wrong = [c for c in self.classes if not 0 <= c < self.num_classes]
        if wrong or not self.classes:
            raise ValueError(f"expected class columns from 0 to {self.num_classes - 1}, found {wrong or 'none'}")

    @property
    def num_tokens(self) -> int:
        """Tokens of a global batch, of all modalities."""
        return self.global_batch_size * sum(i.num_tokens for i in self.inputs)

    @property
    def contrastive(self) -> tuple[str, ...]:
        """The objectives that compare modalities."""
        return tuple(name for name, _ in self.objectives if name in objectives.CONTRASTIVE)

    @property
    def classification(self) -> tuple[str, ...]:
        """The objectives that need a classifier."""
        return tuple(name for name, _ in self.objectives if name in objectives.CLASSIFICATION)

    @property
    def classified(self) -> str:
        """The modality that the classifier looks at: the first that is not text, if there is one."""
        names = [i.modality for i in self.inputs]
        return next((name for name in names if name != "text"), names[0])

    @property
    def _all_pairs(self) -> tuple[tuple[str, str], ...]:
        names = sorted(i.modality for i in self.inputs)
        return tuple(itertools.combinations(names, 2)) if self.contrastive else ()

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The modality pairs that are compared."""
        weights = dict(self.pair_weights)
        return tuple(p for p in self._all_pairs if weights.get("_".join(p), 1.0) > 0)

    @property
    def offsets(self) -> tuple[tuple[str, str], ...]:
        """The pairs whose logits have a learned offset."""
        return self.pairs if "sigmoid_pairs" in self.contrastive else ()

    def groups(self, config: ModelConfig) -> tuple[str, ...]:
        """The parameter groups that enter the graph."""
        names = [i.modality for i in self.inputs]
        encoders = dict.fromkeys(encoder_group(config, name) for name in names)
        heads = [pair_group(*pair) for pair in self.pairs] + [offset_group(*pair) for pair in self.offsets]
        classifier = [f"classifier_{self.classifier}"] if self.classification else []
        return (*encoders, *(f"embed_{name}" for name in names), *heads, *classifier)

    def group_samples(self, config: ModelConfig) -> dict[str, int]:
        """Modality → neighbouring samples whose tokens compete for the experts (empty for a dense model)."""
        if config.moe is None:
            return {}
        size = self.global_batch_size // self.microbatches
        return {i.modality: group_samples(config.moe, batch_size=size, num_tokens=i.num_tokens) for i in self.inputs}

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
        if self.contrastive:
            batch["positive_ids"] = array((size, 2), jnp.int32)
        if self.classification:
            batch["labels"] = array((size, self.num_classes), jnp.uint8)
        return batch


def pair_group(first: str, second: str) -> str:
    """Name of the group of an unordered modality pair."""
    return "pair_" + "_".join(sorted((first, second)))


def offset_group(first: str, second: str) -> str:
    """Name of the group that holds a pair's offset for the sigmoid pair loss."""
    return "offset_" + "_".join(sorted((first, second)))


def encoder_group(config: ModelConfig, modality: str) -> str:
    """Name of the group of the encoder that a modality goes through."""
    return "encoder" if config.towers == "shared" else f"encoder_{modality}"


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
        self.pairs, self.offsets = (tuple(tuple(sorted(p)) for p in given) for given in (pairs, offsets))
        self._build = {}
        for m in self.modalities:
            self._build[encoder_group(config, m)] = lambda rngs: Encoder(config, rngs=rngs)
        for m in self.modalities:
            self._build[f"embed_{m}"] = lambda rngs, m=m: ModalityLayers(config, modality=m, rngs=rngs)
        for p in self.pairs:
            self._build[pair_group(*p)] = lambda rngs, p=p: Pair(config, modalities=p, rngs=rngs)
        for p in self.offsets:
            self._build[offset_group(*p)] = lambda rngs: Offset()
        for name, num in self.classifiers.items():
            self._build[f"classifier_{name}"] = lambda rngs, n=num: Classifier(config, num_classes=n, rngs=rngs)
        self._graphs, self._shapes = {}, {}
        for name, build in self._build.items():
            self._graphs[name], abstract = nnx.split(nnx.eval_shape(lambda build=build: build(nnx.Rngs(0))))
            self._shapes[name] = nnx.to_pure_dict(abstract)

    @classmethod
    def for_structures(cls, config: ModelConfig, structures: list[Structure]) -> Imp:
        """The groups that a list of structures needs, in a fixed order."""
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
        # Stacks of layers come together layer by layer, inside the encoder's scan.
        own = params[group]
        own = own if group.startswith("encoder") else sharding.whole(own)
        return nnx.merge(self._graphs[group], nnx.State(own))

    def encode(self, params: dict, modality: str, tokens, positions, mask=None):
        """Pooled features (B, width) float32 of one modality; no sample's depend on the others in the batch.

        tokens: of vision (B, N, 3072 or 768) uint8, of audio (B, N, 256) float32, of text (B, N) int32 ids. positions:
        (B, N, axes) int32 rows of the position tables. mask: (B, N) bool, True = a real token; None: all are.
        """
        return self.forward(params, modality, tokens, positions, mask, group_samples=1)[0]

    def forward(self, params: dict, modality: str, tokens, positions, mask=None, *, group_samples: int):
        """``encode``, and the routing statistics of the pass. group_samples: in a routing group."""
        layers = self.module(params, f"embed_{modality}")
        x = layers.embed(tokens, positions)
        encoder = self.module(params, encoder_group(self.config, modality))
        x, statistics = encoder(x, mask, group_samples=group_samples)
        return layers.pool(x, mask), statistics

    def project(self, params: dict, features, *, source: str, target: str):
        """``source`` features (B, K) in the space it shares with ``target``, before they are taken to unit length."""
        return self.module(params, pair_group(source, target)).project(features, source)

    def loss(self, params: dict, batch: dict, structure: Structure):
        """The loss of one batch and its metrics, a dict of small arrays.

        moe: modality → ``moe.routing_statistics``, stacked by sparse layer. losses: the terms of a weighted sum and the
        pairs of a mean, before weighting, where there are several, and what the router's own losses add.
        """
        features, metrics, auxiliary = {}, {"moe": {}, "temperatures": {}, "losses": {}}, 0.0
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
            terms[name] = self._contrast(name, params, features, batch["positive_ids"], structure, metrics)
        for name in structure.classification:
            terms[name] = self._classify(name, params, features[structure.classified], batch["labels"], structure)
        loss = sum(weight * terms[name] for name, weight in structure.objectives)
        if len(terms) > 1:
            metrics["losses"] |= terms
        if self.config.moe and (self.config.moe.z_loss_weight or self.config.moe.load_balance_weight):
            metrics["losses"]["router"] = auxiliary
            loss += auxiliary
        return loss, metrics

    def _classify(self, name: str, params: dict, features, labels, structure: Structure):
        logits = self.module(params, f"classifier_{structure.classifier}")(features)
        labels = labels.astype(jnp.float32)
        # Where a loss takes all columns there is nothing to gather; on CPUs it is done for the sake of the same bits.
        if sharding.platform() == "cpu" or structure.classes != tuple(range(structure.num_classes)):
            columns = jnp.asarray(structure.classes)
            logits, labels = logits[:, columns], labels[:, columns]
        return objectives.CLASSIFICATION[name](logits, labels)

    def _contrast(self, name: str, params: dict, features: dict, positive_ids, structure: Structure, metrics: dict):
        """The weighted mean over the pairs."""
        weights = {"_".join(p): 1.0 for p in structure.pairs} | dict(structure.pair_weights)
        total, weight_sum = 0.0, 0.0
        for a, b in structure.pairs:
            pair, key, more = self.module(params, pair_group(a, b)), f"{a}_{b}", {}
            if name == "sigmoid_pairs":
                more["offset"] = self.module(params, offset_group(a, b)).value[...]
            metrics["temperatures"][key] = pair.temperature
            loss = objectives.CONTRASTIVE[name](
                pair.project(features[a], a),
                pair.project(features[b], b),
                temperature=pair.temperature,
                positive_ids=positive_ids,
                chunk_size=self.config.contrastive_chunk,
                **more,
            )
            if len(structure.pairs) > 1:
                metrics["losses"][f"{name}_{key}"] = loss
            total, weight_sum = total + weights[key] * loss, weight_sum + weights[key]
        return total / weight_sum
