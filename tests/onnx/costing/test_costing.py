"""Costs as they are measured: the files, the differences of their times, and a table of few layers by onnxruntime."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from fxquant.errors import InvalidArgument
from fxquant.onnx.costing import measure as measuring
from fxquant.onnx.costing import measure_costs, save_costs
from fxquant.onnx.costing.files import INTEGER, PLAIN, Made, addition, convolutions, product
from fxquant.onnx.costing.grid import Conv, Product
from fxquant.onnx.costing.grid import convolutions as all_convolutions
from fxquant.onnx.costing.grid import products as all_products
from fxquant.targets.costs import CostTable, Line
from fxquant.targets.onnxruntime import TARGET
from fxquant.targets.session import run_outputs, session

WIDE = Conv(inputs=8, outputs=16, pixels=6)
DEEP = Conv(inputs=8, outputs=8, kernel=3, groups=8, pixels=6)
STEM = Conv(inputs=3, outputs=8, kernel=3, stride=2, pixels=12)
TURN = [(WIDE, INTEGER), (WIDE.turned, INTEGER)]
MADE = {
    "convolutions": (convolutions([*TURN, (DEEP, INTEGER)]), {"QLinearConv"}, 3),
    "depthwise": (convolutions([(DEEP, INTEGER)], enters=True, leaves=True), {"QLinearConv"}, 1),
    "stem": (convolutions([(STEM, INTEGER)], enters=True, leaves=True), {"QLinearConv"}, 1),
    "mixed": (convolutions([(WIDE, INTEGER), (WIDE.turned, PLAIN)]), {"QLinearConv"}, 1),
    "floats": (convolutions([(WIDE, PLAIN), (WIDE.turned, PLAIN)]), set(), 0),
    "linear": (product(Product(rows=4, depth=8, columns=16), INTEGER), {"MatMulIntegerToFloat"}, 1),
    "matmul": (
        product(Product(rows=4, depth=8, columns=4, batches=3), INTEGER, enters=True),
        {"MatMulIntegerToFloat"},
        1,
    ),
    "add": (addition(64, INTEGER), {"QLinearAdd"}, 1),
}


@pytest.mark.parametrize("name", MADE)
def test_files_run_as_they_say(name: str, tmp_path: Path) -> None:
    """Valid, and on the integer kernels that they are to time, as many as there are layers of integers."""
    (model, feeds), kernels, count = MADE[name]
    path, optimized = tmp_path / "made.onnx", tmp_path / "optimized.onnx"
    onnx.save(model, path)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model), full_check=True)
    session(path, optimize=True, threads=1, optimized_path=optimized)
    found = [node.op_type for node in onnx.load(optimized).graph.node]
    integers = [
        op for op in found if op in ("QLinearConv", "MatMulIntegerToFloat", "QLinearAdd", "QGemm", "QLinearMatMul")
    ]
    assert set(integers) == kernels and len(integers) == count
    (y,) = run_outputs(path, feeds, optimize=False)
    assert np.isfinite(y.astype(np.float64)).all() and y.size > 8


def clock_of(layer: Mapping[str, float], ends: Mapping[str, float], changes: Mapping[str, float]):  # type: ignore[no-untyped-def]
    """A clock that reads its times off the files: so much a layer of a form, an end, a change of form on the way."""

    def clock(cases: Mapping[str, Made]) -> dict[str, float]:
        return {name: time(*made) for name, made in cases.items()}

    def time(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> float:
        makers = {out: node for node in model.graph.node for out in node.output}
        forms = ["i" if makers.get(n.input[0], n).op_type == "DequantizeLinear" and n.input[1] in makers else "f"
                 for n in model.graph.node if n.op_type == "Conv"]  # fmt: skip
        total = sum(layer[form] for form in forms)
        total += sum(changes[one + two] for one, two in itertools.pairwise(forms) if one != two)
        (x,), y = feeds.values(), makers[model.graph.output[0].name].op_type
        total += ends["codes" if x.dtype == np.uint8 or forms[0] == "i" else "floats"] / 2
        total += ends["codes" if y in ("QuantizeLinear", "DequantizeLinear") else "floats"] / 2
        total += changes["enter"] if forms[0] == "i" and x.dtype == np.float32 else 0
        return total + (changes["leave"] if y == "DequantizeLinear" else 0)

    return clock


@pytest.mark.parametrize("conv", [WIDE, DEEP], ids=["there and back", "in a row"])
def test_a_layer_and_its_changes_are_told_apart(conv: Conv) -> None:
    changes = {"fi": 11.0, "if": 13.0, "enter": 3.0, "leave": 4.0}
    clock = clock_of({"i": 5.0, "f": 7.0}, {"codes": 2.0, "floats": 6.0}, changes)
    cost, found = measuring._in_a_row(conv, clock)
    assert (cost.integer, cost.plain) == (5.0, 7.0)
    numbers = 8 * 36
    assert found == {
        "enter": (numbers, 3.0 + 1.0),  # with half of what the ends of codes cost: their other layout
        "leave": (numbers, 4.0 + 1.0),
        "reorder": (numbers, 3.0),
        "codes": (numbers, 1.0),
        "to_integer": (numbers, 11.0),
        "to_float": (numbers, 13.0),
    }


def test_a_layer_that_shrinks_its_picture_is_measured_after_another() -> None:
    clock = clock_of({"i": 5.0, "f": 7.0}, {"codes": 2.0, "floats": 6.0}, {})
    ends = {name: Line(fixed=0.0, each=each) for name, each in (("codes", 1000.0), ("reorder", 3000.0))}
    shrinking = Conv(inputs=8, outputs=4, kernel=3, stride=2, pixels=2)  # 32 numbers to 4
    cost = measuring._after_another(shrinking, ends, clock)
    assert (cost.integer, cost.plain) == (5.0 + 32 - 4, 7.0 + 3 * (32 - 4))


def test_a_line_is_not_bent_by_outliers() -> None:
    pairs = [(n, 4.0 + n * 0.002) for n in (10, 100, 1000, 10_000, 50_000, 100_000, 200_000, 400_000, 800_000)]
    pairs[4] = (50_000, 9000.0)
    line = measuring._line(pairs)
    assert line.fixed == pytest.approx(4.0, abs=0.1) and line.each == pytest.approx(2.0, rel=0.03)


def test_a_table_of_few_layers(tmp_path: Path) -> None:
    found = measure_costs(
        convs=[WIDE, DEEP, STEM], products=[Product(rows=4, depth=8, columns=16)], adds=(64,), rounds=3, progress=False
    )
    assert [str(row.size) for row in found.rows] == [
        "pointwise 36×8·8×16",
        "depthwise 36×9·9×8",
        "conv 36×27·27×8, stride 2",
        "linear 4×8·8×16",
        "add of 64",
    ]
    assert all(row.cost.integer > 0 and row.cost.plain > 0 for row in found.rows)
    save_costs(found, tmp_path / "costs.json")
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]
    read = CostTable.load(tmp_path / "costs.json")
    assert (read.target, read.threads) == ("onnxruntime", 1) and read.version == TARGET.runtime.require().__version__


def test_the_grid_has_each_layer_once() -> None:
    sizes = [each.size for each in (*all_convolutions(), *all_products())]
    assert len(sizes) > 150 and len(set(sizes)) > 0.95 * len(sizes)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"target": "openvino"}, "whose costs are measured, 'onnxruntime': got 'openvino'"),
        ({"target": "tensorrt"}, "whose costs are measured, 'onnxruntime': got 'tensorrt'"),
        ({"rounds": 1}, "rounds must be at least 3: got 1"),
        ({"threads": 0}, "threads must be at least 1: got 0"),
        ({"convs": []}, "convs must name a layer of stride 1 that another can follow"),
        ({"convs": [STEM]}, "convs must name a layer of stride 1 that another can follow"),
        ({"products": []}, "and products one"),
    ],
    ids=["openvino", "tensorrt", "rounds", "threads", "no convolutions", "a first one alone", "no products"],
)
def test_bad_input(given: dict[str, object], told: str) -> None:
    with pytest.raises(InvalidArgument, match=told):
        measure_costs(**given, progress=False)  # type: ignore[arg-type]
