"""A Q/DQ file as tuning sees it: the layers that can be float instead, and the operators that go along with them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from fxquant.targets.document import Wiring, all_nodes
from fxquant.targets.lint_reader import MOVES, PRODUCTS

if TYPE_CHECKING:
    import onnx

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
FUSED = ("Relu", "Clip")  # what an integer kernel does on the way to its result's codes

_WITHOUT_PAIRS = {
    "MatMulInteger": "its scales follow each input: it has no Q/DQ pair to take away",
    "ConvInteger": "its scales follow each input: it has no Q/DQ pair to take away",
    "QLinearConv": "it is written with codes in and out, not with Q/DQ pairs",
    "QLinearMatMul": "it is written with codes in and out, not with Q/DQ pairs",
    "QGemm": "it is written with codes in and out, not with Q/DQ pairs",
}


@dataclass(frozen=True, kw_only=True)
class QdqGraph(Wiring):
    """The questions of tuning. Nodes go by the name of their first result, which no variant of the file changes.

    Attributes:
        needs_output: products whose integer kernel needs a quantized result, for the runtime in question.
    """

    needs_output: tuple[str, ...] = ("Conv",)

    @cached_property
    def top(self) -> dict[str, onnx.NodeProto]:
        """Nodes of the graph itself, by their first result."""
        return {node.output[0]: node for node in self.model.graph.node}

    @cached_property
    def layers(self) -> dict[str, onnx.NodeProto]:
        """Products that read what a Q/DQ pair, or a DequantizeLinear of a constant, gives."""
        return {key: node for key, node in self.top.items() if node.op_type in PRODUCTS and self._can_be_float(node)}

    @cached_property
    def left_alone(self) -> tuple[tuple[str, str], ...]:
        """Products that read codes and are no layers: their names, and why."""
        found = []
        for node in all_nodes(self.model.graph):
            name = node.name or node.output[0]
            if node.op_type in _WITHOUT_PAIRS:
                found.append((name, _WITHOUT_PAIRS[node.op_type]))
            elif node.op_type in PRODUCTS and any(self.pair(value) is not None for value in node.input):
                if self.top.get(node.output[0]) is not node:
                    found.append((name, "it stands in a branch or a loop body"))
                elif node.output[0] not in self.layers:
                    found.append((name, "its codes come from no QuantizeLinear that could be taken away"))
        return tuple(found)

    def _can_be_float(self, node: onnx.NodeProto) -> bool:
        pairs = [pair for value in node.input if (pair := self.pair(value)) is not None]
        return bool(pairs) and all(pair.output[0] in self.constants or self.quantizer(pair) for pair in pairs)

    def pair(self, value: str) -> onnx.NodeProto | None:
        """The DequantizeLinear that a value comes out of, moved at most."""
        node = self.producer.get(value)
        while node is not None and node.op_type in MOVES:
            node = self.producer.get(node.input[0])
        return node if node is not None and node.op_type == DEQUANTIZE else None

    def has_channels(self, pair: onnx.NodeProto) -> bool:
        """Whether a DequantizeLinear has more scales than one."""
        scale = self.initializers.get(pair.input[1])
        return scale is not None and len(scale.dims) > 0 and list(scale.dims) != [1]

    def quantizer(self, pair: onnx.NodeProto) -> onnx.NodeProto | None:
        """The QuantizeLinear in front of a DequantizeLinear, in the graph itself."""
        node = self.quantizer_of(pair.input[0])
        return node if node is not None and node.output[0] in self.top else None

    def unit(self, value: str) -> str | None:
        """The operator that makes a value, looked for behind what is fused into it and what moves values."""
        node = self.producer.get(value)
        while node is not None and node.op_type in (*FUSED, *MOVES, "Max"):
            node = self.producer.get(node.input[0])
        return None if node is None else node.output[0]

    def ends(self, value: str) -> Iterator[onnx.NodeProto | None]:
        """Who reads a value after moves; None stands for the caller of the graph."""
        if value in self.outputs:
            yield None
        for node in self.consumers.get(value, []):
            if node.op_type in MOVES and node.input[0] == value:
                yield from self.ends(node.output[0])
            else:
                yield node

    @cached_property
    def followers(self) -> dict[str, onnx.NodeProto]:
        """Other operators between Q/DQ pairs: an Add, a Concat, a pool."""
        plain = (*PRODUCTS, *MOVES, *FUSED, QUANTIZE, DEQUANTIZE)
        return {
            key: node
            for key, node in self.top.items()
            if node.op_type not in plain and key not in self.constants and self._between_pairs(node)
        }

    def _between_pairs(self, node: onnx.NodeProto) -> bool:
        operands = [value for value in node.input if value and value not in self.constants]
        pairs = [self.pair(value) for value in operands]
        if not pairs or any(pair is None or self.quantizer(pair) is None for pair in pairs):
            return False
        return any(end is not None and end.op_type == QUANTIZE for end in self._ends_of_unit(node.output[0]))

    def _ends_of_unit(self, value: str) -> Iterator[onnx.NodeProto | None]:
        for end in self.ends(value):
            if end is not None and end.op_type in FUSED and end.output[0] in self.top:
                yield from self._ends_of_unit(end.output[0])
            else:
                yield end

    # ------------------------------------------------------------ what stays on integers

    def staying(self, floats: Collection[str]) -> frozenset[str]:
        """Layers and followers that stay on integers while some layers are float.

        A follower stays where its operands and its result are codes for another reason too, as `fxquant.prepare`
        places it; what was placed otherwise in the file stays as it is.
        """
        whole = frozenset({*self.layers, *self.followers})
        usual = self._settled(whole)
        found = self._settled(whole - set(floats))
        return found | (whole - usual - set(floats))

    def _settled(self, staying: frozenset[str]) -> frozenset[str]:
        while True:
            out = {key for key in staying if key in self.followers and not self._may_stay(self.followers[key], staying)}
            if not out:
                return staying
            staying -= out

    def _may_stay(self, node: onnx.NodeProto, staying: frozenset[str]) -> bool:
        end = node.output[0]
        while len(readers := list(self.ends(end))) == 1 and readers[0] is not None and readers[0].op_type in FUSED:
            end = readers[0].output[0]
        sources = [self.source(value) for value in node.input if value not in self.constants]
        return all(self._is_quantized(value, staying) for value in (*sources, end))

    def source(self, value: str) -> str:
        """The float in front of the Q/DQ pair that a value comes out of."""
        pair = self.pair(value)
        quantizer = None if pair is None else self.quantizer(pair)
        assert quantizer is not None, f"{value} comes out of a pair"
        return str(quantizer.input[0])

    def _is_quantized(self, value: str, staying: frozenset[str]) -> bool:
        """Whether all uses of a tensor want codes, or what makes it gives them anyway."""
        unit = self.unit(value)
        if self.gives_codes(value, staying) and (unit not in self.followers or self._is_joined(str(unit), staying)):
            return True
        return all(self._wants_codes(end, staying) for end in self.ends(value))

    def _is_joined(self, key: str, staying: frozenset[str]) -> bool:
        """Whether a follower reads only what others make, or need, as codes."""
        sources = [self.source(value) for value in self.followers[key].input if value not in self.constants]
        return all(
            self.gives_codes(source, staying)
            or any(self._wants_codes(end, staying, PRODUCTS) for end in self.ends(source))
            for source in sources
        )

    def _wants_codes(
        self, end: onnx.NodeProto | None, staying: frozenset[str], ops: tuple[str, ...] | None = None
    ) -> bool:
        """Whether an end is a QuantizeLinear, and all (of ``ops``: any) that read its codes stay on integers."""
        if end is None or end.op_type != QUANTIZE:
            return False
        pairs = [node for node in self.code_readers(end) if node.op_type == DEQUANTIZE]
        readers = [reader for pair in pairs for reader in self.ends(pair.output[0])]
        if ops is not None:
            return any(r is not None and r.op_type in ops and r.output[0] in staying for r in readers)
        return all(reader is not None and reader.output[0] in staying for reader in readers)

    def gives_codes(self, value: str, staying: Collection[str]) -> bool:
        """Whether a tensor is made by an integer kernel that needs its result quantized."""
        unit = self.unit(value)
        if unit is None or unit not in staying:
            return False
        return unit in self.followers or self.layers[unit].op_type in self.needs_output
