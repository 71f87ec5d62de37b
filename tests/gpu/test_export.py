"""Trained on the device, exported, loaded: the file's codes are training's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxquant
from tests.gpu.test_training import NETS, compiled, each_net, made

pytest.importorskip("onnxruntime", reason="export is checked in onnxruntime")
pytest.importorskip("onnxscript", reason="export needs onnxscript")

from tests.onnx.agreement import assert_codes_agree


def trained(net: str, device: str) -> torch.nn.Module:
    model, xs = made(net, device)
    run = compiled(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        run(xs[0]).square().mean().backward()
        optimizer.step()
    return model


@each_net
def test_codes_agree_after_training_on_the_device(net: str, device: str, tmp_path: Path) -> None:
    """Every QuantizeLinear, in onnxruntime, has the codes that the eager oracle has on CPU."""
    model = trained(net, device).cpu().eval()
    x = torch.randn(NETS[net][1], generator=torch.Generator().manual_seed(3))
    path = tmp_path / "model.onnx"
    fxquant.export_onnx(model, (x,), str(path))
    assert_codes_agree(fxquant.verify_onnx(model, (x,), str(path)))


@each_net
def test_evaluation_on_the_device_is_the_cpu_s(net: str, device: str) -> None:
    """In float64, so that no product moves a code: what is exported from CPU is what the device computed."""
    model = trained(net, device).double().eval()
    x = torch.randn(NETS[net][1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        torch._dynamo.reset()
        there = compiled(model)(x.to(device)).cpu()
        torch._dynamo.reset()
        here = compiled(model.cpu(), "fxquant_eager")(x)
    torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-7)


@each_net
def test_a_model_on_the_device_is_exported_as_one_on_cpu(net: str, device: str, tmp_path: Path) -> None:
    import onnx

    model = trained(net, device).eval()
    x = torch.randn(NETS[net][1], generator=torch.Generator().manual_seed(3))
    files = [tmp_path / "device.onnx", tmp_path / "cpu.onnx"]
    fxquant.export_onnx(model, (x.to(device),), str(files[0]))
    fxquant.export_onnx(model.cpu(), (x,), str(files[1]))
    loaded = [onnx.load(file) for file in files]
    assert [n.op_type for n in loaded[0].graph.node] == [n.op_type for n in loaded[1].graph.node]
    weights = [{t.name: t.raw_data for t in each.graph.initializer} for each in loaded]
    assert weights[0] == weights[1]
