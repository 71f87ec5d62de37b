"""A copy of a Q/DQ file in which some layers are float."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from fxquant.onnx.tuning.graph import DEQUANTIZE, QUANTIZE, QdqGraph
from fxquant.support.require import require
from fxquant.targets.document import all_nodes
from fxquant.targets.lint_reader import MOVES

if TYPE_CHECKING:
    import onnx

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm")  # of these onnxruntime makes integers of its own between two pairs


def with_floats(graph: QdqGraph, floats: Collection[str]) -> onnx.ModelProto:
    """The model with some layers (by their first result) in float, and the operators that go along with them::

        Conv(DQ(Q(x)), DQ(w), DQ(b))  →  Conv(x, w', b')

    w' and b' are what their DequantizeLinear gives, as initializers. A pair stays where an integer kernel needs it:
    the layer then reads its DequantizeLinear. ``MatMul − (−b)`` becomes ``MatMul + b``, of which a runtime makes one
    node. Pairs and constants that nothing reads any more are left out; nothing else changes, with the same values up
    to the rounding that is gone.
    """
    return _Floating(graph, frozenset(floats)).model()


class _Floating:
    """One copy in the making."""

    def __init__(self, graph: QdqGraph, floats: frozenset[str]) -> None:
        self.graph, self.floats = graph, floats
        self.staying = graph.staying(floats)
        self.gone = frozenset({*graph.layers, *graph.followers}) - self.staying
        self.nodes: list[onnx.NodeProto] = []
        self.values: dict[str, str] = {}
        self.made: list[onnx.TensorProto] = []
        self.taken = {*graph.producer, *graph.initializers, *(value.name for value in graph.model.graph.input)}

    def model(self) -> onnx.ModelProto:
        onnx = require("onnx")
        for node in self.graph.model.graph.node:
            self._add(node)
        found = onnx.ModelProto()
        found.CopyFrom(self.graph.model)
        kept, needed = self._alive()
        tensors = [tensor for tensor in found.graph.initializer if tensor.name in needed]
        tensors += [tensor for tensor in self.made if tensor.name in needed]
        infos = [value for value in found.graph.value_info if value.name in needed]
        for field, values in (("node", kept), ("initializer", tensors), ("value_info", infos)):
            copies = [type(value).FromString(value.SerializeToString()) for value in values]
            found.graph.ClearField(field)
            getattr(found.graph, field).extend(copies)
        return found

    def _alive(self) -> tuple[list[onnx.NodeProto], set[str]]:
        """Nodes that the outputs need, and every value that is read."""
        graph = self.graph.model.graph
        needed = {*self.graph.outputs, *(value.name for value in graph.input)}
        kept = []
        for node in reversed(self.nodes):
            if not needed.isdisjoint(node.output):
                kept.append(node)
                inner = require("onnx").GraphProto(node=[node])
                needed.update(name for each in all_nodes(inner) for name in each.input if name)
                needed.update(value.name for each in _bodies(node) for value in each.output)
        return kept[::-1], needed

    def _add(self, node: onnx.NodeProto) -> None:
        key = node.output[0]
        new = type(node)()
        new.CopyFrom(node)
        for index, value in enumerate(node.input):
            if value and (key in self.gone or self._lost_its_maker(node, value)):
                new.input[index] = self._float(value)
        if node.op_type == DEQUANTIZE and key in self.graph.outputs and self._is_idle(key):
            new = require("onnx").helper.make_node("Identity", [self._float(key)], [key], name=node.name)
        self.nodes.append(self._fused_sum(self._as_maximum(new)))
        if self._is_between(key, key):
            self._part(new)

    def _lost_its_maker(self, node: onnx.NodeProto, value: str) -> bool:
        """Whether no integer kernel reads a pair here that stood there for one which is float now."""
        if node.output[0] in self.staying or node.op_type in (DEQUANTIZE, *MOVES):
            return False
        return self._is_idle(value)

    def _is_idle(self, value: str) -> bool:
        """Whether a value comes out of a pair on what an operator gives that is float now."""
        pair = self.graph.pair(value)
        quantizer = None if pair is None or value in self.graph.constants else self.graph.quantizer(pair)
        return quantizer is not None and self.graph.unit(quantizer.input[0]) in self.gone

    def _float(self, value: str) -> str:
        """What a float operator reads in the place of a value."""
        if value not in self.values:
            self.values[value] = self._found(value)
        return self.values[value]

    def _found(self, value: str) -> str:
        pair, node = self.graph.pair(value), self.graph.producer.get(value)
        if pair is None or node is None:
            return value
        if value in self.graph.constants:
            array = constant(self.graph, value)
            self.made.append(require("onnx").numpy_helper.from_array(array, self._name(value)))
            return self.made[-1].name
        if node is pair:
            quantizer = self.graph.quantizer(pair)
            if quantizer is None or self.graph.gives_codes(quantizer.input[0], self.staying):
                return value
            return self._float(quantizer.input[0])
        source = self._float(node.input[0])
        if source == node.input[0]:
            return value
        moved = type(node)()
        moved.CopyFrom(node)
        moved.input[0], moved.output[0] = source, self._name(value)
        moved.name = f"{node.name}_float" if node.name else ""
        del moved.output[1:]
        self.nodes.append(moved)
        return str(moved.output[0])

    def _name(self, value: str) -> str:
        name = f"{value}_float"
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def _fused_sum(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """``MatMul − c`` of a float layer as ``MatMul + (−c)``, the same to the bit."""
        if not self._is_bias(node):
            return node
        helper = require("onnx.numpy_helper")
        negated = -helper.to_array(self.graph.initializers[node.input[1]], base_dir=self.graph.folder)
        self.made.append(helper.from_array(negated, self._name(node.input[1])))
        node.op_type, node.input[1] = "Add", self.made[-1].name
        return node

    def _is_bias(self, node: onnx.NodeProto) -> bool:
        """Whether a Sub takes a negated bias from a float layer's MatMul."""
        if node.op_type != "Sub" or node.input[0] not in self.floats or self._op(node.input[0]) != "MatMul":
            return False
        return node.input[1] in self.graph.initializers and len(self.graph.consumers[node.input[0]]) == 1

    def _op(self, key: str) -> str:
        return str(self.graph.top[key].op_type)

    def _as_maximum(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """``Relu`` behind a float layer that reads a pair as ``Max(…, 0)``: see `_part`."""
        if node.op_type != "Relu" or not self._is_between(node.input[0], node.output[0]):
            return node
        node.op_type = "Max"
        node.input.append(self._bound(node.output[0], 0.0))
        return node

    def _part(self, node: onnx.NodeProto) -> None:
        """A maximum with the lowest float behind a float layer between two pairs, as `fxquant.export_onnx` writes it.

        onnxruntime would quantize its weight by a rule of its own.
        """
        key = node.output[0]
        node.output[0] = self._name(f"{key}_parted")
        inputs = [node.output[0], self._bound(key, float(np.finfo(np.float32).min))]
        self.nodes.append(require("onnx").helper.make_node("Max", inputs, [key], name=f"{node.name}_parted"))

    def _is_between(self, end: str, result: str) -> bool:
        """Whether ``end`` is of a float layer that reads a pair, and a QuantizeLinear that stays reads ``result``."""
        made = self.graph.top.get(end)
        layer = made.input[0] if made is not None and self._is_bias(made) else end
        if layer not in self.floats or not (self._op(layer) in _WEIGHTED or self._has_weight(layer)):
            return False
        readers = [reader for reader in self.graph.consumers.get(result, []) if reader.op_type == QUANTIZE]
        return self.graph.pair(self._float(self.graph.layers[layer].input[0])) is not None and self._is_read(readers)

    def _has_weight(self, layer: str) -> bool:
        return any(value in self.graph.constants for value in self.graph.layers[layer].input)

    def _is_read(self, quantizers: Iterable[onnx.NodeProto]) -> bool:
        """Whether anything reads the codes still."""
        pairs = [pair for each in quantizers for pair in self.graph.code_readers(each)]
        ends = [end for pair in pairs for end in self.graph.ends(pair.output[0])]
        return any(end is None or end.output[0] not in self.gone for end in ends)

    def _bound(self, key: str, least: float) -> str:
        scale = self._scale_type(key)
        self.made.append(require("onnx").helper.make_tensor(self._name(f"{key}_least"), scale, [], [least]))
        return self.made[-1].name

    def _scale_type(self, key: str) -> int:
        """The float type of a layer's Q/DQ pairs."""
        quantizer = next(reader for reader in self.graph.consumers[key] if reader.op_type == QUANTIZE)
        tensor = self.graph.initializers.get(quantizer.input[1])
        return int(require("onnx").TensorProto.FLOAT) if tensor is None else tensor.data_type


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """Branches and loop bodies, nested ones too."""
    found = [body for a in node.attribute for body in (*a.graphs, *([a.g] if a.HasField("g") else []))]
    return found + [inner for body in found for each in body.node for inner in _bodies(each)]


def constant(graph: QdqGraph, value: str) -> Any:
    """The array of a value that hangs on constants alone, by onnx's own evaluator."""
    onnx = require("onnx")
    nodes, tensors, waiting = [], {}, [value]
    while waiting:
        name = waiting.pop()
        node = graph.producer.get(name)
        if name in graph.initializers and (node is None or node.op_type == "Constant"):
            tensors[name] = graph.initializers[name]
        elif node is not None and node not in nodes:
            nodes.append(node)
            waiting += [each for each in node.input if each]
    output = onnx.helper.make_tensor_value_info(value, onnx.TensorProto.UNDEFINED, None)
    order = {node.output[0]: place for place, node in enumerate(graph.model.graph.node)}
    nodes.sort(key=lambda node: order[node.output[0]])
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    for node in copies:
        node.domain = "" if node.op_type in (QUANTIZE, DEQUANTIZE) else node.domain  # com.microsoft's are the same
    body = onnx.helper.make_graph(copies, "constant", [], [output])
    for name, tensor in tensors.items():
        kept = body.initializer.add()
        kept.CopyFrom(tensor)
        kept.name = name
    version = max(21, *(each.version for each in graph.model.opset_import if each.domain in ("", "ai.onnx")))
    opsets = [onnx.helper.make_opsetid("", version)]
    model = onnx.helper.make_model(body, opset_imports=opsets, ir_version=graph.model.ir_version)
    (found,) = require("onnx.reference").ReferenceEvaluator(model).run(None, {})
    return found
