"""Nets whose explanation and drawing the tests look at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Conv, BatchNorm, ReLU, a residual sum, a concat, a pool and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.body, self.mix, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(self.body(x) + x)
        y = self.mix(torch.cat([x, y], 1))
        return self.head(F.avg_pool2d(y, 8).flatten(1))


class Products(nn.Module):
    """A linear, attention and products of activations, one of them straight into the next."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x)[:, None].chunk(3, -1)
        x = F.scaled_dot_product_attention(query, key, value)[:, 0]
        return self.head((x @ x.transpose(1, 2)) @ x)


class Forked(nn.Module):
    """One tensor for two layers, which rules may treat differently."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        return self.a(x) * self.b(x)


class Repeated(nn.Module):
    """One convolution that is called twice, a branch that example inputs may leave out, and a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.extra, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, extra: bool = True) -> Tensor:
        x = self.conv(torch.relu(self.conv(x))).mean((2, 3))
        if extra:
            x = torch.tanh(self.extra(x))
        torch._dynamo.graph_break()
        return self.head(x)


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
FLAT = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
MAPS = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(3))
