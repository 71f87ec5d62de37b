"""Codes of a file's quantizers as outputs of a copy of its graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fxquant.support.require import require
from fxquant.targets.document import ModelPath, Wiring, folder_of, load_model
from fxquant.targets.standard import TRT

# numpy has no 2- or 4-bit integers, so no runtime can hand them out: a Cast to the name on the right can.
_WIDER = {"INT4": "INT8", "UINT4": "UINT8", "INT2": "INT8", "UINT2": "UINT8"}
_PARTS = 4


def quantize_outputs(path: ModelPath) -> dict[str, str]:
    """Label → value name of each activation QuantizeLinear's output, in graph order: the label is that name, less "@0".

    A Q whose input hangs on constants alone belongs to a weight and is left out; so is one inside a branch or
    a loop body, whose values nobody outside can read.
    """
    return code_values(Wiring(model=load_model(path), folder=folder_of(path)), ())


def code_values(wiring: Wiring, also: Collection[str]) -> dict[str, str]:
    """The same, of a loaded file; ``also`` names those that are activations though no input reaches them."""
    made: dict[str, str] = {}  # what a QuantizeLinear gives → the same clipped as codes, where it is
    for node in wiring.model.graph.node:
        source = node if node.domain == TRT and len(node.output) > 1 else wiring.quantizer_of(node.output[0])
        if source is not None and (source.input[0] not in wiring.constants or node.output[0].partition("@")[0] in also):
            made[source.output[0]] = node.output[0]
    return {name.removesuffix("@0"): name for name in made.values()}  # where an input of the graph has the site's name


def show(wiring: Wiring, values: Mapping[str, str]) -> dict[str, str]:
    """Adds values of `code_values` to the outputs of ``wiring.model``, those of 2 or 4 bits widened to 8.

    Label → name of the output. Its type is left to the runtime, which knows it.
    """
    onnx, graph = require("onnx"), wiring.model.graph
    shown = {output.name for output in graph.output}
    names: dict[str, str] = {}
    for label, value in values.items():
        made = wiring.producer[value]
        wider = _WIDER.get(wiring.code_type(made) or "") if made.op_type == "QuantizeLinear" else None
        names[label] = f"{value}::codes" if wider else value
        if wider:
            to = onnx.TensorProto.DataType.Value(wider)
            graph.node.append(onnx.helper.make_node("Cast", [value], [names[label]], to=to))
        if names[label] not in shown:
            graph.output.append(onnx.ValueInfoProto(name=names[label]))
    return names


def apart(wiring: Wiring, values: Mapping[str, str]) -> list[dict[str, str]]:
    """Values of `code_values` in parts, none of which has a quantizer beside one that it is computed from.

    What is an output is not fused with what is after it. Between neighbours that are not shown, a quantizer has the
    fusions of the file. Of a residual block there are three parts; of nets whose layers each read many others there are
    no more than `_PARTS`, with some neighbours in one.
    """
    nearest: dict[str, frozenset[str]] = {}  # value → the quantizers from which it comes by no other
    part_of: dict[str, int] = {}
    quantizers = {*values.values()}
    for node in wiring.model.graph.node:
        before = frozenset[str]().union(*(nearest.get(name, frozenset()) for name in node.input))
        for name in node.output:
            nearest[name] = frozenset([name]) if name in quantizers else before
            if name in quantizers:
                taken = [part_of[each] for each in before]
                part_of[name] = min(range(_PARTS), key=lambda part: (taken.count(part), part))
    parts = [{label: value for label, value in values.items() if part_of[value] == part} for part in range(_PARTS)]
    return [part for part in parts if part]
