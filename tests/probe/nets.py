"""Nets whose sites the tests visit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxquant


class Pair(nn.Module):
    """Two layers, each read through a site on its input and one on its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Twice(nn.Module):
    """One layer that runs twice, on two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.drop = nn.Linear(6, 6), nn.Dropout(0.5)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return scale * self.drop(self.again(torch.tanh(self.again(x))))


class Broken(nn.Module):
    """A frame that breaks in its middle: what follows is a graph of its own, which instances share."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        torch._dynamo.graph_break()
        return torch.tanh(self.down(torch.relu(y)))


class Frames(nn.Module):
    """Two instances of `Broken`, whose graphs know nothing of the whole model."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Broken(), Broken()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ready(net: nn.Module, x: Tensor) -> nn.Module:
    """The net, prepared and calibrated on one batch."""
    return fxquant.calibrate(fxquant.prepare(net, (x,)), [x], progress=False)
