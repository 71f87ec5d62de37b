"""Reading an ONNX file: its nodes, who makes and who reads each value, constants as arrays."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxquant.errors import ExportError
from fxquant.support.require import require

if TYPE_CHECKING:
    import numpy as np
    import onnx


ModelPath = str | os.PathLike[str]
Feeds = Mapping[str, "np.ndarray"]  # a graph's inputs by name
_GIVE = "Give a file that fxquant.export_onnx, or another tool, wrote to its end."


def load_model(path: ModelPath) -> onnx.ModelProto:
    """The model without its external data, with the model's own functions inlined.

    Raises ``ExportError`` where there is no such file or it is not an ONNX model.
    """
    try:
        model: onnx.ModelProto = require("onnx").load(os.fspath(path), load_external_data=False)
    except Exception as error:  # protobuf's parse error has no public name
        got = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ExportError(f"{os.fspath(path)} must be an ONNX model: got {got}. {_GIVE}") from error
    if not model.HasField("graph"):
        raise ExportError(f"{os.fspath(path)} must be an ONNX model: got one without a graph. {_GIVE}")
    if model.functions:
        model = require("onnx.inliner").inline_local_functions(model)
    return model


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node of the graph in order, each followed by those of its branches and loop bodies."""
    for node in graph.node:
        yield node
        for body in _bodies(node):
            yield from all_nodes(body)


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and those of its branches and loop bodies."""
    yield graph
    for node in graph.node:
        for body in _bodies(node):
            yield from all_graphs(body)


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        yield from [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """Who makes and who reads each value of ``model``; external tensors are looked for in ``folder``.

    One namespace for all scopes: ONNX forbids a body to reuse a name of the graph around it.
    """

    model: onnx.ModelProto
    folder: str

    @cached_property
    def producer(self) -> dict[str, onnx.NodeProto]:
        return {name: node for node in all_nodes(self.model.graph) for name in node.output if name}

    @cached_property
    def scopes(self) -> dict[str, int]:
        """Value → a number of the graph, branch or loop body that makes it."""
        graphs = enumerate(all_graphs(self.model.graph))
        return {name: number for number, graph in graphs for node in graph.node for name in node.output if name}

    @cached_property
    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in all_nodes(self.model.graph):
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def initializers(self) -> dict[str, onnx.TensorProto]:
        found = {tensor.name: tensor for graph in all_graphs(self.model.graph) for tensor in graph.initializer}
        for name, node in self.producer.items():
            if node.op_type == "Constant":
                found.update((name, a.t) for a in node.attribute if a.name == "value")
        return found

    @cached_property
    def constants(self) -> frozenset[str]:
        """Values that no graph input reaches."""
        graphs = all_graphs(self.model.graph)
        found = set(self.initializers) | {tensor.values.name for graph in graphs for tensor in graph.sparse_initializer}
        for node in all_nodes(self.model.graph):  # in topological order, as the standard asks
            if all(name in found for name in node.input if name) and not any(_bodies(node)):
                found.update(node.output)
        return frozenset(found)

    @cached_property
    def outputs(self) -> frozenset[str]:
        return frozenset(output.name for output in self.model.graph.output)

    def array(self, node: onnx.NodeProto, index: int) -> Any:
        """The numpy array fed to ``node`` at ``index``, ``None`` where there is none or it is computed.

        Raises ``ExportError`` where the file beside the model that holds it cannot be read.
        """
        tensor = self.initializers.get(node.input[index]) if index < len(node.input) else None
        if tensor is None:
            return None
        try:
            return require("onnx.numpy_helper").to_array(tensor, base_dir=self.folder)
        except Exception as error:  # the checker's error has no public base
            if not tensor.external_data:
                raise
            told = f"the data of {tensor.name!r} must be readable in {self.folder}"
            raise ExportError(f"{told}: got {error}. Keep the file of its weights beside the model.") from error

    def quantizer_of(self, codes: str) -> onnx.NodeProto | None:
        """The QuantizeLinear that codes come out of, clipped to fewer bits than their type at most."""
        node = self.producer.get(codes)
        if node is not None and node.op_type == "Clip":
            node = self.producer.get(node.input[0])
        return node if node is not None and node.op_type == "QuantizeLinear" else None

    def code_readers(self, quantizer: onnx.NodeProto) -> list[onnx.NodeProto]:
        """What reads the codes of a QuantizeLinear, clipped or not."""
        readers = self.consumers.get(quantizer.output[0], [])
        clips = [node for node in readers if self.quantizer_of(node.output[0]) is quantizer]
        after = [node for clip in clips for node in self.consumers.get(clip.output[0], [])]
        return [*(node for node in readers if node not in clips), *after]

    def code_type(self, node: onnx.NodeProto) -> str | None:
        """ONNX's name (``"UINT8"``) for the codes that a QuantizeLinear writes or a DequantizeLinear reads.

        ``None`` where the graph alone does not tell.
        """
        names = require("onnx").TensorProto.DataType.Name
        for index in (2, 0) if node.op_type == "DequantizeLinear" else (2,):
            tensor = self.initializers.get(node.input[index]) if index < len(node.input) else None
            if tensor is not None:
                return str(names(tensor.data_type))
        if node.op_type == "DequantizeLinear":
            source = self.quantizer_of(node.input[0])
            return None if source is None else self.code_type(source)
        dtype = next((attribute.i for attribute in node.attribute if attribute.name == "output_dtype"), 0)
        return str(names(dtype)) if dtype else "UINT8" if len(node.input) < 3 else None


_FLOATS = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}  # by TensorProto's number of the type


def as_declared(model: onnx.ModelProto, feeds: Feeds) -> Feeds:
    """Floats in the types of a graph's inputs; those of bfloat16, which numpy has not, are rounded to it in float32."""
    kinds = {value.name: _FLOATS.get(value.type.tensor_type.elem_type) for value in model.graph.input}
    return {
        name: _as_type(array, kinds[name]) if array.dtype.kind == "f" and kinds.get(name) else array
        for name, array in feeds.items()
    }


def _as_type(array: np.ndarray, kind: str | None) -> np.ndarray:
    if kind != "bfloat16":
        return array.astype(kind, copy=False)
    return array.astype(require("ml_dtypes").bfloat16).astype("float32")


def folder_of(path: ModelPath) -> str:
    return str(Path(path).absolute().parent)
