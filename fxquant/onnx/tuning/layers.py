"""Single layers cut out of a Q/DQ file, as integers and in float, so that both can be timed by themselves."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fxquant.onnx.tuning.floating import with_floats
from fxquant.onnx.tuning.graph import FUSED, QUANTIZE, QdqGraph
from fxquant.onnx.tuning.inputs import made_up, text_of
from fxquant.support.require import require
from fxquant.targets.document import Feeds

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The nodes around one layer: from ``inputs`` to ``output``.

    Attributes:
        inputs: name → the tensor of the file that it has the shape of, and its type where that is another.
    """

    nodes: tuple[Any, ...]
    inputs: Mapping[str, tuple[str, Any]]
    output: str


@dataclass(kw_only=True)
class LayerClass:
    """Layers of one operator, one set of shapes and one set of attributes, of which one is timed.

    Attributes:
        keys: the layers, by their first result, in the file's order.
        shape: sizes in words.
    """

    op_type: str
    shape: str
    integer: Cut
    plain: Cut
    keys: list[str] = field(default_factory=list)


class Layers:
    """The layers of a graph, cut out; shapes come from one run of the file, which the caller does."""

    def __init__(self, graph: QdqGraph) -> None:
        self.graph = graph
        self.plain = QdqGraph(model=with_floats(graph, graph.layers), folder=graph.folder)
        self.integer_cuts = {key: _cut(graph, key, node, integer=True) for key, node in graph.layers.items()}
        self.plain_cuts = {key: _cut(self.plain, key, node, integer=False) for key, node in graph.layers.items()}

    def values(self) -> list[str]:
        """Tensors of the file whose shapes are needed."""
        cuts = (*self.integer_cuts.values(), *self.plain_cuts.values())
        inputs = {value.name for value in self.graph.model.graph.input}
        return list(dict.fromkeys(name for cut in cuts for name, _ in cut.inputs.values() if name not in inputs))

    def classes(self, arrays: Feeds) -> list[LayerClass]:
        """The layers by class; ``arrays`` holds the tensors that `values` names, and the graph's inputs."""
        found: dict[Any, LayerClass] = {}
        for key, cut in self.integer_cuts.items():
            node = self.graph.layers[key]
            kind = (_likeness(self.graph, cut, arrays), _likeness(self.plain, self.plain_cuts[key], arrays))
            if kind not in found:
                found[kind] = LayerClass(
                    op_type=node.op_type,
                    shape=_words(self.graph, node, cut, arrays),
                    integer=cut,
                    plain=self.plain_cuts[key],
                )
            found[kind].keys.append(key)
        return list(found.values())

    def models(self, kind: LayerClass, arrays: Feeds) -> dict[str, tuple[onnx.ModelProto, Feeds]]:
        """``"integer"`` and ``"float"``: the layer as a model of its own, and inputs for it."""
        return {
            "integer": _model(self.graph, kind.integer, arrays),
            "float": _model(self.plain, kind.plain, arrays),
        }


def _cut(graph: QdqGraph, key: str, given: onnx.NodeProto, *, integer: bool) -> Cut:
    """The layer with what is fused into it; as integers from codes to codes.

    It begins at its operands: what moves them is left out, codes come in the form that it reads them in. ``given`` is
    the layer in the file that was given, whose operands have the same shapes.
    """
    layer = graph.top[key]
    output = _tail(graph, key)
    readers = graph.consumers.get(output, [])
    if integer and readers and all(reader.op_type == QUANTIZE for reader in readers) and output not in graph.outputs:
        output = readers[0].output[0]
    operands = {v: like for v, like in zip(layer.input, given.input, strict=True) if v and v not in graph.constants}
    inputs: dict[str, tuple[str, Any]] = {}
    stops, starts = set(operands), []
    for value, like in operands.items():
        pair = graph.pair(value) if integer else None
        if pair is None or (value != pair.output[0] and graph.has_channels(pair)):
            inputs[value] = (like, None)
            continue
        start = _read_at(pair, value)
        starts.append(start)
        stops.update(start.input[1:])
        kind = require("onnx").TensorProto.DataType.Value(graph.code_type(pair) or "UINT8")
        inputs[start.input[0]] = (like, require("onnx").helper.tensor_dtype_to_np_dtype(kind))
    found = _between(graph, [output, *(name for start in starts for name in start.input[1:])], stops)
    return Cut(nodes=(*starts, *found), inputs=inputs, output=output)


def _read_at(pair: onnx.NodeProto, value: str) -> onnx.NodeProto:
    """A DequantizeLinear like ``pair`` that gives ``value`` itself."""
    start = type(pair)()
    start.CopyFrom(pair)
    start.input[0], start.output[0] = f"{value}_codes", value
    return start


