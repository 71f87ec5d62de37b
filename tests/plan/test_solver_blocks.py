"""Where quantizers go in blocks with several branches, gates and loops, as golden texts."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.nn import functional as F

from tests.plan.test_solver import IMAGE, TOKENS, conv, golden


class Dense(nn.Module):
    """Each layer reads everything before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4 + 2 * i, 2, 3, padding=1) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, F.relu(layer(x))], 1)
        return x


def test_densenet_concat() -> None:
    assert_expected_inline(
        golden(Dense(), IMAGE),
        """\
activation u8: conv2d.input, cat.operand0
weight s8 axis 0: conv2d.weight
activation u8: cat.operand1
activation u8: conv2d_1.input, cat_1.operand0
weight s8 axis 0: conv2d_1.weight
activation u8: cat_1.operand1
activation u8: conv2d_2.input, cat_2.operand0
weight s8 axis 0: conv2d_2.weight
activation u8: cat_2.operand1
output u8: cat_2.output
""",
    )


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.reduce, self.three, self.pooled = conv(4, 2, 1), conv(4, 2, 1), conv(2, 2), conv(4, 2, 1)
        self.last = nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        deep = F.relu(self.three(F.relu(self.reduce(x))))
        pooled = self.pooled(F.max_pool2d(x, 3, 1, 1))
        return self.last(torch.cat([F.relu(self.one(x)), deep, F.relu(pooled), x], 1))


def test_inception_branches() -> None:
    assert_expected_inline(
        golden(Inception(), IMAGE),
        """\
activation u8: conv2d.input, conv2d_2.input, conv2d_3.input, cat.operand3
weight s8 axis 0: conv2d.weight
activation u8: conv2d_1.input
weight s8 axis 0: conv2d_1.weight
weight s8 axis 0: conv2d_2.weight
weight s8 axis 0: conv2d_3.weight
activation u8: cat.operand0
activation u8: cat.operand1
activation u8: cat.operand2
activation u8: conv2d_4.input
weight s8 axis 0: conv2d_4.weight
output u8: conv2d_4.output
""",
    )


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.deep, self.out = conv(4, 4), conv(4, 4), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.enter(x))
        deep = F.relu(self.deep(F.max_pool2d(skip, 2)))
        return self.out(torch.cat([skip, F.interpolate(deep, scale_factor=2.0, mode="nearest")], 1))


def test_unet_skip() -> None:
    assert_expected_inline(
        golden(Skip(), IMAGE),
        """\
activation u8: conv2d.input
weight s8 axis 0: conv2d.weight
activation u8: conv2d_1.input, cat.operand0
weight s8 axis 0: conv2d_1.weight
activation u8: cat.operand1
activation u8: conv2d_2.input
weight s8 axis 0: conv2d_2.weight
output u8: conv2d_2.output
""",
    )


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up, self.down = nn.LayerNorm(8), *(nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def test_gated_mlp() -> None:
    assert_expected_inline(
        golden(GatedMLP(), TOKENS),
        """\
activation u8: linear.input, linear_1.input
weight s8 axis 0: linear.weight
weight s8 axis 0: linear_1.weight
activation u8: linear_2.input
weight s8 axis 0: linear_2.weight
declined add: its operand arg2_1 is also used in float
""",
    )


class LSTM(nn.Module):
    """Two steps of a cell written by hand: its weights are quantized once, its states step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.hidden = nn.Linear(8, 16), nn.Linear(4, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 4)
        for t in range(2):
            i, f, g, o = (self.input(x[:, t]) + self.hidden(h)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return h


def test_lstm_cell() -> None:
    assert_expected_inline(
        golden(LSTM(), TOKENS),
        """\
activation u8: linear.input
weight s8 axis 0: linear.weight, linear_2.weight
weight s8 axis 0: linear_1.weight, linear_3.weight
activation u8: linear_2.input
activation u8: linear_3.input
declined add: its result add is used in float
declined add_1: its result add_1 is used in float
declined add_2: its result add_2 is used in float
declined add_3: its result add_3 is used in float
declined linear_1: its operand new_zeros is all zeros, which have no range
""",
    )
