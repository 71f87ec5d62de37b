from __future__ import annotations

import functools
import os
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import pytest
from onnx.reference import ReferenceEvaluator

from fxquant.errors import ExportError, InvalidArgument
from fxquant.targets import session as runtime
from fxquant.targets.in_turns import clock_of, in_turns
from fxquant.targets.shown_codes import quantize_outputs
from tests.onnx.graphs import BOOL, Graph, image, rows


def pixels(batch: int = 2, seed: int = 1) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((batch, 4, 6, 6)).astype(np.float32)}


def network(folder: Path) -> Path:
    """Conv, Relu, Conv, a residual Add and a Linear, quantized throughout.

    Every scale is a power of two and every sum fits float32, so no order of summation changes a bit of it.
    """
    graph, x = image(scale=2**-5)

    def conv(x: str) -> str:
        bias = graph.const(graph.rng.integers(-5000, 5000, 4).astype(np.float32) * np.float32(2**-11))
        return graph.op("Conv", x, graph.weight(4, 4, 3, 3, axis=0, scale=2**-6), bias, pads=[1] * 4)

    first = graph.qdq(graph.op("Relu", conv(x)), 2**-2, 0, name="q_relu")
    second = graph.qdq(conv(first), 2.0, name="q_second")
    total = graph.qdq(graph.op("Add", second, x), 2.0, name="q_add")
    pooled = graph.op("MaxPool", total, kernel_shape=[3, 3], strides=[3, 3])
    flat = graph.op("Reshape", pooled, graph.const(np.array([0, -1])))
    head = graph.op("MatMul", flat, graph.weight(16, 5, axis=1, scale=2**-6))
    return graph.save(folder, graph.op("Sub", head, graph.const(np.arange(5, dtype=np.float32))))


def reference_codes(path: Path, feeds: dict[str, np.ndarray], names: list[str]) -> list[np.ndarray]:
    """ONNX's own evaluator, told to give the values ``names``."""
    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return ReferenceEvaluator(model).run(None, feeds)


