"""Nets with a weight of every form that the methods change."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import fxquant
from fxquant.prepared.quantizer import quantizers


class Forms(nn.Module):
    """A convolution with BatchNorm, one of groups, a linear after a pool, a matrix product, a norm and attention."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.deep = nn.Conv2d(width, 2 * width, 3, groups=width // 2, bias=False, stride=2)
        self.flat = nn.Linear(2 * width, width)
        self.matrix, self.shift = nn.Parameter(torch.randn(width, width)), nn.Parameter(torch.randn(width))
        self.before, self.attend = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.3, 3.0)
            self.norm.weight.uniform_(-2.0, 2.0)
            self.norm.bias.normal_()
            self.before.weight.uniform_(0.1, 3.0)
            self.before.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.deep(torch.relu(self.norm(self.conv(x)))))
        y = self.flat(functional.adaptive_max_pool2d(y, 1).flatten(1)) @ self.matrix + self.shift
        z = self.before(y.unsqueeze(0))
        found: Tensor = self.attend(z, z, z, need_weights=False)[0]
        return found


class Perceptron(nn.Module):
    """Two linears with a ReLU between, inputs that depend on each other."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, hidden), nn.Linear(hidden, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(torch.relu(self.up(x)))
        return found


def images(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 9, 9, generator=generator) for _ in range(count)]


def vectors(count: int = 2) -> list[Tensor]:
    """Correlated, a few channels much larger than others."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(12, 12, generator=generator) * torch.logspace(-1, 1, 12)
    return [torch.randn(64, 12, generator=generator) @ mix for _ in range(count)]


def ready(net: type[nn.Module], data: list[Tensor], seed: int = 0, **options: object) -> nn.Module:
    """A net of random weights, prepared and calibrated."""
    torch.manual_seed(seed)
    model = fxquant.prepare(net(), (data[0],), **options)
    if any(quantizer.stateful for _, quantizer in quantizers(model)):
        fxquant.calibrate(model, data, progress=False)
    return model
