from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from fxquant.errors import ExportError
from fxquant.targets.onnxruntime_reasons import UNKNOWN
from fxquant.targets.onnxruntime_rows import INTEGER, kernel_rows
from fxquant.targets.target import KernelRow
from tests.onnx.graphs import BOOL, FLOAT16, Graph, image, rows

Build = Callable[[Graph, str], str]


def only_row(graph: Graph, folder: Path, *outputs: str, opset: int = 21) -> KernelRow:
    path = graph.save(folder, *outputs, opset=opset)
    before = path.read_bytes()
    (row,) = kernel_rows(path)
    assert path.read_bytes() == before and list(folder.iterdir()) == [path]
    assert row.integer is (row.kernel in INTEGER) is (row.reason is None)
    assert row.reason != UNKNOWN
    return row


def linear(graph: Graph, x: str, bias: str | None = None, shape: tuple[int, ...] = (5,)) -> str:
    y = graph.op("MatMul", x, graph.weight(8, 5, axis=1), name="linear")
    return y if bias is None else graph.op(bias, y, graph.floats(*shape), name="bias")


def gemm(graph: Graph, x: str, *, bias: str | None = None, **attributes: float) -> str:
    inputs = [x, graph.weight(5, 8, axis=0), *([bias] if bias else [])]
    return graph.op("Gemm", *inputs, name="linear", transB=1, **attributes)


def clip(graph: Graph, x: str, low: float, high: float) -> str:
    return graph.op("Clip", x, graph.const(np.float32(low)), graph.const(np.float32(high)), name="clip")


# How every reason of these two kinds ends.
APART = "Write the bias as Sub(MatMul, -bias), which stays apart"
NBITS = "MatMulNBits rounds the other operand in its own way unless session.qdq_matmulnbits_accuracy_level is 1"

INTEGER_CONV: dict[str, Build] = {
    "plain": lambda g, x: g.qdq(g.conv(x)),
    "without bias": lambda g, x: g.qdq(g.conv(x, bias=False)),
    "relu at the smallest code": lambda g, x: g.qdq(g.op("Relu", g.conv(x)), 0.05, 0),
    "signed relu": lambda g, x: g.qdq(g.op("Relu", g.conv(x)), 0.05, -128, np.int8),
    "clip wider than the codes": lambda g, x: g.qdq(clip(g, g.conv(x), 0, 6), 6 / 255, 0),
    "identity between": lambda g, x: g.qdq(g.op("Identity", g.conv(x))),
    "after a max pool": lambda g, x: g.qdq(g.conv(g.op("MaxPool", x, kernel_shape=[2, 2]))),
    "4-bit codes held in int8": lambda g, x: g.qdq(g.op("Conv", x, g.weight(4, 4, 3, 3, axis=0, limit=7))),
}


@pytest.mark.parametrize("build", INTEGER_CONV.values(), ids=INTEGER_CONV)
def test_convolutions_that_run_as_integers(tmp_path: Path, build: Build) -> None:
    graph, x = image()
    assert only_row(graph, tmp_path, build(graph, x)).kernel == "QLinearConv"


INTEGER_LINEAR: dict[str, tuple[int, str, Build]] = {
    "no bias, float out": (2, "MatMulIntegerToFloat", linear),
    "no bias, codes out": (2, "QLinearMatMul", lambda g, x: g.qdq(linear(g, x))),
    "subtracted bias": (2, "MatMulIntegerToFloat", lambda g, x: linear(g, x, "Sub")),
    "subtracted bias, gelu": (
        2,
        "MatMulIntegerToFloat",
        lambda g, x: g.qdq(g.op("Erf", linear(g, x, "Sub"))),
    ),
    "added bias, codes out": (2, "QGemm", lambda g, x: g.qdq(linear(g, x, "Add"))),
    "added bias, relu, codes out": (
        2,
        "QGemm",
        lambda g, x: g.qdq(g.op("Relu", linear(g, x, "Add")), 0.05, 0),
    ),
    "added bias in 3 dimensions": (3, "MatMulIntegerToFloat", lambda g, x: linear(g, x, "Add")),
    "gemm, no bias": (2, "QGemm", gemm),
    "gemm, codes out": (2, "QGemm", lambda g, x: g.qdq(gemm(g, x, bias=g.floats(5)))),
    "after a reshape": (
        2,
        "MatMulIntegerToFloat",
        lambda g, x: linear(g, g.op("Reshape", x, g.const(np.array([-1, 8])))),
    ),
}


