"""A file of float32 as one of a half type: what is float becomes half, but for scales and what half cannot hold."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fxquant.support.require import require

_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum"})
_QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
# Attributes that say the type of a result.
_DTYPES = ("to", "dtype", "output_dtype", "output_datatype")
# What takes a float32 value as it is: what moves it, and a quantizer.
_TAKES = frozenset({"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Slice", "Identity", "QuantizeLinear"})
# What a variance passes on its way from the sum to the root.
_AFTER_SUMS = frozenset({"Add", "Max", "Clip", "Div", "Mul", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Expand"})


def data_type(dtype: torch.dtype) -> Any:
    """ONNX's name of a torch dtype."""
    import onnx_ir as ir

    return {
        torch.float16: ir.DataType.FLOAT16,
        torch.bfloat16: ir.DataType.BFLOAT16,
        torch.float32: ir.DataType.FLOAT,
        torch.float64: ir.DataType.DOUBLE,
    }[dtype]


def type_floats(
    model: Any, dtype: torch.dtype, opset: int, without: Collection[str] = (), *, int4: bool = False
) -> list[str]:
    """Rewrites a float32 model, an ``onnx_ir.Model``, to ``dtype``, float16 or bfloat16; notes::

        Conv(DQ(q, s), DQ(w, t), b)   →  Conv(DQ(q, s, output_dtype=FLOAT16), DQ(w, t, output_dtype=FLOAT16), b16)
        Conv(DQ(q, s), DQ(w, t), b)   →  Conv(Cast(DQ(q, s), FLOAT16), Cast(DQ(w, t), FLOAT16), b16)     opset 22
        Q(x, s)                       →  Q(x16, s)              Q(Cast(x16, FLOAT), s)                    opset 22

    Scales stay float32: rounded to half they would move codes. So do

    - angles (what goes into Sin and Cos and nowhere else): a position times a frequency has more digits than a half;
    - sums of squares on their way into a root, with the squares;
    - operands that the standard has no half of (the scales of Resize, an Einsum in bfloat16), and operators of
      ``without``, which the runtime has not in this type,

    each, after what only moves its values, with a Cast where it meets the rest. A quantizer reads them as they are, and
    so it does float32 inputs of the graph: those codes are training's.

    ``int4``: the scales of int4 weights are half where all are normal numbers of the type, as TensorRT has no other
    form in which a product reads 4 bits; where one is not, a Cast to half stands after the float32 DequantizeLinear.

    A finite constant beyond the type becomes its largest value: such are masks. Inputs and outputs of the graph keep
    their types; a Cast to float32 after a half one goes.
    """
    return _Typing(model, data_type(dtype), opset, without, int4).run()


@dataclass(kw_only=True)
class _Slots:
    """The type parameters of a node's inputs and outputs, as the standard binds them together.

    Attributes:
        inputs, outputs: parameter by position, None where no float32 tensor stands.
        wide: parameters that stay float32.
        exact: inputs that do for their values' sake: what is computed for them alone stays float32 as well.
    """

    inputs: list[str | None]
    outputs: list[str | None]
    wide: set[str] = field(default_factory=set)
    exact: set[int] = field(default_factory=set)

    def keep(self, inputs: Iterable[int], outputs: Iterable[str | None] = ()) -> None:
        """These inputs stay float32 exactly, and so do all values of their types."""
        self.exact |= {index for index in inputs if self.inputs[index] is not None}
        self.wide |= {name for name in (*(self.inputs[index] for index in self.exact), *outputs) if name is not None}


