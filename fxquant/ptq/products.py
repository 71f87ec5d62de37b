"""The products of a graph with a weight: which channels its elements join, how it is a matrix, where its bias is."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional

from fxquant.graph.arguments import argument
from fxquant.graph.kinds import Kind, kind_of, operands
from fxquant.graph.nodes import only_reader, packet
from fxquant.graph.views import BlockQparams, Convolution, Item
from fxquant.ptq.bound_graph import BoundGraph
from fxquant.ptq.weight_path import WeightPath

aten = torch.ops.aten
_INPUTS = {"linear": "input", "conv": "input", "conv_transpose": "input", "matmul": "lhs"}


@dataclass(frozen=True, eq=False)
class Product:
    """A convolution, linear or matrix product whose weight is a parameter.

    Attributes:
        key: the plan's key of its weight; of a weight in float, the operator's name.
    """

    graph: BoundGraph
    node: fx.Node
    kind: Kind
    weight: WeightPath
    key: str

    @property
    def input(self) -> fx.Node:
        """The other operand."""
        return operands(self.node)[_INPUTS[self.kind.name]]

    @property
    def is_quantized(self) -> bool:
        """Whether a site is on the weight."""
        return self.weight.quantizer is not None

    @property
    def end(self) -> fx.Node:
        """The product, or the addition of a parameter with which `torch.matmul` is a linear."""
        return self._added[0] if self._added else self.node

    @property
    def bias(self) -> fx.Node | None:
        """What is added to each channel; None for nothing."""
        if self._added:
            return self._added[1]
        if self.kind.name == "matmul":
            return None
        value = argument(self.node, "self" if packet(self.node) is aten.addmm else "bias")
        return value if isinstance(value, fx.Node) else None

    @functools.cached_property
    def _added(self) -> tuple[fx.Node, fx.Node] | None:
        user = only_reader(self.node) if self.kind.name == "matmul" else None
        if user is None or user.target is not aten.add.Tensor or argument(user, "alpha") != 1:
            return None
        others = [n for n in user.all_input_nodes if n is not self.node and n in self.graph.constants]
        return (user, others[0]) if others and tuple(others[0].meta["val"].shape) == (self.outputs,) else None

    # Channels

    @property
    def _is_transposed(self) -> bool:
        return self.kind.name == "conv_transpose"

    @property
    def groups(self) -> int:
        """Of a convolution; 1 of others."""
        view = Convolution.of(self.node)
        return 1 if view is None else view.groups

    @property
    def _shape(self) -> tuple[int, ...]:
        return tuple(self.weight_operand.meta["val"].shape)

    @property
    def weight_operand(self) -> fx.Node:
        """The node that the operator reads as its weight."""
        assert self.kind.weight is not None
        return operands(self.node)[self.kind.weight]

    @property
    def _is_columns(self) -> bool:
        """Whether output channels are the weight's columns: ``[K, N]``."""
        return self.kind.weight_axis in (-1, 1)

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return self._shape[1] * self.groups if self._is_columns else self._shape[0]

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return self._shape[0] if self._is_columns else self._shape[1] * self.groups

    def _of_elements(self, whole: int) -> tuple[Tensor, Tensor]:
        """For ``[rows, columns]`` of the weight: the channel of a row, and that of an element along the other side.

        ``whole`` rows in all; those of a group meet channels of their own.
        """
        rows, columns = self._shape[:2]
        row = torch.arange(rows, device=self.weight.tensor.device).unsqueeze(1).expand(rows, columns)
        group = row // (whole // self.groups)
        return row, group * columns + torch.arange(columns, device=row.device)

    @property
    def channels(self) -> tuple[Tensor, Tensor]:
        """For each element of the weight operand its output and its input channel."""
        row, column = self._of_elements(self._shape[0])
        pair = (column, row) if self._is_columns else (row, column)
        shape = (*self._shape[:2], *[1] * (len(self._shape) - 2))
        out, into = (each.reshape(shape).expand(self._shape) for each in pair)
        return out, into

    def channel_dim(self, value: fx.Node) -> int:
        """The dimension of channels of its input or result."""
        dims = int(value.meta["val"].dim())
        return dims - 1 if Convolution.of(self.node) is None else dims - (len(self._shape) - 2) - 1

    def amax(self, channels: Tensor, count: int, operand: Tensor) -> Tensor:
        """The largest magnitude of ``operand``, shaped like the weight, for each of ``count`` channels."""
        found = torch.zeros(count, dtype=operand.dtype, device=operand.device)
        return found.scatter_reduce(0, channels.reshape(-1), operand.abs().reshape(-1), "amax")

    def why_no_codes(self) -> str | None:
        """Why the weight has no integers that could be chosen; None if it has."""
        if not self.is_quantized:
            return "its weight is float"
        if self.weight.grid.element is not None:
            return "its codes are small floats"
        if BlockQparams.of(getattr(Item.of(self.weight.grid.scale), "source", None)):
            return "its scales are quantized too"
        return None

    # As a matrix

    def why_no_matrix(self) -> str | None:
        """Why the product is not one of a matrix and vectors; None if it is."""
        if self.kind.name == "conv_transpose":
            return "transposed convolutions are not looked at as matrices"
        if self.kind.name != "conv" and len(self._shape) != 2:
            return f"its weight has {len(self._shape)} dimensions"
        return None

    def matrix(self, operand: Tensor) -> Tensor:
        """``[groups, rows, values of a row]``: what a vector of the input is multiplied by."""
        if self._is_columns:
            operand = operand.t()
        return operand.reshape(self.groups, operand.shape[0] // self.groups, -1)

    def operand(self, matrix: Tensor) -> Tensor:
        """Inverse of `matrix`."""
        if self._is_columns:
            return matrix.reshape(matrix.shape[1:]).t()
        return matrix.reshape(self._shape)

    def vectors(self, x: Tensor) -> Tensor:
        """``[groups, vectors, values of a row]``: what the weight's rows are multiplied by."""
        if self.kind.name != "conv":
            return x.reshape(1, -1, x.shape[-1])
        view, spatial = Convolution.of(self.node), len(self._shape) - 2
        assert view is not None
        if x.dim() == spatial + 1:
            x = x.unsqueeze(0)
        kernel = self._shape[2:]
        stride, dilation = (_each(value, spatial) for value in (view.stride, view.dilation))
        x = functional.pad(x, _margins(view, kernel, dilation))
        for dim, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
            x = x.unfold(dim, apart * (size - 1) + 1, step)[..., ::apart]
        # [N, C, out …, kernel …] → [groups, N · out …, C / groups · kernel …]
        order = (0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial))
        x = x.permute(order).flatten(0, spatial)
        return x.reshape(x.shape[0], self.groups, -1).transpose(0, 1)


