"""Small graphs, each for one thing that TensorRT takes or does not: what its builder makes of it, what rules say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx

from tests.onnx.graphs import FLOAT, FLOAT16, Graph

FP8, FP4, INT4 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn, ml_dtypes.int4
BFLOAT16 = onnx.TensorProto.BFLOAT16

# What the builder does: all products on codes; floats where they are meant, as beside a lone weight; floats though both
# operands are quantized; an error; or a product on codes whose numbers are not ONNX's, which a build does not tell.
Outcome = Literal["codes", "as meant", "float", "error", "wrong"]


@dataclass(frozen=True)
class Case:
    """``build`` writes nodes and returns the graph's output."""

    name: str
    build: Callable[[Graph], str]
    outcome: Outcome = "codes"
    rule: str | None = None
    said: str = ""
    opset: int = 21
    checked: bool = True  # off for operators that onnx does not know, and for what its checker refuses too

    @property
    def clean(self) -> bool:
        return self.rule is None

    def save(self, folder: Path) -> Path:
        """Writes the graph as a file."""
        graph = Graph()
        output = self.build(graph)
        return graph.write(folder / "net.onnx", output, opset=self.opset, checked=self.checked)


# ---------------------------------------------------------------- parts


def pair(g: Graph, x: str, scale: Any = 0.05, zero_point: int = 0, dtype: Any = np.int8, **attributes: Any) -> str:
    return g.qdq(x, scale, zero_point, dtype, **attributes)


def image(g: Graph, name: str = "x") -> str:
    return g.input(2, 4, 6, 6, name=name)


def vectors(g: Graph, name: str = "x") -> str:
    return g.input(2, 8, 8, name=name)


def matrix(g: Graph, x: str) -> str:
    return g.op("MatMul", x, g.weight(8, 8, axis=1))


def stored(g: Graph, shape: tuple[int, ...], scale: Any, dtype: Any = np.int8, **attributes: Any) -> str:
    """Codes of a type after a DequantizeLinear; ``scale`` is an array or the name of a value."""
    codes = g.const(np.ones(shape, dtype))
    if isinstance(scale, str):
        return g.op("DequantizeLinear", codes, scale, **attributes)
    scale = np.asarray(scale, np.float32)
    return g.op("DequantizeLinear", codes, g.const(scale), g.const(np.zeros(scale.shape, dtype)), **attributes)


def ints(g: Graph, *values: int) -> str:
    return g.const(np.array(values))


# ---------------------------------------------------------------- what stands between Q/DQ and a product

Between = Callable[[Graph, str], str]

