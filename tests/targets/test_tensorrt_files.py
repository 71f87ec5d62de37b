"""TensorRT's rows for files that fxquant did not write: names of any kind, branches, loops."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from fxquant.errors import ExportError
from fxquant.onnx import lint_onnx
from fxquant.targets.document import Wiring, folder_of, load_model
from fxquant.targets.tensorrt_plan import Operation
from fxquant.targets.tensorrt_reasons import reason
from fxquant.targets.tensorrt_run import kernel_rows, run
from tests.onnx.graphs import BOOL, FLOAT, INT64, Graph

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is missing")

ODD = ['a"b', "a]b[c", "a\nb", "größe 模型", "} type=float {", "x={ ", "fxquant_product_1", "[ONNX Layer: x]", "a | b"]


def pair(g: Graph, x: str) -> str:
    return g.qdq(x, 0.05, 0, np.int8)


@pytest.mark.parametrize("name", ODD)
def test_rows_of_files_with_odd_names(name: str, tmp_path: Path) -> None:
    g = Graph()
    x = pair(g, g.input(4, 32, name=f"x{name}"))
    y = g.op("MatMul", x, g.weight(32, 16, axis=1), name=name)
    path = g.save(tmp_path, g.op("MatMul", pair(g, y), g.weight(16, 16, axis=1), name=f"{name} again"))
    rows = kernel_rows(path)
    assert [(row.name, row.kernel) for row in rows] == [
        (name, "matrix product int8·int8"),
        (f"{name} again", "matrix product int8·int8"),
    ]


def body(x: str, *, paired: bool, name: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], str]:
    """Nodes and constants of a branch that multiplies ``x``, whose Q/DQ stands in it or has been before."""
    g = Graph()
    g.fresh = lambda stem: f"{name}_{stem}_{len(g.nodes)}_{len(g.constants)}"  # type: ignore[method-assign]
    y = g.op("MatMul", pair(g, x) if paired else x, g.weight(32, 32, axis=1), name=name)
    return g.nodes, g.constants, y


@pytest.mark.parametrize("inside", [True, False])
def test_products_of_branches(inside: bool, tmp_path: Path) -> None:
    """The builder takes no Q/DQ of an activation from outside into a branch."""
    g = Graph()
    x = g.input(4, 32)
    x = x if inside else pair(g, x)
    branches = {}
    for branch in ("then", "else"):
        nodes, constants, y = body(x, paired=inside, name=branch)
        end = helper.make_tensor_value_info(y, FLOAT, [4, 32])
        branches[f"{branch}_branch"] = helper.make_graph(nodes, branch, [], [end], constants)
    path = g.save(tmp_path, g.op("If", g.input(dtype=BOOL, name="choice"), **branches))
    rows = {row.name: row for row in kernel_rows(path)}
    findings = lint_onnx(path, "tensorrt").findings
    assert set(rows) == {"then", "else"} and all(row.integer == inside for row in rows.values())
    if not inside:
        said = "the Q/DQ of operand 0 must stand in the same branch or loop body as the product"
        assert {row.reason for row in rows.values()} == {said}
        assert {(found.node, found.message) for found in findings} == {("then", said), ("else", said)}
    else:
        assert not findings


def test_products_of_loops(tmp_path: Path) -> None:
    nodes, constants, y = body("x_in", paired=True, name="inner")
    nodes.append(helper.make_node("Identity", ["go_on"], ["goes_on"]))
    starts = [("count", INT64, []), ("go_on", BOOL, []), ("x_in", FLOAT, [4, 32])]
    ends = [("goes_on", BOOL, []), (y, FLOAT, [4, 32])]
    inputs, outputs = ([helper.make_tensor_value_info(*value) for value in values] for values in (starts, ends))
    g = Graph()
    times, always = g.const(np.int64(3)), g.const(np.array(True))
    loop = g.op(
        "Loop", times, always, g.input(4, 32), body=helper.make_graph(nodes, "body", inputs, outputs, constants)
    )
    ends = [helper.make_tensor_value_info(loop, FLOAT, [4, 32])]
    graph = helper.make_graph(g.nodes, "graph", g.inputs, ends, g.constants)
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    assert [(row.name, row.integer) for row in kernel_rows(path)] == [("inner", True)]
    assert lint_onnx(path, "tensorrt")


def test_no_axis_is_blamed_where_it_is_right(tmp_path: Path) -> None:
    g = Graph()
    y = g.op("MatMul", g.weight(32, 16, axis=1), g.weight(16, 32, axis=1), name="constants")
    (row,) = kernel_rows(g.save(tmp_path, g.op("Add", g.input(32, 32), y)))
    assert not row.integer and row.reason == "both its operands are constants"


def test_types_that_the_plan_does_not_tell_are_no_floats(tmp_path: Path) -> None:
    g = Graph()
    path = g.save(tmp_path, g.op("MatMul", pair(g, g.input(4, 32)), g.weight(32, 16, axis=1)))
    wiring = Wiring(model=load_model(path), folder=folder_of(path))
    product = Operation(kind="fully_connected", name="m", reads=("unknown", "int8"), writes=("float",), nodes=())
    said = "the types that it reads cannot be read from the plan"
    assert reason(wiring.model.graph.node[-1], [product], wiring, None) == said


def test_modules_of_the_working_folder_hide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = Graph()
    path = g.save(tmp_path, g.op("MatMul", pair(g, g.input(4, 32)), g.weight(32, 16, axis=1)))
    for name in ("json", "runpy", "tensorrt_rtx"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError")
    monkeypatch.chdir(tmp_path)
    assert [row.integer for row in kernel_rows(path.name)] == [True]


def test_where_open_sizes_are_guessed_the_error_says_so(tmp_path: Path) -> None:
    """A product of 32 features, whose number the file leaves open: a run has the right sizes."""
    g = Graph()
    x = g.input("batch", "features")
    path = g.save(tmp_path, g.op("MatMul", pair(g, x), g.weight(32, 16, axis=1)))
    with pytest.raises(ExportError, match=r"build .*Its open sizes \(x: batch, features\) were taken as 1 to 8"):
        kernel_rows(path)
    assert run(path, {"x": np.zeros((2, 32), np.float32)}).rows[0].integer
    with pytest.raises(ExportError, match="build") as raised:
        run(path, {"x": np.zeros((2, 31), np.float32)})
    assert "open sizes" not in str(raised.value)


def test_an_einsum_is_a_product(tmp_path: Path) -> None:
    g = Graph()
    x = g.input(4, 8, 32)
    y = g.op("Einsum", pair(g, x), g.weight(32, 16, axis=1), equation="bik,kn->bin", name="weighted")
    z = g.op("Einsum", pair(g, y), pair(g, y), equation="bik,bjk->bij", name="of both")
    first, codes = pair(g, z), pair(g, g.input(4, 8, 8, name="other"))
    several = g.op("Einsum", first, codes, pair(g, z), equation="bij,bjk,bkl->bil", name="several")
    rows = kernel_rows(g.save(tmp_path, several))
    assert [(row.name, row.integer) for row in rows] == [("weighted", True), ("of both", True), ("several", False)]
    assert rows[-1].reason == "it is several products, of 3 operands: what they make is multiplied in float"


def test_a_file_that_is_refused_is_not_said_to_lack_a_driver(tmp_path: Path) -> None:
    g = Graph()
    bias = g.op("DequantizeLinear", g.const(np.ones(16, np.int32)), g.const(np.float32(0.1)), name="int32")
    path = g.save(tmp_path, g.op("Add", pair(g, g.input(4, 16)), bias))
    with pytest.raises(ExportError, match=r"(?s)must parse .*DequantizeLinear 'int32': .*has type Int32") as raised:
        kernel_rows(path)
    assert "cuda" not in str(raised.value).lower()