def _each(value: object, count: int) -> list[int]:
    numbers = [int(n) for n in value] if isinstance(value, (tuple, list)) else [int(value)]  # type: ignore[call-overload]
    return numbers * count if len(numbers) == 1 else numbers


def _margins(view: Convolution, kernel: tuple[int, ...], dilation: list[int]) -> list[int]:
    """Zeros before and after, last dimension first."""
    if isinstance(view.padding, str):
        whole = [d * (k - 1) if view.padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        pairs = [(each // 2, each - each // 2) for each in whole]
    else:
        pairs = [(each, each) for each in _each(view.padding, len(kernel))]
    return [n for pair in reversed(pairs) for n in pair]


def look(graph: BoundGraph) -> tuple[list[Product], list[tuple[str, str]]]:
    """The products of a graph with a parameter for a weight, and its other sites on weights: (key, why not)."""
    found, declined, seen = [], [], set()
    for node in graph.calls():
        kind = kind_of(node)
        value = None if kind is None or kind.weight is None else operands(node).get(kind.weight)
        if kind is None or value is None or value not in graph.constants or node in graph.constants:
            continue
        path = WeightPath.find(graph, value)
        quantizer = _site_above(graph, value)
        key = graph.keys[quantizer][0] if quantizer is not None else node.name
        seen.add(quantizer)
        if isinstance(path, str):
            declined.append((key, path))
        elif kind.name not in _INPUTS:
            declined.append((key, "rows of an embedding are looked up: each value is met alone"))
        elif packet(node) is aten.baddbmm:
            declined.append((key, "a batch of sums and products is not looked at"))
        elif path.tensor.dim() < 2:
            declined.append((key, "its weight is a vector"))
        else:
            found.append(Product(graph, node, kind, path, key))
    return found, declined


def _site_above(graph: BoundGraph, value: fx.Node) -> fx.Node | None:
    """The site that a constant operand is computed through, if any."""
    while value not in graph.state and value not in graph.keys and value.all_input_nodes:
        value = value.all_input_nodes[0]
    return value if value in graph.keys else None


class Products:
    """The products of all graphs that ran, by key; those of another batch size are the same.

    Attributes:
        all: key → the first product of that key.
        declined: key → why a site on a weight is none.
    """

    def __init__(self, graphs: Iterable[BoundGraph]) -> None:
        self.all: dict[str, Product] = {}
        self.declined: dict[str, str] = {}
        self._graphs = list(graphs)
        self._keys: dict[fx.Node, str] = {}  # of products and of the additions that end them
        for graph in self._graphs:
            found, declined = products_of(graph)
            self.declined.update(declined)
            for one in found:
                self.all.setdefault(one.key, one)
                self._keys.update({one.node: one.key, one.end: one.key})

    def __iter__(self) -> Iterator[Product]:
        return iter(self.all.values())

    def key_of(self, node: fx.Node) -> str:
        """The key of a product's node; the name of another operator."""
        return self._keys.get(node) or str(getattr(packet(node), "__name__", node.name))

    def other_reader(self, tensor: Tensor, key: str, *, once: bool = False) -> str | None:
        """Who reads a parameter beside the operator of ``key``; ``once``: or that one, where it runs again."""
        for graph in self._graphs:
            nodes = graph.readers.get(id(tensor), [])
            others = [node for node in nodes if self.key_of(node) != key]
            if others:
                return self.key_of(others[0])
            if once and len({*nodes}) > 1:
                return f"another run of {key}"
        return None


def products_of(graph: BoundGraph) -> tuple[list[Product], list[tuple[str, str]]]:
    """`look`, once for each graph."""
    held = vars(graph)
    if "products" not in held:
        held["products"] = look(graph)
    found: tuple[list[Product], list[tuple[str, str]]] = held["products"]
    return found
