"""What Inductor made of a step: its kernels, what they read and write, and what it left as calls.

`watch` looks at Inductor's scheduler after each graph that is compiled inside, so caches must be off there (it turns
them off). A *kernel* is one loop nest of the scheduler, one pass over memory: what is one Triton kernel on a GPU. (On
CPU several of them may share a C++ function.)

A *weight kernel* reads nothing but weights and what other weight kernels computed from them, in forward or saved for
backward: the cost of quantizing weights, which does not grow with the batch. Plain has some too, that bring a
convolution's weight into another layout. A weight is a graph input that has the shape of a parameter of at least two
dimensions, and not the batch's. Where a weight's kernel was fused with a gradient's, or tracks the weight's range as
state, it counts as a kernel and not as a weight kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor, nn


@dataclass
class Graph:
    """Counts of one forward or backward graph.

    Attributes:
        kernels: loop nests.
        weight_kernels: those of them that read weights only.
        extern_kernels: calls of libraries: matrix products, convolutions, attention, what was not fused.
        extern_fake_quantize: those of them that fake-quantize.
        bytes_accessed: what all of them read and write, each buffer once a kernel, by Inductor's own count.
    """

    kernels: int = 0
    weight_kernels: int = 0
    extern_kernels: int = 0
    extern_fake_quantize: int = 0
    bytes_accessed: int = 0


@dataclass
class Made:
    """The graphs of a step by Dynamo's frame and direction: what a recompile makes replaces what was before."""

    graphs: dict[tuple[str, bool], Graph] = field(default_factory=dict)
    weights: dict[str, set[str]] = field(default_factory=dict)  # by forward graph: names known in its backward

    def fields(self) -> dict[str, int | None]:
        """The sums over the graphs, as in a row; None where nothing was compiled."""
        found = self.graphs.values()
        return {f.name: sum(getattr(g, f.name) for g in found) if found else None for f in dataclasses.fields(Graph)}


@contextmanager
def watch(model: nn.Module, x: Tensor) -> Iterator[Made]:
    """Counts what Inductor compiles inside the block for ``model`` on ``x``."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config
    from torch._inductor.graph import GraphLowering  # private; tried on 2.13 and 2.15

    made = Made()
    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() > 1} - {tuple(x.shape)}
    compile_to_module = GraphLowering.compile_to_module

    def counted(lowering: GraphLowering) -> object:
        module = compile_to_module(lowering)
        _count(lowering, made, shapes)
        return module

    with (
        mock.patch.object(GraphLowering, "compile_to_module", counted),
        inductor_config.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
        functorch_config.patch(enable_autograd_cache=False, enable_remote_autograd_cache=False),
    ):
        yield made


def _count(lowering, made: Made, shapes: set[tuple[int, ...]]) -> None:  # type: ignore[no-untyped-def]
    """Adds one graph."""
    from torch._functorch.aot_autograd import get_graph_being_compiled  # private; tried on 2.13 and 2.15
    from torch._guards import CompileContext  # private; tried on 2.13 and 2.15

    pair = get_graph_being_compiled().split("_")[0]  # "0_forward" and "0_backward" are one step's
    identity = CompileContext.current_compile_id()
    graph = made.graphs[str(pair if identity is None else identity.frame_id), bool(lowering.is_backward)] = Graph()
    placeholders = [node for node in lowering.graph.nodes if node.op == "placeholder"]
    if lowering.is_backward:
        of_weights = set(made.weights.get(pair, ()))
    else:
        of_weights = {node.name for node in placeholders if _shape(node) in shapes}
    for node in lowering.scheduler.nodes:
        graph.bytes_accessed += int(node.get_read_write_buffers_sizes())
        if node.is_extern():
            name = _called(node.node)
            graph.extern_kernels += bool(name)
            graph.extern_fake_quantize += "fake_quant" in name
        elif node.get_buffer_names() and type(node).__name__ != "NopKernelSchedulerNode":
            graph.kernels += 1
            reads = {dependency.name for dependency in node.read_writes.reads} - node.get_buffer_names()
            if reads and reads <= of_weights:
                graph.weight_kernels += 1
                of_weights |= node.get_buffer_names()
    if not lowering.is_backward:
        (outputs,) = (node for node in lowering.graph.nodes if node.op == "output")
        both = zip(outputs.args[0], lowering.get_output_names(), strict=True)
        saved = {node.name for node, buffer in both if isinstance(node, torch.fx.Node) and buffer in of_weights}
        made.weights[pair] = saved | (of_weights & {node.name for node in placeholders})


def _shape(node: torch.fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not all(isinstance(size, int) for size in value.shape):
        return None  # a size that is left open is not a weight's, and cannot be hashed
    return tuple(value.shape)


def _called(node: object) -> str:
    """The operator that an extern kernel calls; empty for the parts of another's result."""
    name = getattr(node, "op_overload", None) or getattr(node, "python_kernel_name", None)
    return "" if name is None else str(name)
