"""Rounding to small floats gives the same bits where a compiler makes one operation of a product and a sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.numerics.floating import round_to_float
from fxquant.numerics.formats import FLOAT_FORMATS
from tests.ops.oracle import assert_same_bits

aten = torch.ops.aten


class Contracting(fx.Interpreter):
    """Runs a float32 graph as a GPU may: each sum and difference of a product with one rounding."""

    def run_node(self, n: fx.Node) -> Any:
        signs = {aten.add.Tensor: 1.0, aten.sub.Tensor: -1.0}
        if n.target not in signs or not any(_is_product(operand) for operand in n.args):
            return super().run_node(n)
        # In float64 the products are exact, and sums of numbers as near to each other as these.
        first, second = (self._exact(operand) for operand in n.args)
        return (first + signs[n.target] * second).to(torch.float32)

    def _exact(self, operand: Any) -> Tensor:
        if _is_product(operand):
            lhs, rhs = (self.env[a].double() if isinstance(a, fx.Node) else a for a in operand.args)
            return lhs * rhs
        value: Tensor = self.env[operand]
        return value.double()


def _is_product(operand: Any) -> bool:
    return isinstance(operand, fx.Node) and operand.target is aten.mul.Tensor


def magnitudes() -> Tensor:
    """A million of any exponent, as many of the size of weights, all at the ends of binades, and specials."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 0x7F800000, (1_000_000,), generator=generator, dtype=torch.int64)
    weights = torch.randn(1_000_000, generator=generator) * torch.logspace(-4, 4, 1_000_000)
    specials = torch.tensor([0.0, -0.0, 1e-45, float("inf"), float("nan")])
    ends = (torch.arange(1, 255).view(-1, 1) << 23) - torch.arange(-64, 64)  # where a sum comes into the next binade
    bits = torch.cat([bits, ends.view(-1)])
    return torch.cat([bits.to(torch.int32).view(torch.float32), weights, specials])


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_no_bit_depends_on_it(name: str) -> None:
    x = magnitudes()
    graph = make_fx(lambda x: round_to_float(x, FLOAT_FORMATS[name]))(x[:4])
    assert any(_is_product(a) for node in graph.graph.nodes for a in node.args if node.target is not aten.mul.Tensor)
    assert_same_bits(Contracting(graph, garbage_collect_values=False).run(x), graph(x))


def test_the_emulation_sees_what_depends_on_it() -> None:
    graph = make_fx(lambda x, y: x * y + y)(torch.ones(4), torch.ones(4))
    x, y = torch.rand(1000), torch.rand(1000)
    assert not torch.equal(Contracting(graph, garbage_collect_values=False).run(x, y), graph(x, y))
