"""A file with some layers float: its values are the reference form's, what stays is as it was, and runtimes load it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from fxquant.onnx.tuning.floating import with_floats
from fxquant.onnx.tuning.graph import QdqGraph
from fxquant.targets.onnxruntime_rows import kernel_rows
from fxquant.targets.session import run_outputs
from tests.onnx.graphs import BOOL, Graph, image, rows


def graph_of(model: onnx.ModelProto, **options: Any) -> QdqGraph:
    return QdqGraph(model=model, folder="", **options)


def floated(model: onnx.ModelProto, *layers: str, **options: Any) -> onnx.ModelProto:
    """The checked variant; the model that it was made of is as before."""
    before = model.SerializeToString()
    found = with_floats(graph_of(model, **options), layers)
    assert model.SerializeToString() == before
    onnx.checker.check_model(found, full_check=True)
    return found


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def outputs(model: onnx.ModelProto, folder: Path, x: np.ndarray) -> list[np.ndarray]:
    """onnxruntime's without optimizations, which onnx's own evaluator gives as well."""
    onnx.save(model, folder / "run.onnx")
    found = run_outputs(folder / "run.onnx", {"x": x}, optimize=False)
    for ours, theirs in zip(found, ReferenceEvaluator(model).run(None, {"x": x}), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    return found


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape or (2, 4, 6, 6)).astype(np.float32)


def array(model: onnx.ModelProto, name: str) -> np.ndarray:
    return next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == name)


def node(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    return next(each for each in model.graph.node if output in each.output)


# ---------------------------------------------------------------- weights and biases


def test_weights_per_channel_and_integer_biases_become_floats(tmp_path: Path) -> None:
    """Against the same convolution in float64, of codes times scales."""
    graph, x = image()
    codes = graph.rng.integers(-127, 128, (4, 4, 3, 3)).astype(np.int8)
    scales, bias = np.array([0.01, 0.02, 0.005, 0.1], np.float32), np.array([300, -7, 0, 90], np.int32)
    zero, none = graph.const(np.zeros(4, np.int8)), graph.const(np.zeros(4, np.int32))
    weight = graph.op("DequantizeLinear", graph.const(codes), graph.const(scales), zero, axis=0)
    offset = graph.op("DequantizeLinear", graph.const(bias), graph.const(scales * np.float32(0.05)), none, axis=0)
    model = graph.model(graph.op("Conv", x, weight, offset, pads=[1] * 4, name="conv"))
    found = floated(model, "conv")
    assert ops(found) == {"Conv": 1} and node(found, "conv").input[0] == "x"
    x64 = np.pad(pixels().astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    w64 = codes.astype(np.float64) * scales.astype(np.float64)[:, None, None, None]
    windows = np.lib.stride_tricks.sliding_window_view(x64, (3, 3), (2, 3))
    b64 = bias * scales.astype(np.float64) * 0.05
    expected = np.einsum("nchwij,ocij->nohw", windows, w64) + b64[None, :, None, None]
    np.testing.assert_allclose(outputs(found, tmp_path, pixels())[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["INT8", "INT4"])
def test_weights_in_blocks(kind: str, tmp_path: Path) -> None:
    graph = Graph()
    x, codes = graph.input(3, 8), np.random.default_rng(0).integers(-8, 8, (8, 5))
    number = onnx.TensorProto.DataType.Value(kind)
    packed = helper.make_tensor("codes", number, codes.shape, codes.ravel())
    graph.constants.append(packed)
    scales = graph.const(np.random.default_rng(1).uniform(0.1, 1, (2, 5)).astype(np.float32))
    weight = graph.op("DequantizeLinear", "codes", scales, axis=0, block_size=4)
    model = graph.model(graph.op("MatMul", x, weight, name="product"))
    found = floated(model, "product")
    assert ops(found) == {"MatMul": 1}
    wide = np.repeat(numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == scales)), 4, axis=0)
    np.testing.assert_array_equal(array(found, found.graph.node[0].input[1]), codes.astype(np.float32) * wide)
    assert np.array_equal(outputs(found, tmp_path, pixels(3, 8))[0], outputs(model, tmp_path, pixels(3, 8))[0])


def test_a_weight_of_two_layers_is_both_codes_and_floats() -> None:
    graph, x = rows()
    weight = graph.weight(8, 8, axis=1)
    graph.op("MatMul", x, weight, name="one")
    second = graph.op("MatMul", graph.qdq(graph.op("Relu", "one")), weight, name="two")
    model = graph.model(second)
    found = floated(model, "one")
    assert node(found, "two").input[1] == weight and node(found, weight).op_type == "DequantizeLinear"
    mine = array(found, node(found, "one").input[1])
    (dequantized,) = ReferenceEvaluator(helper.make_model(helper.make_graph(
        [node(model, weight)], "weight", [], [helper.make_tensor_value_info(weight, 1, [8, 8])], model.graph.initializer
    ), opset_imports=model.opset_import)).run(None, {})  # fmt: skip
    np.testing.assert_array_equal(mine, dequantized)
    assert ops(floated(model, "one", "two")) == {"MatMul": 2, "Relu": 1}


def test_a_transposed_weight_and_a_bias_taken_away(tmp_path: Path) -> None:
    """``MatMul − (−b)`` is what fxquant writes of a linear layer beside integers."""
    graph, x = rows()
    weight = graph.op("Transpose", graph.weight(5, 8, axis=0), perm=[1, 0])
    bias = graph.const(np.arange(5, dtype=np.float32))
    model = graph.model(graph.op("Sub", graph.op("MatMul", x, weight, name="product"), bias))
    found = floated(model, "product")
    assert ops(found) == {"MatMul": 1, "Add": 1}
    matrix, added = array(found, node(found, "product").input[1]), array(found, found.graph.node[1].input[1])
    assert matrix.shape == (8, 5) and np.array_equal(added, -np.arange(5))
    expected = pixels(3, 8).astype(np.float64) @ matrix.astype(np.float64) - np.arange(5)
    np.testing.assert_allclose(outputs(found, tmp_path, pixels(3, 8))[0], expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- pairs


def test_nothing_float_is_the_file_itself() -> None:
    graph, x = image()
    first = graph.qdq(graph.op("Relu", graph.conv(x, name="first")), 0.05, 0)
    second = graph.qdq(graph.op("Add", graph.qdq(graph.conv(first, name="second")), x))
    model = graph.model(graph.op("GlobalAveragePool", second))
    assert floated(model).SerializeToString() == model.SerializeToString()


def test_a_pair_of_several_readers_stays_for_the_others(tmp_path: Path) -> None:
    graph, x = rows()
    one = graph.op("MatMul", x, graph.weight(8, 8, axis=1), name="one")
    two = graph.op("MatMul", x, graph.weight(8, 8, axis=1), name="two")
    model = graph.model(one, two)
    found = floated(model, "two")
    assert node(found, "one").input[0] == x and node(found, "two").input[0] == "x"
    before, after = outputs(model, tmp_path, pixels(3, 8)), outputs(found, tmp_path, pixels(3, 8))
    assert np.array_equal(before[0], after[0]) and not np.array_equal(before[1], after[1])


def test_what_moves_a_pair_is_moved_in_float_too(tmp_path: Path) -> None:
    graph, x = rows(rank=3)
    turned = graph.op("Transpose", x, perm=[0, 2, 1], name="turned")
    one = graph.op("MatMul", turned, graph.weight(3, 5, axis=1), name="one")
    two = graph.op("MatMul", turned, graph.weight(3, 5, axis=1), name="two")
    found = floated(graph.model(one, two), "two")
    assert ops(found)["Transpose"] == 2 and node(found, "one").input[0] == "turned"
    moved = node(found, node(found, "two").input[0])
    assert moved.op_type == "Transpose" and moved.input[0] == "x"
    x64 = pixels(2, 3, 8).astype(np.float64).transpose(0, 2, 1)
    expected = x64 @ array(found, node(found, "two").input[1]).astype(np.float64)
    np.testing.assert_allclose(outputs(found, tmp_path, pixels(2, 3, 8))[1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("relu", [False, True])
def test_the_codes_of_an_integer_convolution_stay(relu: bool, tmp_path: Path) -> None:
    """Whose kernel gives codes: the float layer reads them dequantized, and onnxruntime leaves it float."""
    graph, x = image()
    first = graph.qdq(graph.conv(x, name="first"))
    middle = graph.conv(first, name="middle")
    middle = graph.op("Relu", middle) if relu else middle
    last = graph.qdq(graph.conv(graph.qdq(middle, name="codes"), name="last"))
    model = graph.model(last)
    found = floated(model, "middle")
    onnx.save(found, tmp_path / "net.onnx")
    assert [row.kernel for row in kernel_rows(tmp_path / "net.onnx")] == ["QLinearConv", "Conv", "QLinearConv"]
    assert node(found, node(found, "codes").input[0]).op_type == "Max" and "Relu" not in ops(found)
    # Its input's codes are the same, its weight is the same number: so is its result.
    for name in ("first", "codes"):
        assert np.array_equal(value(model, name, tmp_path), value(found, name, tmp_path))
    # Where the runtime's kernel needs no codes after it, the pair goes.
    assert node(floated(model, "middle", needs_output=()), "middle").input[0] == "first"


def test_codes_that_are_clipped_to_fewer_bits_are_a_pairs_too(tmp_path: Path) -> None:
    """As `fxquant.export_onnx` writes 4-bit activations: the clip goes with the codes, the rest stays on integers."""
    graph, x = image()
    limits = [graph.const(np.uint8(each)) for each in (120, 135)]
    scale, zero = graph.const(np.float32(0.1)), graph.const(np.uint8(128))

    def narrow(value: str) -> str:
        codes = graph.op("Clip", graph.op("QuantizeLinear", value, scale, zero), *limits)
        return graph.op("DequantizeLinear", codes, scale, zero)

    first = narrow(graph.conv(narrow(x), name="first"))
    middle = narrow(graph.conv(first, name="middle"))
    model = graph.model(narrow(graph.conv(middle, name="last")))
    assert list(graph_of(model).layers) == ["first", "middle", "last"]
    found = floated(model, "middle")
    onnx.save(found, tmp_path / "net.onnx")
    assert [row.kernel for row in kernel_rows(tmp_path / "net.onnx")] == ["QLinearConv", "Conv", "QLinearConv"]
    assert ops(found)["Clip"] == ops(model)["Clip"] == 4
    every = floated(model, "first", "middle", "last")
    assert ops(every) == {"Conv": 3, "Identity": 1}


def value(model: onnx.ModelProto, name: str, folder: Path) -> np.ndarray:
    shown = onnx.ModelProto.FromString(model.SerializeToString())
    del shown.graph.output[:]
    shown.graph.output.append(onnx.ValueInfoProto(name=name))
    onnx.save(shown, folder / "value.onnx")
    return run_outputs(folder / "value.onnx", {"x": pixels()}, optimize=False)[0]


def residual(result: str) -> onnx.ModelProto:
    """Two convolutions and an Add on integers; ``result``: who reads the sum."""
    graph, x = image()
    first = graph.qdq(graph.op("Relu", graph.conv(x, name="first")), 0.05, 0)
    second = graph.qdq(graph.conv(first, name="second"), name="right")
    total = graph.qdq(graph.op("Add", first, second, name="sum"), name="total")
    if result == "pool":
        return graph.model(graph.op("GlobalAveragePool", total))
    return graph.model(graph.qdq(graph.conv(total, name="third")))


@pytest.mark.parametrize(
    ("result", "floats", "codes"),
    [
        ("conv", ["second"], [True, True]),  # quantizes it for the sum, whose result the third reads
        ("conv", ["third"], [True, True]),  # both are codes of integer kernels: so is the sum
        ("conv", ["first", "second"], [False, False]),  # `first` is read by `second` in float
        ("pool", ["second"], [True, False]),  # float; an integer kernel gave its first operand as codes
        ("pool", ["first", "second"], [False, False]),
    ],
)
def test_a_sum_goes_along_as_prepare_places_it(result: str, floats: list[str], codes: list[bool]) -> None:
    model = residual(result)
    assert list(graph_of(model).followers) == ["sum"]
    found = floated(model, *floats)
    assert [node(found, name).op_type == "DequantizeLinear" for name in node(found, "sum").input] == codes


def test_all_float_has_no_quantizer_left(tmp_path: Path) -> None:
    """Those of another tool's file too: pools between pairs, and a pair at the end."""
    graph, x = image()
    first = graph.qdq(graph.op("Relu", graph.conv(x, name="first")), 0.05, 0)
    pooled = graph.qdq(graph.op("MaxPool", first, kernel_shape=[2, 2], strides=[2, 2]), 0.05, 0)
    mean = graph.qdq(graph.op("GlobalAveragePool", pooled))
    flat = graph.op("Flatten", mean)
    end = graph.qdq(graph.op("Gemm", flat, graph.weight(4, 3, axis=1), name="head"))
    model = graph.model(end)
    found = floated(model, "first", "head")
    kept = ("Conv", "Relu", "MaxPool", "GlobalAveragePool", "Flatten", "Gemm", "Identity")
    assert ops(found) == dict.fromkeys(kept, 1)
    assert [value.name for value in found.graph.output] == [end]
    before, after = outputs(model, tmp_path, pixels())[0], outputs(found, tmp_path, pixels())[0]
    assert 0 < np.abs(before - after).max() < 0.1


