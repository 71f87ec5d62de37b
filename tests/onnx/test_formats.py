"""Files of every recipe for every target that runs it: codes equal to training's, in types that the target reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import QuantSpec, Recipe
from fxquant.errors import ExportError, InvalidArgument
from fxquant.onnx import lint_onnx
from fxquant.spec.ranges import CurrentTensor
from fxquant.spec.recipes import RECIPES
from tests.onnx.models import calibrated

WIDTH = 64


class Head(nn.Module):
    """Two linears and a bare product with a weight, which stands the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.last = nn.Parameter(torch.randn(WIDTH, 32) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()) @ self.last


@dataclass(frozen=True)
class Case:
    """``kernels``: of the three products, as the runtime names them; None where no runtime is run."""

    recipe: str
    target: str
    types: tuple[str, ...]
    kernels: str | None = None
    integer: int = 3

    def __str__(self) -> str:
        return f"{self.recipe} {self.target}"


CASES = (
    Case("w4a4", "generic", ("INT8", "UINT8")),
    Case("w2a8", "generic", ("INT8", "UINT8")),
    Case("int8_dynamic", "generic", ("INT8",)),
    Case("w4a4_dynamic", "generic", ("INT8",)),
    Case("w4a4_dynamic", "onnxruntime", ("INT8",), "MatMulInteger"),
    Case("fp8", "generic", ("FLOAT8E4M3FN",)),
    Case("mxfp8", "generic", ("FLOAT8E4M3FN",)),
    Case("mxfp4", "generic", ("FLOAT4E2M1",)),
    Case("nvfp4", "generic", ("FLOAT4E2M1", "FLOAT8E4M3FN")),
    Case("w4a16_nvfp4", "generic", ("FLOAT4E2M1", "FLOAT8E4M3FN")),
    Case("int8_dynamic", "onnxruntime", ("INT8",), "MatMulInteger"),
    Case("fp8", "tensorrt", ("FLOAT8E4M3FN",), "matrix product fp8_e4m3·fp8_e4m3"),
    Case("nvfp4", "tensorrt", ("FLOAT4E2M1", "FLOAT8E4M3FN"), "matrix product fp4_e2m1·fp4_e2m1"),
    Case("mxfp8", "tensorrt", ("FLOAT8E4M3FN", "UINT8"), "matrix product float·float", integer=0),
    Case("w4a16_nvfp4", "tensorrt", ("FLOAT4E2M1", "FLOAT8E4M3FN"), "matrix product float·float", integer=0),
)


def made(recipe: str | Recipe, target: str) -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(0)
    model, x = Head(), torch.randn(3, 5, WIDTH)
    fxquant.prepare(model, (x,), recipe=recipe, target=target)
    return fxquant.calibrate(model, [x], progress=False), (x,)


def test_every_recipe_that_has_a_format_of_its_own_is_here() -> None:
    assert {case.recipe for case in CASES} == RECIPES.keys() - {"int8", "w4a8", "int4_weight_only"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_are_those_of_training(case: Case, tmp_path: Path) -> None:
    model, args = made(case.recipe, case.target)
    path = tmp_path / "model.onnx"
    report = fxquant.export_onnx(model, args, path)
    assert report.notes == () and len(report.weights) == 3
    kinds = onnx.TensorProto.DataType
    graph = onnx.load(path).graph
    codes = {kinds.Name(t.data_type) for t in graph.initializer if len(t.dims) == 2}
    read, held = {name for node in graph.node for name in node.input}, {tensor.name for tensor in graph.initializer}
    weights = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in held]
    assert all(node.output[0] in read for node in weights), "no weight is dequantized for nothing"
    assert codes - {"FLOAT"} == {kind for kind in case.types if kind != "UINT8" or case.target == "tensorrt"}
    found = fxquant.verify_onnx(model, args, path, rounds=0)
    weight_only = RECIPES[case.recipe].activation is None
    # Sums of integers are exact, where those of training's floats are rounded: a code may fall to the other side.
    most = 2 if case.kernels == "MatMulInteger" else 0
    assert found.differing_codes <= most and found.largest_code_difference <= 1
    assert found.compared_codes > 2000 or weight_only
    assert found.max_output_difference < (0.05 * found.output_spread if found.differing_codes else 1e-5)
    if case.kernels is None:
        assert found.lint is not None and bool(found.lint)
    else:
        assert [row.kernel for row in found.rows] == [case.kernels] * 3, found
        assert sum(row.integer for row in found.rows) == case.integer


