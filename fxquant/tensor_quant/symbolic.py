"""The ONNX form of the amax quantizers, for both of torch's exporters: native QuantizeLinear and DequantizeLinear.

::

    scale = amax / B                           B the highest code, or the largest value of a float format
    y     = DequantizeLinear(QuantizeLinear(clip(x), scale, 0), scale, 0)

The clip is there when the zero point's type holds more codes than the format. ONNX divides by amax/B where
`fxquant.ops.amax` multiplies by B/amax: at ties, rarely, they give neighbouring codes (of 10 million normal values
with 20 amax: none in 4 bits, 9 in 8 bits, 2872 in 16). An amax of at most 2⁻²⁴ gets a scale with which all rounds to
0, for a float format that of amax 1. Arithmetic is float32 for every input dtype. NaN is the runtime's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from fxquant.errors import ExportError
from fxquant.numerics.amax import EPSILON, code_range
from fxquant.numerics.formats import float_format

# Divided by it, all that a float quantizer meets rounds to 0.
_HUGE = 2.0**127
# onnx.TensorProto.DataType
_FLOAT = 1
_DATA_TYPES = {torch.float32: 1, torch.float16: 10, torch.float64: 11, torch.bfloat16: 16}
_FLOAT_KINDS = {"e4m3": "float8e4m3fn", "e5m2": "float8e5m2", "e2m1": "float4e2m1"}
_INTEGER_DATA_TYPES = {"uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "uint4": 21, "int4": 22}


class Emitter(Protocol):
    """An exporter's graph, as far as it is needed here."""

    opset: int

    def op(self, name: str, *inputs: Any, **attributes: int) -> Any:
        """One node of the standard domain."""

    def number(self, value: float) -> Any:
        """A float32 scalar."""

    def vector(self, values: Sequence[int]) -> Any:
        """An int64 vector."""

    def zeros(self, kind: str, shape: tuple[int, ...]) -> Any:
        """Zeros of an ONNX type, by name; ExportError if the exporter cannot hold it."""


class Operand:
    """A value of the exporter with what is known of it: dtype, and sizes, None where they are open."""

    def __init__(self, value: Any, dtype: torch.dtype, shape: Sequence[int | None]) -> None:
        self.value = value
        self.dtype = dtype
        self.shape = tuple(shape)

    def wide(self, emit: Emitter) -> Any:
        """The value as float32."""
        return self.value if self.dtype == torch.float32 else emit.op("Cast", self.value, to=_FLOAT)


def _storage(lowest: int, bound: int, opset: int) -> tuple[str, int, int]:
    """The narrowest ONNX integer type that holds the codes, with its limits.

    4 bits only where the codes fill them: onnxruntime refuses to load a Clip before a 4-bit QuantizeLinear.
    """
    unsigned = "u" if lowest == 0 else ""
    for width in (4, 8, 16) if opset >= 21 else (8,):
        low, high = (0, 2**width - 1) if unsigned else (-(2 ** (width - 1)), 2 ** (width - 1) - 1)
        if low <= lowest and bound <= high and (width > 4 or (low, high) == (lowest, bound)):
            return f"{unsigned}int{width}", low, high
    raise ExportError(
        f"num_bits must be at most 8 before opset 21: got codes up to {bound} in opset {opset}. Export with "
        "torch.onnx.export(dynamo=True, opset_version=21) and fxquant.onnx.translate_amax."
    )


def _axes(name: str, bound: Operand, rank: int) -> list[int]:
    """The dimensions of the input along which ``bound`` differs."""
    if not all(isinstance(size, int) for size in bound.shape):
        raise ExportError(f"{name} must have a fixed shape: got {bound.shape}. Do not make its sizes dynamic.")
    offset = rank - len(bound.shape)
    return [offset + d for d, size in enumerate(bound.shape) if size != 1]


def _qdq(
    emit: Emitter, x: Operand, scale: Any, zero_point: Any, edges: Any, shape: tuple[int, ...], axis: int | None
) -> Any:
    value = x.wide(emit)
    if edges is not None:
        if shape:  # Clip takes one limit for all
            value = emit.op("Min", emit.op("Max", value, edges[0]), edges[1])
        else:
            value = emit.op("Clip", value, *edges)
    attributes = {} if axis is None else {"axis": axis}
    codes = emit.op("QuantizeLinear", value, scale, zero_point, **attributes)
    return emit.op("DequantizeLinear", codes, scale, zero_point, **attributes)


def _by_amax(emit: Emitter, x: Operand, amax: Operand, kind: str, top: float, idle: float, edges: Any) -> Any:
    """Q/DQ with scale amax/top, ``idle`` where amax counts as 0; ``edges`` are codes to clip at."""
    axes = _axes("amax", amax, len(x.shape))
    reach = amax.wide(emit)
    full = emit.op("Div", reach, emit.number(top))
    nothing = emit.op("LessOrEqual", reach, emit.number(EPSILON))
    full = emit.op("Where", nothing, emit.number(idle), full)
    if not axes and amax.shape:
        full = emit.op("Reshape", full, emit.vector([]))
    clips = None if edges is None else [emit.op("Mul", full, emit.number(edge)) for edge in edges]
    if len(axes) > 1:  # QuantizeLinear knows one axis: divide before, multiply after
        divided = Operand(emit.op("Div", x.wide(emit), full), torch.float32, x.shape)
        clips = None if edges is None else [emit.number(edge) for edge in edges]
        y = _qdq(emit, divided, emit.number(1.0), emit.zeros(kind, ()), clips, (), None)
        y = emit.op("Mul", y, full)
    else:
        axis = axes[0] if axes else None
        shape: tuple[int, ...] = () if axis is None else (int(amax.shape[axis - len(x.shape)] or 0),)
        scale = full if axis is None else emit.op("Reshape", full, emit.vector(shape))
        y = _qdq(emit, x, scale, emit.zeros(kind, shape), clips, shape, axis)
    return y if x.dtype == torch.float32 else emit.op("Cast", y, to=_DATA_TYPES[x.dtype])


