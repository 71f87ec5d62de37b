"""Fake-quant ops into the arithmetic that Inductor fuses with its neighbours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

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
_KEPT = ("stack_trace", "nn_module_stack", "original_aten", "partitioner_tag", "recompute", "ac_graph_id")


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
        table = dict(self.decompositions()) if nodes else {}
        bodies: dict[tuple[object, ...], fx.Graph] = {}
        for node in nodes:
            key = _signature(node)
            if key not in bodies:
                bodies[key] = _traced(node, table)
            _inline(gm.graph, node, bodies[key])
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


def _signature(node: fx.Node) -> tuple[object, ...]:
    """Nodes with equal signatures have equal bodies; tracing is what costs, so layers of one shape share it."""
    numbers = tuple(None if isinstance(a, fx.Node) else a for a in node.args)
    values = (n.meta["val"] for n in _operands(node))
    tensors = tuple((v.dtype, v.device, str(tuple(v.shape)), str(v.stride())) for v in values)
    return node.target, numbers, tuple(node.kwargs.items()), tensors


def _traced(node: fx.Node, table: dict[Any, Callable[..., Any]]) -> fx.Graph:
    kernel = functools.partial(_positional, ARITHMETIC[node.target], node.args, dict(node.kwargs))
    values = [n.meta["val"] for n in _operands(node)]
    mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None)
    assert mode is not None, f"{node.name} reads no fake tensor"
    with mode:
        return make_fx(kernel, decomposition_table=table)(*values).graph


def _inline(graph: fx.Graph, node: fx.Node, body: fx.Graph) -> None:
    mapped: dict[fx.Node, fx.Node] = {}
    placeholders = iter(_operands(node))
    backward = node.target in fake_quantize.BACKWARD
    behind = {next(iter(body.nodes))}  # what depends on the incoming gradient
    with graph.inserting_before(node):
        for inner in body.nodes:
            if inner.op == "placeholder":
                mapped[inner] = next(placeholders)
            elif inner.op == "output":
                node.replace_all_uses_with(mapped[inner.args[0]])
                if backward:
                    mark_masked_gradient(mapped[inner.args[0]])
            else:
                mapped[inner] = graph.node_copy(inner, mapped.__getitem__)
                for key in _KEPT:
                    if key in node.meta:
                        mapped[inner].meta[key] = node.meta[key]
                if backward and not any(n in behind for n in inner.all_input_nodes):
                    # The clip mask: a function of the input that forward could compute and keep.
                    mapped[inner].meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
                elif backward:
                    behind.add(inner)
    graph.erase_node(node)


def _positional(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *tensors: torch.Tensor) -> torch.Tensor:
    """The kernel with node arguments taken from ``tensors``, in order."""
    given = iter(tensors)
    return kernel(*(next(given) if isinstance(a, fx.Node) else a for a in args), **kwargs)
