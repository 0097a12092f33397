"""The Transformer of ``plain_vit.py`` in PyTorch's fastest form: the second yardstick of ``model_step.py``.

One matrix for queries, keys and values, ``scaled_dot_product_attention``, fused Adam; bfloat16 by autocast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


class TorchBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, self.num_heads = config.width, config.num_heads
        self.attention_norm, self.mlp_norm = (nn.LayerNorm(width, eps=1e-6, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.wi = nn.Linear(width, config.mlp_dim, bias=False)
        self.wo = nn.Linear(config.mlp_dim, width, bias=False)

    def forward(self, x) -> torch.Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.wo(F.gelu(self.wi(self.mlp_norm(x)), approximate="tanh"))


class TorchViT(nn.Module):
    def __init__(self, config, *, num_tokens: int, patch_values: int, num_classes: int):
        super().__init__()
        self.patch = nn.Linear(patch_values, config.width)
        self.position = nn.Parameter(torch.randn(num_tokens, config.width))
        self.blocks = nn.ModuleList(TorchBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, num_classes)

    def forward(self, patches, labels) -> torch.Tensor:
        """The loss of uint8 patches (B, N, P) and class numbers (B,)."""
        x = self.patch(patches / 127.5 - 1) + self.position
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x).float().mean(1)).float(), labels)


def torch_side(
    config, patches, labels, *, num_classes: int, compiled: bool, clip_norm: float, learning_rate: float
) -> Callable[[int], None]:
    """A side for ``timing.in_turns``: training steps on numpy ``patches`` and ``labels``.

    On a GPU if PyTorch sees one. Compiles at its first call, and raises the compiler's errors.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vit = TorchViT(config, num_tokens=patches.shape[1], patch_values=patches.shape[2], num_classes=num_classes)
    vit = vit.to(device)
    patches, labels = torch.from_numpy(patches).to(device), torch.from_numpy(labels).long().to(device)
    optimizer = torch.optim.Adam(vit.parameters(), lr=learning_rate, eps=1e-7, fused=True)
    forward = torch.compile(vit) if compiled else vit

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss = forward(patches, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(vit.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    def run(calls: int) -> None:
        for _ in range(calls):
            step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run
