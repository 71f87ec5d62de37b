"""A joint graph of forward and backward, read once: which nodes run when, and what backward has anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import fx

from fxquant.graph.edit import mutates
from fxquant.graph.elementwise import is_pointwise, is_small
from fxquant.graph.moves import is_moving
from fxquant.graph.views import FakeQuantBackward
from fxquant.ops import fake_quantize


class Joint:
    """``forward``: nodes that the model's outputs or mutations need. All others run in backward, or nowhere."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.tangents = [n for n in graph.nodes if n.op == "placeholder" and str(n.target).startswith("tangents")]
        after = set(self.tangents)
        for node in graph.nodes:
            if node.op != "output" and any(source in after for source in node.all_input_nodes):
                after.add(node)
        ends = [n for n in graph.output_node().all_input_nodes if n not in after]
        ends += [n for n in graph.nodes if n.op == "call_function" and n not in after and mutates(n)]
        needed: set[fx.Node] = set(ends)
        for node in reversed(graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        self.forward = {node: None for node in graph.nodes if node in needed}
        self.after_tangents = after

    def only_backward(self) -> Iterator[fx.Node]:
        """Nodes that forward does not need."""
        return (n for n in self.graph.nodes if n.op == "call_function" and n not in self.forward)

    def wanted(self, skip: Callable[[fx.Node], bool]) -> set[fx.Node]:
        """Forward's values that backward reads or computes again from what it reads.

        A fake-quant node is one as itself, not by what it is computed from. What only a fake-quant's gradient reads as
        its input is none, nor is what nodes read that ``skip`` names.
        """
        found: set[fx.Node] = set()
        stack = [source for node in self.only_backward() if not skip(node) for source in _read(node)]
        while stack:
            node = stack.pop()
            if node in found or node not in self.forward:
                continue
            found.add(node)
            if node.target not in fake_quantize.FAKE_QUANTIZE and (is_moving(node) or is_pointwise(node)):
                stack += node.all_input_nodes
        return found

    def kept(self, wanted: set[fx.Node]) -> set[fx.Node]:
        """Values that backward has anyway, or gets from such values by pointwise steps, none of them a fake-quant.

        A GELU counts too: computed again from its input, which its own gradient reads, it took a transformer's step as
        long as its codes did (1.07 and 1.08 of plain), and an eighth less was kept.
        """
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.target in fake_quantize.FAKE_QUANTIZE:
                continue
            if node.op == "placeholder" or node in wanted or _is_cheap(node, found):
                found.add(node)
        return found


def _read(node: fx.Node) -> list[fx.Node]:
    gradient = FakeQuantBackward.of(node)
    return [source for source in node.all_input_nodes if gradient is None or source is not gradient.input]


def _is_cheap(node: fx.Node, found: set[fx.Node]) -> bool:
    if not is_moving(node) and not is_pointwise(node):
        return False
    return all(source in found or is_small(source, node) for source in node.all_input_nodes)
