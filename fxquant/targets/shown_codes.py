"""Codes of a file's quantizers as outputs of a copy of its graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True)
class Part:
    """A run of a file that shows codes.

    Attributes:
        judged: labels of those that this run is for.
        shown: label → value name, of all but what those are computed from.
    """

    judged: frozenset[str]
    shown: Mapping[str, str]


def apart(wiring: Wiring, values: Mapping[str, str]) -> list[Part]:
    """Runs in which each of `code_values` is judged once, and what it is computed from is not shown there.

    What is an output is not fused with what is after it: where all are shown, no kernel can leave one out that it
    should round to. All others are shown, so that differences do not run on from one to the next. Of a residual block
    there are three parts; of nets whose layers each read many others no more than `_PARTS`, with some neighbours in
    one.
    """
    before = _nearest(wiring, {*values.values()})
    part_of: dict[str, int] = {}
    for value, found in before.items():
        taken = [part_of[each] for each in found]
        part_of[value] = min(range(_PARTS), key=lambda part: (taken.count(part), part))
    parts = []
    for part in sorted({*part_of.values()}):
        judged = {value for value in before if part_of[value] == part}
        hidden = frozenset[str]().union(*(before[value] for value in judged)) - judged
        shown = {label: value for label, value in values.items() if value not in hidden}
        parts.append(Part(judged=frozenset(k for k, v in shown.items() if v in judged), shown=shown))
    return parts


def _nearest(wiring: Wiring, quantizers: Set[str]) -> dict[str, frozenset[str]]:
    """Quantizer → those from which it is computed by no other, in the graph's order."""
    nearest: dict[str, frozenset[str]] = {}
    found = {}
    for node in wiring.model.graph.node:
        before = frozenset[str]().union(*(nearest.get(name, frozenset()) for name in node.input))
        for name in node.output:
            nearest[name] = frozenset([name]) if name in quantizers else before
            if name in quantizers:
                found[name] = before
    return found
