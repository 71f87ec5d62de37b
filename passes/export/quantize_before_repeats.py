"""A weight that is computed and then repeated for each element of the batch is quantized before it is repeated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph.dependence import constant_nodes
from fxquant.graph.edit import arguments_with, call, item
from fxquant.graph.meta import SITE, STANDS_FOR, copied_meta, site_of
from fxquant.graph.moves import moves
from fxquant.graph.nodes import call_nodes, packet
from fxquant.graph.views import FakeQuant, SymmetricQparams, qparams_of
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.stages import EXPORT

aten = torch.ops.aten

# The greatest value stays what it is.
_KEEPING = moves("aliases", "copies", "reshapes", "ones", "permutes", "repeats") | {aten.repeat, aten.tile}


@dataclass(frozen=True, kw_only=True)
class QuantizeBeforeRepeats(Pass):
    """``FQ(expand(w, [n, …]), max|expand(w)| / 127)``  →  ``expand(FQ(w, max|w| / 127), [n, …])``, with n of the input.

    For a ``w`` of parameters only and one scale for the tensor: the codes are the same, and `Freeze` then finds a
    constant. With n open, the scale would follow the input, of which it has nothing but the size.
    """

    stages: ClassVar = (EXPORT,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Moves the fake-quants of such weights."""
        constants = constant_nodes(gm.graph)
        sites = [view for node in call_nodes(gm.graph) if (view := FakeQuant.of(node)) is not None]
        done = sum(_quantize_before(view, constants) for view in sites if view.input not in constants)
        if done:
            gm.graph.eliminate_dead_code()
        return done


def _quantize_before(view: FakeQuant, constants: set[fx.Node]) -> bool:
    site, own_range = site_of(view.node), qparams_of(view.scale)
    if site is None or site.role != "weight" or view.axis is not None or not isinstance(own_range, SymmetricQparams):
        return False
    chain: list[fx.Node] = []
    source = view.input
    while source not in constants and packet(source) in _KEEPING:
        chain.append(source)
        source = source.all_input_nodes[0]
    if source not in constants:
        return False
    graph = view.node.graph
    with graph.inserting_before(view.node):
        args, kwargs = arguments_with(own_range.node, own_range.input, source)
        both = call(graph, own_range.node.target, *args, like=view.node, **kwargs)
        grid = {view.input: source, view.scale: item(graph, both, 0), view.zero_point: item(graph, both, 1)}
        args, kwargs = fx.map_arg((view.node.args, view.node.kwargs), lambda node: grid[node])
        value = call(graph, view.node.target, *args, like=view.node, **kwargs)
        value.meta.update(copied_meta(view.node, SITE, STANDS_FOR))
        for move in reversed(chain):
            args, kwargs = arguments_with(move, source, value)
            source, value = move, call(graph, move.target, *args, like=move, **kwargs)
    view.node.replace_all_uses_with(value)
    graph.erase_node(view.node)
    return True
