"""Rounding "divide" gives the codes of ONNX QuantizeLinear → DequantizeLinear, in the reference and the runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from fxquant.ops import fake_quantize_per_channel_affine, fake_quantize_per_tensor_affine

TYPES = {
    "int8": (TensorProto.INT8, np.int8),
    "uint8": (TensorProto.UINT8, np.uint8),
    "int16": (TensorProto.INT16, np.int16),
    "uint16": (TensorProto.UINT16, np.uint16),
}
SCALES = (1e-3, 0.1, 1 / 3, 1.0, 7.3)


def pair(onnx_type: int, channels: int | None) -> onnx.ModelProto:
    """Outputs of QuantizeLinear and of DequantizeLinear after it; axis 1 where there are channels."""
    attributes = {} if channels is None else {"axis": 1}
    shape = [] if channels is None else [channels]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None]),
        helper.make_tensor_value_info("s", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("z", onnx_type, shape),
    ]
    outputs = [
        helper.make_tensor_value_info("q", onnx_type, [None, None]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None]),
    ]
    graph = helper.make_graph(nodes, "pair", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def values(scale: float, low: int, high: int) -> torch.Tensor:
    """Every tie of up to 70000 codes with both neighbours, both ends, and plain values between."""
    codes = torch.arange(low - 3, high + 4, dtype=torch.float32) + 0.5
    ties = codes * torch.tensor(scale)
    inf = torch.tensor([float("inf"), -float("inf"), 1e30, -1e30, 0.0, -0.0, 1e-45])
    spread = torch.empty(2000).uniform_(
        low * scale * 1.1, high * scale * 1.1, generator=torch.Generator().manual_seed(1)
    )
    return torch.cat([inf, ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1), spread])


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("runtime", ["reference", "onnxruntime"])
def test_no_code_differs(name: str, runtime: str) -> None:
    onnx_type, dtype = TYPES[name]
    low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    model = pair(onnx_type, None)
    if runtime == "reference":
        run = ReferenceEvaluator(model).run
    else:
        run = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run
    for scale in SCALES:
        for point in (low, 0, high // 2 + 1, high):
            x = values(scale, low - point, high - point)[None]
            if runtime == "reference":  # its astype is undefined for values beyond int32
                x = x[x.abs() < 2e9 * scale][None]
            feeds = {"x": x.numpy(), "s": np.array(scale, np.float32), "z": np.array(point, dtype)}
            _, expected = run(None, feeds)
            got = fake_quantize_per_tensor_affine(x, scale, point, low, high, rounding="divide")
            assert np.count_nonzero(got.numpy() != expected) == 0, (scale, point)


@pytest.mark.parametrize("name", TYPES)
def test_no_code_differs_per_channel(name: str) -> None:
    onnx_type, dtype = TYPES[name]
    low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    session = onnxruntime.InferenceSession(pair(onnx_type, len(SCALES)).SerializeToString())
    scale = torch.tensor(SCALES)
    point = torch.linspace(low, high, len(SCALES)).to(torch.int32)
    x = torch.stack([values(s, low - int(z), high - int(z)) for s, z in zip(SCALES, point, strict=True)], dim=1)
    _, expected = session.run(None, {"x": x.numpy(), "s": scale.numpy(), "z": point.numpy().astype(dtype)})
    got = fake_quantize_per_channel_affine(x, scale, point, 1, low, high, rounding="divide")
    assert np.count_nonzero(got.numpy() != expected) == 0


def test_the_two_roundings_differ_where_onnx_and_torch_do() -> None:
    x = torch.arange(-128.0, 128.0) * 0.1 + 0.05
    divide, reciprocal = (
        fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127, rounding=r) for r in ("divide", "reciprocal")
    )
    assert not torch.equal(divide, reciprocal)