def _tail(graph: QdqGraph, value: str) -> str:
    """The last result of what is fused into a layer: a bias, a Relu, a Clip."""
    readers = graph.consumers.get(value, [])
    while len(readers) == 1 and value not in graph.outputs and readers[0].output[0] in graph.top:
        (reader,) = readers
        others = [each for each in reader.input if each and each != value]
        if reader.op_type not in (*FUSED, "Add", "Sub", "Max") or not graph.constants.issuperset(others):
            break
        value = reader.output[0]
        readers = graph.consumers.get(value, [])
    return value


def _between(graph: QdqGraph, wanted: Iterable[str], stops: Collection[str]) -> list[onnx.NodeProto]:
    """Nodes that make the wanted values of ``stops`` and constants, in the graph's order."""
    found, waiting = set[str](), list(wanted)
    while waiting:
        value = waiting.pop()
        node = graph.producer.get(value)
        if value not in stops and node is not None and node.output[0] not in found:
            found.add(node.output[0])
            waiting += [name for name in node.input if name]
    return [node for node in graph.model.graph.node if node.output[0] in found]


def _likeness(graph: QdqGraph, cut: Cut, arrays: Feeds) -> Any:
    """Equal of two cuts that cost the same: operators, attributes, wiring, shapes and types, but no names or values."""
    numbers: dict[str, int] = {}
    rows = []
    for node in cut.nodes:
        wiring = tuple(numbers.setdefault(name, len(numbers)) for name in (*node.input, *node.output))
        attributes = tuple(sorted(a.SerializeToString() for a in node.attribute if a.name != "value"))
        rows.append((node.op_type, node.domain, attributes, wiring))
    held = tuple((numbers[n], tuple(t.dims), t.data_type) for n, t in _held(graph, cut))
    given = tuple((numbers.get(n), shape, dtype.str) for n, (shape, dtype) in _given(cut, arrays).items())
    return tuple(rows), held, given


def _given(cut: Cut, arrays: Feeds) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and type of each input."""
    return {
        name: (arrays[like].shape, np.dtype(arrays[like].dtype if kind is None else kind))
        for name, (like, kind) in cut.inputs.items()
    }


def _held(graph: QdqGraph, cut: Cut) -> Iterable[tuple[str, onnx.TensorProto]]:
    names = dict.fromkeys(name for node in cut.nodes for name in node.input)
    return [(name, graph.initializers[name]) for name in names if name in graph.initializers]


def _words(graph: QdqGraph, node: onnx.NodeProto, cut: Cut, arrays: Feeds) -> str:
    """``1x64x56x56 · 64x64x3x3 stride 2 groups 64``."""
    parts = []
    for value in node.input[:2]:
        pair = graph.pair(value)
        tensor = graph.initializers.get(value if pair is None else pair.input[0])
        shape = arrays[value].shape if value in arrays else None if tensor is None else tensor.dims
        parts.append("?" if shape is None else text_of(shape))
    given = {a.name: require("onnx").helper.get_attribute_value(a) for a in node.attribute}
    strides, groups = given.get("strides", [1]), given.get("group", 1)
    words = [f"stride {max(strides)}"] if max(strides) > 1 else []
    words += [f"groups {groups}"] if groups > 1 else []
    return " ".join([" · ".join(parts), *words])


def _model(graph: QdqGraph, cut: Cut, arrays: Feeds) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A cut as a model, and inputs: normal floats, codes over their whole range."""
    onnx = require("onnx")
    random = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {}
    inputs = []
    for name, (shape, dtype) in _given(cut, arrays).items():
        inputs.append(
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(dtype), shape)
        )
        feeds[name] = _codes(dtype, shape, random) if dtype.kind in "iu" else made_up(dtype, shape, random)
    output = onnx.ValueInfoProto(name=cut.output)
    body = onnx.helper.make_graph([], "layer", inputs, [output])
    made = {name for node in cut.nodes for name in node.output}
    body.node.extend(type(node).FromString(node.SerializeToString()) for node in cut.nodes)
    for name, tensor in _held(graph, cut):
        if name not in made:
            kept = body.initializer.add()
            kept.CopyFrom(tensor)
            kept.name = name
    model = onnx.helper.make_model(body, ir_version=graph.model.ir_version, opset_imports=graph.model.opset_import)
    return model, feeds


def _codes(dtype: np.dtype[Any], shape: Sequence[int], random: np.random.Generator) -> np.ndarray:
    limits = np.iinfo(dtype)
    return random.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


def by_key(classes: Iterable[LayerClass]) -> Mapping[str, int]:
    """Layer → the number of its class."""
    return {key: number for number, kind in enumerate(classes) for key in kind.keys}
