"""Half files in NVIDIA's own parser and builder: what is a product of integers in the float32 file stays one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.targets.session import run_outputs
from fxquant.targets.tensorrt_run import kernel_rows
from tests.onnx.models import calibrated
from tests.onnx.test_typed import FLOAT, HALVES, KINDS, net

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


class Heads(nn.Module):
    """Query, key and value from one layer, split; attention in half types is left whole, so nothing quantizes them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.layer(x).chunk(3, -1))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_one_layer_of_query_key_and_value_stays_a_product_of_integers(tmp_path: Path) -> None:
    """The builder would split its weight as floats: a product with one stands after it, which changes no bit."""
    x = torch.randn(2, 16, 32).bfloat16()
    model = calibrated(Heads().bfloat16(), x, target="tensorrt")
    fxquant.export_onnx(model, (x,), tmp_path / "net.onnx")
    verified = fxquant.verify_onnx(model, (x,), tmp_path / "net.onnx", rounds=0)
    assert [row.name for row in verified.rows if row.integer] == ["node_matmul", "node_matmul_3"] and verified.lint
    file = onnx.load(tmp_path / "net.onnx")
    (times,) = (node for node in file.graph.node if node.op_type == "Mul" and "node" not in node.name)
    (one,) = (tensor for tensor in file.graph.initializer if tensor.name == times.input[1])
    assert times.input[0] == "matmul" and onnx.numpy_helper.to_array(one).item() == 1
    for node in file.graph.node:
        node.input[:] = ["matmul" if name == times.output[0] else name for name in node.input]
    file.graph.node.remove(times)
    onnx.save(file, tmp_path / "split.onnx")
    assert not kernel_rows(tmp_path / "split.onnx")[0].integer
    feeds = {"x": x.float().numpy()}
    both = [run_outputs(tmp_path / name, feeds, optimize=False)[0] for name in ("net.onnx", "split.onnx")]
    assert np.array_equal(*both)


@HALVES
def test_weights_of_int4_are_read_by_the_product(dtype: torch.dtype, tmp_path: Path) -> None:
    """By half scales: the builder has no form with float32 ones. Those that half cannot hold are a Cast apart."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32))
    with torch.no_grad():
        net[2].weight *= 1e-5
    x = torch.randn(4, 64)
    model = calibrated(net, x, target="tensorrt", recipe="int4_weight_only")
    report = fxquant.export_onnx(model, (x,), tmp_path / "net.onnx", float_dtype=dtype)
    assert "2 weights stored as int4" in report.notes
    file, kind = onnx.load(tmp_path / "net.onnx"), str(dtype)[6:].replace("bfloat", "bf").replace("float16", "half")
    held = {tensor.name: tensor.data_type for tensor in file.graph.initializer}
    found = [held[node.input[1]] for node in file.graph.node if node.op_type == "DequantizeLinear"]
    assert found == [KINDS[dtype], FLOAT if dtype == torch.float16 else KINDS[dtype]]
    assert [row.kernel for row in kernel_rows(tmp_path / "net.onnx")] == [f"matrix product {kind}·{kind}"] * 2
    (y,) = run_outputs(tmp_path / "net.onnx", {file.graph.input[0].name: x.numpy()}, optimize=False)
    expected = model(x).detach().numpy()
    assert np.abs(y - expected).max() < 8 * torch.finfo(dtype).eps * np.abs(expected).max()


def test_codes_of_four_bits_beside_codes_stay_int8_in_half_files(tmp_path: Path) -> None:
    """By half scales the product would be stored in half before it is scaled, and overflow."""
    x = torch.randn(4, 16)
    model = calibrated(nn.Linear(16, 16), x, target="tensorrt", recipe="w4a8")
    for dtype, note in (
        (torch.float16, "1 weights without groups stay int8: beside half types it has no int4 ones"),
        (torch.float32, "1 weights stored as int4"),
    ):
        report = fxquant.export_onnx(model, (x,), tmp_path / "net.onnx", float_dtype=dtype, weight_storage="int4")
        assert note in report.notes
        assert [row.kernel for row in kernel_rows(tmp_path / "net.onnx")] == ["matrix product int8·int8"]


def test_hard_swish_is_no_bfloat16_operator(tmp_path: Path) -> None:
    """The parser refuses it there: it runs in float32, and the convolutions around it on integers."""
    x = torch.randn(2, 3, 8, 8)
    layers = nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 4, 3)
    model = calibrated(nn.Sequential(*layers), x, target="tensorrt")
    fxquant.export_onnx(model, (x,), tmp_path / "net.onnx", float_dtype=torch.bfloat16)
    assert [row.integer for row in kernel_rows(tmp_path / "net.onnx")] == [True, True]
