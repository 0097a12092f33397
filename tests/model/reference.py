"""The loss of a structure in float64 numpy, from the formulas: plain, slow, and independent of model/'s functions.

It takes the parameters, batch, structure and config that ``Imp.loss`` takes, microbatches excepted. Arrays
are (batch, tokens, width) until they are pooled.
"""

from __future__ import annotations

import itertools

import numpy as np


class Reference:
    """margin: by how much the closest decisions of the routers were taken, over all passes so far; the loss is smooth
    only where it is not small."""

    def __init__(self, config, structure):
        self.config, self.structure, self.margin = config, structure, np.inf

    def loss(self, params: dict, batch: dict) -> float:
        s, moe = self.structure, self.config.moe
        features, router_losses = {}, 0.0
        for i in s.inputs:
            arrays = batch[i.modality]
            features[i.modality], of_layers = self.encode(params, i.modality, arrays)
            for z_loss, balance in of_layers:
                router_losses += moe.z_loss_weight * z_loss + moe.load_balance_weight * balance
        total = router_losses
        for name, weight in s.objectives:
            if name in ("nce", "sigmoid_pairs"):
                total += weight * self.contrast(name, params, features, batch["positive_ids"])
            else:
                total += weight * self.classify(name, params, features, batch["labels"])
        return float(total)

    # --- from tokens to pooled features ---

    def encode(self, params: dict, modality: str, arrays: dict):
        own = params[f"embed_{modality}"]
        tokens = arrays["tokens"]
        mask = arrays.get("mask", np.ones(tokens.shape[:2], bool))
        x = affine(own["pre"], self.embed(own, modality, tokens) + place(own["position"], arrays["positions"]))
        tower = "encoder" if self.config.towers == "shared" else f"encoder_{modality}"
        x, of_layers = self.layers(params[tower], x, mask)
        x = affine(own["post"], x)
        return np.stack([x[b, mask[b]].mean(0) for b in range(len(x))]), of_layers

    def embed(self, own: dict, modality: str, tokens):
        if modality == "text":
            return own["table"][tokens]
        linear, values = own["patch"]["linear"], tokens.astype(np.float64)
        if modality == "vision":
            values = values / 127.5 - 1
            # A still image is one frame shown in every frame of the tubelet.
            values = np.tile(values, linear["kernel"].shape[0] // values.shape[-1])
        return affine(linear, values)

    def layers(self, encoder: dict, x, mask):
        config, of_layers = self.config, []
        taken = {"dense": 0, "sparse": 0}
        for layer in range(config.depth):
            kind = "sparse" if layer in sparse_layers(config) else "dense"
            p = one_layer(encoder[kind], taken[kind])
            taken[kind] += 1
            normed = layer_norm(p["attention_norm"], x)
            x = x + self.attention(p["attention"], normed, mask)
            normed = layer_norm(p["mlp_norm"], x)
            if kind == "dense":
                x = x + gelu(normed @ p["mlp"]["wi"]["kernel"]) @ p["mlp"]["wo"]["kernel"]
                continue
            update, losses = self.mixture(p["mlp"], normed, mask)
            x = x + update
            of_layers.append(losses)
        return layer_norm(encoder["norm"], x), of_layers

    def attention(self, p: dict, x, mask):
        """Head by head: softmax(q k / sqrt(head_dim)) v over the real tokens."""
        size, heads = self.config.head_dim, self.config.num_heads
        query, key, value = np.split(x @ p["qkv"]["kernel"], 3, axis=-1)
        out = []
        for h in range(heads):
            q, k, v = (a[..., h * size : (h + 1) * size] for a in (query, key, value))
            if self.config.qk_norm:
                q, k = layer_norm(p["query_norm"], q), layer_norm(p["key_norm"], k)
            scores = q @ k.swapaxes(1, 2) / np.sqrt(size)
            out.append(softmax(np.where(mask[:, None, :], scores, -np.inf)) @ v)
        return np.concatenate(out, axis=-1) @ p["out"]["kernel"]

    # --- mixtures of experts ---

    def mixture(self, p: dict, x, mask):
        """(output, (z-loss, load balance)): tokens compete within groups, the losses are over the whole batch."""
        moe, (batch, num_tokens, width) = self.config.moe, x.shape
        size = num_tokens * group_samples(moe, batch, num_tokens)
        tokens, real = x.reshape(-1, size, width), mask.reshape(-1, size)
        if moe.route_padding:
            real = np.ones_like(real)
        out = np.zeros_like(tokens)
        logits = tokens @ p["router"]["kernel"]
        probs = softmax(logits)
        choose = self.experts_choose if moe.router == "experts_choose" else self.tokens_choose
        for group in range(len(tokens)):
            for expert, token in choose(probs[group], real[group]):
                wi, wo = p["experts"]["wi"][expert], p["experts"]["wo"][expert]
                out[group, token] += probs[group, token, expert] * (gelu(tokens[group, token] @ wi) @ wo)
        z_loss = (logsumexp(logits[real]) ** 2).mean()
        first = np.eye(moe.num_experts)[probs[real].argmax(-1)].mean(0)
        return out.reshape(x.shape), (z_loss, moe.num_experts * (first * probs[real].mean(0)).sum())

    def capacity(self, num_real: int) -> int:
        moe = self.config.moe
        each = moe.num_selected if moe.router == "tokens_choose" else 1
        return max(1, round(moe.capacity_factor * num_real * each / moe.num_experts))

    def experts_choose(self, probs, real):
        """Every expert takes the tokens that it is most probable for."""
        tokens = np.flatnonzero(real)
        for expert in range(probs.shape[1]):
            best = tokens[np.argsort(-probs[tokens, expert])]
            self.note_margin(probs[best, expert], self.capacity(len(tokens)))
            for token in best[: self.capacity(len(tokens))]:
                yield expert, token

    def tokens_choose(self, probs, real):
        """Every token goes to its best experts while they have room: all first choices, then all second ones."""
        moe, tokens = self.config.moe, np.flatnonzero(real)
        if moe.batch_priority:
            tokens = tokens[np.argsort(-probs[tokens].max(-1))]
            self.note_margin(probs[tokens].max(-1), None)
        used = np.zeros(moe.num_experts, int)
        for choice in range(moe.num_selected):
            for token in tokens:
                order = np.argsort(-probs[token])
                self.note_margin(probs[token, order], None)
                if used[order[choice]] < self.capacity(len(tokens)):
                    used[order[choice]] += 1
                    yield order[choice], token

    def note_margin(self, falling, cut: int | None) -> None:
        """falling: what was compared, the highest first. cut: how many were taken; None: their order counts."""
        gaps = falling[:-1] - falling[1:]
        gaps = gaps if cut is None else gaps[cut - 1 : cut]
        self.margin = min([self.margin, *gaps])

    # --- the losses ---

    def contrast(self, name: str, params: dict, features: dict, ids) -> float:
        """The weighted mean over pairs of modalities."""
        total, weights = 0.0, 0.0
        equal = (ids[:, None] == ids[None, :]).all(-1)
        for a, b in itertools.combinations(sorted(features), 2):
            weight = dict(self.structure.pair_weights).get(f"{a}_{b}", 1.0)
            if not weight:
                continue
            pair = params[f"pair_{a}_{b}"]
            if self.config.heads == "per_pair":
                first, second = (head(pair["heads"][m], features[m]) for m in (a, b))
            else:
                first, second = (head(params[f"head_{m}"], features[m]) for m in (a, b))
            tau, offset = max(pair["tau"], self.config.temperature_floor), params.get(f"offset_{a}_{b}")
            dims = self.config.matryoshka or (self.config.common_dim,)
            losses = [of_pair(name, first[:, :d], second[:, :d], equal, tau=tau, offset=offset) for d in dims]
            total, weights = total + weight * np.mean(losses), weights + weight
        return total / weights

    def classify(self, name: str, params: dict, features: dict, labels) -> float:
        s = self.structure
        modality = next((i.modality for i in s.inputs if i.modality != "text"), "text")
        logits = affine(params[f"classifier_{s.classifier}"]["linear"], features[modality])[:, list(s.classes)]
        labels = labels[:, list(s.classes)].astype(np.float64)
        if name == "sigmoid":
            return (np.log1p(np.exp(logits)) - labels * logits).mean()
        target = labels / labels.sum(-1, keepdims=True)
        return (target * (logsumexp(logits)[:, None] - logits)).sum(-1).mean()


def of_pair(name: str, first, second, equal, *, tau, offset) -> float:
    logits = unit(first) @ unit(second).T / tau
    if name == "nce":
        matched = np.where(equal, logits, -np.inf)
        rows, columns = (logsumexp(x) - logsumexp(y) for x, y in ((logits, matched), (logits.T, matched.T)))
        return (rows + columns).mean() / 2
    logits = np.where(equal, 1, -1) * (logits + offset["value"])
    return np.log1p(np.exp(-logits)).sum(1).mean()


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def logsumexp(x):
    highest = x.max(-1, keepdims=True)
    return np.log(np.exp(x - highest).sum(-1)) + highest[..., 0]


def softmax(x):
    return np.exp(x - logsumexp(x)[..., None])


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def affine(p: dict, x):
    return x @ p["kernel"] + p["bias"]


def layer_norm(p: dict, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p.get("bias", 0.0)


def place(p: dict, positions):
    """The rows of the axes, summed, then LayerNorm."""
    rows = [table[positions[..., axis]] for axis, table in enumerate(p["tables"].values())]
    return layer_norm(p["norm"], sum(rows))


def head(p: dict, x):
    return layer_norm(p["norm"], affine(p["wo"], gelu(affine(p["wi"], x))))


def one_layer(stack: dict, index: int) -> dict:
    return {name: one_layer(p, index) if isinstance(p, dict) else p[index] for name, p in stack.items()}


def sparse_layers(config) -> list[int]:
    if config.moe is None:
        return []
    depth, number = config.depth, config.moe.num_layers
    if config.moe.placement == "last":
        return list(range(depth))[-number:]
    return [layer for layer in range(depth) if (layer + 1) % (depth // number) == 0]


def group_samples(moe, batch: int, num_tokens: int) -> int:
    """One sample, or as many as divide the batch and fit into the group's tokens."""
    fitting = [n for n in range(1, batch + 1) if batch % n == 0 and n * num_tokens <= moe.group_size]
    return max([1, *fitting]) if moe.group == "tokens" else 1
