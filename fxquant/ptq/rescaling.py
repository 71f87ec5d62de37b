"""Where numbers can be moved from a tensor's channels into the weights that read it, the model's function kept.

``T / s`` for ``T`` is reached by dividing the parameters that make its channels, and undone by multiplying those that
read them: weights, whatever lies between, as long as it commutes with a scale for each channel.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from fxquant.graph.arguments import argument
from fxquant.graph.nodes import packet
from fxquant.graph.views import FakeQuant
from fxquant.ops.qparams import QPARAM_OPS
from fxquant.ptq.biases import beta_of, gamma_of, plain_bias
from fxquant.ptq.bound_graph import BoundGraph
from fxquant.ptq.labels import along, carried, first_labels
from fxquant.ptq.products import Product, Products, products_of

aten = torch.ops.aten
_SIZES = frozenset({aten.sym_size, aten.sym_stride, aten.sym_numel})
_NORMS = frozenset({aten.layer_norm, aten.group_norm, aten.batch_norm, aten.rms_norm, aten.instance_norm})


@dataclass(frozen=True, eq=False)
class Part:
    """A parameter and, for each of its elements, the channel that it belongs to; −1 for none."""

    tensor: nn.Parameter
    channels: Tensor


@dataclass(frozen=True, eq=False)
class Source:
    """What makes a tensor with channels: a product, a norm, or a parameter that it is multiplied by.

    Attributes:
        key: of the product, or the operator's name.
        start: the node from which on the channels can be scaled.
        dim: their dimension there.
        parts: the parameters that scale them.
        product: where it is one.
    """

    key: str
    start: fx.Node
    dim: int
    parts: tuple[Part, ...]
    product: Product | None = None


@dataclass(frozen=True, eq=False)
class Region:
    """A source and all that reads it.

    Attributes:
        graph: where they are.
        channels: how many.
        readers: the products that read the tensor, each with the channel of each of its input channels.
        sites: the quantizers of activations between, with the label of each element.
    """

    graph: BoundGraph
    source: Source
    channels: int
    readers: tuple[tuple[Product, Tensor], ...]
    sites: dict[fx.Node, Tensor] = field(repr=False)

    @property
    def read_by(self) -> str:
        """The readers' keys."""
        return ", ".join(product.key for product, _ in self.readers)

    def reader_amax(self) -> Tensor:
        """The largest magnitude of the weights that meet each channel, float64."""
        found = torch.zeros(self.channels, dtype=torch.float64)
        for product, labels in self.readers:
            channels = labels[product.channels[1].cpu()].long()
            found = torch.maximum(found, product.amax(channels, self.channels, product.weight.read().double().cpu()))
        return found

    def source_amax(self) -> Tensor:
        """The largest magnitude of the weights that make each channel, of a product, float64."""
        product = self.source.product
        assert product is not None
        return product.amax(product.channels[0].cpu(), self.channels, product.weight.read().double().cpu())

    def scaled(self, factor: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters with each channel divided by its factor where it is made, multiplied where it is read."""
        changed = [(part.tensor, _times(part, 1 / factor)) for part in self.source.parts]
        for product, labels in self.readers:
            channels = labels[product.channels[1].cpu()].to(torch.int64)
            part = Part(_parameter(product), product.weight.over_parameter(channels, -1))
            changed.append((part.tensor, _times(part, factor)))
        return changed


def _parameter(product: Product) -> nn.Parameter:
    tensor = product.weight.tensor
    assert isinstance(tensor, nn.Parameter), "a weight path begins at a parameter"
    return tensor


def _times(part: Part, factor: Tensor) -> Tensor:
    channels = part.channels.to(part.tensor.device)
    factors = factor.to(channels.device)[channels.clamp(min=0)]
    return part.tensor.detach().double() * torch.where(channels < 0, 1.0, factors)


# Finding them


def regions(graph: BoundGraph, products: Products) -> tuple[list[Region], list[tuple[str, str]]]:
    """The regions of a graph, in its order, and the sources that have none: (key, why not)."""
    found, declined = [], []
    for node in graph.calls():
        source = _source(graph, products, node)
        if source is None:
            continue
        region = source if isinstance(source, tuple) else _region(graph, products, source)
        if isinstance(region, Region):
            found.append(region)
        else:
            declined.append(region)
    return found, declined


def _source(graph: BoundGraph, products: Products, node: fx.Node) -> Source | tuple[str, str] | None:
    product = next((one for one in products_of(graph)[0] if one.node is node), None)
    if product is not None:
        parts = _product_parts(product, products)
        if isinstance(parts, str):
            return product.key, parts
        return Source(product.key, product.end, product.channel_dim(product.end), parts, product)
    if packet(node) in _NORMS:
        return _norm(graph, products, node)
    if node.target is aten.mul.Tensor and node not in graph.constants:
        gamma = next((n for n in node.all_input_nodes if n in graph.state), None)
        if gamma is None or gamma.meta["val"].dim() != 1 or node.meta["val"].dim() < 2:
            return None
        parts = _vectors(graph, products, node, (gamma,))
        return (node.name, parts) if isinstance(parts, str) else Source(node.name, node, -1, parts)
    return None


def _product_parts(product: Product, products: Products) -> tuple[Part, ...] | str:
    """What scales the rows of a product: weight and bias, or γ and β of the BatchNorm that is folded into it."""
    graph, weight, bias = product.graph, product.weight, plain_bias(product)
    if weight.factors:
        gamma = gamma_of(graph, weight.factors[0]) if len(weight.factors) == 1 else None
        beta = None if bias is None else beta_of(graph, bias)
        if gamma is None:
            return "its BatchNorm has no weight that could be scaled"
        if beta is None:
            return "its BatchNorm has no bias that could be scaled"
        return _vectors(graph, products, product.node, (gamma, beta))
    if bias is not None and bias not in graph.state:
        return "its bias is computed in the model"
    rows = Part(_parameter(product), weight.over_parameter(product.channels[0], -1))
    other = products.other_reader(rows.tensor, product.key, once=True)
    if other is not None:
        return f"{other} reads the same parameter"
    if bias is None:
        return (rows,)
    vector = _vectors(graph, products, product.node, (bias,))
    return vector if isinstance(vector, str) else (rows, *vector)


def _norm(graph: BoundGraph, products: Products, node: fx.Node) -> Source | tuple[str, str]:
    given = [argument(node, name) for name in ("weight", "bias") if _has(node, name)]
    gamma, vectors = given[0], tuple(n for n in given if isinstance(n, fx.Node))
    if not isinstance(gamma, fx.Node):
        return node.name, "the norm has no weight that could be scaled"
    parts = _vectors(graph, products, node, vectors)
    if isinstance(parts, str):
        return node.name, parts
    return Source(node.name, node, -1 if packet(node) in (aten.layer_norm, aten.rms_norm) else 1, parts)


def _has(node: fx.Node, name: str) -> bool:
    schema = node.target._schema  # type: ignore[union-attr]
    return any(each.name == name for each in schema.arguments)


def _vectors(
    graph: BoundGraph, products: Products, node: fx.Node, vectors: tuple[fx.Node, ...]
) -> tuple[Part, ...] | str:
    """Parameters with one number for each channel, that nothing but ``node`` reads."""
    parts = []
    for vector in vectors:
        tensor = graph.state.get(vector)
        if not isinstance(tensor, nn.Parameter) or tensor.dim() != 1:
            return "its weight or bias is no parameter with a number for each channel"
        other = products.other_reader(tensor, products.key_of(node), once=True)
        if other is not None:
            return f"{other} reads the same parameter"
        parts.append(Part(tensor, torch.arange(len(tensor), device=tensor.device)))
    return tuple(parts)


def _region(graph: BoundGraph, products: Products, source: Source) -> Region | tuple[str, str]:
    readers: list[tuple[Product, Tensor]] = []
    sites: dict[fx.Node, Tensor] = {}
    waiting = [(source.start, first_labels(source.start, source.dim))]
    met = {source.start}
    while waiting:
        node, labels = waiting.pop()
        for user in node.users:
            if _only_finds_scales(user) or packet(user) in _SIZES:
                continue
            if user in met:
                return source.key, f"{_called(user)} reads it twice"
            met.add(user)
            reader = _reader(graph, node, user)
            if reader is not None:
                channels = along(labels, reader.channel_dim(node))
                why = (
                    _why_not_scaled(reader, products) if channels is not None else "its channels are not the operator's"
                )
                if channels is None or why is not None:
                    return source.key, f"its result is read by {reader.key}: {why}"
                readers.append((reader, channels))
                continue
            after = labels if _is_site(graph, node, user) else carried(user, node, labels)
            if after is None:
                return source.key, f"its result is read by {_called(user)}"
            if user in graph.keys:
                sites[user] = labels
            waiting.append((user, after))
    if not readers:
        return source.key, "no product reads its result"
    tensors = [part.tensor for part in source.parts] + [product.weight.tensor for product, _ in readers]
    if len({*map(id, tensors)}) < len(tensors):
        return source.key, "one parameter makes its channels and reads them"
    return Region(graph, source, int(source.start.meta["val"].shape[source.dim]), tuple(readers), sites)


def _reader(graph: BoundGraph, node: fx.Node, user: fx.Node) -> Product | None:
    """The product that reads ``node`` as its input."""
    return next((one for one in products_of(graph)[0] if one.node is user and one.input is node), None)


def _why_not_scaled(reader: Product, products: Products) -> str | None:
    other = products.other_reader(reader.weight.tensor, reader.key, once=True)
    return None if other is None else f"{other} reads the same parameter"


def _is_site(graph: BoundGraph, node: fx.Node, user: fx.Node) -> bool:
    grid = FakeQuant.of(user)
    return grid is not None and user in graph.keys and grid.input is node


def _only_finds_scales(user: fx.Node) -> bool:
    """Whether a user hands the tensor to what finds a range, and to nothing else."""
    if user.target in QPARAM_OPS:
        return True
    return packet(user) is aten.detach and all(map(_only_finds_scales, user.users))


def _called(user: fx.Node) -> str:
    return "what the model gives back" if user.op == "output" else user.name
