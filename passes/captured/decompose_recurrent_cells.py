"""Fused recurrent cells become the products and gates that they are, so that the products can be quantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxquant.graph.arguments import argument
from fxquant.graph.bodies import all_graphs
from fxquant.graph.edit import call, item
from fxquant.graph.nodes import call_nodes, packet
from fxquant.graph.views import Item
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.stages import CAPTURED

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class DecomposeRecurrentCells(Pass):
    """``lstm_cell(x, (h, c), w, u, b, d)``  →  ``gates = linear(h, u, d) + linear(x, w, b)``, sigmoid, tanh, …

    The arithmetic and its order are those of torch's CPU implementations of ``lstm_cell``, ``gru_cell``,
    ``rnn_tanh_cell`` and ``rnn_relu_cell``, which Inductor would take the same way: nothing gets slower. Whole layers
    (``nn.LSTM``), whose length may be open, stay as they are.
    """

    stages: ClassVar = (CAPTURED,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Replaces every cell."""
        done = 0
        for module in all_graphs(gm):
            for node in [n for n in call_nodes(module.graph) if packet(n) in _CELLS]:
                with module.graph.inserting_before(node):
                    results = _CELLS[packet(node)](_Cell(node))
                _replace(node, results)
                done += 1
        return done


class _Cell:
    """The arguments of one cell, and a shorthand to make nodes before it."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.input, self.state = argument(node, "input"), argument(node, "hx")
        weights = {name: argument(node, name) for name in ("w_ih", "b_ih", "w_hh", "b_hh")}
        self._weights = {"input": (weights["w_ih"], weights["b_ih"]), "hidden": (weights["w_hh"], weights["b_hh"])}

    def __call__(self, op: Any, *args: Any) -> fx.Node:
        return call(self.node.graph, op, *args, like=self.node)

    def of_input(self) -> fx.Node:
        return self(aten.linear.default, self.input, *self._weights["input"])

    def of_hidden(self, hidden: Any) -> fx.Node:
        return self(aten.linear.default, hidden, *self._weights["hidden"])

    def parts(self, gates: fx.Node, count: int) -> list[fx.Node]:
        chunks = self(aten.chunk.default, gates, count, 1)
        return [item(self.node.graph, chunks, index) for index in range(count)]


def _lstm(cell: _Cell) -> list[fx.Node]:
    hidden, memory = cell.state
    of_input = cell.of_input()
    gates = cell(aten.add.Tensor, cell.of_hidden(hidden), of_input)
    enter, forget, new, leave = cell.parts(gates, 4)
    enter, forget, leave = (cell(aten.sigmoid.default, gate) for gate in (enter, forget, leave))
    new = cell(aten.tanh.default, new)
    kept = cell(aten.mul.Tensor, forget, memory)
    memory = cell(aten.add.Tensor, kept, cell(aten.mul.Tensor, enter, new))
    return [cell(aten.mul.Tensor, leave, cell(aten.tanh.default, memory)), memory]


def _gru(cell: _Cell) -> list[fx.Node]:
    of_input, of_hidden = cell.of_input(), cell.of_hidden(cell.state)
    (reset, update, new), (reset_h, update_h, new_h) = cell.parts(of_input, 3), cell.parts(of_hidden, 3)
    reset = cell(aten.sigmoid.default, cell(aten.add.Tensor, reset_h, reset))
    update = cell(aten.sigmoid.default, cell(aten.add.Tensor, update_h, update))
    new = cell(aten.tanh.default, cell(aten.add.Tensor, new, cell(aten.mul.Tensor, new_h, reset)))
    apart = cell(aten.sub.Tensor, cell.state, new)
    return [cell(aten.add.Tensor, cell(aten.mul.Tensor, apart, update), new)]


def _simple(activation: Any) -> Callable[[_Cell], list[fx.Node]]:
    def decompose(cell: _Cell) -> list[fx.Node]:
        of_input = cell.of_input()
        return [cell(activation, cell(aten.add.Tensor, cell.of_hidden(cell.state), of_input))]

    return decompose


_CELLS: dict[Any, Callable[[_Cell], list[fx.Node]]] = {
    aten.lstm_cell: _lstm,
    aten.gru_cell: _gru,
    aten.rnn_tanh_cell: _simple(aten.tanh.default),
    aten.rnn_relu_cell: _simple(aten.relu.default),
}


def _replace(node: fx.Node, results: list[fx.Node]) -> None:
    """Hands the results to the readers, of which those of a pair take its parts."""
    if len(results) == 1:
        node.replace_all_uses_with(results[0])
    else:
        for part in [found for user in node.users if (found := Item.of(user)) is not None]:
            part.node.replace_all_uses_with(results[part.index])
            node.graph.erase_node(part.node)
    node.graph.erase_node(node)
