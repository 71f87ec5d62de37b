"""Linear layers and convolutions of codes, as modules that hold integer weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxquant.graph.arguments import argument, argument_at, has_argument, operand
from fxquant.graph.kinds import kind_of
from fxquant.graph.nodes import call_nodes, only_user, packet
from fxquant.graph.views import Convolution
from fxquant.ops.integer_matmul import LONGEST_SUM, widest_exact_code
from fxquant.ops.quantize import DEQUANTIZE_TENSOR, QUANTIZE_TENSOR
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.export.constants import constant_value, known_value
from fxquant.passes.export.integer_layers import Epilogue, IntegerLayer, Window
from fxquant.passes.export.pairs import CONVOLUTIONS, MATMULS, Dequantized
from fxquant.passes.stages import EXPORT

aten = torch.ops.aten

_PRODUCTS = CONVOLUTIONS | MATMULS | {aten.linear, aten.addmm}
_OTHERS = frozenset({"sdpa", "lstm", "gru", "rnn", "einsum", "bilinear", "mv", "matmul"})
_RELUS = frozenset({aten.relu, aten.relu_})
_CLAMPS = {aten.hardtanh: ("min_val", "max_val"), aten.clamp: ("min", "max")}


@dataclass
class Integers:
    """What `UseIntegerLayers` made: paths of the modules, in the graph's order; a product of its `PassResult`."""

    layers: list[str]


class _StaysFloat(Exception):
    """Why a product does."""


@dataclass(frozen=True)
class _Product:
    """A layer of codes: where they come from, and what it holds."""

    source: fx.Node  # dequantize_per_tensor
    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    window: Window | None
    weight: Dequantized


@dataclass(frozen=True, kw_only=True)
class UseIntegerLayers(Pass):
    """Replaces linear layers and convolutions of codes whose weights are codes, and what quantizes their results::

        linear(dequantize(q, s, z), dequantize_affine(codes, t, 0), b)    →  fc(q, s, z)
        quantize(relu(conv2d(dequantize(q, s, z), DQ(codes, t, 0))), …)   →  conv(q, s, z)

    ``fc`` and ``conv`` are `IntegerLayer` modules at the paths that the layers have in the model. In the second the
    kernel quantizes too, by a product with ``1 / s``. ``addmm``, ``mm`` and ``matmul`` by a constant matrix are linear
    layers too. A decline says what stays float, with the same values: transposed convolutions, products of two
    activations, weights with scales of groups or zero points, inputs that are not quantized.

    ``int4`` names the weights that are held two to a byte, as `Freeze` names them.
    """

    stages: ClassVar = (EXPORT,)

    int4: frozenset[str] = frozenset()

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Puts modules in; their `Integers` is a product of the result."""
        made = Integers([])
        result.products.append(made)
        for node in list(call_nodes(gm.graph)):
            if not any(map(_is_quantized, node.all_input_nodes)):
                continue
            kind = kind_of(node)
            if packet(node) not in _PRODUCTS and (kind is None or kind.name not in _OTHERS):
                continue
            try:
                product = _product_of(gm, node)
            except _StaysFloat as reason:
                self.decline(result, node, f"{_path_of(node) or node.name} stays a float product: {reason}")
            else:
                made.layers.append(_replace(gm, node, product, str(product.weight.code.target) in self.int4))
        if made.layers:
            gm.graph.eliminate_dead_code()
        return len(made.layers)


def _is_quantized(node: fx.Node) -> bool:
    return Dequantized.of(node) is not None or node.target is DEQUANTIZE_TENSOR


def _product_of(gm: fx.GraphModule, node: fx.Node) -> _Product:
    """The layer that a product is; _StaysFloat where there is no kernel for it."""
    if widest_exact_code() == 0:
        raise _StaysFloat("this build of torch has no integer kernels for CPUs")
    if packet(node) not in _PRODUCTS:
        raise _StaysFloat("torch has no integer kernel for it")
    source, weight, turned = _operands(node)
    view = Dequantized.of(weight)
    if view is None:
        both = weight.target is DEQUANTIZE_TENSOR
        raise _StaysFloat("torch has no product of two integer activations" if both else "its weight is not quantized")
    if source.target is not DEQUANTIZE_TENSOR:
        raise _StaysFloat("its input is not quantized")
    if operand(source, "code").meta["val"].dtype != torch.uint8:
        raise _StaysFloat("the codes of its input have more than 8 bits")
    codes, scale = _codes_of(gm, view, turned)
    window = _window(Convolution(node)) if packet(node) in CONVOLUTIONS else None
    if math.prod(codes.shape[1:]) > LONGEST_SUM:
        raise _StaysFloat(f"its sums of {math.prod(codes.shape[1:])} products may not fit int32")
    return _Product(source, codes, scale, _bias_of(gm, node, codes.shape[0]), window, view)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, bool]:
    """What is multiplied, and whether the second has its output channels last."""
    if packet(node) in CONVOLUTIONS:
        view = Convolution(node)
        if view.transposed:
            raise _StaysFloat("torch has no transposed convolution of integers")
        if view.input.meta["val"].dim() != view.weight.meta["val"].dim():
            raise _StaysFloat("its input has no batch")
        return view.input, view.weight, False
    first = 1 if packet(node) is aten.addmm else 0
    source, weight = argument_at(node, first), argument_at(node, first + 1)
    turned = packet(node) is not aten.linear
    if packet(weight) in (aten.t, aten.transpose) and weight.meta["val"].dim() == 2:
        turned, weight = not turned, argument_at(weight, 0)
    return source, weight, turned


def _bias_of(gm: fx.GraphModule, node: fx.Node, channels: int) -> Tensor | None:
    name = "self" if packet(node) is aten.addmm else "bias"
    given = argument(node, name) if has_argument(node, name) and packet(node) not in MATMULS else None
    if given is None:
        return None
    bias = known_value(gm, given)
    if bias is None or bias.shape != (channels,):
        raise _StaysFloat("its bias is not one constant for each channel")
    if packet(node) is aten.addmm and (argument(node, "alpha") != 1 or argument(node, "beta") != 1):
        raise _StaysFloat("it is scaled by alpha or beta")
    return bias.detach().to(torch.float32).clone()


def _window(view: Convolution) -> Window:
    sizes = view.weight.meta["val"].shape[2:]
    count = len(sizes)
    stride, dilation = ([*value] * (count // len(value)) for value in (view.stride, view.dilation))
    padding = view.padding
    if isinstance(padding, str):
        around = [step * (size - 1) if padding == "same" else 0 for step, size in zip(dilation, sizes, strict=True)]
        if any(total % 2 for total in around):
            raise _StaysFloat("it pads one side more than the other")
        padding = [total // 2 for total in around]
    padding = [*padding] * (count // len(padding))
    if not all(isinstance(each, int) for each in (*stride, *padding, *dilation)):
        raise _StaysFloat("its stride, padding or dilation is computed")
    return Window((*map(int, stride),), (*map(int, padding),), (*map(int, dilation),), view.groups)


def _codes_of(gm: fx.GraphModule, view: Dequantized, turned: bool) -> tuple[Tensor, Tensor]:
    """Codes with the output channels in front, and one scale for all or for each."""
    codes, scale, point = (constant_value(gm, each) for each in (view.code, view.scale, view.zero_point))
    if view.block_size is not None:
        raise _StaysFloat("its weight has a scale for each group")
    if codes.dtype != torch.int8 or bool(point.any()):
        raise _StaysFloat("its weight has a zero point")
    if turned and codes.dim() != 2:
        raise _StaysFloat("its weight is a batch of matrices")
    if view.axis is not None and view.axis % codes.dim() != (1 if turned else 0):
        raise _StaysFloat("its weight has a scale for each element of its sums")
    return (codes.t() if turned else codes).clone(memory_format=torch.contiguous_format), scale.clone()


def _replace(gm: fx.GraphModule, node: fx.Node, product: _Product, packs: bool) -> str:
    """The module's path."""
    quantize, scale, zero_point = (operand(product.source, name) for name in ("code", "scale", "zero_point"))
    largest = int(argument(quantize, "quant_max")) if quantize.target is QUANTIZE_TENSOR else 255
    held = (product.codes, product.scale, product.bias)
    again = len(product.weight.node.users) > 1
    layer = IntegerLayer(*held, window=product.window, largest=255 if again else largest, packs=packs)
    path = _free_path(gm, node, layer)
    gm.add_submodule(path, layer)
    last, epilogue = _epilogue_after(node)
    user, end = only_user(last), node
    if user is not None and _gives_codes(user) and not again:
        names = ("scale", "zero_point")
        grid = [operand(user, name) for name in names]
        step, point = (constant_value(gm, each).clone() for each in grid)
        layer.give_codes(step, point, epilogue)
        for each, name in zip(grid, names, strict=True):
            each.target = f"{path}.output_{name}"
        end = user
    with gm.graph.inserting_before(end):
        new = gm.graph.call_module(path, (quantize, scale, zero_point))
    new.meta = dict(end.meta)
    end.replace_all_uses_with(new)
    for each in dict.fromkeys((end, *((last,) if end is user else ()), node)):
        gm.graph.erase_node(each)
    for each in gm.graph.find_nodes(op="get_attr"):
        if not each.users:  # a bias that stood where the layer stands now
            gm.graph.erase_node(each)
    return path


