"""The size of a model: its parameters, and the FLOPs of a pass. ``python -m model.sizes [NAME ...]`` prints tables.

FLOPs are model FLOPs, as for the utilisation of a device: those that the mathematics needs, two a multiply-add, of
every matrix product: projections, scores and values of attention, feed-forward, router, heads, logits. Padding counts,
for it is computed; so do an expert's empty slots. Left out: norms, softmax, GELU, biases, pooling, lookups, top-k and
the moving of tokens to experts, the optimizer, and whatever is computed a second time to save memory.

Shape letters: N tokens, D width, F mlp_dim, E experts, C capacity, K common_dim, P values of a patch, B batch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence

import jax

from model.config import VARIANTS, ModelConfig, from_variant
from model.groups import classifier_group, embed_group, encoder_group, head_group, head_groups, named, pair_group
from model.imp import Imp
from model.moe import effective_capacity_factor, expert_capacity
from model.sharding import path_keys
from model.structure import Structure

# The backward pass has two products for each of the forward pass: gradients of inputs and of weights. (Pixels need no
# gradient, so that the patch projection has one; the usual factor counts two.)
TRAINING_PASSES = 3


def _product(rows: int, inner: int, columns: int) -> int:
    """FLOPs of (rows, inner) @ (inner, columns)."""
    return 2 * rows * inner * columns


def encoder_flops(config: ModelConfig, num_tokens: int, *, num_samples: int = 1) -> int:
    """Forward FLOPs of the encoder over samples of ``num_tokens`` that share a routing group, all of them together.

    A layer: queries, keys and values 2·N·D·3D, scores and values 2·2·N²·D over all heads, output 2·N·D·D; then a dense
    feed-forward 2·2·N·D·F, or the router 2·N·D·E and 2·2·D·F for each of the experts' E·C slots.
    """
    width, depth = config.width, config.depth
    num_sparse = len(config.sparse_layers)
    tokens = num_samples * num_tokens
    scores = num_samples * _product(num_tokens, width, num_tokens)
    attention = _product(tokens, width, 3 * width) + 2 * scores + _product(tokens, width, width)
    total = depth * attention + (depth - num_sparse) * 2 * _product(tokens, width, config.mlp_dim)
    if num_sparse:
        experts = config.moe.num_experts
        slots = experts * expert_capacity(tokens, config.moe)
        total += num_sparse * (_product(tokens, width, experts) + 2 * _product(slots, width, config.mlp_dim))
    return total


def _input_flops(config: ModelConfig, modality: str, num_tokens: int, *, num_values: int, num_samples: int) -> int:
    """``encoder_flops`` and the layers of a modality around it."""
    tokens = num_samples * num_tokens
    projections = 2 * _product(tokens, config.width, config.width)
    embedding = 0 if modality == "text" else _product(tokens, num_values, config.width)
    return embedding + projections + encoder_flops(config, num_tokens, num_samples=num_samples)


def sample_flops(config: ModelConfig, modality: str, num_tokens: int, *, num_values: int | None = None) -> int:
    """Forward FLOPs from one sample's tokens to its features, as ``Imp.encode`` runs them; heads are not in it.

    The encoder's, the patch projection 2·N·P·D (a lookup for text), pre- and post-projection 2·2·N·D·D.
    num_values: P, values of a patch as they arrive; None: the modality's whole patch. A still image has one frame's.
    Raises ValueError for an unknown modality.
    """
    if modality not in config.modalities:
        raise ValueError(f"unknown modality {modality!r}; known: {', '.join(config.modalities)}")
    num_values = config.patch_values(modality) if num_values is None else num_values
    return _input_flops(config, modality, num_tokens, num_values=num_values, num_samples=1)


def head_flops(config: ModelConfig) -> int:
    """Forward FLOPs of one sample's projection into the common space of a pair: 2·D·K + 2·K·K."""
    return _product(1, config.width, config.common_dim) + _product(1, config.common_dim, config.common_dim)


