"""Numbers of half files: the evaluator for types that onnxruntime lacks against others, codes against training's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import fxquant
from fxquant.targets.document import as_declared
from fxquant.targets.rounded import is_beyond_onnxruntime, rounded
from fxquant.targets.session import run_codes, run_outputs
from tests.onnx.test_typed import HALVES, net
from tests.onnx.test_typed_choice import trained_under


def ran(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    built = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return built.run(None, {built.get_inputs()[0].name: x})[0]


def spread(value: np.ndarray) -> float:
    return float(np.ptp(value.astype(np.float32)))


@pytest.mark.parametrize("name", ["residual", "attention-operator", "squeeze-and-excitation"])
@HALVES
def test_the_rounded_file_is_onnx_s_evaluator_within_the_type(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """onnx's adds up in the half type, so that its sums are rounded more often."""
    model, x = net(name)
    path = tmp_path / "net.onnx"
    fxquant.export_onnx(model, (x,), path, float_dtype=dtype)
    file = onnx.load(path)
    assert is_beyond_onnxruntime(file)
    (ours,) = run_outputs(path, {file.graph.input[0].name: x.numpy()}, optimize=False)
    (theirs,) = ReferenceEvaluator(file).run(None, {file.graph.input[0].name: x.numpy()})
    # A code that falls to the other side of a tie is a step of 1/255 of one tensor's range.
    bound = (16 * torch.finfo(dtype).eps + 2 / 255) * spread(theirs)
    assert np.abs(ours - theirs.astype(np.float32)).max() < bound


@pytest.mark.parametrize("name", ["residual", "attention-operator"])
def test_the_rounded_float16_file_is_onnxruntime_s_own_float16(name: str, tmp_path: Path) -> None:
    """Before opset 23 onnxruntime runs the file itself: it too computes each node in float32, and rounds."""
    model, x = net(name)
    path = tmp_path / "net.onnx"
    fxquant.export_onnx(model, (x,), path, float_dtype=torch.float16, opset=22)
    file = onnx.load(path)
    assert not is_beyond_onnxruntime(file)
    ours, theirs = ran(rounded(file, str(tmp_path)), x.numpy()), ran(file, x.numpy())
    assert np.abs(ours - theirs).max() < (4 * torch.finfo(torch.float16).eps + 2 / 255) * spread(theirs)


@HALVES
def test_both_forms_compute_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = net("attention-after")
    outputs: list[Any] = []
    for opset in (22, 23):
        fxquant.export_onnx(model, (x,), tmp_path / "net.onnx", float_dtype=dtype, opset=opset)
        outputs.append(ran(rounded(onnx.load(tmp_path / "net.onnx"), str(tmp_path)), x.numpy()))
    assert np.array_equal(*outputs)


def test_the_rounded_file_has_half_numbers_alone(tmp_path: Path) -> None:
    model, x = net("mlp")
    fxquant.export_onnx(model, (x,), tmp_path / "net.onnx", float_dtype=torch.bfloat16)
    file = rounded(onnx.load(tmp_path / "net.onnx"), str(tmp_path))
    shown = [
        node.output[0] for node in file.graph.node if node.op_type in ("MatMul", "Add", "Gelu", "DequantizeLinear")
    ]
    wide = [name.removesuffix("::wide") for name in shown if name.endswith("::wide")]
    assert len(wide) == len(shown) > 6
    file.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wide)
    session = onnxruntime.InferenceSession(file.SerializeToString())
    for value in session.run(wide, {session.get_inputs()[0].name: x.numpy()}):
        as_half = torch.from_numpy(value).to(torch.bfloat16).float().numpy()
        assert value.dtype == np.float32 and np.array_equal(as_half, value)


def test_a_node_of_several_results_is_rounded_in_each(tmp_path: Path) -> None:
    info = onnx.helper.make_tensor_value_info
    split = onnx.helper.make_node("Split", ["x"], ["a", "b"], num_outputs=2)
    one = onnx.TensorProto.BFLOAT16
    graph = onnx.helper.make_graph([split], "g", [info("x", one, [4])], [info("a", one, [2]), info("b", one, [2])])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10),
        tmp_path / "g.onnx",
    )
    found = run_outputs(tmp_path / "g.onnx", {"x": np.float32([1, 2, 3, 4])}, optimize=False)
    assert [value.tolist() for value in found] == [[1, 2], [3, 4]]