def integer(emit: Emitter, x: Operand, amax: Operand, num_bits: int, unsigned: bool, narrow_range: bool) -> Any:
    """`fake_tensor_quant`: zero point 0 of the narrowest type, (u)int4 and (u)int16 from opset 21."""
    lowest, bound = code_range(num_bits, unsigned, narrow_range)
    kind, low, high = _storage(lowest, bound, emit.opset)
    edges = None if (low, high) == (lowest, bound) else (float(lowest), float(bound))
    return _by_amax(emit, x, amax, kind, float(bound), _HUGE, edges)


def floating(emit: Emitter, x: Operand, amax: Operand | None, E: int, M: int) -> Any:
    """`scaled_float`: zero point 0 of type float8e4m3fn or float8e5m2 (opset 19), float4e2m1 (opset 23)."""
    target = float_format((E, M))
    least = 23 if target.name == "e2m1" else 19
    if target.name not in _FLOAT_KINDS or emit.opset < least:
        wanted = f" before opset {least}" if target.name in _FLOAT_KINDS else ""
        raise ExportError(
            f"(E, M) must have a type in ONNX: got ({E}, {M}), which has none{wanted}. "
            "Use (4, 3) or (5, 2) from opset 19, (2, 1) from opset 23."
        )
    kind = _FLOAT_KINDS[target.name]
    if amax is None:
        y = _qdq(emit, x, emit.number(1.0), emit.zeros(kind, ()), None, (), None)
        return y if x.dtype == torch.float32 else emit.op("Cast", y, to=_DATA_TYPES[x.dtype])
    return _by_amax(emit, x, amax, kind, target.max, 1.0 / target.max, None)


def affine(emit: Emitter, x: Operand, low: Operand, high: Operand, num_bits: int) -> Any:
    """`fake_affine_tensor_quant` per tensor: scale ``step``, zero point ``−zero``.

    A range that does not hold 0 has no such zero point: the result is NaN then, not a wrong number.
    """
    for name, bound in (("min", low), ("max", high)):
        if _axes(name, bound, len(x.shape)):
            raise ExportError(f"{name} must be one number in ONNX: got shape {bound.shape}.")
    half = 2 ** (num_bits - 1)
    kind, least, most = _storage(-half, half - 1, emit.opset)
    bottom, top = (emit.op("Reshape", b.wide(emit), emit.vector([])) if b.shape else b.wide(emit) for b in (low, high))
    step = emit.op("Div", emit.op("Sub", top, bottom), emit.number(float(2**num_bits - 1)))
    zero = emit.op("Add", emit.op("Round", emit.op("Div", bottom, step)), emit.number(float(half)))
    point = emit.op("Neg", zero)
    kept = emit.op("Clip", point, emit.number(float(-half)), emit.number(float(half - 1)))
    step = emit.op("Where", emit.op("Equal", kept, point), step, emit.number(float("nan")))
    zero_point = emit.op("Cast", kept, to=_INTEGER_DATA_TYPES[kind])
    edges = None
    if (least, most) != (-half, half - 1):
        edges = [emit.op("Mul", emit.op("Add", zero, emit.number(float(code))), step) for code in (-half, half - 1)]
    y = _qdq(emit, x, step, zero_point, edges, (), None)
    return y if x.dtype == torch.float32 else emit.op("Cast", y, to=_DATA_TYPES[x.dtype])


_TORCH_SCRIPT_TYPES = {
    "int8": torch.int8,
    "uint8": torch.uint8,
    "float8e4m3fn": torch.float8_e4m3fn,
    "float8e5m2": torch.float8_e5m2,
}


class TorchScript:
    """`Emitter` over the graph context that ``torch.onnx.export(dynamo=False)`` hands to ``symbolic``."""

    def __init__(self, g: Any) -> None:
        self.g = g
        self.opset = int(g.opset)

    def op(self, name: str, *inputs: Any, **attributes: int) -> Any:
        """A node."""
        return self.g.op(name, *inputs, **{f"{key}_i": value for key, value in attributes.items()})

    def number(self, value: float) -> Any:
        """A float32 scalar."""
        return self.g.op("Constant", value_t=torch.tensor(value, dtype=torch.float32))

    def vector(self, values: Sequence[int]) -> Any:
        """An int64 vector."""
        return self.g.op("Constant", value_t=torch.tensor(list(values), dtype=torch.int64))

    def zeros(self, kind: str, shape: tuple[int, ...]) -> Any:
        """Zeros of the types that TorchScript has too."""
        if kind not in _TORCH_SCRIPT_TYPES:
            raise ExportError(
                f"zero point must have a type that torch.onnx.export(dynamo=False) can hold: got {kind}. "
                "Export with dynamo=True and fxquant.onnx.translate_amax."
            )
        return self.g.op("Constant", value_t=torch.zeros(shape, dtype=_TORCH_SCRIPT_TYPES[kind]))


def torch_script_operand(value: Any) -> Operand:
    """A TorchScript value, whose rank and dtype must be known."""
    found = value.type()
    if found.kind() != "TensorType" or found.sizes() is None or found.dtype() is None:
        raise ExportError(f"{value.debugName()} must be a tensor of known rank and dtype: got {found}.")
    return Operand(value, found.dtype(), found.sizes())
