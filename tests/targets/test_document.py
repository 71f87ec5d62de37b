"""Reading an ONNX file: who makes and who reads a value, what is constant, what the codes are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from fxquant.errors import ExportError
from fxquant.targets.document import Wiring, all_nodes, folder_of, load_model
from tests.onnx.graphs import BOOL, FLOAT, Graph


def wiring(graph: Graph, folder: Path, *outputs: str) -> Wiring:
    path = graph.save(folder, *outputs)
    return Wiring(model=load_model(path), folder=folder_of(path))


def branching(graph: Graph, x: str) -> str:
    """An If with a Relu that reads ``x`` in one branch and a constant in the other."""
    bodies = {}
    for branch, op in (("then_branch", "Relu"), ("else_branch", "Constant")):
        inner = Graph()
        if op == "Relu":
            value = inner.op(op, x, name="inner_relu")
        else:
            value = inner.op(op, name="inner_const", value=onnx.numpy_helper.from_array(np.ones(2, np.float32)))
        end = helper.make_tensor_value_info(value, FLOAT, [2])
        bodies[branch] = helper.make_graph(inner.nodes, branch, [], [end])
    return graph.op("If", graph.input(1, dtype=BOOL, name="choice"), name="choose", **bodies)


def test_nodes_of_branches_follow_theirs(tmp_path: Path) -> None:
    g = Graph()
    y = g.op("Neg", branching(g, g.op("Abs", g.input(2), name="abs")), name="neg")
    found = wiring(g, tmp_path, y)
    names = [node.output[0] for node in all_nodes(found.model.graph)]
    assert names[:2] == ["abs", "choose"] and names[-1] == "neg" and set(names[2:4]) == {"inner_relu", "inner_const"}
    assert found.producer["inner_relu"].op_type == "Relu" and "x" not in found.producer
    assert [node.op_type for node in found.consumers["abs"]] == ["Relu"]
    assert found.consumers["choose"][0].op_type == "Neg" and found.outputs == {"neg"}


def test_what_reads_twice_is_there_twice(tmp_path: Path) -> None:
    g = Graph()
    x = g.input(2)
    found = wiring(g, tmp_path, g.op("Add", x, x, name="twice"))
    assert [node.output[0] for node in found.consumers["x"]] == ["twice", "twice"]


def test_constants_are_what_no_input_reaches(tmp_path: Path) -> None:
    g = Graph()
    x, held = g.input(2), g.const(np.ones(2, np.float32), "held")
    made = g.op("Constant", name="made", value=onnx.numpy_helper.from_array(np.full(2, 3, np.float32)))
    folded = g.op("Mul", held, made, name="folded")
    mixed = g.op("Add", x, folded, name="mixed")
    found = wiring(g, tmp_path, mixed)
    assert found.constants == {"held", "made", "folded"}
    assert set(found.initializers) == {"held", "made"}


def test_what_a_branch_chooses_is_no_constant(tmp_path: Path) -> None:
    g = Graph()
    held = g.const(np.ones(2, np.float32), "held")
    found = wiring(g, tmp_path, branching(g, held))
    assert "choose" not in found.constants and "held" in found.constants


def test_arrays_are_read_or_none(tmp_path: Path) -> None:
    g = Graph()
    x, values = g.input(3), np.array([1.5, -2.0, 0.25], np.float32)
    node = g.op("Add", g.op("Neg", x, name="neg"), g.const(values, "held"), name="add")
    found = wiring(g, tmp_path, node)
    add = found.producer["add"]
    np.testing.assert_array_equal(found.array(add, 1), values)
    assert found.array(add, 0) is None and found.array(add, 2) is None


def test_arrays_in_a_file_beside_the_model(tmp_path: Path) -> None:
    g = Graph()
    values = np.arange(6, dtype=np.float32)
    y = g.op("Add", g.input(6), g.const(values, "held"), name="add")
    path = g.save(tmp_path, y)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="far.bin", size_threshold=0)
    assert (tmp_path / "far.bin").is_file()
    found = Wiring(model=load_model(path), folder=folder_of(path))
    np.testing.assert_array_equal(found.array(found.producer["add"], 1), values)
    (tmp_path / "far.bin").unlink()
    with pytest.raises(ExportError, match=r"the data of 'held' must be readable in .*: got .*far\.bin"):
        found.array(found.producer["add"], 1)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(np.uint8, "UINT8"), (np.int8, "INT8"), (np.int16, "INT16"), (np.uint16, "UINT16")]
)
def test_the_zero_point_says_what_codes_are(dtype: type, kind: str, tmp_path: Path) -> None:
    g = Graph()
    found = wiring(g, tmp_path, g.qdq(g.input(2), 0.1, 0, dtype, name="q"))
    pair = found.consumers["q"][0]
    assert found.code_type(found.producer["q"]) == found.code_type(pair) == kind


@pytest.mark.parametrize(("given", "kind"), [({}, "UINT8"), ({"output_dtype": onnx.TensorProto.INT8}, "INT8")])
def test_without_one_it_is_the_output_s_type(given: dict[str, int], kind: str, tmp_path: Path) -> None:
    g = Graph()
    scale = g.const(np.float32(1))
    q = g.op("QuantizeLinear", g.input(2), scale, name="q", **given)
    found = wiring(g, tmp_path, g.op("DequantizeLinear", q, scale, name="dq"))
    assert found.code_type(found.producer["q"]) == found.code_type(found.producer["dq"]) == kind


def test_codes_that_come_from_elsewhere_have_no_known_type(tmp_path: Path) -> None:
    g = Graph()
    codes = g.input(2, dtype=onnx.TensorProto.UINT8, name="codes")
    found = wiring(g, tmp_path, g.op("DequantizeLinear", codes, g.const(np.float32(1)), name="dq"))
    assert found.code_type(found.producer["dq"]) is None


def test_constants_of_a_branch_are_constants(tmp_path: Path) -> None:
    g = Graph()
    held = g.input(2, name="held")
    found = wiring(g, tmp_path, branching(g, held))
    assert "inner_const" in found.constants and "inner_relu" not in found.constants
    inner = Graph()
    y = inner.op("Add", "held", inner.op("Neg", inner.const(np.ones(2, np.float32), "own"), name="folded"), name="add")
    end = helper.make_tensor_value_info(y, FLOAT, [2])
    body = helper.make_graph(inner.nodes, "branch", [], [end], inner.constants)
    other = helper.make_graph([helper.make_node("Identity", ["held"], ["same"])], "other", [], [end])
    other.output[0].name = "same"
    g = Graph()
    g.input(2, name="held")
    y = g.op("If", g.input(1, dtype=BOOL, name="choice"), name="choose", then_branch=body, else_branch=other)
    found = wiring(g, tmp_path, y)
    assert found.constants == {"own", "folded"} and set(found.initializers) == {"own"}
    np.testing.assert_array_equal(found.array(found.producer["folded"], 0), np.ones(2, np.float32))


@pytest.mark.parametrize("content", [None, b"not a protobuf", b""], ids=["absent", "junk", "empty"])
def test_what_is_no_model_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError, match=r"net\.onnx must be an ONNX model: got "):
        load_model(path)


def test_the_folder_of_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert folder_of("net.onnx") == str(tmp_path) and folder_of(tmp_path / "a" / "b.onnx") == str(tmp_path / "a")
