"""Fake-quant ops into the arithmetic that Inductor fuses with its neighbours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from fxquant.ops import fake_quantize, quantize, saved
from fxquant.ops.library import ARITHMETIC
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.materialize_shared import mark_masked_gradient

_OPS = (*fake_quantize.FAKE_QUANTIZE, *fake_quantize.BACKWARD, *quantize.QUANTIZE, *saved.FORWARD)
# What backward reads saved codes and masks with. As nodes that do not fuse, in the joint graph, they make the
# partitioner count what they read as stored; else it takes a byte for two, no better than bfloat16.
_READERS = (*quantize.DEQUANTIZE, *saved.BACKWARD)
_KEPT = ("stack_trace", "nn_module_stack", "original_aten", "partitioner_tag", "recompute", "ac_graph_id")


@dataclass(frozen=True, kw_only=True)
class LowerFakeQuantize(Pass):
    """``fake_quantize(x, s, z)``  →  ``div, round, add, where, where, sub, mul`` on the same operands.

    The arithmetic is traced from the op's own kernel, so eager and compiled code share one definition. What is
    inlined keeps the node's recompute tags; in the backward op, what does not depend on the gradient (the clip mask)
    must be recomputed, so that it exists only inside fused kernels.

    ``decompositions`` gives the table of the compiler behind, for ops that it takes in decomposed form only. Without
    ``readers``, what backward reads saved codes and masks with stays a node.
    """

    decompositions: Callable[[], Mapping[Any, Callable[..., Any]]] = field(default=dict, repr=False)
    readers: bool = True

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Replaces every fake-quant node by its traced body."""
        ops = (*_OPS, *_READERS) if self.readers else _OPS
        nodes = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in ops]
        table = dict(self.decompositions()) if nodes else {}
        bodies: dict[tuple[object, ...], fx.Graph] = {}
        for node in nodes:
            key = _signature(node)
            if key not in bodies:
                bodies[key] = _traced(node, table)
            _inline(gm.graph, node, bodies[key])
        return len(nodes)


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