@pytest.mark.parametrize(
    ("fields", "target", "kernel"),
    [
        ({"signed": False, "symmetric": False}, "onnxruntime", "MatMulInteger"),
        ({"bits": 4, "symmetric": False}, "onnxruntime", "MatMulInteger"),
        ({"signed": False}, "onnxruntime", "MatMulInteger"),
        ({"bits": 12, "signed": False, "symmetric": False}, "generic", None),
        ({"bits": 16}, "generic", None),
    ],
    ids=str,
)
def test_tokens_of_other_codes(fields: dict[str, Any], target: str, kernel: str | None, tmp_path: Path) -> None:
    """With zero points of their own, or fixed ones that are not 0; of more than 8 bits, which had no type to fit."""
    activation = QuantSpec(group_size=-1, range=CurrentTensor(), **fields)
    weight = QuantSpec(bits=7, narrow=True, axis=0, range=CurrentTensor())  # sums saturate on no CPU
    model, args = made(Recipe(name="tokens", activation=activation, weight=weight), target)
    path = tmp_path / "model.onnx"
    fxquant.export_onnx(model, args, path)
    found = fxquant.verify_onnx(model, args, path, rounds=0)
    assert found.differing_codes <= (0 if kernel is None else 2) and found.largest_code_difference <= 1
    assert found.compared_codes > 2000 and len(found.codes) == 3
    assert {row.kernel for row in found.rows} == ({kernel} if kernel else set())
    if kernel is not None:
        assert all(level.error is None and level.largest <= 1 for level in found.levels)
        assert found.optimized_output_difference < 0.01 * found.output_spread


