"""Pairs and integer weights in the operators that consumers of PT2E know: torch's ``quantized_decomposed``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxquant.errors import ExportError
from fxquant.graph.arguments import argument
from fxquant.graph.edit import call
from fxquant.graph.nodes import call_nodes, packet
from fxquant.ops.qdq import QUANTIZE_DEQUANTIZE_BLOCKS
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.export.constants import constant, constant_value
from fxquant.passes.export.pairs import Dequantized, Pair
from fxquant.passes.export.quantize_at_products import EPILOGUES
from fxquant.passes.stages import EXPORT

_FLOAT_RESULT = "the result of its product is not quantized, and the runtime's kernels give integers"
# The codes that a type holds.
_RANGES = {torch.int8: (-128, 127), torch.uint8: (0, 255), torch.int16: (-32768, 32767)}
KEY = "quantized_site"


@dataclass(frozen=True, kw_only=True)
class FloatWeights(Pass):
    """``linear(QDQ(x), dequantize_affine(codes, …))``  →  ``linear(QDQ(x), float values)``, where nobody quantizes it.

    For runtimes whose integer kernels give integers: a product with a float result is a float product there, with the
    same values.
    """

    stages: ClassVar = (EXPORT,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Weights of such products become constants; a decline names each."""
        done = 0
        for node in list(call_nodes(gm.graph)):
            view = Dequantized.of(node)
            if view is None or any(_is_quantized(user) for user in node.users):
                continue
            with gm.graph.inserting_before(node):
                values = _values(gm, view)
            node.replace_all_uses_with(values)
            gm.graph.erase_node(node)
            self.decline(result, values, _FLOAT_RESULT)
            done += 1
        return done


def _is_quantized(node: fx.Node) -> bool:
    """Whether all that reads a product's result is a Q/DQ pair, or an epilogue of one."""
    readers = list(node.users)
    return bool(readers) and all(
        Pair.of(reader) is not None or (packet(reader) in EPILOGUES and _is_quantized(reader)) for reader in readers
    )


@dataclass(frozen=True, kw_only=True)
class DecomposePairs(Pass):
    """Replaces what `Freeze` made::

        quantize_dequantize(x, s, z, lo, hi)  →  dequantize_per_tensor(quantize_per_tensor(x, s, z, lo, hi, t), …)
        dequantize_affine(codes, s, z, 0)     →  dequantize_per_channel(codes, s, z, 0, lo, hi, t)
        dequantize_affine(int32 codes, s, 0)  →  the float values, a constant: a bias

    ``t`` is int8 or uint8, whichever holds the codes; with ``activations``, codes of 8 bits move by 128 to that type,
    and so does their zero point. ``meta["quantized_site"]`` of a QuantizeLinear's twin is its site's key.
    ExportError for formats that these operators do not have.
    """

    stages: ClassVar = (EXPORT,)

    activations: torch.dtype | None = None

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Writes both kinds; blocks of activations have no operator."""
        done = 0
        for node in list(call_nodes(gm.graph)):
            if node.target is QUANTIZE_DEQUANTIZE_BLOCKS:
                raise ExportError(_no_operator(argument(node, "label"), "scales of tokens or blocks of an activation"))
            if (pair := Pair.of(node)) is not None:
                new = self._pair(gm, pair)
            elif (weight := Dequantized.of(node)) is not None:
                new = _weight(gm, weight)
            else:
                continue
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            done += 1
        gm.graph.eliminate_dead_code()
        return done

    def _pair(self, gm: fx.GraphModule, pair: Pair) -> fx.Node:
        if pair.element is not None:
            raise ExportError(_no_operator(pair.label, f"codes of {pair.element}"))
        zero_point, (low, high) = pair.zero_point, pair.limits
        kind = torch.uint8 if low >= 0 else torch.int8
        if self.activations is not None and self.activations != kind:
            shift = -128 if self.activations == torch.int8 else 128
            zero_point, low, high, kind = zero_point + shift, low + shift, high + shift, self.activations
        least, most = _RANGES[kind]
        if not least <= low <= high <= most:
            raise ExportError(_no_operator(pair.label, f"codes from {low} to {high} in {kind}"))
        ops, grid = _operators(), (pair.scale, zero_point, low, high, kind)
        with gm.graph.inserting_before(pair.node):
            codes = call(gm.graph, ops.quantize_per_tensor.default, pair.input, *grid, like=pair.node)
            codes.meta[KEY] = pair.label
            return call(gm.graph, ops.dequantize_per_tensor.default, codes, *grid, like=pair.node)


def _weight(gm: fx.GraphModule, view: Dequantized) -> fx.Node:
    label, graph, ops = str(view.code.target), gm.graph, _operators()
    codes, scale, point = (constant_value(gm, node) for node in (view.code, view.scale, view.zero_point))
    if view.element is not None:
        raise ExportError(_no_operator(label, f"codes of {view.element}"))
    with gm.graph.inserting_before(view.node):
        if codes.dtype == torch.int32:
            return _values(gm, view)
        grid = (*_RANGES[codes.dtype], codes.dtype)
        if view.axis is None:
            numbers = (float(scale), int(point))
            return call(graph, ops.dequantize_per_tensor.default, view.code, *numbers, *grid, like=view.node)
        if view.block_size is not None:
            raise ExportError(_no_operator(label, "weights with a scale per group"))
        points = constant(gm, f"{view.zero_point.target}_int64", point.to(torch.int64), like=view.zero_point)
        channels = (view.scale, points, view.axis)
        return call(graph, ops.dequantize_per_channel.default, view.code, *channels, *grid, like=view.node)


def _values(gm: fx.GraphModule, view: Dequantized) -> fx.Node:
    """What codes stand for, as a constant."""
    assert callable(view.node.target)
    args, kwargs = fx.map_arg((view.node.args, view.node.kwargs), lambda node: constant_value(gm, node))
    return constant(gm, f"{view.code.target}_values", view.node.target(*args, **kwargs), like=view.node)


def _no_operator(label: str, what: str) -> str:
    return (
        f"{label} must have a format that quantized_decomposed has: got {what}. Prepare with recipe 'int8' or 'w4a8' "
        "without groups, or override this site."
    )


def _operators() -> Any:
    try:
        import torch.ao.quantization.fx._decomposed  # registers them; private, tried on 2.13
    except ImportError as error:
        raise ExportError(
            f"torch must have the operators of quantized_decomposed: torch {torch.__version__} has none. "
            "export_program was tried with torch 2.13."
        ) from error
    return torch.ops.quantized_decomposed
