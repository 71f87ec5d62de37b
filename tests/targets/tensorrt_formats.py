"""Small graphs in the forms of weights and of Q/DQ that TensorRT takes or does not: more of `tensorrt_graphs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import helper

from tests.onnx.graphs import FLOAT, FLOAT16, Graph
from tests.targets.tensorrt_graphs import FP4, FP8, INT4, Case, image, matrix, pair, stored, vectors

# ---------------------------------------------------------------- forms of weights


def _product(op: str, *shape: int, axis: int, x: tuple[int, ...], **attributes: Any) -> Callable[[Graph], str]:
    return lambda g: g.op(op, pair(g, g.input(*x)), g.weight(*shape, axis=axis), **attributes)


def _one_scale(shape: tuple[int, ...]) -> Callable[[Graph], str]:
    return lambda g: g.op("Conv", pair(g, image(g)), stored(g, (4, 4, 3, 3), np.full(shape, 0.1)))


def _int4(size: int | None, x: str, rows: int = 128, columns: int = 8) -> Callable[[Graph], str]:
    """Codes [rows, columns] with blocks along the rows, or scales per column; ``x`` float or quantized."""

    def build(g: Graph) -> str:
        shape = (columns,) if size is None else (rows // size, columns)
        given = {"axis": 1} if size is None else {"axis": 0, "block_size": size}
        weight = stored(g, (rows, columns), np.full(shape, 0.1), INT4, **given)
        values = g.input(2, rows)
        return g.op("MatMul", {"float": lambda: values, "int8": lambda: pair(g, values)}[x](), weight)

    return build


def _int4_convolution(g: Graph) -> str:
    return g.op("Conv", pair(g, image(g)), stored(g, (4, 4, 3, 3), np.full(4, 0.1), INT4, axis=0))


def _blocks(dtype: Any, quantized: bool, rows: int = 64) -> Callable[[Graph], str]:
    def build(g: Graph) -> str:
        x = g.input(2, rows)
        weight = stored(g, (rows, 8), np.full((-(-rows // 32), 8), 0.1), dtype, axis=0, block_size=32)
        return g.op("MatMul", pair(g, x, dtype=dtype) if quantized else x, weight)

    return build


def _mixed(activation: Any, weight: Any) -> Callable[[Graph], str]:
    def build(g: Graph) -> str:
        return g.op("MatMul", pair(g, vectors(g), dtype=activation), stored(g, (8, 8), np.array(0.5), weight))

    return build


def weights() -> Iterator[Case]:
    yield Case("Conv-1d", _product("Conv", 4, 4, 3, axis=0, x=(2, 4, 6)))
    yield Case("Conv-2d", _product("Conv", 4, 4, 3, 3, axis=0, x=(2, 4, 6, 6)))
    yield Case("Conv-3d", _product("Conv", 4, 4, 3, 3, 3, axis=0, x=(2, 4, 6, 6, 6)))
    yield Case("Conv-depthwise", _product("Conv", 4, 1, 3, 3, axis=0, x=(2, 4, 6, 6), group=4))
    yield Case("Gemm", _product("Gemm", 8, 8, axis=1, x=(2, 8)))
    yield Case("Gemm-transB", _product("Gemm", 8, 8, axis=0, x=(2, 8), transB=1))
    yield Case("MatMul-of-batches", _product("MatMul", 2, 8, 8, axis=2, x=(2, 8, 8)))
    yield Case("weight-of-one-scale", _one_scale(()))
    yield Case("weight-of-one-scale-in-a-list", _one_scale((1,)))
    axes = "weight-axis-is-the-output-channel"
    yield Case("Conv-scales-on-inputs", _product("Conv", 4, 4, 3, 3, axis=1, x=(2, 4, 6, 6)), "float", axes, "axis 1")
    yield Case("MatMul-scales-on-rows", _product("MatMul", 8, 8, axis=0, x=(2, 8)), "float", axes, "along axis 0")
    yield Case("Gemm-scales-on-rows", _product("Gemm", 8, 8, axis=1, x=(2, 8), transB=1), "float", axes, "axis 1")
    up = _product("ConvTranspose", 4, 4, 3, 3, axis=1, x=(2, 4, 6, 6))
    yield Case("ConvTranspose", up, "float", "products-run-on-codes", "no integer transposed convolution")
    for size in (16, 32, 64, 128):
        yield Case(f"int4-blocks-of-{size}", _int4(size, "float"), "as meant")
    yield Case("int4-odd-columns", _int4(64, "float", columns=7), "as meant")
    yield Case("int4-per-column", _int4(None, "float"), "as meant")
    yield Case("int4-per-column-beside-codes", _int4(None, "int8"))
    blocks = "blocks-stand-beside-floats"
    yield Case(
        "int4-blocks-beside-codes", _int4(64, "int8"), "wrong", blocks, "beside a quantized activation in MatMul"
    )
    yield Case("int8-blocks-beside-codes", _blocks(np.int8, True), "wrong", blocks)
    yield Case("fp8-blocks-beside-codes", _blocks(FP8, True), "wrong", blocks)
    yield Case("int8-blocks", _blocks(np.int8, False), "as meant")
    yield Case("fp8-blocks", _blocks(FP8, False), "as meant")
    yield Case("blocks-and-a-rest", _blocks(np.int8, False, rows=48), "as meant")
    yield Case("int4-convolution", _int4_convolution, "error", "int4-is-of-matrices", "write them as int8")
    yield Case("int8-activation-only", _beside_float, "float", "operands-go-together", "operand 0 is quantized")
    yield Case(
        "int8-weight-only", lambda g: matrix(g, vectors(g)), "float", "every-input-is-quantized", "its operand 0"
    )
    yield Case(
        "fp8-beside-int8", _mixed(FP8, np.int8), "error", "codes-of-operands-go-together", "fp8 codes by integer"
    )
    yield Case(
        "int8-beside-fp8", _mixed(np.int8, FP8), "error", "codes-of-operands-go-together", "integer codes by fp8"
    )
    yield Case("fp8", _mixed(FP8, FP8))


def _beside_float(g: Graph) -> str:
    return g.op("MatMul", pair(g, vectors(g)), vectors(g, "y"))


# ---------------------------------------------------------------- forms of Q/DQ


def _plain(g: Graph) -> str:
    return matrix(g, pair(g, vectors(g)))


def _zero_point_by_type(g: Graph) -> str:
    x, scale = vectors(g), g.const(np.float32(0.05))
    codes = g.op("QuantizeLinear", x, scale, output_dtype=onnx.TensorProto.INT8)
    return matrix(g, g.op("DequantizeLinear", codes, scale))


def _zero_point_shape(g: Graph) -> str:
    codes, scale, zero = g.const(np.ones((8, 8), np.int8)), g.const(np.full(8, 0.1, np.float32)), g.const(np.int8(0))
    return g.op("MatMul", pair(g, vectors(g)), g.op("DequantizeLinear", codes, scale, zero, axis=1))


def _axis_missing(g: Graph) -> str:
    return g.op("MatMul", pair(g, vectors(g)), stored(g, (8, 8), np.full(8, 0.1)))


def _axis_negative(g: Graph) -> str:
    return g.op("MatMul", pair(g, vectors(g)), stored(g, (8, 8), np.full(8, 0.1), axis=-1))


def _output_dtype(g: Graph) -> str:
    weight = stored(g, (8, 8), np.full(8, 0.1), axis=1, output_dtype=FLOAT)
    return g.op("MatMul", pair(g, vectors(g)), weight)


def _listed_scale(op: str) -> Callable[[Graph], str]:
    def build(g: Graph) -> str:
        x = pair(g, image(g) if op == "Conv" else vectors(g), np.full(1, 0.05, np.float32))
        return g.conv(x) if op == "Conv" else matrix(g, x)

    return build


def _per_channel(g: Graph) -> str:
    return matrix(g, pair(g, vectors(g), np.full(8, 0.1, np.float32), axis=1))


def _integer_bias(g: Graph) -> str:
    bias = stored(g, (4,), np.full(4, 0.1), np.int32, axis=0)
    return g.op("Conv", pair(g, image(g)), g.weight(4, 4, 3, 3, axis=0), bias)


def _integers(g: Graph) -> str:
    return g.op("MatMulInteger", *(g.input(2, 8, 8, dtype=onnx.TensorProto.UINT8, name=name) for name in "ab"))


def _dynamic(g: Graph) -> str:
    codes, scale, zero = "codes", "scale", "zero"
    g.nodes.append(helper.make_node("DynamicQuantizeLinear", [vectors(g)], [codes, scale, zero], name="dynamic"))
    return g.op("Cast", codes, to=FLOAT)


def _dilated(g: Graph) -> str:
    return g.conv(g.op("MaxPool", pair(g, image(g)), kernel_shape=[2, 2], dilations=[2, 2]))


def _scatter(g: Graph) -> str:
    indices, updates = g.const(np.zeros((1, 1), np.int64)), g.const(np.ones((1, 8, 8), np.float32))
    return g.op("ScatterND", _plain(g), indices, updates, reduction="add")


def _half(product: bool, output: bool = True) -> Callable[[Graph], str]:
    """Half tensors beside float32 scales, with the half type asked for or not."""

    def build(g: Graph) -> str:
        scale, zero, given = g.const(np.float32(0.05)), g.const(np.int8(0)), {"output_dtype": FLOAT16} if output else {}
        codes = g.op("QuantizeLinear", g.input(2, 8, 8, dtype=FLOAT16), scale, zero)
        x = g.op("DequantizeLinear", codes, scale, zero, **given)
        y = g.op("MatMul", x, stored(g, (8, 8), np.full(8, 0.1), axis=1, **given))
        return g.op("Add", y, g.const(np.ones(8, np.float16)))

    return build


def forms() -> Iterator[Case]:
    yield Case("plain", _plain)
    yield Case("type-of-codes-by-output_dtype", _zero_point_by_type)
    yield Case("axis-missing", _axis_missing)
    yield Case("axis-negative", _axis_negative)
    yield Case("output_dtype", _output_dtype, opset=23)
    for opset in (22, 23, 24, 25):
        yield Case(f"opset-{opset}", _plain, opset=opset)
    yield Case("scale-in-a-list-MatMul", _listed_scale("MatMul"))
    codes = "products-run-on-codes"
    yield Case("scale-in-a-list-Conv", _listed_scale("Conv"), "float", codes, r"must be a scalar: got shape \(1,\)")
    yield Case("activation-per-channel", _per_channel, "float", codes, r"must be a scalar: got shape \(8,\)")
    yield Case(
        "zero-point-of-another-shape",
        _zero_point_shape,
        "error",
        "zero-point-is-given",
        "differ in shape",
        checked=False,
    )
    point = "zero-point-is-zero"
    yield Case("zero-point-3", lambda g: matrix(g, pair(g, vectors(g), zero_point=3)), "error", point, r"got \[3\]")
    scales = {"0": 0.0, "negative": -0.5, "NaN": float("nan")}
    for name, value in scales.items():
        build = _scaled(value)
        yield Case(f"scale-{name}", build, "error", "scale-is-positive", "must be finite and above 0")
    unsigned = _unsigned(np.uint8)
    yield Case("codes-uint8", unsigned, "wrong", "codes-are-known", "its codes are uint8: TensorRT has no such codes")
    yield Case("codes-int16", _unsigned(np.int16), "error", "codes-are-known", "its codes are int16")
    yield Case("codes-fp8-e5m2", _unsigned(ml_dtypes.float8_e5m2), "error", "codes-are-known", "float8e5m2")
    yield Case("bias-int32", _integer_bias, "error", "codes-are-known", "an int32 bias must stay float")
    read = "operators-are-read"
    yield Case("MatMulInteger", _integers, "error", read, "does not read MatMulInteger")
    yield Case("DynamicQuantizeLinear", _dynamic, "error", read, "does not read DynamicQuantizeLinear")
    yield Case("MaxPool-with-dilations", _dilated, "error", read, "MaxPool with dilations")
    yield Case("ScatterND-with-reduction", _scatter, "error", read, "ScatterND with a reduction")
    yield Case("float16-with-float32-scales", _half(True), opset=23)
    untyped = _half(True, output=False)
    yield Case(
        "float16-without-output_dtype", untyped, "error", "types-go-together", "float and float16", 23, checked=False
    )


def _scaled(value: float) -> Callable[[Graph], str]:
    return lambda g: matrix(g, pair(g, vectors(g), value))


def _unsigned(dtype: Any) -> Callable[[Graph], str]:
    return lambda g: matrix(g, pair(g, vectors(g), dtype=dtype))


# ---------------------------------------------------------------- NVFP4


def _fp4(rows: int = 32, block: int = 16, kind: Any = FP8, scales: int = 1) -> Callable[[Graph], str]:
    """Both operands in fp4, with fp8 block scales after one float scale."""

    def build(g: Graph) -> str:
        one = g.const(np.full(scales, 0.5, np.float32) if scales > 1 else np.float32(0.5))
        codes, small, x, amax = "codes", "small", g.input(2, rows), g.const(np.float32(1.0))
        given = {"axis": -1, "block_size": 16, "scale_type": onnx.TensorProto.FLOAT8E4M3FN}
        node = helper.make_node("TRT_FP4DynamicQuantize", [x, amax], [codes, small], domain="trt", name="q", **given)
        g.nodes.append(node)
        step = g.op("DequantizeLinear", small, g.const(np.float32(0.5)))
        left = g.op("DequantizeLinear", codes, step, axis=-1, block_size=16)
        blocks, points = g.const(np.ones((-(-rows // block), 8), kind)), [g.const(np.zeros((), kind))]
        after = g.op(
            "DequantizeLinear", blocks, one, *(points if kind is not FP8 else []), **({"axis": 1} if scales > 1 else {})
        )
        return g.op("MatMul", left, stored(g, (rows, 8), after, FP4, axis=0, block_size=block))

    return build


def _fp4_activation(g: Graph) -> str:
    codes = g.op("QuantizeLinear", g.input(2, 32), g.const(np.float32(0.5)), g.const(np.zeros((), FP4)))
    return g.op("Identity", codes)


def fp4() -> Iterator[Case]:
    """Of those that break a rule, some build: what they compute was not seen, documents say that they are not meant."""
    rule = "fp4-is-in-blocks"
    yield Case("nvfp4", _fp4(), checked=False)
    yield Case("fp4-blocks-that-do-not-divide", _fp4(40), "error", rule, "got 40", checked=False)
    yield Case("fp4-blocks-of-32", _fp4(block=32), "wrong", rule, "must hold 16 codes: got 32", checked=False)
    yield Case("fp4-int8-scales", _fp4(kind=np.int8), "wrong", rule, "its scales must be fp8 codes", checked=False)
    yield Case("fp4-scale-per-column", _fp4(scales=8), "float", rule, "must have one float scale", checked=False)
    yield Case("fp4-activation", _fp4_activation, "wrong", rule, "by trt::TRT_FP4", opset=23, checked=False)
