"""Models of half and double precision: files that load, run on integers, and equal training within their precision."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant.onnx.edges import NOTE
from tests.onnx.models import calibrated, snapshot


class Net(nn.Module):
    """Convolution with a BatchNorm, residual, normalization, linear; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.bn(self.a(x)))
        y = self.norm(F.relu(self.b(y) + y).mean((2, 3)))
        return self.fc(y), y.float().argmax(1)


KINDS = {
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.FLOAT,
    torch.float64: onnx.TensorProto.DOUBLE,
}


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("onnxruntime", torch.float16),
        ("onnxruntime", torch.bfloat16),
        ("onnxruntime", torch.float64),
        ("openvino", torch.float16),
    ],
    ids=["float16", "bfloat16", "float64", "openvino-float16"],
)
def test_the_file_loads_runs_on_integers_and_equals_training(target: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6, dtype=dtype)
    model = calibrated(Net().to(dtype), x, target=target)
    before, path = snapshot(model), tmp_path / "half.onnx"
    report = fxquant.export_onnx(model, (x,), path)
    assert snapshot(model) == before and {p.dtype for p in model.parameters()} == {dtype}
    assert not any("not checked" in note for note in report.notes)
    assert (NOTE in report.notes) == (report.float_dtype == "float32") == (target == "onnxruntime")
    graph = onnx.load(path).graph
    kinds = [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)]
    assert kinds == [KINDS[dtype], KINDS[dtype], onnx.TensorProto.INT64]
    verified = fxquant.verify_onnx(model, (x,), path, rounds=1)
    assert verified.integer_share == 1.0 and len(verified.rows) == 3
    assert verified.compared_codes > 500 and verified.input_differing_codes == 0
    # Training rounds each result between two sites (product, norm, sum) to 11 or 8 bits, by half an eps of up to 255
    # codes; and a code beside a tie may fall to the other side.
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert verified.largest_code_difference <= 1 + int(3 * 255 * eps / 2)
    assert verified.differing_codes <= max(2, verified.compared_codes * 64 * eps)
    assert verified.max_output_difference < 16 * eps * max(1.0, verified.output_spread)