@pytest.mark.parametrize(("rank", "kernel", "build"), INTEGER_LINEAR.values(), ids=INTEGER_LINEAR)
def test_linears_that_run_as_integers(tmp_path: Path, rank: int, kernel: str, build: Build) -> None:
    graph, x = rows(rank=rank)
    row = only_row(graph, tmp_path, build(graph, x))
    assert (row.name, row.kernel) == ("linear", kernel)


FLOAT_CONV: dict[str, tuple[Build, str]] = {
    "graph output": (
        lambda g, x: g.conv(x),
        "Conv has no output QuantizeLinear: 'conv' is a graph output",
    ),
    "float reader": (
        lambda g, x: g.qdq(g.op("Add", g.conv(x), x, name="sum")),
        "Conv has no output QuantizeLinear: 'conv' goes to Add 'sum'",
    ),
    "float reader after relu": (
        lambda g, x: g.op("Tanh", g.op("Relu", g.conv(x), name="relu"), name="tanh"),
        "Conv has no output QuantizeLinear: 'relu' goes to Tanh 'tanh', after Relu 'relu'",
    ),
    "relu above the smallest code": (
        lambda g, x: g.qdq(g.op("Relu", g.conv(x), name="relu"), 0.05, 5, name="q"),
        "Relu 'relu' stays a node of its own: the zero point of QuantizeLinear 'q' is 5,"
        " and only 0 clips as a Relu does",
    ),
    "clip inside the codes": (
        lambda g, x: g.qdq(clip(g, g.conv(x), 0, 6), 0.05, 0, name="q"),
        "Clip 'clip' stays a node of its own: QuantizeLinear 'q' covers [0, 12.75], which is not inside [0, 6]",
    ),
    "16-bit output": (
        lambda g, x: g.qdq(g.conv(x), 0.001, 0, np.int16),
        "its output is quantized to int16: integer kernels write int8 and uint8",
    ),
    "4-bit weight": (
        lambda g, x: g.qdq(g.op("Conv", x, g.weight(4, 4, 3, 3, axis=0, dtype=int4(), limit=7))),
        "operand 1 'dequantizelinear_8' holds int4 codes: integer kernels read int8 and uint8",
    ),
    "computed weight": (
        lambda g, x: g.qdq(g.op("Conv", x, g.input(4, 4, 3, 3, name="w"))),
        "operand 1 'w' is not the output of a DequantizeLinear: it is a graph input",
    ),
    "computed bias": (
        lambda g, x: g.qdq(g.op("Conv", x, g.weight(4, 4, 3, 3, axis=0), g.input(4, name="b"))),
        "its bias 'b' is neither a constant nor the output of a DequantizeLinear",
    ),
    "float activation": (
        lambda g, x: g.qdq(g.conv(g.op("Tanh", x, name="tanh"))),
        "operand 0 'tanh' is not the output of a DequantizeLinear: it comes from Tanh 'tanh'",
    ),
    "bias of another scale": (
        lambda g, x: g.qdq(g.op("Conv", x, *weight_and_bias(g, 2.0))),
        "its bias 'bias' has another scale than operand 0's times operand 1's",
    ),
    "transposed": (
        lambda g, x: g.qdq(g.op("ConvTranspose", x, g.weight(4, 4, 2, 2, axis=1))),
        "onnxruntime has no integer kernel for ConvTranspose",
    ),
}


def int4() -> type:
    return pytest.importorskip("ml_dtypes").int4


def weight_and_bias(graph: Graph, factor: float) -> tuple[str, str]:
    """A weight, and a bias whose scale is the right one times ``factor``."""
    scale = np.full(4, 0.01, np.float32)
    codes, bias = np.ones((4, 4, 3, 3), np.int8), np.arange(4, dtype=np.int32)
    zeros = graph.const(np.zeros(4, np.int8)), graph.const(np.zeros(4, np.int32))
    scales = graph.const(scale), graph.const(np.float32(0.05) * scale * np.float32(factor))
    weight = graph.op("DequantizeLinear", graph.const(codes), scales[0], zeros[0], axis=0)
    return weight, graph.op("DequantizeLinear", graph.const(bias), scales[1], zeros[1], axis=0, name="bias")


