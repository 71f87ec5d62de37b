"""Modules below a bound forward keep their paths in an export where another module is shared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxquant
from fxquant.capture.exported import exported_graph


class Layer(nn.Module):
    """YOLO's: one activation, of the class, for all instances."""

    act = nn.ReLU()

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 1)
        self.act = Layer.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class Block(nn.Module):
    """Owns sites, those of its concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.cv1, self.cv2 = Layer(4, 4), Layer(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv2(torch.cat([self.cv1(x), x], 1))


def test_paths_below_a_bound_forward() -> None:
    model, x = nn.Sequential(Layer(3, 4), nn.Sequential(Block()), Layer(4, 2)).eval(), torch.randn(2, 3, 4, 4)
    fxquant.prepare(model, (x,))
    assert "forward" in vars(model[1][0])
    with torch.no_grad():
        gm = exported_graph(model, (x,), {}, None)
    convs = [node for node in gm.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    paths = [list(node.meta["nn_module_stack"].values())[-1][0] for node in convs]
    assert paths == ["0.conv", "1.0.cv1.conv", "1.0.cv2.conv", "2.conv"]
