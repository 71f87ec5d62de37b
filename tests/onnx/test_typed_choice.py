"""Which type a file's float parts have where none is asked, and types that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant.errors import InvalidArgument
from fxquant.onnx.edges import NOTE
from tests.onnx.models import calibrated, snapshot
from tests.onnx.nets import TOKENS
from tests.onnx.test_typed import FLOAT, FLOAT16, HALVES, edges, net


@HALVES
@pytest.mark.parametrize(
    ("target", "takes"), [("tensorrt", (0, 1)), ("openvino", (0,)), ("generic", (0, 1)), ("onnxruntime", ())]
)
def test_a_model_of_half_parameters_is_a_half_file_where_the_target_takes_it(
    target: str, takes: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    model, x = net("mlp", target, dtype)
    before = snapshot(model)
    report = fxquant.export_onnx(model, (x,), tmp_path / "net.onnx")
    taken = (torch.float16, torch.bfloat16).index(dtype) in takes
    assert report.float_dtype == (str(dtype)[6:] if taken else "float32") and (NOTE in report.notes) != taken
    assert report.opset == (23 if taken else 21) and (report.typed_difference is not None) == taken
    assert edges(onnx.load(tmp_path / "net.onnx")) == [FLOAT if dtype == torch.bfloat16 else FLOAT16] * 2
    assert snapshot(model) == before


def trained_under(dtype: torch.dtype | None, target: str, where: str) -> nn.Module:
    """One training step, compiled; autocast around the call, or within forward."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None and where == "within"):
                return self.out(F.relu(self.fc(x)))

    torch._dynamo.reset()  # the forwards of all these are one code object, which Dynamo compiles eight times at most
    torch.manual_seed(0)
    model = fxquant.prepare(Net(), (TOKENS,), target=target)
    step = torch.compile(model, backend="fxquant_eager")
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None and where == "around"):
        loss = step(TOKENS).float().sum()
    loss.backward()
    return model.eval()


@pytest.mark.parametrize(
    ("dtype", "target", "where", "expected"),
    [
        (torch.bfloat16, "tensorrt", "around", "bfloat16"),
        (torch.float16, "tensorrt", "within", "float16"),
        (None, "tensorrt", "around", "float32"),
        (torch.bfloat16, "openvino", "around", "float32"),
    ],
)
def test_autocast_of_training_is_the_file_s_type_for_tensorrt(
    dtype: torch.dtype | None, target: str, where: str, expected: str, tmp_path: Path
) -> None:
    model = trained_under(dtype, target, where)
    report = fxquant.export_onnx(model, (TOKENS,), tmp_path / "net.onnx")
    assert report.float_dtype == expected and (f"dynamic batch, {expected}" in str(report)) == (expected != "float32")
    asked = fxquant.export_onnx(model, (TOKENS,), tmp_path / "net.onnx", float_dtype=torch.float32)
    assert asked.float_dtype == "float32" and asked.opset == 21 and asked.typed_difference is None


def test_evaluation_under_autocast_is_no_training(tmp_path: Path) -> None:
    model = trained_under(None, "tensorrt", "around")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.compile(model, backend="fxquant_eager")(TOKENS)
    assert fxquant.export_onnx(model, (TOKENS,), tmp_path / "net.onnx").float_dtype == "float32"


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (
            "tensorrt",
            {"float_dtype": torch.int8},
            r"float_dtype must be torch\.float32, torch\.float16, .* got torch.int8",
        ),
        ("tensorrt", {"float_dtype": "float16"}, r"float_dtype must be .* got 'float16'"),
        ("tensorrt", {"float_dtype": torch.float64}, r"float_dtype must be .* got torch.float64"),
        ("tensorrt", {"io_dtype": torch.int64}, r"io_dtype must be .* got torch.int64"),
        (
            "onnxruntime",
            {"float_dtype": torch.float16},
            r"must be torch\.float32 for target 'onnxruntime': got torch.float16",
        ),
        (
            "openvino",
            {"float_dtype": torch.bfloat16},
            r"must be torch\.float16 or torch\.float32 for target 'openvino'",
        ),
        ("tensorrt", {"float_dtype": torch.bfloat16, "opset": 21}, r"opset must be at least 22 for torch\.bfloat16"),
    ],
)
def test_a_type_that_is_none_is_refused_before_a_file_is_there(
    target: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model, x = net("mlp", target)
    with pytest.raises(InvalidArgument, match=message):
        fxquant.export_onnx(model, (x,), tmp_path / "net.onnx", **options)
    assert not list(tmp_path.iterdir())


class Grown(nn.Module):
    """Values beyond float16 between two sites: squares, whose effect is finite (`after` brings them back) or not."""

    def __init__(self, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.out, self.after = nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 4), after

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x) * 1000
        return self.out(self.after(y * y))


@pytest.mark.parametrize("after", [lambda y: y / 1e5, lambda y: 1e6 / (y + 1e6)], ids=["infinite", "finite"])
def test_a_tensor_that_overflows_is_named(after: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    model = calibrated(Grown(after), TOKENS, target="tensorrt")
    message = (
        r"float_dtype must hold every value that the model computes: got torch\.float16, which ends at 6\.55e\+04, for "
        r"mul\w*, which reaches .* on the given inputs\. Give float_dtype=torch\.bfloat16 or torch\.float32\."
    )
    with pytest.raises(InvalidArgument, match=message):
        fxquant.export_onnx(model, (TOKENS,), tmp_path / "net.onnx", float_dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    report = fxquant.export_onnx(model, (TOKENS,), tmp_path / "net.onnx", float_dtype=torch.bfloat16)
    assert report.typed_difference is not None and report.typed_difference < 0.05


def test_a_module_in_which_it_overflows_is_named(tmp_path: Path) -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x

    model = calibrated(
        nn.Sequential(nn.Linear(8, 8), nn.Sequential(Square()), nn.Linear(8, 4)), 500 * TOKENS, target="tensorrt"
    )
    with pytest.raises(InvalidArgument, match=r"for mul\w* of 1\.0, which reaches"):
        fxquant.export_onnx(model, (500 * TOKENS,), tmp_path / "net.onnx", float_dtype=torch.float16)