@pytest.mark.parametrize(("build", "reason"), FLOAT_CONV.values(), ids=FLOAT_CONV)
def test_why_a_convolution_stays_float(tmp_path: Path, build: Build, reason: str) -> None:
    graph, x = image()
    row = only_row(graph, tmp_path, build(graph, x))
    assert row.reason == reason
    assert row.kernel in ("Conv", "FusedConv", "ConvTranspose")


def test_a_convolution_with_the_bias_scale_that_belongs_to_it(tmp_path: Path) -> None:
    graph, x = image()
    y = graph.qdq(graph.op("Conv", x, *weight_and_bias(graph, 1.0)))
    assert only_row(graph, tmp_path, y).kernel == "QLinearConv"


@pytest.mark.parametrize("second", ["Tanh", "QuantizeLinear", None])
def test_an_output_with_several_readers(tmp_path: Path, second: str | None) -> None:
    graph, x = image()
    y = graph.conv(x)
    first = graph.qdq(y, name="q")
    if second == "QuantizeLinear":
        other = graph.qdq(y, 0.07, name="r")
    else:
        other = y if second is None else graph.op(second, y, name="r")
    reader = "the graph's outputs" if second is None else f"{second} 'r'"
    reason = only_row(graph, tmp_path, first, other).reason
    assert reason == f"its output 'conv' goes to several places: QuantizeLinear 'q', {reader}"


FLOAT_LINEAR: dict[str, tuple[str, Build, str]] = {
    "added bias, float out": (
        "Gemm",
        lambda g, x: linear(g, x, "Add"),
        "onnxruntime made one float Gemm of it and Add 'bias': Add has no output QuantizeLinear:"
        f" 'bias' is a graph output. {APART}",
    ),
    "added bias in a row": (
        "Gemm",
        lambda g, x: g.qdq(g.op("Add", linear(g, x), g.const(np.ones((1, 5), np.float32), "b"), name="bias")),
        "onnxruntime made one float Gemm of it and Add 'bias': its bias 'b' has shape [1, 5]: QGemm wants one"
        f" dimension, a value per column. {APART}",
    ),
    "added bias after a product by one": (
        "Gemm",
        lambda g, x: g.op("Add", g.op("Mul", linear(g, x), g.const(np.float32(1))), g.floats(5), name="bias"),
        "onnxruntime made one float Gemm of it and Add 'bias': Add has no output QuantizeLinear:"
        f" 'bias' is a graph output. {APART}",
    ),
    "codes and float out": (
        "MatMul",
        lambda g, x: g.op("Add", g.qdq(y := linear(g, x), name="q"), g.op("Tanh", y, name="tanh")),
        "its output 'linear' goes to several places: QuantizeLinear 'q', Tanh 'tanh'",
    ),
    "gemm with a float bias": (
        "Gemm",
        lambda g, x: g.op("Erf", gemm(g, x, bias=g.floats(5)), name="erf"),
        "a float bias wants an output QuantizeLinear, but Gemm has no output QuantizeLinear: 'linear' goes to"
        f" Erf 'erf'. {APART}",
    ),
    "gemm with relu above the smallest code": (
        "FusedGemm",
        lambda g, x: g.qdq(g.op("Relu", gemm(g, x, bias=g.floats(5)), name="relu"), name="q"),
        "a float bias wants an output QuantizeLinear, but Relu 'relu' stays a node of its own: the zero point"
        f" of QuantizeLinear 'q' is 128, and only 0 clips as a Relu does. {APART}",
    ),
    "gemm with alpha": (
        "Gemm",
        lambda g, x: g.qdq(gemm(g, x, bias=g.floats(5), alpha=2.0)),
        "its alpha is 2: beside a bias, QGemm wants 1",
    ),
    "gemm with a scalar bias": (
        "Gemm",
        lambda g, x: g.qdq(gemm(g, x, bias=g.floats(1, name="b"))),
        "its bias 'b' has shape [1]: QGemm wants one dimension, a value per column",
    ),
    "float weight": (
        "MatMul",
        lambda g, x: g.op("MatMul", x, g.floats(8, 5, name="w")),
        "operand 1 'w' is not the output of a DequantizeLinear: it is a constant",
    ),
    "16-bit activation": (
        "MatMul",
        lambda g, x: linear(g, g.qdq("x", 0.001, 0, np.int16)),
        "operand 0 'dequantizelinear_8' holds int16 codes: integer kernels read int8 and uint8",
    ),
    "scale between": (
        "FusedMatMul",
        lambda g, x: g.op("MatMul", g.op("Mul", x, g.const(np.float32(0.5)), name="mul"), g.op("Transpose", x)),
        "operand 0 'mul' is not the output of a DequantizeLinear: it comes from Mul 'mul'",
    ),
    "weight only": (
        "MatMulNBits",
        lambda g, x: linear(g, g.op("Tanh", x, name="tanh")),
        f"weight-only: operand 0 'tanh' is not the output of a DequantizeLinear: it comes from Tanh 'tanh'; {NBITS}",
    ),
    "after a flatten of floats": (
        "MatMulNBits",
        lambda g, x: linear(g, g.op("Flatten", g.op("Tanh", x), name="flat")),
        f"weight-only: operand 0 'flat' is not the output of a DequantizeLinear: it comes from Flatten 'flat'; {NBITS}",
    ),
    "after a flatten": (
        "MatMulNBits",
        lambda g, x: linear(g, g.op("Flatten", x, name="flat")),
        "weight-only: operand 0 'flat' is not the output of a DequantizeLinear: it comes from Flatten 'flat',"
        f" where a Reshape would carry the integers on; {NBITS}",
    ),
}


