"""Training steps written by hand, as `trace_step` would give them: nodes, kernels and what is kept, no compile."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx, nn

from fxquant.backend.inductor.scheduled import Access, ScheduledKernel
from fxquant.backend.inductor.step import Kept, Step

S0 = sympy.Symbol("s0", integer=True, positive=True)  # a size that a graph leaves open
Bytes = tuple[Any, list[fx.Node]]


class Nodes:
    """Nodes of one graph, each with the quantizer that it computes for and the module that it ran in."""

    def __init__(self) -> None:
        self.graph = fx.Graph()

    def input(self, name: str) -> fx.Node:
        return self.graph.placeholder(name)

    def call(self, op: Any, site: str | None = None, module: str = "", *, backward: bool = False) -> fx.Node:
        """A call of ``op``; of a backward node the frames are those of the forward node that it belongs to."""
        node = self.graph.call_function(op, ())
        stack: dict[str, tuple[str, type]] = {"fxquant.site": (site, nn.Module)} if site is not None else {}
        if module:
            stack |= {"0": ("L['self']", nn.Module), "1": (f"L['self']._modules['{module}']", nn.Linear)}
        node.meta["fwd_nn_module_stack" if backward else "nn_module_stack"] = stack
        return node


def kernel(reads: Iterable[Bytes] = (), writes: Iterable[Bytes] = ()) -> ScheduledKernel:
    """One kernel, from the bytes of each tensor and the nodes that read or write it there."""
    return ScheduledKernel(reads=_accesses(reads), writes=_accesses(writes))


def _accesses(those: Iterable[Bytes]) -> tuple[Access, ...]:
    return tuple(Access(size=sympy.sympify(size), nodes=tuple(nodes)) for size, nodes in those)


def kept(size: Any, node: fx.Node, readers: Iterable[fx.Node], shape: tuple[Any, ...] = (4,)) -> Kept:
    """One allocation of float32 numbers."""
    return Kept(size=sympy.sympify(size), dtype=torch.float32, shape=shape, node=node, readers=tuple(readers))


def step(kernels: Iterable[ScheduledKernel], those: Iterable[Kept] = (), batch: Iterable[sympy.Symbol] = ()) -> Step:
    """A step of these kernels and allocations; ``batch``: the symbols that stand for the batch."""
    empty = fx.GraphModule({}, fx.Graph())
    return Step(forward=empty, backward=empty, kernels=tuple(kernels), kept=tuple(those), open=frozenset(batch))
