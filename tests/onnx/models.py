"""Tiny nets for export tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant


class Block(nn.Module):
    """Convolution, BatchNorm, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)) + x)


class ConvNet(nn.Module):
    """Stem, two residual blocks, pooling, head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.stem(x)), 2)
        return self.head(F.adaptive_avg_pool2d(self.body(x), 1).flatten(1))


class Attention(nn.Module):
    """One self-attention block with a mask of the given kind."""

    def __init__(self, masked: str | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.causal = masked == "causal"
        keep = torch.ones(6, 6, dtype=torch.bool).tril(2)
        mask = {"bool": keep, "float": torch.zeros(6, 6).masked_fill(~keep, -2.0)}.get(masked or "")
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.causal)
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


def calibrated(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    """Prepared, with statistics and ranges from ``x``."""
    fxquant.prepare(model, (x,), **options)
    for _ in range(3):
        model(x)
    fxquant.calibrate(model, [x], progress=False)
    return model.eval()


def snapshot(model: nn.Module) -> Any:
    """Everything an operation could have changed: values, modes, attributes."""
    values = {key: value.tolist() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    modes = [module.training for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    return repr(values), modes, attributes