# ---------------------------------------------------------------- what is no layer


def test_what_is_left_alone_says_why() -> None:
    graph, x = rows()
    held = graph.weight(8, 8, axis=1)
    result = helper.make_tensor_value_info("y", 1, ["batch", 8])
    bodies = [
        helper.make_graph([helper.make_node("MatMul", [x, held], ["y"], name=name)], name, [], [result])
        for name in ("then", "else")
    ]
    either = graph.input(dtype=BOOL, name="either")
    chosen = graph.op("If", either, then_branch=bodies[0], else_branch=bodies[1])
    model = graph.model(graph.op("MatMul", graph.qdq(chosen), held, name="outside"))
    found = graph_of(model)
    assert list(found.layers) == ["outside"]
    assert dict(found.left_alone) == dict.fromkeys(("then", "else"), "it stands in a branch or a loop body")
    variant = floated(model, "outside")
    assert held in [each.output[0] for each in variant.graph.node], "the branches read it"


def test_products_without_pairs_say_why() -> None:
    graph = Graph()
    x = graph.input(2, 8)
    codes = graph.op("DynamicQuantizeLinear", x)
    graph.nodes[-1].output.extend(["scale", "zero"])
    product = graph.op("MatMulInteger", codes, graph.const(np.ones((8, 2), np.int8)), "zero", name="dynamic")
    gathered = graph.op("Gather", graph.const(np.ones((4, 2, 2), np.int8)), graph.const(np.array([1, 2])), axis=0)
    rows = graph.op("DequantizeLinear", gathered, graph.const(np.float32(0.1)))
    floats = graph.op("MatMul", graph.op("Cast", product, to=1), rows, name="table")
    found = graph_of(graph.model(floats))
    assert dict(found.left_alone)["dynamic"].startswith("its scales follow each input")
    assert list(found.layers) == ["table"], "rows of a constant are a constant"