def structure_flops(config: ModelConfig, structure: Structure, *, freeze: Sequence[str] = ()) -> int:
    """Training FLOPs of one step of a structure, on all devices together: three times those of the forward pass.

    All inputs in their routing groups, both heads of every pair or the one of every modality, the B x B cosines 2·B·B·K
    of every pair, contrastive objective and number of dimensions, and the classifier 2·B·D·classes.
    freeze: as ``OptimizerConfig`` has it: what is frozen has no gradient of its weights, and none of its inputs where
    nothing below is trained. The layers around the encoder count as it does.
    """
    batch, total = structure.global_batch_size, 0
    groups = structure.group_samples(config)
    for i in structure.inputs:
        size = groups.get(i.modality, 1)
        of_group = _input_flops(config, i.modality, i.num_tokens, num_values=i.num_values, num_samples=size)
        total += _passes(config, i.modality, freeze) * (batch // size) * of_group
    below = any(_passes(config, i.modality, freeze) > 1 for i in structure.inputs)

    def passes(group: str) -> int:
        return TRAINING_PASSES - bool(named(group, freeze)) * (1 if below else 2)

    heads = head_groups(config, structure.pairs) or [pair_group(*p) for p in structure.pairs for _ in p]
    total += sum(passes(group) for group in heads) * batch * head_flops(config)
    dims = sum(config.matryoshka or (config.common_dim,))
    cosines = len(structure.pairs) * len(structure.contrastive) * _product(batch, dims, batch)
    total += TRAINING_PASSES * cosines
    if structure.classification:
        classes = _product(batch, config.width, structure.num_classes)
        total += passes(classifier_group(structure.classifier)) * classes
    return total


def _passes(config: ModelConfig, modality: str, freeze: Sequence[str]) -> int:
    """Products of a training step for each product of an input's forward pass."""
    if not named(encoder_group(config, modality), freeze):
        return TRAINING_PASSES
    return 1 if named(embed_group(modality), freeze) else 2


# Remat policy → numbers of arrays that a layer keeps for the backward pass beside its input: those of the model's
# width, (B, N, D), and those of the hidden width, (B, N, F).
_KEPT = {"full": (1, 0), "attention": (2, 0), "auto": (2, 0), "dots": (6, 1), "products": (7, 1), "none": (10, 2)}


def structure_memory(
    config: ModelConfig, structure: Structure, *, fused: bool = False, freeze: Sequence[str] = ()
) -> dict[str, int]:
    """Bytes of one step of a structure on one device that holds all of it: an estimate, before anything is compiled.

    state: parameters and both moments of the groups it takes. gradients: as large as their parameters. activations:
    what all layers keep for the backward pass by the remat policy, and what the widest single layer works with: its
    hidden activations and attention scores, forward and backward. batch: the inputs. Within a half of what XLA plans on
    a CPU (tests/model/test_sizes.py). fused: attention is, and keeps no scores. freeze: as ``OptimizerConfig`` has it.
    """
    shapes = Imp.for_structures(config, [structure]).shapes()
    weights = {group: 4 * _count(shapes[group]) for group in structure.groups(config)}
    trained = sum(size for group, size in weights.items() if not named(group, freeze))
    size, batch = 2 if config.dtype == "bfloat16" else 4, structure.global_batch_size // structure.microbatches
    kept, working = 0, 0
    of_width, of_hidden = _KEPT[config.remat]
    for i in structure.inputs:
        tokens = batch * i.num_tokens
        rows = tokens * max(1, math.ceil(config.moe.capacity_factor)) if config.moe else tokens
        scores = 0 if fused else 4 * batch * config.num_heads * i.num_tokens**2
        if _passes(config, i.modality, freeze) > 1:
            kept += config.depth * size * (of_width * tokens * config.width + of_hidden * rows * config.mlp_dim)
            kept += config.depth * scores if config.remat == "none" else 0
        # Each with its gradient and a copy of both, as XLA's plans hold them.
        hidden = size * rows * (config.mlp_dim + config.width)
        patches = 2 * size * tokens * i.num_values
        working = max(working, 4 * scores + 4 * hidden + 12 * size * tokens * config.width + patches)
    cosines = 4 * batch * batch if structure.pairs else 0
    arrays = jax.tree.leaves(structure.batch_shapes())
    return {
        "state": sum(weights.values()) + 2 * trained,
        "gradients": trained,
        "activations": kept + working + cosines,
        "batch": sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays),
    }


def parameters(config: ModelConfig) -> dict:
    """Counts of a model with all modalities and a pair of heads for any two of them, without classifiers.

    encoder: of the encoder, or of one tower. all: everything. per_token: modality → the parameters that a token of it
    meets on its way into a common space: dense layers of the encoder whole, of the experts as many as a token gets on
    average (capacity c: c experts), routers whole, the modality's own layers, one head; of every table (positions,
    vocabulary) the one row that is looked up.
    """
    imp = Imp(config, modalities=config.modalities, pairs=tuple(itertools.combinations(sorted(config.modalities), 2)))
    shapes = imp.shapes()
    encoder = shapes[encoder_group(config, config.modalities[0])]
    met = {}
    for modality in config.modalities:
        other = next(m for m in config.modalities if m != modality)
        own = config.heads == "per_modality"
        head = shapes[head_group(modality)] if own else shapes[pair_group(modality, other)]["heads"][modality]
        met[modality] = _met((encoder, shapes[embed_group(modality)], head), config)
    return {"encoder": _count(encoder), "all": _count(shapes), "per_token": met}


