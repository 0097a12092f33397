"""The network of an exported IMP model in PyTorch, by the names of its model.safetensors.

It computes in the type of its parameters, float32, what the model's evaluation computes. Experts choose among the
tokens of one sample, so no result depends on its neighbours.

Shape letters: B batch, N tokens, D width, H heads, E experts, K values in a common space.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class ImpEncoder(nn.Module):
    """The network: tokens of one modality → pooled features → a place in the space of a pair."""

    def __init__(self, config: dict, arrays: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        # Names with "/", as in model.safetensors.
        self.arrays = nn.ParameterDict(arrays)

    def features(self, modality: str, tokens: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, D) of tokens (B, N[, P]); positions (N, axes); mask (B, N), True for a real token."""
        embed, tower = f"embed_{modality}", "encoder"
        if self.config["towers"] == "per_modality":
            tower = f"encoder_{modality}"
        x = self._linear(self._embedded(embed, modality, tokens) + self._places(embed, positions), f"{embed}/pre")
        next_of = {"dense": 0, "sparse": 0}
        for layer in range(self.config["depth"]):
            kind = "sparse" if layer in self._sparse_layers() else "dense"
            x = self._block(x, mask, f"{tower}/{kind}", next_of[kind])
            next_of[kind] += 1
        x = self._linear(self._norm(x, f"{tower}/norm"), f"{embed}/post")
        if mask is None:
            return x.mean(1)
        weight = mask[..., None].to(x.dtype)
        return (x * weight).sum(1) / weight.sum(1).clamp(min=1)

    def project(self, features: Tensor, pair: list[str], source: str) -> Tensor:
        """(B, K) of unit length: ``source`` features in the space of a pair, or of all modalities."""
        own = f"head_{source}"
        head = own if f"{own}/wi/kernel" in self.arrays else f"pair_{'_'.join(pair)}/heads/{source}"
        x = functional.gelu(self._linear(features, f"{head}/wi"), approximate="tanh")
        x = self._norm(self._linear(x, f"{head}/wo"), f"{head}/norm")
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6)

    def _embedded(self, embed: str, modality: str, tokens: Tensor) -> Tensor:
        if modality == "text":
            return self.arrays[f"{embed}/table"][tokens]
        kernel = self.arrays[f"{embed}/patch/linear/kernel"]
        x = tokens.to(kernel.dtype)
        if modality == "vision":
            x = x / 127.5 - 1
        # A patch of one frame counts as that frame repeated over a tubelet.
        kernel = kernel.reshape(-1, x.shape[-1], kernel.shape[1]).sum(0)
        return x @ kernel + self.arrays[f"{embed}/patch/linear/bias"]

    def _places(self, embed: str, positions: Tensor) -> Tensor:
        tables = [self.arrays[f"{embed}/position/tables/axis_{axis}"] for axis in range(positions.shape[1])]
        rows = sum(table[positions[:, axis]] for axis, table in enumerate(tables))
        return self._norm(rows, f"{embed}/position/norm")

    def _sparse_layers(self) -> range:
        depth, moe = self.config["depth"], self.config["moe"]
        if moe is None:
            return range(0)
        if moe["placement"] == "last":
            return range(depth - moe["num_layers"], depth)
        period = depth // moe["num_layers"]
        return range(period - 1, depth, period)

    def _block(self, x: Tensor, mask: Tensor | None, stack: str, layer: int) -> Tensor:
        x = x + self._attention(self._norm(x, f"{stack}/attention_norm", layer), mask, f"{stack}/attention", layer)
        normed = self._norm(x, f"{stack}/mlp_norm", layer)
        if stack.endswith("sparse"):
            return x + self._experts(normed, mask, f"{stack}/mlp", layer)
        return x + self._feed_forward(normed, *(self.arrays[f"{stack}/mlp/{w}/kernel"][layer] for w in ("wi", "wo")))

    def _attention(self, x: Tensor, mask: Tensor | None, name: str, layer: int) -> Tensor:
        batch, count, width = x.shape
        qkv = (x @ self.arrays[f"{name}/qkv/kernel"][layer]).reshape(batch, count, 3, self.config["num_heads"], -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, D / H)
        if self.config["qk_norm"]:
            query, key = (self._norm(x, f"{name}/{w}_norm", layer) for x, w in ((query, "query"), (key, "key")))
        seen = None if mask is None else mask[:, None, None, :]
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return out.transpose(1, 2).reshape(batch, count, width) @ self.arrays[f"{name}/out/kernel"][layer]

    @staticmethod
    def _feed_forward(x: Tensor, wi: Tensor, wo: Tensor) -> Tensor:
        return functional.gelu(x @ wi, approximate="tanh") @ wo

    def _experts(self, x: Tensor, mask: Tensor | None, name: str, layer: int) -> Tensor:
        """The sum of the experts that took a token, by their gates; zero for a token that none took."""
        moe, count = self.config["moe"], x.shape[1]
        probs = (x.float() @ self.arrays[f"{name}/router/kernel"][layer].float()).softmax(-1)
        if mask is None or moe["route_padding"]:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        slots = torch.tensor([expert_capacity(n, moe) for n in range(count + 1)], device=x.device)[mask.sum(1)]
        choose = experts_choose if moe["router"] == "experts_choose" else tokens_choose
        gates = choose(probs, mask, slots, moe).to(x.dtype)  # (B, E, N), 0 for a token that the expert did not take
        wi, wo = (self.arrays[f"{name}/experts/{w}"][layer] for w in ("wi", "wo"))
        out = torch.zeros_like(x)
        for expert in range(moe["num_experts"]):
            sample, token = gates[:, expert].nonzero(as_tuple=True)
            found = self._feed_forward(x[sample, token], wi[expert], wo[expert])
            out.index_put_((sample, token), found * gates[sample, expert, token, None], accumulate=True)
        return out

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.arrays[f"{name}/kernel"] + self.arrays[f"{name}/bias"]

    def _norm(self, x: Tensor, name: str, layer: int | None = None) -> Tensor:
        scale = self.arrays[f"{name}/scale"]
        bias = self.arrays.get(f"{name}/bias")
        return functional.layer_norm(x, x.shape[-1:], scale if layer is None else scale[layer], bias, eps=1e-6)


