"""A captured graph with the tensors that a run gave it: values of what depends on parameters alone, and who reads."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from fxquant.graph.dependence import constant_nodes
from fxquant.graph.moves import aten
from fxquant.graph.nodes import call_nodes, packet
from fxquant.ops.bias import FAKE_QUANTIZE_BIAS
from fxquant.ops.qparams import QPARAM_OPS

_SIZES = frozenset({aten.sym_size, aten.sym_stride, aten.sym_numel})


class BoundGraph:
    """A captured QAT graph and the parameters and buffers of one way to run it.

    Attributes:
        gm: the graph, in which every site is one fake-quant.
        state: placeholder → the parameter or buffer that it is.
        keys: fake-quant of a site → the plan's keys of the sites on its tensor.
        constants: nodes that depend on parameters and buffers alone.
    """

    def __init__(self, gm: fx.GraphModule, state: dict[fx.Node, Tensor], keys: dict[fx.Node, tuple[str, ...]]) -> None:
        self.gm, self.state, self.keys = gm, state, keys
        self.constants = constant_nodes(gm.graph)

    def value(self, node: fx.Node) -> Any:
        """What a constant node computes from the tensors as they are now."""
        return self._value(node, {})

    def _value(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        if node in self.state:
            return self.state[node].detach()
        if node.op == "get_attr":
            return functools.reduce(getattr, str(node.target).split("."), self.gm)
        if node not in known:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self._value(n, known))
            assert callable(node.target), f"{node.name} is a call"
            known[node] = node.target(*args, **kwargs)
        return known[node]

    @functools.cached_property
    def readers(self) -> dict[int, list[fx.Node]]:
        """Of each parameter and buffer, by id: the operators that read it, or something computed from it alone.

        What only finds a scale, or asks for sizes, is none.
        """
        found: dict[int, list[fx.Node]] = {}
        for placeholder, tensor in self.state.items():
            found.setdefault(id(tensor), []).extend(self._read_by(placeholder))
        return found

    def _read_by(self, placeholder: fx.Node) -> list[fx.Node]:
        waiting, seen, ends = [placeholder], {placeholder}, []
        while waiting:
            for user in waiting.pop().users:
                if user in seen or user.target in QPARAM_OPS or packet(user) in _SIZES:
                    continue
                seen.add(user)
                if user.op == "call_function" and (user in self.constants or user.target is FAKE_QUANTIZE_BIAS):
                    waiting.append(user)
                else:
                    ends.append(user)
        return ends

    def calls(self) -> Iterator[fx.Node]:
        """The operators in the order in which they run."""
        return call_nodes(self.gm.graph)