class _Typing:
    """One rewrite."""

    def __init__(self, model: Any, half: Any, opset: int, without: Collection[str], int4: bool) -> None:
        import onnx_ir as ir

        self.without, self.int4 = without, int4
        self.ir, self.model, self.half, self.opset = ir, model, half, opset
        self.nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
        self.slots = {node: self._slots(node) for node in self.nodes}
        self.saturated = 0

    def run(self) -> list[str]:
        """Decides what stays, then writes."""
        for node in reversed(self.nodes):
            self._keep_exact(node)
        for node in self.nodes:
            if node.op_type in _TAKES and self.slots[node].inputs[0] is not None and self._stays(node.inputs[0]):
                self.slots[node].wide.add(str(self.slots[node].inputs[0]))
        held = [value for graph in self._graphs() for value in list(graph.initializers.values())]
        for value, stays in [(value, self._stays(value)) for value in self._values()]:
            self._connect(value, stays)
        for value in held:
            self._initializer(value)
        for node in self.nodes:
            self._attributes(node)
        self._drop_casts()
        many = f"{self.saturated} constants beyond {self.half.name.lower()} are its largest value in the file"
        return [many] if self.saturated else []

    def _slots(self, node: Any) -> _Slots:
        """Those of a node, with what the standard and its kind keep in float32."""
        defs = require("onnx").defs
        inputs: list[str | None] = [None] * len(node.inputs)
        outputs: list[str | None] = [None] * len(node.outputs)
        kind = f"tensor({self.half.name.lower()})"
        known = node.domain in ("", "ai.onnx") and defs.has(node.op_type, self.opset)
        schema = defs.get_schema(node.op_type, self.opset) if known else None
        allowed = {} if schema is None else {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        for values, names, formals in (
            (node.inputs, inputs, None if schema is None else schema.inputs),
            (node.outputs, outputs, None if schema is None else schema.outputs),
        ):
            for index, value in enumerate(values):
                if value is not None and value.dtype == self.ir.DataType.FLOAT:
                    names[index] = formals[min(index, len(formals) - 1)].type_str if formals else "unknown"
        slots = _Slots(inputs=inputs, outputs=outputs)
        slots.wide = {name for name in (*inputs, *outputs) if name is not None and kind not in allowed.get(name, ())}
        if node.op_type == "TRT_MXFP8DequantizeLinear":  # its attribute says what it gives
            slots.wide = set()
        if node.op_type in _QDQ:
            self._keep_scale(node, slots)
        elif node.op_type in ("Sin", "Cos", "ReduceL2", "ReduceSumSquare") or self._is_root_of_sum(node):
            slots.keep([0])
        elif node.op_type in self.without or (any(outputs) and not any(inputs) and not self._says_type(node)):
            slots.wide |= {name for name in (*inputs, *outputs) if name is not None}
        return slots

    def _keep_scale(self, node: Any, slots: _Slots) -> None:
        """Scales are float32, but for codes of 4 bits where TensorRT has no DQ from such scales to half."""
        kinds, kind = self.ir.DataType, node.inputs[0].dtype
        if kind == kinds.INT4 and self.int4:
            if not self._is_normal(node.inputs[1].const_value):
                slots.keep([1], slots.outputs)
        elif kind != kinds.FLOAT4E2M1:  # of fp4 the scales of blocks are half, the tensor's not
            slots.keep([1])

    def _is_normal(self, tensor: Any) -> bool:
        """Whether all values of a constant keep their digits in the half type."""
        info = require("ml_dtypes").finfo(self.half.numpy())
        values = None if tensor is None else abs(tensor.numpy())
        return values is not None and bool(((values >= info.smallest_normal) & (values <= info.max)).all())

    def _says_type(self, node: Any) -> bool:
        """Whether an attribute says that a node's result is float32, or a body of its own."""
        kinds = self.ir.AttributeType
        for name, attribute in node.attributes.items():
            if attribute.type in (kinds.TENSOR, kinds.GRAPH) or name in (*_DTYPES, "value_float", "value_floats"):
                return True
        return bool(node.op_type == "DequantizeLinear")

    def _is_root_of_sum(self, node: Any) -> bool:
        """Sqrt(mean + eps), or a power of it."""
        if node.op_type not in ("Sqrt", "Pow"):
            return False
        source = node.inputs[0].producer()
        while source is not None and source.op_type in _AFTER_SUMS:
            held = [v for v in source.inputs if v is not None and v.producer() is not None]
            source = held[0].producer() if held else None
        return source is not None and source.op_type in ("ReduceMean", "ReduceSum")

    def _keep_exact(self, node: Any) -> None:
        """Float32 for what is read only where values have to be exact; products of codes are typed nevertheless."""
        slots = self.slots[node]
        floats = [value for value, name in zip(node.outputs, slots.outputs, strict=True) if name is not None]
        if not floats or (node.op_type in _PRODUCTS and self._reads_codes(node)):
            return
        if any(a.type in (self.ir.AttributeType.GRAPH, self.ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            return
        if node.op_type in _QDQ:
            if all(self._is_wide(value) for value in floats):
                slots.keep([], slots.outputs)
        elif all(self._is_exact(value) for value in floats):
            slots.keep(range(len(slots.inputs)), slots.outputs)

    def _is_wide(self, value: Any) -> bool:
        return not value.is_graph_output() and all(self._needs_wide(user, index) for user, index in value.uses())

    def _is_exact(self, value: Any) -> bool:
        uses = list(value.uses())
        return (
            bool(uses) and not value.is_graph_output() and all(index in self.slots[user].exact for user, index in uses)
        )

    def _reads_codes(self, node: Any) -> bool:
        makers = [value.producer() for value in node.inputs if value is not None]
        return any(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)

    def _graphs(self) -> Iterator[Any]:
        yield self.model.graph
        for node in self.nodes:
            for attribute in node.attributes.values():
                if attribute.type == self.ir.AttributeType.GRAPH:
                    yield attribute.as_graph()
                elif attribute.type == self.ir.AttributeType.GRAPHS:
                    yield from attribute.as_graphs()

    def _values(self) -> Iterator[Any]:
        """Float32 ones that are computed or given."""
        for graph in self._graphs():
            for value in graph.inputs:
                if value.dtype == self.ir.DataType.FLOAT:
                    yield value
        for node in self.nodes:
            for value, name in zip(node.outputs, self.slots[node].outputs, strict=True):
                if name is not None:
                    yield value

    def _stays(self, value: Any) -> bool:
        """Whether a value is float32 where it is made."""
        node = value.producer()
        if node is None:
            return bool(value.is_graph_input() and value.graph is self.model.graph)
        return self.slots[node].outputs[value.index()] in self.slots[node].wide

    def _needs_wide(self, user: Any, index: int) -> bool:
        return self.slots[user].inputs[index] in self.slots[user].wide

    def _connect(self, value: Any, stays: bool) -> None:
        """A value in its type, and a Cast for those readers that want the other."""
        kinds, is_main = (self.half, self.ir.DataType.FLOAT), value.graph is self.model.graph
        value.type = self.ir.TensorType(kinds[stays])
        uses = [(user, index) for user, index in value.uses() if self._needs_wide(user, index) != stays]
        shown = [index for index, output in enumerate(value.graph.outputs) if output is value and is_main != stays]
        if not uses and not shown:
            return
        cast = cast_of(value, kinds[not stays])
        (result,) = cast.outputs
        if value.producer() is not None:
            value.graph.insert_after(value.producer(), cast)
        else:
            value.graph.insert_before(value.graph[0], cast)
        for user, index in uses:
            user.replace_input_with(index, result)
        for index in shown:
            value.graph.outputs[index] = result
        if shown and is_main:
            result.name, value.name = value.name, f"{value.name}_in_{value.dtype.name.lower()}"

    def _initializer(self, value: Any) -> None:
        """Half for those readers that take it; a copy where others want float32."""
        if value.dtype != self.ir.DataType.FLOAT or value.const_value is None:
            return
        uses = [(user, index) for user, index in value.uses() if not self._needs_wide(user, index)]
        if not uses:
            return
        small = self._narrowed(value.const_value, f"{value.name}_{self.half.name.lower()}")
        fresh = self.ir.Value(name=small.name, shape=value.shape, type=self.ir.TensorType(self.half), const_value=small)
        value.graph.register_initializer(fresh)
        for user, index in uses:
            user.replace_input_with(index, fresh)
        if not value.uses() and not value.is_graph_output():
            del value.graph.initializers[value.name]

    def _narrowed(self, tensor: Any, name: str | None) -> Any:
        """A float32 tensor in the half type, finite where it was."""
        import numpy as np

        array = tensor.numpy()
        kind = self.half.numpy()
        limit = float(require("ml_dtypes").finfo(kind).max)
        beyond = np.isfinite(array) & (np.abs(array) > limit)
        self.saturated += bool(beyond.any())
        array = np.where(beyond, np.copysign(np.float32(limit), array), array)
        return self.ir.tensor(array.astype(kind), dtype=self.half, name=name)

    def _attributes(self, node: Any) -> None:
        """Types and values that a node holds itself."""
        if not any(value.dtype == self.half for value in node.outputs):
            return
        kinds, single = self.ir.AttributeType, int(self.ir.DataType.FLOAT)
        for name, attribute in list(node.attributes.items()):
            if name in _DTYPES and attribute.type == kinds.INT and attribute.as_int() == single:
                node.attributes[name] = self.ir.AttrInt64(name, int(self.half))
            elif attribute.type == kinds.TENSOR and attribute.as_tensor().dtype == self.ir.DataType.FLOAT:
                node.attributes[name] = self.ir.AttrTensor(name, self._narrowed(attribute.as_tensor(), None))
            elif name in ("value_float", "value_floats"):
                import numpy as np

                del node.attributes[name]
                tensor = self.ir.tensor(np.asarray(attribute.value, dtype=np.float32))
                node.attributes["value"] = self.ir.AttrTensor("value", self._narrowed(tensor, None))
        if node.op_type == "DequantizeLinear":
            node.attributes["output_dtype"] = self.ir.AttrInt64("output_dtype", int(self.half))

    def _drop_casts(self) -> None:
        """Casts to the type that a value has."""
        for node in self.nodes:
            value = node.inputs[0] if node.op_type == "Cast" else None
            if value is not None and value.dtype == node.outputs[0].dtype == self.half:
                self._drop(node, value, node.outputs[0])

    def _drop(self, cast: Any, value: Any, result: Any) -> None:
        graph = cast.graph
        if result.is_graph_output():
            if value.producer() is None or value.is_graph_output() or value.graph is not graph:
                return  # it gives the output a name of its own
            name, result.name = result.name, None
            value.name = name
            for index, output in enumerate(graph.outputs):
                if output is result:
                    graph.outputs[index] = value
        self.ir.convenience.replace_all_uses_with(result, value)
        graph.remove(cast, safe=True)


def cast_of(value: Any, to: Any) -> Any:
    """A Cast node of a value, in no graph yet."""
    import onnx_ir as ir

    node = ir.node("Cast", inputs=[value], attributes={"to": int(to)})
    (result,) = node.outputs
    result.name = f"{value.name}_in_{to.name.lower()}"
    result.shape, result.type = value.shape, ir.TensorType(to)
    return node