def test_codes_clipped_to_fewer_bits(tmp_path: Path) -> None:
    """As fxquant writes 4-bit activations: the Clip goes with the pair, and stays for the other reader."""
    graph = Graph()
    scale, zero = graph.const(np.float32(0.2)), graph.const(np.uint8(8))
    codes = graph.op("QuantizeLinear", graph.input(3, 8), scale, zero)
    low, high = graph.const(np.uint8(0)), graph.const(np.uint8(15))
    x = graph.op("DequantizeLinear", graph.op("Clip", codes, low, high, name="clip"), scale, zero)
    one = graph.op("MatMul", x, graph.weight(8, 4, axis=1), name="one")
    two = graph.op("MatMul", x, graph.weight(8, 4, axis=1), name="two")
    model = graph.model(one, two)
    assert list(graph_of(model).layers) == ["one", "two"]
    assert ops(floated(model, "one", "two")) == {"MatMul": 2}
    found = floated(model, "two")
    assert ops(found)["Clip"] == 1 and node(found, "two").input[0] == "x"
    before, after = outputs(model, tmp_path, pixels(3, 8)), outputs(found, tmp_path, pixels(3, 8))
    assert np.array_equal(before[0], after[0])
    expected = pixels(3, 8).astype(np.float64) @ array(found, node(found, "two").input[1]).astype(np.float64)
    np.testing.assert_allclose(after[1], expected, rtol=1e-4, atol=1e-5)
