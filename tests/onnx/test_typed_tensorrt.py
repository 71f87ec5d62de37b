"""Half files in NVIDIA's own parser and builder: what is a product of integers in the float32 file stays one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import fxquant
from fxquant.targets.tensorrt_run import kernel_rows
from tests.onnx.models import calibrated
from tests.onnx.test_typed import HALVES, net

pytest.importorskip("tensorrt_rtx")


def integers(name: str, folder: Path, dtype: torch.dtype, **options: Any) -> dict[str, bool]:
    """Each product of the file, and whether the builder made it one of integers."""
    model, x = net(name)
    fxquant.export_onnx(model, (x,), folder / "net.onnx", float_dtype=dtype, **options)
    return {row.name: row.integer for row in kernel_rows(folder / "net.onnx")}


@pytest.mark.parametrize("name", ["residual-with-downsample", "attention-operator", "unet-skip"])
@HALVES
def test_products_of_integers_stay_so(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    single = integers(name, tmp_path, torch.float32)
    assert any(single.values()) and integers(name, tmp_path, dtype) == single


@HALVES
@pytest.mark.parametrize("options", [{"opset": 22}, {"io_dtype": torch.bfloat16}], ids=["opset-22", "io-bfloat16"])
def test_the_other_form_and_other_edges_build_too(dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    assert all(integers("residual", tmp_path, dtype, **options).values())


@HALVES
def test_a_half_model_is_verified_with_the_builder(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = net("squeeze-and-excitation", dtype=dtype)
    fxquant.export_onnx(model, (x,), tmp_path / "net.onnx")
    verified = fxquant.verify_onnx(model, (x,), tmp_path / "net.onnx", rounds=0)
    assert verified.integer_share == 1.0 and verified.input_differing_codes == 0 and verified.lint


def test_a_max_pool_does_not_stop_integers(tmp_path: Path) -> None:
    """In bfloat16 it runs in float, so that its result is quantized again, to the codes that it picked."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3)
    model = calibrated(nn.Sequential(*layers), x, target="tensorrt")
    pairs = []
    for dtype in (torch.float16, torch.bfloat16):
        fxquant.export_onnx(model, (x,), tmp_path / "net.onnx", float_dtype=dtype)
        assert [row.integer for row in kernel_rows(tmp_path / "net.onnx")] == [True, True]
        pairs.append([node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node].count("QuantizeLinear"))
        verified = fxquant.verify_onnx(model, (x,), tmp_path / "net.onnx", rounds=0)
        assert verified.largest_code_difference <= 1 and len(verified.codes) == 2
    assert pairs == [2, 3]
