"""The compiled graph of a task as data: its inputs, its objectives, and the parameter groups that enter it."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from model import terms
from model.config import ModelConfig
from model.groups import task_groups
from model.moe import group_samples


@dataclasses.dataclass(frozen=True)
class InputShape:
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
    inputs: tuple[InputShape, ...]
    classifier: str | None = None
    num_classes: int = 0
    classes: tuple[int, ...] = ()
    pair_weights: tuple[tuple[str, float], ...] = ()
    microbatches: int = 1

    def __post_init__(self) -> None:
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
        known = [terms.pair_name(p) for p in self._all_pairs]
        wrong = [name for name, weight in self.pair_weights if name not in known or weight < 0]
        if wrong or (known and not self.pairs):
            raise ValueError(f"pair_weights: expected weights of {known}, not all 0, found {dict(self.pair_weights)}")

    def _check_objectives(self) -> None:
        names = [name for name, _ in self.objectives]
        unknown = [n for n in names if n not in terms.NAMES]
        if unknown or not names:
            found = repr(unknown[0]) if unknown else "none"
            raise ValueError(f"unknown objective {found}; known: {', '.join(terms.NAMES)}")
        if len(set(names)) != len(names) or any(not weight > 0 for _, weight in self.objectives):
            raise ValueError(f"expected different objectives with weights above 0, found {dict(self.objectives)}")

    def _check_inputs(self) -> None:
        names = [i.modality for i in self.inputs]
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
        return terms.contrastive(name for name, _ in self.objectives)

    @property
    def classification(self) -> tuple[str, ...]:
        """The objectives that need a classifier."""
        return terms.classification(name for name, _ in self.objectives)

    @property
    def classified(self) -> str:
        """The modality that the classifier looks at."""
        return terms.classified(i.modality for i in self.inputs)

    @property
    def _all_pairs(self) -> tuple[tuple[str, str], ...]:
        return terms.pairs(i.modality for i in self.inputs) if self.contrastive else ()

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The modality pairs that are compared."""
        weights = dict(self.pair_weights)
        return tuple(p for p in self._all_pairs if weights.get(terms.pair_name(p), 1.0) > 0)

    @property
    def offsets(self) -> tuple[tuple[str, str], ...]:
        """The pairs whose logits have a learned offset."""
        return self.pairs if "sigmoid_pairs" in self.contrastive else ()

    def groups(self, config: ModelConfig) -> tuple[str, ...]:
        """The parameter groups that enter the graph."""
        return task_groups(
            config,
            modalities=[i.modality for i in self.inputs],
            pairs=self.pairs,
            offsets=self.offsets,
            classifier=self.classifier if self.classification else None,
        )

    def check_patches(self, config: ModelConfig) -> None:
        """Raises ValueError if tokens are not patches of the model's: another number of values that divides the kernel
        would pass for a patch of one frame."""
        time, *sides = config.vision_patch
        whole = {
            "vision": {3 * math.prod(sides), 3 * time * math.prod(sides)},
            "audio": {math.prod(config.audio_patch)},
        }
        for i in self.inputs:
            known = whole.get(i.modality)
            if known and i.num_values not in known:
                raise ValueError(
                    f"{i.modality}: the model takes tokens of {' or '.join(map(str, sorted(known)))} values, "
                    f"found {i.num_values}"
                )

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