def _gives_codes(user: fx.Node) -> bool:
    """Whether a reader quantizes to all codes of 8 bits, as a kernel does."""
    limits = [argument(user, name) for name in ("quant_min", "quant_max")] if user.target is QUANTIZE_TENSOR else []
    return limits == [0, 255]


def _epilogue_after(node: fx.Node) -> tuple[fx.Node, Epilogue]:
    """The last node of what a kernel computes after its product, where each is the only reader."""
    user = only_user(node)
    if user is not None and packet(user) in _RELUS:
        return user, Epilogue(0.0)
    if user is not None and packet(user) in _CLAMPS:
        low, high = (argument(user, name) for name in _CLAMPS[packet(user)])
        if isinstance(low, int | float | None) and isinstance(high, int | float | None):
            return user, Epilogue(-math.inf if low is None else low, math.inf if high is None else high)
    return node, Epilogue()


def _path_of(node: fx.Node) -> str:
    """Of the module whose forward calls the product; empty for the model's own."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    return [*stack.values()][-1][0] if stack else ""


def _free_path(gm: fx.GraphModule, node: fx.Node, layer: IntegerLayer) -> str:
    """The layer's path in the model, or one below it where more than its own parameters stand there."""
    path = _path_of(node)
    if not path:
        return f"{node.name}_layer"
    there: Any = gm
    for part in path.split("."):
        there = getattr(there, part, None)
    if isinstance(there, IntegerLayer):  # called twice
        return path if there.is_as(layer) else f"{path}_{node.name}"
    below, weights = f"{path}.", {each for each in node.all_input_nodes if Dequantized.of(each) is not None}
    read = [each for each in gm.graph.find_nodes(op="get_attr") if str(each.target).startswith(below)]
    parent = any(not all(weights & {*user.all_input_nodes} for user in each.users) for each in read)
    for each in gm.graph.nodes:
        within = _path_of(each)
        other = each.op == "call_module" or (packet(each) in _PRODUCTS and weights.isdisjoint(each.all_input_nodes))
        parent = parent or within.startswith(below) or (within == path and other)
    return f"{path}.{node.name}" if parent else path