@pytest.mark.parametrize(
    ("recipe", "target", "message"),
    [
        (
            "mxfp4",
            "onnxruntime",
            "recipe 'mxfp4' must have a format that target 'onnxruntime' runs: got e2m1 axis 0 group 32 scale e8m0 for "
            "a weight. It runs integers, affine token, token; target='generic' takes any format.",
        ),
        (
            "fp8",
            "openvino",
            "recipe 'fp8' must have a format that target 'openvino' runs: got e4m3 axis 0 for a weight. It runs "
            "integers; target='generic' takes any format.",
        ),
    ],
)
def test_a_target_that_cannot_says_what_it_can(recipe: str, target: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        made(recipe, target)
    assert str(caught.value) == message


class Convolutions(nn.Module):
    """Before a ReLU, which its quantizer does, and before what nothing can do for it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, bias=False)
        self.three, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.hardswish(self.two(self.one(x).relu()))
        return self.head(self.head(self.three(y).mean((2, 3))))


@pytest.mark.parametrize("recipe", ["w4a4", "w4a8", "w2a8"])
def test_every_product_of_few_bits_is_integer_in_onnxruntime(recipe: str, tmp_path: Path) -> None:
    """4-bit codes are bytes that a Clip narrows, which kept convolutions from their integer kernels."""
    torch.manual_seed(0)
    x, path = torch.randn(2, 8, 8, 8), tmp_path / "model.onnx"
    model = calibrated(Convolutions().eval(), x, target="onnxruntime", recipe=recipe)
    fxquant.export_onnx(model, (x,), path)
    found = fxquant.verify_onnx(model, (x,), path, rounds=0)
    assert len(found.rows) == 5 and [row.kernel for row in found.rows if not row.integer] == [], found
    assert found.compared_codes > 3000 and found.differing_codes == 0
    assert all(level.error is None and level.differing <= 2 for level in found.levels) and found.levels
    assert bool(lint_onnx(path, target="onnxruntime"))


def test_blocks_that_do_not_divide_are_left_in_float() -> None:
    model, x = nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 8)), torch.randn(2, 40)
    fxquant.prepare(model, (x,), recipe="mxfp4", target="generic")
    declined = [place.reason for place in fxquant.explain(model, (x,)).declined]
    assert declined == ["groups of 32 must divide the 40 values of a channel"]


def test_activations_whose_blocks_do_not_divide_leave_their_weights_in_float_too() -> None:
    model, x = nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 8)), torch.randn(2, 40)
    activation = QuantSpec(group_size=32, scale_format="e8m0", range=CurrentTensor())
    fxquant.prepare(model, (x,), recipe=Recipe(name="blocks", activation=activation), target="generic")
    found = fxquant.explain(model, (x,))
    reasons = [place.reason for place in found.declined]
    assert reasons == ["groups of 32 must divide the 40 values along the last axis of its input"]
    assert [row.key for row in found.rows] == ["1.input", "1.weight"]


def test_codes_of_two_kinds_are_not_multiplied_by_tensorrt() -> None:
    torch.manual_seed(0)
    model, x = Head(), torch.randn(3, 5, WIDTH)
    fp8 = QuantSpec(element="e4m3", axis=0, range=CurrentTensor())
    rule = fxquant.Rule(path="up", operand="weight", spec=fp8)
    fxquant.prepare(model, (x,), target="tensorrt", rules=[rule])
    declined = {place.where: place.reason for place in fxquant.explain(model, (x,)).declined}
    assert declined == {
        "linear": "its input has integer codes and its weight has e4m3 codes: tensorrt multiplies codes of one kind"
    }


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            QuantSpec(group_size=-1, range=CurrentTensor()),
            "changes['up.input'] must not be per token or group for up.input: got s8 token for an activation, whose "
            "place follows from its format. Prepare the model with fxquant.Rule(operand='input', spec=…) or a recipe.",
        ),
        (
            QuantSpec(element="e4m3"),
            "changes['up.input'] must have a format that target 'onnxruntime' runs: got e4m3 for an activation. "
            "It runs integers, affine token, token; target='generic' takes any format.",
        ),
    ],
    ids=str,
)
def test_formats_that_a_site_cannot_change_to(spec: QuantSpec, message: str) -> None:
    model, _ = made("int8", "onnxruntime")
    with pytest.raises(InvalidArgument) as caught:
        fxquant.override(model, {"up.input": spec})
    assert str(caught.value) == message


def test_a_site_changes_to_small_floats(tmp_path: Path) -> None:
    model, args = made("int8", "generic")
    weight = QuantSpec(element="e5m2", axis=0, range=CurrentTensor())
    fxquant.override(model, {"up.input": QuantSpec(element="e4m3"), "up.weight": weight})
    fxquant.calibrate(model, [args[0]], progress=False)
    fxquant.export_onnx(model, args, tmp_path / "model.onnx")
    assert fxquant.verify_onnx(model, args, tmp_path / "model.onnx", rounds=0).differing_codes == 0


def test_six_bit_floats_train_and_have_no_file(tmp_path: Path) -> None:
    fields = {"element": "e3m2", "group_size": 32, "scale_format": "e8m0"}
    spec = QuantSpec(range=CurrentTensor(), **fields)
    model, args = made(
        Recipe(name="mxfp6", activation=spec, weight=QuantSpec(axis=0, range=CurrentTensor(), **fields)), "generic"
    )
    with pytest.raises(ExportError, match=r"element must be one that ONNX has a type for, 'e4m3', 'e5m2', 'e2m1'"):
        fxquant.export_onnx(model, args, tmp_path / "model.onnx")


def test_an_opset_without_the_type(tmp_path: Path) -> None:
    model, args = made("nvfp4", "generic")
    with pytest.raises(InvalidArgument, match=r"opset must be at least 23 for codes of e2m1: got 21. Leave it out."):
        fxquant.export_onnx(model, args, tmp_path / "model.onnx", opset=21)
    assert not any(tmp_path.iterdir())


def test_scales_of_each_tensor_are_refused_by_tensorrt(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Head(), torch.randn(3, 5, WIDTH)
    fxquant.prepare(model, (x,), recipe="nvfp4", target="tensorrt", ranges=CurrentTensor())
    with pytest.raises(ExportError, match=r"the range of up.input must be known before it runs, for TensorRT"):
        fxquant.export_onnx(model, (x,), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("recipe", "kernel"),
    [
        ("fp8", "matrix product fp8_e4m3·fp8_e4m3"),
        ("nvfp4", "matrix product fp4_e2m1·fp4_e2m1"),
        ("mxfp8", "matrix product half·half"),
    ],
)
def test_half_files_multiply_the_same_codes(recipe: str, kernel: str, tmp_path: Path) -> None:
    """Of fp4 the scales of blocks are half in such a file, those of tensors not: no other form builds."""
    model, args = made(recipe, "tensorrt")
    path = tmp_path / "model.onnx"
    report = fxquant.export_onnx(model, args, path, float_dtype=torch.float16)
    assert report.typed_difference is not None and report.typed_difference < 0.03
    found = fxquant.verify_onnx(model, args, path, rounds=0)
    assert [row.kernel for row in found.rows] == [kernel] * 3
    assert found.differing_codes <= 0.03 * found.compared_codes


@pytest.mark.parametrize(
    ("recipe", "target", "forecast"),
    [
        ("fp8", "tensorrt", "fp8 MatrixMultiply"),
        ("nvfp4", "tensorrt", "fp4 MatrixMultiply"),
        ("mxfp8", "tensorrt", "float: TensorRT for RTX makes floats of MXFP8 codes before it multiplies"),
        ("w4a16_nvfp4", "tensorrt", "MatrixMultiply with an fp4 weight"),
        ("int8_dynamic", "onnxruntime", "MatMulInteger"),
        ("w4a4_dynamic", "onnxruntime", "MatMulInteger"),
    ],
)
def test_explain_forecasts_what_was_seen(recipe: str, target: str, forecast: str) -> None:
    model, args = made(recipe, target)
    found = fxquant.explain(model, args)
    assert {kernel for row in found.rows for kernel in row.kernels} == {forecast}
    assert recipe in str(found) and forecast.split()[0] in str(found)


@pytest.mark.parametrize(("recipe", "target"), [("nvfp4", "tensorrt"), ("int8", "onnxruntime")])
def test_a_site_with_the_name_of_an_input_is_written_and_compared(recipe: str, target: str, tmp_path: Path) -> None:
    """A lone Linear: both are called "input", so that the exporter gave the codes another name than the site's."""
    x = torch.randn(4, 32)
    model = calibrated(nn.Linear(32, 8), x, target=target, recipe=recipe)
    assert fxquant.export_onnx(model, (x,), tmp_path / "net.onnx").activations == ("input",)
    assert [each.name for each in onnx.load(tmp_path / "net.onnx").graph.input] == ["input"]
    codes = fxquant.verify_onnx(model, (x,), tmp_path / "net.onnx", rounds=0).codes
    assert [(row.key, row.compared, row.differing) for row in codes] == [("input", 128, 0)]
