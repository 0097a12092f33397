"""Names of the parameter groups that a task trains. Free of jax, so that a recipe can be checked without it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from model.config import ModelConfig
from model.terms import pair_name


def named(group: str, names: Iterable[str]) -> str | None:
    """The one of ``names`` that means a group: its own name, or else the longest of its beginnings before a "_".

    "embed" means every ``embed_<modality>``, "encoder" all towers.
    """
    meant = [name for name in names if group == name or group.startswith(f"{name}_")]
    return max(meant, key=len, default=None)


def task_groups(
    config: ModelConfig,
    *,
    modalities: Sequence[str],
    pairs: Sequence[tuple[str, str]] = (),
    offsets: Sequence[tuple[str, str]] = (),
    classifier: str | None = None,
) -> tuple[str, ...]:
    """The groups that enter the graph of a task. pairs: those with a head. classifier: the data set of one."""
    encoders = dict.fromkeys(encoder_group(config, name) for name in modalities)
    heads = [*head_groups(config, pairs), *(pair_group(*p) for p in pairs), *(offset_group(*p) for p in offsets)]
    return (*encoders, *map(embed_group, modalities), *heads, *([classifier_group(classifier)] if classifier else []))


def encoder_group(config: ModelConfig, modality: str) -> str:
    """The encoder that a modality goes through."""
    return "encoder" if config.towers == "shared" else f"encoder_{modality}"


def embed_group(modality: str) -> str:
    """The layers of a modality around the encoder."""
    return f"embed_{modality}"


def head_groups(config: ModelConfig, pairs: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """The heads of the modalities of pairs, where each has one of its own; () where they are the pairs'."""
    modalities = sorted({m for pair in pairs for m in pair})
    return tuple(map(head_group, modalities)) if config.heads == "per_modality" else ()


def head_group(modality: str) -> str:
    """The one head of a modality, with heads "per_modality"."""
    return f"head_{modality}"


def pair_group(first: str, second: str) -> str:
    """The temperature of an unordered modality pair and, with heads "per_pair", both of its heads."""
    return f"pair_{pair_name((first, second))}"


def offset_group(first: str, second: str) -> str:
    """The offset of a pair's logits in the sigmoid pair loss."""
    return f"offset_{pair_name((first, second))}"


def classifier_group(data_set: str) -> str:
    """The classifier of a data set."""
    return f"classifier_{data_set}"