def expert_capacity(num_tokens: int, moe: dict) -> int:
    """Slots of one expert for the tokens of a sample."""
    selected = moe["num_selected"] if moe["router"] == "tokens_choose" else 1
    return min(num_tokens, max(1, round(moe["capacity_factor"] * num_tokens * selected / moe["num_experts"])))


def experts_choose(probs: Tensor, mask: Tensor, slots: Tensor, moe: dict) -> Tensor:
    """Gates (B, E, N): each expert's best ``slots`` tokens of a sample. probs: (B, N, E)."""
    scores = probs.transpose(1, 2).masked_fill(~mask[:, None, :], -math.inf)
    # A stable order, so that of equal tokens the first is taken.
    order = scores.argsort(dim=-1, descending=True, stable=True)
    taken = torch.arange(scores.shape[-1], device=scores.device) < slots[:, None, None]
    taken = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, taken.expand_as(scores))
    return torch.where(taken & mask[:, None, :], scores, 0.0)


def tokens_choose(probs: Tensor, mask: Tensor, slots: Tensor, moe: dict) -> Tensor:
    """Gates (B, E, N): tokens ask their best experts, first choices before second ones, while slots are left."""
    batch, count, num_experts = probs.shape
    gates, experts = (a[..., : moe["num_selected"]] for a in probs.sort(dim=-1, descending=True, stable=True))
    order = torch.arange(count, device=probs.device).expand(batch, count)
    if moe["batch_priority"]:
        order = gates[..., 0].masked_fill(~mask, -math.inf).argsort(dim=1, descending=True, stable=True)
    used = torch.zeros(batch, num_experts, dtype=torch.long, device=probs.device)
    out = torch.zeros(batch, num_experts, count, dtype=probs.dtype, device=probs.device)
    for choice in range(moe["num_selected"]):
        wanted = torch.where(mask, experts[..., choice], num_experts).gather(1, order)
        asks = functional.one_hot(wanted, num_experts + 1)[..., :num_experts]  # (B, N, E) in the order of asking
        place = used[:, None, :] + asks.cumsum(1) - asks
        gets = (asks * (place < slots[:, None, None])).transpose(1, 2)
        gate = gates[..., choice].gather(1, order)[:, None, :] * gets
        out = out.scatter_add(2, order[:, None, :].expand_as(gate), gate)
        used = used + asks.sum(1)
    return out