CARRY_IMAGES: dict[str, Between] = {
    "MaxPool": lambda g, x: g.op("MaxPool", x, kernel_shape=[2, 2]),
    "MaxPool-padded": lambda g, x: g.op("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2]),
    "Pad": lambda g, x: g.op("Pad", x, ints(g, 0, 0, 1, 1, 0, 0, 1, 1)),
    "Pad-edge": lambda g, x: g.op("Pad", x, ints(g, 0, 0, 1, 1, 0, 0, 1, 1), mode="edge"),
    "Pad-reflect": lambda g, x: g.op("Pad", x, ints(g, 0, 0, 1, 1, 0, 0, 1, 1), mode="reflect"),
    "DepthToSpace": lambda g, x: g.op("SpaceToDepth", g.op("DepthToSpace", x, blocksize=2), blocksize=2),
    "Concat-of-equal-scales": lambda g, x: g.op("Concat", x, pair(g, image(g, "y")), axis=0),
    "Tile": lambda g, x: g.op("Tile", x, ints(g, 1, 1, 2, 1)),
}
CARRY_VECTORS: dict[str, Between] = {
    "Transpose": lambda g, x: g.op("Transpose", x, perm=[0, 2, 1]),
    "Reshape": lambda g, x: g.op("Reshape", x, ints(g, 4, 4, 8)),
    "Slice": lambda g, x: g.op("Slice", x, ints(g, 0), ints(g, 4), ints(g, 1)),
    "Slice-reversed": lambda g, x: g.op("Slice", x, ints(g, -1), ints(g, -9), ints(g, 1), ints(g, -1)),
    "Gather": lambda g, x: g.op("Gather", x, ints(g, 3, 1), axis=1),
    "Unsqueeze": lambda g, x: g.op("Unsqueeze", x, ints(g, 0)),
    "Expand": lambda g, x: g.op("Expand", g.op("Unsqueeze", x, ints(g, 0)), ints(g, 3, 2, 8, 8)),
    "Identity": lambda g, x: g.op("Identity", x),
    "Mul-by-a-constant": lambda g, x: g.op("Mul", x, g.const(np.float32(0.5))),
    "Cast": lambda g, x: g.op("Cast", x, to=FLOAT),
}
STOP_IMAGES: dict[str, Between] = {
    "AveragePool": lambda g, x: g.op("AveragePool", x, kernel_shape=[2, 2]),
    "Relu": lambda g, x: g.op("Relu", x),
    "Clip": lambda g, x: g.op("Clip", x, g.const(np.float32(0)), g.const(np.float32(6))),
    "Resize": lambda g, x: g.op("Resize", x, "", g.const(np.array([1, 1, 2, 2], np.float32)), mode="nearest"),
    "Concat-of-unequal-scales": lambda g, x: g.op("Concat", x, pair(g, image(g, "y"), 0.1), axis=0),
}


def _image_through(between: Between, again: bool = False) -> Callable[[Graph], str]:
    def build(g: Graph) -> str:
        y = between(g, pair(g, image(g)))
        return g.conv(pair(g, y) if again else y)

    return build


def _vectors_through(between: Between) -> Callable[[Graph], str]:
    return lambda g: matrix(g, between(g, pair(g, vectors(g))))


def between() -> Iterator[Case]:
    for name, found in CARRY_IMAGES.items():
        yield Case(f"{name}-before-Conv", _image_through(found))
    for name, found in CARRY_VECTORS.items():
        yield Case(f"{name}-before-MatMul", _vectors_through(found))
    for name, found in STOP_IMAGES.items():
        rule, said = "products-run-on-codes", "which computes in float, stands between operand 0 and its Q/DQ"
        yield Case(f"{name}-before-Conv", _image_through(found), "float", rule, said)
        if not name.startswith("Concat"):
            yield Case(f"{name}-and-Q/DQ-again-before-Conv", _image_through(found, again=True))
    yield Case(
        "MaxPool-3d", lambda g: _volume(g, False), "float", "products-run-on-codes", "MaxPool '.*', which computes"
    )
    yield Case("MaxPool-3d-and-Q/DQ-again", lambda g: _volume(g, True))
    yield Case("Cast-of-both", _cast)
    twice = "Cast '.*', which computes in float, stands between operand 0"
    yield Case("Cast-and-back", _cast_back, "float", "products-run-on-codes", twice)
    yield Case("Transpose-of-a-weight", _transposed_weight)


def _volume(g: Graph, again: bool) -> str:
    y = g.op("MaxPool", pair(g, g.input(2, 4, 6, 6, 6)), kernel_shape=[2, 2, 2])
    return g.op("Conv", pair(g, y) if again else y, g.weight(4, 4, 3, 3, 3, axis=0))


def _cast(g: Graph) -> str:
    return g.op("MatMul", *(g.op("Cast", x, to=FLOAT16) for x in (pair(g, vectors(g)), g.weight(8, 8, axis=1))))


def _cast_back(g: Graph) -> str:
    return matrix(g, g.op("Cast", g.op("Cast", pair(g, vectors(g)), to=FLOAT16), to=FLOAT))


def _transposed_weight(g: Graph) -> str:
    return g.op("MatMul", pair(g, vectors(g)), g.op("Transpose", g.weight(8, 8, axis=0), perm=[1, 0]))


# ---------------------------------------------------------------- places around products


def _result(g: Graph) -> str:
    return pair(g, g.op("Relu", matrix(g, pair(g, vectors(g)))))


def _skip(quantized: bool) -> Callable[[Graph], str]:
    def build(g: Graph) -> str:
        y = image(g, "y")
        return g.op("Add", g.conv(pair(g, image(g))), pair(g, y) if quantized else y)

    return build


def _two_convolutions(g: Graph) -> str:
    x = pair(g, image(g))
    return g.op("Add", g.conv(x), g.conv(x, name="short"))


def _quantized_sum(g: Graph) -> str:
    return pair(g, g.op("Add", pair(g, g.conv(pair(g, image(g)))), pair(g, image(g, "y"))))


def _activation(op: str) -> Callable[[Graph], str]:
    return lambda g: g.conv(pair(g, g.op(op, g.conv(pair(g, image(g))))), name="next")


def _requantized_activation(g: Graph) -> str:
    y = pair(g, g.conv(pair(g, image(g))))
    return g.conv(g.op("Relu", y), name="next")


def _quantized_twice(g: Graph) -> str:
    x = vectors(g)
    return g.op("Add", matrix(g, pair(g, x)), matrix(g, pair(g, x, 0.1)))


def _quantized_again(g: Graph) -> str:
    return matrix(g, pair(g, pair(g, vectors(g))))


def _batch_norm(g: Graph) -> str:
    return g.op("BatchNormalization", g.conv(pair(g, image(g))), *(g.const(np.ones(4, np.float32)) for _ in range(4)))


def _scores(scaled: str) -> Callable[[Graph], str]:
    def build(g: Graph) -> str:
        q, k, factor = vectors(g, "q"), vectors(g, "k"), g.const(np.float32(0.5))
        q = g.op("Mul", q, factor) if scaled == "before" else q
        scores = g.op("MatMul", pair(g, q), g.op("Transpose", pair(g, k), perm=[0, 2, 1]))
        scores = g.op("Mul", scores, factor) if scaled == "after" else scores
        return g.op("Softmax", g.op("Add", scores, vectors(g, "mask")))

    return build


def _attention(quantized: str, dtype: Any = np.int8, half: bool = False) -> Callable[[Graph], str]:
    """``quantized`` names what has Q/DQ: q, k, v, p, the probabilities, and r, the result."""

    def build(g: Graph) -> str:
        def operand(name: str, x: str) -> str:
            return half_pair(g, x, dtype) if name in quantized and half else pair(g, x, dtype=dtype)

        def place(name: str, x: str) -> str:
            return operand(name, x) if name in quantized else x

        inputs = {name: g.input(2, 4, 128, 64, dtype=FLOAT16 if half else FLOAT, name=name) for name in "qkv"}
        q, k, v = (place(name, x) for name, x in inputs.items())
        scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2]))
        return place("r", g.op("MatMul", place("p", g.op("Softmax", scores)), v))

    return build