@pytest.mark.parametrize(("kernel", "build", "reason"), FLOAT_LINEAR.values(), ids=FLOAT_LINEAR)
def test_why_a_linear_stays_float(tmp_path: Path, kernel: str, build: Build, reason: str) -> None:
    graph, x = rows()
    row = only_row(graph, tmp_path, build(graph, x))
    assert (row.kernel, row.reason) == (kernel, reason)


def test_half_precision_scales(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.qdq(graph.input("batch", 8, dtype=FLOAT16), np.float16(0.05))
    weight = graph.qdq(graph.const(np.ones((8, 5), np.float16)), np.float16(0.01), 0, np.int8)
    row = only_row(graph, tmp_path, graph.op("MatMul", x, weight))
    assert row.reason == f"operand 0 '{x}' has float16 scales: integer kernels read float32 ones"


def test_an_activation_quantized_per_channel(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.qdq(graph.input("batch", 4, 6, 6), np.full(4, 0.05, np.float32), 128, axis=1)
    row = only_row(graph, tmp_path, graph.qdq(graph.conv(x)))
    assert row.reason == f"operand 0 '{x}' is quantized per channel: only weights may be"


def test_attention(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.qdq(graph.input("batch", 2, 3, 8))
    row = only_row(graph, tmp_path, graph.op("Attention", x, x, x), opset=23)
    assert row.reason == "onnxruntime has no integer kernel that reads the standard's Attention"


def test_the_products_of_attention(tmp_path: Path) -> None:
    graph = Graph()
    q, k, v = (graph.qdq(graph.input("batch", 2, 3, 8, name=name)) for name in "qkv")
    scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2]), name="scores")
    weights = graph.op("Softmax", graph.op("Mul", scores, graph.const(np.float32(0.35))), name="softmax")
    path = graph.save(tmp_path, graph.op("MatMul", weights, v, name="mix"))
    first, second = kernel_rows(path)
    assert (first.name, first.kernel) == ("scores", "MatMulIntegerToFloat")
    assert second.kernel == "MatMul"
    assert second.reason is not None and second.reason.endswith("it comes from Softmax 'softmax'")