@pytest.fixture(autouse=True)
def untouched(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Whatever a test saved is there unchanged afterwards, with nothing beside it and nothing printed."""
    saved: dict[Path, bytes] = {}
    write = onnx.save

    def save(model: onnx.ModelProto, path: Path, **options: object) -> None:
        write(model, path, **options)
        saved.update({p: p.read_bytes() for p in Path(path).parent.iterdir() if p.is_file()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "save", save)
        yield
    folders = {path.parent for path in saved}
    left = {p: p.read_bytes() for folder in folders for p in folder.iterdir() if p.is_file()}
    assert left == saved
    assert capfd.readouterr() == ("", "")


class TestCodes:
    def test_equal_the_reference_evaluator_code_for_code(self, tmp_path: Path) -> None:
        path = network(tmp_path)
        codes = runtime.run_codes(path, pixels())
        assert list(codes) == ["quantizelinear_3", "q_relu", "q_second", "q_add"]
        for found, expected in zip(codes.values(), reference_codes(path, pixels(), list(codes)), strict=True):
            assert found.dtype == np.uint8 and len(np.unique(found)) > 20
            np.testing.assert_array_equal(found, expected, strict=True)

    def test_are_those_that_the_integer_kernels_compute(self, tmp_path: Path) -> None:
        path = network(tmp_path)
        (fast,) = runtime.run_outputs(path, pixels(), optimize=True, config=runtime.EXACT_SUMS)
        (plain,) = runtime.run_outputs(path, pixels(), optimize=False)
        np.testing.assert_array_equal(fast, plain, strict=True)

    @pytest.mark.parametrize(
        ("dtype", "zero_point", "given"),
        [
            ("uint8", 7, "uint8"),
            ("int8", -3, "int8"),
            ("uint16", 900, "uint16"),
            ("int16", -9, "int16"),
            ("int4", -2, "int8"),
            ("uint4", 5, "uint8"),
            ("float8_e4m3fn", 0, "uint8"),
        ],
    )
    def test_every_type_with_ties_and_saturation(self, tmp_path: Path, dtype: str, zero_point: int, given: str) -> None:
        kind = getattr(pytest.importorskip("ml_dtypes"), dtype, None) or getattr(np, dtype)
        graph = Graph()
        out = graph.qdq(graph.input(9), 0.5, zero_point, kind, name="q")
        path = graph.save(tmp_path, out)
        feeds = {"x": np.array([-1e6, -0.75, -0.25, 0.0, 0.25, 0.75, 1.25, 3.0, 1e6], np.float32)}
        codes = runtime.run_codes(path, feeds)["q"]
        expected = reference_codes(path, feeds, ["q"])[0]
        assert codes.dtype == given
        expected = expected.view(np.uint8) if dtype.startswith("float8") else expected.astype(given)
        np.testing.assert_array_equal(codes, expected)

    def test_a_q_without_zero_point_is_uint8(self, tmp_path: Path) -> None:
        graph = Graph()
        q = graph.op("QuantizeLinear", graph.input(3), graph.const(np.float32(1)), name="q")
        path = graph.save(tmp_path, graph.op("DequantizeLinear", q, graph.const(np.float32(1))))
        feeds = {"x": np.array([-1, 1.5, 300], np.float32)}
        assert runtime.run_codes(path, feeds)["q"].tolist() == [0, 2, 255]

    def test_output_dtype_alone_names_the_type(self, tmp_path: Path) -> None:
        graph = Graph()
        scale = graph.const(np.float32(1))
        q = graph.op("QuantizeLinear", graph.input(3), scale, name="q", output_dtype=onnx.TensorProto.INT4)
        path = graph.save(tmp_path, graph.op("DequantizeLinear", q, scale))
        codes = runtime.run_codes(path, {"x": np.array([-9, 1.5, 3], np.float32)})["q"]
        assert codes.dtype == np.int8 and codes.tolist() == [-8, 2, 3]

    def test_codes_that_are_an_output_already(self, tmp_path: Path) -> None:
        graph = Graph()
        graph.qdq(graph.input(2), 1.0, 0, name="q")
        path = graph.save(tmp_path, "q")
        assert runtime.run_codes(path, {"x": np.array([1, 2], np.float32)})["q"].tolist() == [1, 2]

    def test_weight_quantizers_are_left_out(self, tmp_path: Path) -> None:
        graph, x = rows()
        folded = graph.op("Transpose", graph.floats(6, 8), perm=[1, 0])
        weight = graph.qdq(folded, 0.01, 0, np.int8, name="of_weight")
        path = graph.save(tmp_path, graph.op("MatMul", x, weight))
        assert quantize_outputs(path) == {"quantizelinear_3": "quantizelinear_3"}

    def test_a_model_without_quantizers_has_none(self, tmp_path: Path) -> None:
        graph = Graph()
        path = graph.save(tmp_path, graph.op("Relu", graph.input(2)))
        assert quantize_outputs(path) == runtime.run_codes(path, {"x": np.zeros(2, np.float32)}) == {}

    def test_inside_a_function_of_the_model(self, tmp_path: Path) -> None:
        path = with_function(tmp_path)
        feeds = {"x": np.array([[1.0, 2.0]], np.float32)}
        (codes,) = runtime.run_codes(path, feeds).values()
        assert codes.tolist() == [[1, 2]]


def with_function(folder: Path) -> Path:
    """A model whose Q and DQ stand in a local function."""
    node, versions = (
        onnx.helper.make_node,
        [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("my", 1)],
    )
    body = [node("QuantizeLinear", ["a", "s"], ["q"]), node("DequantizeLinear", ["q", "s"], ["b"])]
    function = onnx.helper.make_function("my", "Fake", ["a", "s"], ["b"], body, versions[:1])
    ends = [onnx.helper.make_tensor_value_info(name, 1, [1, 2]) for name in ("x", "y")]
    scale = onnx.numpy_helper.from_array(np.array(1, np.float32), "scale")
    call = node("Fake", ["x", "scale"], ["y"], domain="my")
    graph = onnx.helper.make_graph([call], "g", ends[:1], ends[1:], [scale])
    model = onnx.helper.make_model(graph, functions=[function], opset_imports=versions, ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


class TestOutputs:
    def test_optimized_and_plain_differ_by_float_rounding_only(self, tmp_path: Path) -> None:
        graph, x = rows(rank=3)
        path = graph.save(tmp_path, graph.op("MatMul", x, graph.weight(8, 5, axis=1)))
        feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)}
        (fast,) = runtime.run_outputs(path, feeds, optimize=True, config=runtime.EXACT_SUMS)
        (plain,) = runtime.run_outputs(path, feeds, optimize=False)
        (expected,) = ReferenceEvaluator(onnx.load(path)).run(None, feeds)
        np.testing.assert_allclose(plain, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(fast, expected, rtol=1e-5, atol=1e-6)

    def test_a_fusion_that_fails_while_it_runs(self, tmp_path: Path) -> None:
        graph = Graph()
        x = graph.qdq(graph.input("batch", 8), np.full(8, 0.05, np.float32), 128, axis=1)
        path = graph.save(tmp_path, graph.op("MatMul", x, graph.weight(8, 5, axis=1)))
        feeds = {"x": np.ones((2, 8), np.float32)}
        assert runtime.run_outputs(path, feeds, optimize=False)[0].shape == (2, 5)
        with pytest.raises(ExportError, match=r"must run in onnxruntime: got .*MatMulIntegerToFloat"):
            runtime.run_outputs(path, feeds, optimize=True)

    def test_feeds_of_other_names(self, tmp_path: Path) -> None:
        path = network(tmp_path)
        with pytest.raises(InvalidArgument, match=r"feeds must name the model's inputs \['x'\]: got \['y'\]"):
            runtime.run_outputs(path, {"y": pixels()["x"]}, optimize=True)

    @pytest.mark.parametrize("read", [quantize_outputs, lambda path: runtime.session(path, optimize=True)])
    def test_files_that_are_no_models(self, tmp_path: Path, read: Callable[[Path], object]) -> None:
        with pytest.raises(ExportError, match=r"absent\.onnx must"):
            read(tmp_path / "absent.onnx")
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(b"not a protobuf")
        with pytest.raises(ExportError, match=r"broken\.onnx must"):
            read(broken)

    def test_session_takes_threads_bytes_and_a_place_for_the_optimized_graph(self, tmp_path: Path) -> None:
        graph, x = rows()
        data = graph.model(graph.op("MatMul", x, graph.weight(8, 5, axis=1))).SerializeToString()
        built = runtime.session(data, optimize=True, threads=1, optimized_path=tmp_path / "seen.onnx")
        assert built.get_providers() == ["CPUExecutionProvider"]
        assert built.get_session_options().intra_op_num_threads == 1
        assert "MatMulIntegerToFloat" in {node.op_type for node in onnx.load(tmp_path / "seen.onnx").graph.node}
        with pytest.raises(ExportError, match=r"^The model must load in onnxruntime"):
            runtime.session(b"junk", optimize=True)


@pytest.mark.parametrize("relative", [False, True])
def test_external_data_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool) -> None:
    graph, x = rows()
    model = graph.model(graph.op("MatMul", x, graph.weight(8, 5, axis=1)))
    (tmp_path / "inside").mkdir()
    inside, path = tmp_path / "inside" / "model.onnx", tmp_path / "model.onnx"
    onnx.save(model, inside)
    options = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 0}
    onnx.save(model, path, **options)
    assert (tmp_path / "model.onnx.data").stat().st_size > 0
    if relative:
        monkeypatch.chdir(tmp_path)
        path = Path("model.onnx")
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)}
    for call in (runtime.run_codes, lambda p, f: {"y": runtime.run_outputs(p, f, optimize=True)[0]}):
        for found, expected in zip(call(path, feeds).values(), call(inside, feeds).values(), strict=True):
            np.testing.assert_array_equal(found, expected)


class TestLatency:
    def test_gives_seconds_for_every_model(self, tmp_path: Path) -> None:
        path = network(tmp_path)
        seconds = runtime.latency({"one": path, "two": os.fspath(path)}, pixels(), rounds=3)
        assert list(seconds) == ["one", "two"]
        assert all(0.0 < value < 1.0 for value in seconds.values())

    def test_sees_that_more_work_takes_longer(self, tmp_path: Path) -> None:
        paths = {}
        for name, size in (("small", 1), ("large", 1024)):
            graph = Graph()
            y = graph.op("MatMul", graph.input("batch", 1024), graph.floats(1024, size))
            (tmp_path / name).mkdir()
            paths[name] = graph.save(tmp_path / name, y)
        seconds = runtime.latency(paths, {"x": np.ones((32, 1024), np.float32)}, rounds=5)
        assert seconds["small"] < seconds["large"]

    def test_asks_for_a_round(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidArgument, match="rounds must be at least 1: got 0"):
            runtime.latency({}, {}, rounds=0)


class TestSamples:
    def test_each_file_runs_on_its_own_inputs_in_every_round(self, tmp_path: Path) -> None:
        path = network(tmp_path)
        cases = {"one": (path, pixels(1)), "three": (path, pixels(3))}
        found = runtime.samples(cases, rounds=4)
        assert {key: len(values) for key, values in found.items()} == {"one": 4, "three": 4}
        assert all(value > 0 for values in found.values() for value in values)

    def test_a_file_that_does_not_run_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidArgument, match="feeds must name the model's inputs"):
            runtime.samples({"one": (network(tmp_path), {})}, rounds=1)


def test_runs_take_turns_after_three_that_do_not_count() -> None:
    calls: list[str] = []
    found = in_turns({name: functools.partial(calls.append, name) for name in "abc"}, rounds=3, threads=2)
    assert "".join(calls) == "aaabbbccc" + "abc" + "bca" + "cab"
    assert [len(found[name]) for name in "abc"] == [3, 3, 3]


def test_one_thread_is_timed_by_what_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by how long others keep it waiting; several, and where CPU time is coarse, by the clock on the wall."""
    assert clock_of(2) == "wall time"
    assert clock_of(1) == "CPU time"
    (waited,) = in_turns({"sleeps": functools.partial(time.sleep, 0.02)}, rounds=1, threads=1)["sleeps"]
    assert waited < 0.01
    (waited,) = in_turns({"sleeps": functools.partial(time.sleep, 0.02)}, rounds=1, threads=2)["sleeps"]
    assert waited >= 0.02
    coarse = types.SimpleNamespace(resolution=0.0156)
    monkeypatch.setattr(time, "get_clock_info", lambda name: coarse)
    assert clock_of(1) == "wall time"


def test_values_by_their_names(tmp_path: Path) -> None:
    """Those of onnx's evaluator, inner ones and outputs."""
    path, feeds = network(tmp_path), pixels()
    names = ["q_relu", "q_add", onnx.load(path).graph.output[0].name]
    found = runtime.values_of(path, feeds, names)
    for name, expected in zip(names, reference_codes(path, feeds, names), strict=True):
        np.testing.assert_array_equal(found[name], expected)
    assert runtime.values_of(path, feeds, []) == {}


def test_branches_keep_their_quantizers_to_themselves(tmp_path: Path) -> None:
    graph = Graph()
    x, choice = graph.input(2), graph.input(1, dtype=BOOL, name="choice")
    scale = graph.const(np.float32(1))
    bodies = {}
    for name, op_type in (("then_branch", "QuantizeLinear"), ("else_branch", "Relu")):
        inner = Graph()
        value = inner.op(op_type, x, *([scale] if name == "then_branch" else []), name=f"in_{name}")
        if name == "then_branch":
            value = inner.op("DequantizeLinear", value, scale, name="then_out")
        end = onnx.helper.make_tensor_value_info(value, 1, [2])
        bodies[name] = onnx.helper.make_graph(inner.nodes, name, [], [end])
    path = graph.save(tmp_path, graph.op("If", choice, **bodies))
    assert quantize_outputs(path) == {}