def _heads(*parts: str, times_one: bool = False) -> Callable[[Graph], str]:
    """A product with a scale per column, split; each part becomes two heads of 8 ("heads"), or stays as it is."""

    def build(g: Graph) -> str:
        y = g.op("MatMul", pair(g, g.input(2, 8, 16)), g.weight(16, 16 * len(parts), axis=1))
        y = g.op("Mul", y, g.const(np.float32(1))) if times_one else y
        split = [g.fresh("part") for _ in parts]
        whole = g.op("Add", y, g.floats(16 * len(parts)))
        g.nodes.append(onnx.helper.make_node("Split", [whole], split, axis=-1, num_outputs=len(parts)))
        for index, part in enumerate(parts):
            if part == "heads":
                apart = g.op("Reshape", split[index], ints(g, 2, 8, 2, 8))
                split[index] = g.op("Transpose", apart, perm=[0, 2, 1, 3])
        return g.op("Sum", *(g.op("ReduceSum", each, keepdims=0) for each in split))

    return build


def half_pair(g: Graph, x: str, dtype: Any = np.int8) -> str:
    """Q/DQ of a float16 tensor by a float32 scale."""
    scale, zero = g.const(np.float32(0.05)), g.const(np.zeros((), dtype))
    return g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, zero), scale, zero, output_dtype=FLOAT16)


def places() -> Iterator[Case]:
    yield Case("result-that-nothing-reads-as-codes", _result)
    yield Case("skip-in-float", _skip(False))
    yield Case("skip-quantized", _skip(True))
    yield Case("Add-of-two-convolutions", _two_convolutions)
    yield Case("Q/DQ-between-Conv-and-Add", _quantized_sum)
    for op in ("Relu", "Sigmoid", "HardSwish"):
        yield Case(f"{op}-in-front-of-Q/DQ", _activation(op))
    yield Case("Relu-after-Q/DQ", _requantized_activation, "float", "products-run-on-codes", "Relu '.*'")
    yield Case("two-quantizers-of-a-tensor", _quantized_twice)
    yield Case("quantized-again", _quantized_again)
    yield Case("BatchNormalization-after-Conv", _batch_norm)
    for scaled in ("before", "after"):
        yield Case(f"scores-scaled-{scaled}", _scores(scaled))
    split, said = "products-run-on-codes", "its result is split in three parts that become heads"
    yield Case("product-split-into-heads", _heads("heads", "heads", "heads"), "float", split, said)
    yield Case("product-split-into-heads-times-one", _heads("heads", "heads", "heads", times_one=True))
    yield Case("product-split-into-four", _heads(*["heads"] * 4))
    yield Case("product-split-into-heads-and-a-rest", _heads("heads", "heads", "rest"))
    yield Case("attention-int8-q-k", _attention("qk"), "as meant")
    yield Case("attention-int8-whole", _attention("qkvp"))
    yield Case("attention-fp8-whole", _attention("qkvp", FP8))
    yield Case("attention-fp8-q-k", _attention("qk", FP8), "float", "attention-stays-whole", "are not all fp8")
    whole, said = "attention-stays-whole", "has codes in a part of its operands: MatMul '.*' is float"
    yield Case("attention-half-int8-q-k", _attention("qk", half=True), "float", whole, said, 23)
    yield Case("attention-half", _attention("", half=True), "as meant", opset=23)
    yield Case("attention-half-int8-whole", _attention("qkvp", half=True), opset=23)
    yield Case("attention-half-int8-whole-and-its-result", _attention("qkvpr", half=True), opset=23)
    yield Case("attention-int8-whole-and-its-result", _attention("qkvpr"))
    yield Case("attention-half-fp8-whole", _attention("qkvp", FP8, half=True), opset=23)