def test_feeds_have_the_file_s_types() -> None:
    info = onnx.helper.make_tensor_value_info
    kinds = {"a": onnx.TensorProto.FLOAT16, "b": onnx.TensorProto.BFLOAT16, "c": onnx.TensorProto.INT64}
    graph = onnx.helper.make_graph([], "g", [info(name, kind, [1]) for name, kind in kinds.items()], [])
    x = np.float32([1.001])
    found = as_declared(onnx.helper.make_model(graph), {"a": x, "b": x, "c": np.int64([3])})
    assert [str(value.dtype) for value in found.values()] == ["float16", "float32", "int64"]
    assert found["a"].tolist() == [float(np.float16(1.001))] and found["b"].tolist() == [1.0]


# ---------------------------------------------------------------- the file and training


def held_to_training(model: nn.Module, x: Tensor, path: Path, dtype: torch.dtype) -> None:
    verified = fxquant.verify_onnx(model, (x,), path, rounds=0)
    eps = torch.finfo(dtype).eps
    assert verified.compared_codes > 100 and verified.input_differing_codes == 0
    assert verified.largest_code_difference <= 1 + int(3 * 255 * eps / 2)
    assert verified.differing_codes <= max(2, verified.compared_codes * 32 * eps)
    assert verified.max_output_difference < (16 * eps + 2 / 255) * 8 * verified.output_spread


@pytest.mark.parametrize("name", ["inverted-residual", "unet-skip", "attention-after", "average-pool"])
@HALVES
def test_codes_of_a_half_model_are_training_s(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = net(name, dtype=dtype)
    report = fxquant.export_onnx(model, (x,), tmp_path / "net.onnx")
    assert report.float_dtype == str(dtype)[6:] and not report.notes
    held_to_training(model, x, tmp_path / "net.onnx", dtype)


@pytest.mark.parametrize("name", ["residual-with-downsample", "attention-operator"])
@HALVES
def test_codes_of_a_float32_model_are_training_s_within_the_type(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = net(name)
    report = fxquant.export_onnx(model, (x,), tmp_path / "net.onnx", float_dtype=dtype)
    assert report.typed_difference is not None and 0 < report.typed_difference < 4 * torch.finfo(dtype).eps + 1 / 255
    held_to_training(model, x, tmp_path / "net.onnx", dtype)


@pytest.mark.parametrize("where", ["around", "within"])
@HALVES
def test_a_model_that_trained_under_autocast_is_held_to_it(where: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained_under(dtype, "tensorrt", where)
    x = torch.randn(16, 5, 8)
    fxquant.export_onnx(model, (x,), tmp_path / "net.onnx")
    held_to_training(model, x, tmp_path / "net.onnx", dtype)
    verified = fxquant.verify_onnx(model, (x,), tmp_path / "net.onnx", rounds=0)
    fxquant.export_onnx(model, (x,), tmp_path / "single.onnx", float_dtype=torch.float32)
    names = run_codes(tmp_path / "net.onnx", {"x": x.numpy()})
    assert len(names) == len(verified.codes) == 2


def test_codes_at_float32_inputs_are_those_of_the_float32_file(tmp_path: Path) -> None:
    model, x = net("residual")
    codes = []
    for dtype in (torch.float32, torch.bfloat16):
        fxquant.export_onnx(model, (x,), tmp_path / "net.onnx", float_dtype=dtype)
        codes.append(run_codes(tmp_path / "net.onnx", {"x": x.numpy()})["one_0_conv0_input"])
    assert np.array_equal(*codes)


def test_a_file_that_is_off_by_more_than_its_type_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight's scale 5 % too large in the file alone."""
    from fxquant.onnx import export as exporting

    def also(model: Any, *args: Any, **keywords: Any) -> list[str]:
        scale = next(v for name, v in model.graph.initializers.items() if name.endswith("weight__scale"))
        import onnx_ir as ir

        scale.const_value = ir.tensor(scale.const_value.numpy() * np.float32(1.05))
        return real(model, *args, **keywords)

    real = exporting.type_floats
    monkeypatch.setattr(exporting, "type_floats", also)
    model, x = net("mlp")
    with pytest.raises(fxquant.errors.ExportError, match="the file must compute what the evaluated graph does"):
        fxquant.export_onnx(model, (x,), tmp_path / "net.onnx", float_dtype=torch.float16)
    assert not list(tmp_path.iterdir())
