"""What several loops read is computed in the first of them and stored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.graph.arguments import argument, has_argument
from fxquant.graph.edit import call
from fxquant.graph.elementwise import elements, is_heavy, is_pointwise, is_small
from fxquant.graph.meta import is_masked_gradient
from fxquant.graph.moves import is_moving
from fxquant.graph.nodes import packet
from fxquant.ops import fake_quantize, quantize
from fxquant.ops.marks import MATERIALIZE
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.stages import POST_GRAD

aten = torch.ops.aten
_EXTREMES = (aten.amin, aten.amax)
_FAKE_QUANTS = (*fake_quantize.FAKE_QUANTIZE, *fake_quantize.BACKWARD, *quantize.DEQUANTIZE)
_FEW = 1024  # elements: fewer stay in cache, however often they are read


@dataclass(frozen=True, kw_only=True)
class MaterializeShared(Pass):
    """Post-grad graph, on CPU: ``amin(gelu(u)), …, round(gelu(u) / s)``  →  ``x = materialize(gelu(u)); amin(x), …``.

    Inductor computes what it has not stored anew in each loop that reads it, unless it holds it for dear: on CPU exp,
    log, sigmoid and tanh, but not erf. Three values it should hold for dear, too:

    - an observed one, with an erf and the like in it or computed from several tensors. The range of a tensor is known
      when a loop over it has ended, so its codes are made in a second one, and its clip mask in a third. A
      transformer's step of 214 ms had 48 erf of 8 MB each instead of 16: 12 ms. Of a residual CNN's bytes it is 6 %.
      Where nothing dear is in it, the extremes are taken of the value and not of what is stored: then they read what
      the storing loop reads, and become one loop with it. 2 % of a residual CNN's bytes.
    - a sum that a normalization reads: in one loop for the mean, in one for the variance, in one for the result. A
      residual stream is a sum of up to four tensors there; quantization adds loops to it. 2 % of a transformer's step.
      It is stored row by row, in the normalization's own loop.
    - a gradient after a clip mask that several read, as LayerNorm's: Inductor stores the rounded codes that the mask
      is made of instead, for loops that read the gradient besides. 2 % of the step.
    """

    stages: ClassVar = (POST_GRAD,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Inserts into the graph itself; what reads a stored value reads memory, and is judged so."""
        dear: set[fx.Node] = set()
        done = 0
        for node in list(gm.graph.nodes):
            if is_heavy(node) or (_is_elementwise(node) and any(source in dear for source in node.all_input_nodes)):
                dear.add(node)
            if _is_shared(node) and (is_masked_gradient(node) or _is_worth_it(node, dear)):
                _materialize(gm.graph, node, is_dear=node in dear)
                done += 1
        return done


def _is_elementwise(node: fx.Node) -> bool:
    return is_moving(node) or is_pointwise(node) or node.target in _FAKE_QUANTS


def _is_shared(node: fx.Node) -> bool:
    """Whether several read a tensor, on CPU, that this pass has not yet had stored."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
        return False
    return len(node.users) > 1 and not any(user.target is MATERIALIZE for user in node.users)


def _is_worth_it(node: fx.Node, dear: set[fx.Node]) -> bool:
    if _is_observed(node):
        return node in dear or _reads_several(node)
    return _is_normalized_sum(node)


def _is_observed(node: fx.Node) -> bool:
    return _is_any(node.users, *_EXTREMES)


def _reads_several(node: fx.Node) -> bool:
    """Whether two large tensors have to be read to compute ``node``."""
    stored: set[fx.Node] = set()
    stack, seen = [node], {node}
    while stack:
        each = stack.pop()
        if _is_elementwise(each):
            stack += [source for source in _large_inputs(each) if source not in seen]
            seen.update(stack)
        else:
            stored.add(each)
    return len(stored) > 1


def _is_normalized_sum(node: fx.Node) -> bool:
    if packet(node) is not aten.add or len(_large_inputs(node)) < 2 or (elements(node) or 0) < _FEW:
        return False
    squares = [user for user in node.users if packet(user) in (aten.pow, aten.mul)]
    return _is_any(node.users, aten.var_mean) or any(_is_any(square.users, aten.mean) for square in squares)


def _large_inputs(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if elements(source) and not is_small(source, node)]


def _is_any(nodes: Iterable[fx.Node], *packets: object) -> bool:
    return any(packet(node) in packets for node in nodes)


def _materialize(graph: fx.Graph, node: fx.Node, *, is_dear: bool) -> None:
    observed = _is_observed(node)
    with graph.inserting_after(node):
        stored = call(graph, MATERIALIZE, node, 0 if observed else _rows(node), like=node)

    def reads_memory(user: fx.Node) -> bool:
        return user is not stored and (is_dear or not _is_any((user,), *_EXTREMES))

    node.replace_all_uses_with(stored, delete_user_cb=reads_memory)


def _rows(node: fx.Node) -> int:
    """How many dimensions of ``node`` a normalization leaves: all before those that it takes its mean over."""
    rank = node.meta["val"].dim()
    for each in (*node.users, *(reader for user in node.users for reader in user.users)):
        is_mean = packet(each) in (aten.var_mean, aten.mean) and has_argument(each, "dim")
        dims = argument(each, "dim") if is_mean else None
        if isinstance(dims, (list, tuple)):
            left = rank - len(dims)
            return left if sorted(int(d) % rank for d in dims) == list(range(left, rank)) else 0
    return 0
