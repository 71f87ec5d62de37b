"""What a lint rule is, what a target gives the linter, and the questions that rules ask of a graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fxquant.support.require import require
from fxquant.targets.document import Wiring, all_nodes
from fxquant.targets.profile import Profile

if TYPE_CHECKING:
    import onnx


PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
QDQ = ("QuantizeLinear", "DequantizeLinear")

# Ops that move values: Q and DQ with one scale may stand on either side of them.
MOVES = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Identity", "MaxPool", "Pad")

Breaches = Iterator[tuple["onnx.NodeProto | None", str]]
Rule = Callable[["LintReader"], Breaches]


class Rules(dict[str, Rule]):
    """Rules by name, in the order in which they are checked."""

    def add(self, rule: Rule) -> Rule:
        """Takes a rule in, as a decorator: ``_its_name`` becomes ``its-name``.

        A rule yields each node that breaks it, or None for the model, and in which way; its docstring is what it asks.
        """
        self[rule.__name__.strip("_").replace("_", "-")] = rule
        return rule


def doc(rule: Rule) -> str:
    """What a rule asks."""
    return inspect.getdoc(rule) or ""


@dataclass(frozen=True, kw_only=True)
class Lint:
    """What a target gives the linter.

    Attributes:
        rules: its own, checked after those for every target.
        waived: names of common rules that it does not hold files to.
        measured: the versions that its rules were seen on.
        misplaced: ops between a DequantizeLinear and a product that a rule of its own reports, so that the common
            rules look through them: one finding is enough.
        quantizers: its own operators that quantize as the file runs, with the code type of each result.
    """

    rules: Mapping[str, Rule] = field(default_factory=Rules)
    waived: tuple[str, ...] = ()
    measured: str = ""
    misplaced: tuple[str, ...] = ()
    quantizers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LintReader(Wiring):
    """The questions that rules ask of a graph that is meant for ``profile``."""

    profile: Profile
    lint: Lint = field(default_factory=Lint)

    @cached_property
    def opset(self) -> int:
        """Of the standard's operators."""
        return max((e.version for e in self.model.opset_import if e.domain in ("", "ai.onnx")), default=0)

    @cached_property
    def nodes(self) -> list[onnx.NodeProto]:
        """All nodes, those of nested graphs too."""
        return list(all_nodes(self.model.graph))

    @cached_property
    def types(self) -> dict[str, str]:
        """Value → ONNX's name of its element type, where the graph tells."""
        onnx = require("onnx")
        graph = onnx.shape_inference.infer_shapes(self.model).graph
        values = [*graph.value_info, *graph.input, *graph.output]
        found = {value.name: value.type.tensor_type.elem_type for value in values}
        found |= {name: tensor.data_type for name, tensor in self.initializers.items()}
        return {name: str(onnx.TensorProto.DataType.Name(kind)) for name, kind in found.items()}

    def of(self, *ops: str) -> Iterator[onnx.NodeProto]:
        """Nodes of some operators."""
        return (node for node in self.nodes if node.op_type in ops)

    def source(self, node: onnx.NodeProto, index: int) -> onnx.NodeProto | None:
        """What computes an input."""
        return self.producer.get(node.input[index]) if index < len(node.input) else None

    def origin(
        self, node: onnx.NodeProto, index: int, through: tuple[str, ...] = MOVES
    ) -> tuple[onnx.NodeProto | None, list[onnx.NodeProto]]:
        """What computes an input before the ops named, and those that stand between, from the input upward."""
        found, between = self.source(node, index), []
        while found is not None and found.op_type in through:
            between.append(found)
            found = self.source(found, next((i for i, n in enumerate(found.input) if n not in self.constants), 0))
        return found, between

    def pair(self, node: onnx.NodeProto, index: int, through: tuple[str, ...] = MOVES) -> onnx.NodeProto | None:
        """The DequantizeLinear that an input comes out of, moved at most."""
        found, _ = self.origin(node, index, through)
        return found if found is not None and found.op_type == "DequantizeLinear" else None

    def quantized_from(self, dequantize: onnx.NodeProto | None) -> onnx.NodeProto | None:
        """The node whose result a Q/DQ pair stands on, given its DequantizeLinear."""
        quantize = None if dequantize is None else self.quantizer_of(dequantize.input[0])
        return None if quantize is None else self.source(quantize, 0)

    def readers(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """What reads the node's first output."""
        return self.consumers.get(node.output[0], [])

    def ends(self, node: onnx.NodeProto, through: tuple[str, ...]) -> Iterator[onnx.NodeProto]:
        """What reads the node's result after the ops named."""
        for reader in self.readers(node):
            if reader.op_type in through:
                yield from self.ends(reader, through)
            else:
                yield reader

    def is_weight(self, node: onnx.NodeProto) -> bool:
        """Whether a Q or DQ stands on a constant."""
        return node.input[0] in self.constants

    def is_dynamic(self, name: str) -> bool:
        """Whether a value comes from one of the target's own quantizers."""
        node = self.producer.get(name)
        while node is not None and node.op_type == "DequantizeLinear":
            node = self.source(node, 0)
        return node is not None and node.op_type in self.lint.quantizers

    def codes(self, node: onnx.NodeProto) -> str | None:
        """As ``code_type``, results of the target's own quantizers included."""
        source = self.source(node, 0) if node.op_type == "DequantizeLinear" else None
        if source is not None and source.op_type in self.lint.quantizers:
            return self.lint.quantizers[source.op_type][list(source.output).index(node.input[0])]
        return self.code_type(node)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a constant."""
        tensor = self.initializers.get(name)
        return None if tensor is None else tuple(tensor.dims)


def attribute(node: onnx.NodeProto, name: str) -> Any:
    """An attribute's value, None where it is not given."""
    return next((require("onnx").helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)


def title(node: onnx.NodeProto) -> str:
    """What messages call a node."""
    return f"{node.op_type} '{node.name or node.output[0]}'"