class TestNames:
    """A row belongs to its node whatever the exporter called it and onnxruntime makes of the name."""

    def rows(self, folder: Path, rename: Callable[[int], str]) -> list[tuple[str, str]]:
        graph, x = image()
        model = graph.model(graph.qdq(graph.conv(graph.qdq(graph.conv(x)), name="last")), graph.conv(x, name="float"))
        for index, node in enumerate(node for node in model.graph.node if node.op_type == "Conv"):
            node.name = rename(index)
        onnx.save(model, folder / "model.onnx")
        return [(row.name, row.kernel) for row in kernel_rows(folder / "model.onnx")]

    def test_no_names_fall_back_on_the_output(self, tmp_path: Path) -> None:
        expected = [("conv", "QLinearConv"), ("last", "QLinearConv"), ("float", "Conv")]
        assert self.rows(tmp_path, lambda index: "") == expected

    def test_equal_names(self, tmp_path: Path) -> None:
        assert self.rows(tmp_path, lambda index: "c") == [("c", "QLinearConv")] * 2 + [("c", "Conv")]

    def test_one_name_begins_another(self, tmp_path: Path) -> None:
        expected = [("c", "QLinearConv"), ("c_token_1", "QLinearConv"), ("c/MatMulAddFusion", "Conv")]
        names = [name for name, _ in expected]
        assert self.rows(tmp_path, names.__getitem__) == expected


def test_float_convolutions_keep_their_rows(tmp_path: Path) -> None:
    graph = Graph()
    y = graph.op("Conv", graph.input("batch", 16, 8, 8), graph.floats(16, 16, 3, 3), name="one")
    ones = [graph.const(np.ones(16, np.float32)) for _ in range(4)]
    y = graph.op("Conv", graph.op("BatchNormalization", y, *ones), graph.floats(16, 16, 3, 3), name="two")
    path = graph.save(tmp_path, graph.op("Relu", y))
    assert [(row.name, row.kernel) for row in kernel_rows(path)] == [("one", "Conv"), ("two", "FusedConv")]


def test_a_product_of_constants(tmp_path: Path) -> None:
    graph = Graph()
    row = only_row(
        graph,
        tmp_path,
        graph.op("Add", graph.input(4, 4), graph.op("MatMul", graph.floats(4, 4), graph.floats(4, 4))),
    )
    assert row.kernel == "none"
    assert row.reason == "onnxruntime computed it while loading: all its operands are constants"


def test_equal_nodes_that_onnxruntime_merges(tmp_path: Path) -> None:
    graph = Graph()
    x, weight = graph.input(4, 4), graph.floats(4, 4)
    both = [graph.op("Relu", graph.op("MatMul", x, weight)) for _ in range(2)]
    path = graph.save(tmp_path, graph.op("Concat", *both, axis=0))
    rows = sorted(kernel_rows(path), key=lambda row: row.kernel)
    assert [row.kernel for row in rows] == ["MatMul", "none"]
    reason = "no node is left of it: it is unused, equal to another node, or part of a larger fusion"
    assert rows[1].reason == reason


def test_inside_a_branch(tmp_path: Path) -> None:
    graph, x = rows()
    choice, weight, bodies = graph.input(1, dtype=BOOL, name="choice"), graph.floats(8, 8), {}
    for name, inner in (("then_branch", Graph()), ("else_branch", Graph())):
        value = inner.op("MatMul", x, weight, name=f"in_{name}")
        end = onnx.helper.make_tensor_value_info(value, 1, ["batch", 8])
        bodies[name] = onnx.helper.make_graph(inner.nodes, name, [], [end])
    path = graph.save(tmp_path, graph.op("If", choice, **bodies))
    assert {row.name: row.kernel for row in kernel_rows(path)} == {
        "in_then_branch": "MatMul",
        "in_else_branch": "MatMul",
    }


def test_external_data(tmp_path: Path) -> None:
    graph, x = rows()
    model, path = graph.model(graph.qdq(linear(graph, x, "Add"))), tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert [row.kernel for row in kernel_rows(path)] == ["QGemm"]
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_external_scales_are_read_for_the_reasons(tmp_path: Path) -> None:
    graph, x = image()
    model = graph.model(graph.qdq(graph.op("Relu", graph.conv(x)), 0.05, 5))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (row,) = kernel_rows(tmp_path / "m.onnx")
    assert row.reason is not None and "the zero point of" in row.reason


def test_a_model_without_weighted_nodes(tmp_path: Path) -> None:
    graph = Graph()
    assert kernel_rows(graph.save(tmp_path, graph.op("Relu", graph.input(2)))) == ()


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="must be an ONNX model"):
        kernel_rows(tmp_path / "absent.onnx")