def _count(shapes) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _met(shapes, config: ModelConfig) -> int:
    """Parameters that one token meets."""

    def of(path, leaf) -> float:
        names, size = path_keys(path), math.prod(leaf.shape)
        if "table" in names or "tables" in names:
            return float(leaf.shape[-1])
        return size * _experts_per_token(config) / config.moe.num_experts if "experts" in names else float(size)

    return round(sum(jax.tree.leaves(jax.tree.map_with_path(of, shapes))))


def _experts_per_token(config: ModelConfig) -> float:
    """The average number of experts of a token if every slot is filled."""
    moe = config.moe
    if moe.router == "tokens_choose":
        return moe.num_selected * min(1.0, moe.capacity_factor)
    return min(moe.capacity_factor, float(moe.num_experts))


def input_sizes(config: ModelConfig) -> dict[str, dict]:
    """The inputs that the table shows, by name: arguments of ``sample_flops``. Pictures are 256 x 256, with patches of
    16 x 16; a video has 16 frames in tubelets of 4; DropToken keeps a quarter of its tokens."""
    frame = 3 * math.prod(config.vision_patch[1:])
    return {
        "image 256": {"modality": "vision", "num_tokens": 256, "num_values": frame},
        "video 1024": {"modality": "vision", "num_tokens": 1024},
        "video drop 256": {"modality": "vision", "num_tokens": 256},
        "audio 64": {"modality": "audio", "num_tokens": 64},
        "text 16": {"modality": "text", "num_tokens": 16},
        "text 256": {"modality": "text", "num_tokens": 256},
    }


def sizes(name: str) -> dict:
    """Everything the table shows of a variant. Raises ValueError for an unknown name."""
    config = from_variant(name)
    forward = {label: sample_flops(config, **given) for label, given in input_sizes(config).items()}
    sparse = {} if config.moe is None else {"capacity": _capacity(config)}
    return sparse | {
        "parameters": parameters(config),
        "forward_flops": forward,
        "training_flops": {label: TRAINING_PASSES * flops for label, flops in forward.items()},
    }


def _capacity(config: ModelConfig) -> dict[str, float]:
    """Input → its effective capacity factor in routing groups of one sample."""
    tokens = {label: given["num_tokens"] for label, given in input_sizes(config).items()}
    return {label: effective_capacity_factor(number, config.moe) for label, number in tokens.items()}


def _rows(title: str, values: dict[str, dict], form) -> list[str]:
    """A table: variants down, the values of each across."""
    names, columns = list(values), list(next(iter(values.values())))
    cells = [[form(values[name][column]) for column in columns] for name in names]
    first = max(len(text) for text in (title, *names))
    widths = [max(len(text) for text in texts) for texts in zip(columns, *cells, strict=True)]
    lines = [(title, columns), *zip(names, cells, strict=True)]
    return [
        "  ".join([name.ljust(first), *(c.rjust(w) for c, w in zip(row, widths, strict=True))]) for name, row in lines
    ]


def table(found: dict[str, dict]) -> str:
    """Aligned tables of variant → ``sizes``."""
    counts = {
        name: {"encoder": of["parameters"]["encoder"], "all": of["parameters"]["all"]}
        | {f"{m} token": count for m, count in of["parameters"]["per_token"].items()}
        for name, of in found.items()
    }
    blocks = [_rows("parameters", counts, lambda n: f"{n:,}")]
    for title, key in (("forward GFLOPs", "forward_flops"), ("training GFLOPs", "training_flops")):
        blocks.append(_rows(title, {name: of[key] for name, of in found.items()}, lambda n: f"{n / 1e9:,.3f}"))
    capacities = {name: of["capacity"] for name, of in found.items() if "capacity" in of}
    if capacities:
        blocks.append(_rows("effective capacity factor", capacities, lambda factor: f"{factor:.3g}"))
    return "\n\n".join("\n".join(lines) for lines in blocks)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m model.sizes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Parameters and FLOPs of the model's variants.",
        epilog="parameters: of the encoder; of all (three modalities, three pairs, no classifiers); and those that a\n"
        "  token of each modality meets on its way into a common space: a table counts as the one row looked up,\n"
        "  experts as the number a token gets on average.\n"
        "FLOPs: of one sample, matrix products only, two a multiply-add, from tokens to features (no heads);\n"
        "  training is three times forward. Columns: the input and its number of tokens, drop with\n"
        "  DropToken 0.75.\n"
        "effective capacity factor: of the experts, once each has a whole number of slots in a group of one sample.\n"
        f"variants: {', '.join(VARIANTS)}",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="variants to show (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    arguments = parser.parse_args(argv)
    try:
        found = {name: sizes(name) for name in arguments.names or VARIANTS}
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1) if arguments.json else table(found))
    return 0


if __name__ == "__main__":
    # Only shapes are used, so no accelerator is needed.
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main(sys.argv[1:]))
