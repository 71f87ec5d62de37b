"""Fake-quant ops into the arithmetic that Inductor fuses with its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from fxquant.graph.inline import Bodies, of_operands, paste
from fxquant.graph.meta import mark_masked_gradient
from fxquant.graph.nodes import call_nodes
from fxquant.ops import fake_quantize, quantize, saved
from fxquant.ops.library import ARITHMETIC
from fxquant.passes.base import Pass, PassResult

_OPS = (
    *fake_quantize.FAKE_QUANTIZE,
    *fake_quantize.BACKWARD,
    *quantize.QUANTIZE,
    *quantize.DEQUANTIZE,
    *saved.FORWARD,
    *saved.BACKWARD,
)

# As nodes that do not fuse, in the joint graph, these make the partitioner count what they read as stored; else it
# takes a byte for two, no better than bfloat16.
_READERS = (*quantize.DEQUANTIZE, *saved.BACKWARD)


@dataclass(frozen=True, kw_only=True)
class LowerFakeQuantize(Pass):
    """``fake_quantize(x, s, z)``  →  ``div, round, add, where, where, sub, mul`` on the same operands.

    The arithmetic is traced from the op's own kernel, so eager and compiled code share one definition. What is
    inlined keeps the node's recompute tags; in the backward op, what does not depend on the gradient (the clip mask)
    must be recomputed, so that it exists only inside fused kernels.

    ``decompositions`` gives the table of the compiler behind, for ops that it takes in decomposed form only. ``where``
    says which nodes are replaced: of a ``"joint"`` graph gradients only, or ``"beside integers"`` all but what reads
    saved codes and masks; ``"behind"`` the partitioner what Inductor does not lower by itself (`fxquant.lowerings`);
    by default all.
    """

    decompositions: Callable[[], Mapping[Any, Callable[..., Any]]] = field(default=dict, repr=False)
    where: Literal["joint", "beside integers", "behind", "anywhere"] = "anywhere"

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Replaces every fake-quant node by its traced body."""
        nodes = [node for node in call_nodes(gm.graph) if node.target in _OPS]
        nodes = list(filter(_CHOICES[self.where], nodes))
        bodies = Bodies(self.decompositions() if nodes else {})
        for node in nodes:
            arithmetic = of_operands(ARITHMETIC[node.target], node.args, node.kwargs, _is_node)
            _replace(node, bodies.of(_form(node), arithmetic, _operands(node)))
        return len(nodes)


def _is_gradient(node: fx.Node) -> bool:
    """All else is one node to the partitioner as well: tags say what is recomputed (`TagRecompute`)."""
    return node.target in fake_quantize.BACKWARD


def _is_no_reader(node: fx.Node) -> bool:
    """Where products take codes, the partitioner has to see how they are computed.

    Else it keeps fake-quantized floats beside them: of a mixer's block 250 kB instead of 119.
    """
    return node.target not in _READERS


def _beyond_lowerings(node: fx.Node) -> bool:
    """Whether Inductor has to meet the arithmetic as nodes.

    On CPU it takes a fake-quant in one, which spares it half of the nodes of a graph; not on GPUs, where
    `keep_divisions` looks for the divisions.
    """
    return any(n.meta["val"].device.type != "cpu" for n in (node, *_operands(node)))


_CHOICES: dict[str, Callable[[fx.Node], bool]] = {
    "joint": _is_gradient,
    "beside integers": _is_no_reader,
    "behind": _beyond_lowerings,
    "anywhere": lambda node: True,
}


def _operands(node: fx.Node) -> list[fx.Node]:
    return [a for a in node.args if isinstance(a, fx.Node)]


def _is_node(value: object) -> bool:
    return isinstance(value, fx.Node)


def _form(node: fx.Node) -> tuple[object, ...]:
    """What a body depends on beside its operands: the operator, and the arguments that are no nodes."""
    return node.target, tuple(None if isinstance(a, fx.Node) else a for a in node.args), tuple(node.kwargs.items())


def _replace(node: fx.Node, body: fx.Graph) -> None:
    """Puts a body in the place of its node."""
    with node.graph.inserting_before(node):
        is_gradient = node.target in fake_quantize.BACKWARD
        made = _paste_gradient(node, body) if is_gradient else paste(node.graph, body, _operands(node), origin=node)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


def _paste_gradient(node: fx.Node, body: fx.Graph) -> fx.Node:
    """The body of a gradient; what does not depend on the incoming one is the clip mask."""
    dependent = {next(iter(body.nodes))}

    def tag(old: fx.Node, new: fx.Node) -> None:
        if any(each in dependent for each in old.all_input_nodes):
            dependent.add(old)
        else:  # a function of the input that forward could compute and keep
            new.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE

    result: fx.Node = paste(node.graph, body, _operands(node), origin=node, copied=tag)
    mark_masked_gradient(result)
    return result
