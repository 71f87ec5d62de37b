"""Operators that a model calls itself, exported by torch.onnx with our table: native Q/DQ, and training's numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from fxquant import ops
from fxquant.onnx import translation_table
from tests.ops.oracle import hard_values

QDQ = {"QuantizeLinear", "DequantizeLinear"}
PLAIN = {"Constant", "Cast", "CastLike", "Clip", "Min", "Max", "Mul", "Sub", "Reshape", "Identity"}


@dataclass(frozen=True)
class Case:
    """A call, and the range it is hard for."""

    name: str
    call: Any
    low: int
    high: int

    def __str__(self) -> str:
        return self.name


class Model(nn.Module):
    """One call, with scales and zero points as buffers."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call = call
        self.register_buffer("scale", torch.tensor([0.1, 0.02, 3.0]))
        self.register_buffer("point", torch.tensor([0, 1, 5], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.scale, self.point)


def per_tensor(low: int, high: int) -> Any:
    return lambda x, s, z: ops.fake_quantize_per_tensor_affine(x, s[:1], z[1:2], low, high, rounding="divide")


def per_channel(low: int, high: int) -> Any:
    return lambda x, s, z: ops.fake_quantize_per_channel_affine(x, s, z, 1, low, high, rounding="divide")


CASES = [
    Case("numbers", lambda x, s, z: ops.fake_quantize_per_tensor_affine(x, 0.1, 3, 0, 255, rounding="divide"), 0, 255),
    Case("numbers u4", lambda x, s, z: ops.fake_quantize_per_tensor_affine(x, 0.1, 3, 0, 15, rounding="divide"), 0, 15),
    Case("tensor s8", per_tensor(-128, 127), -128, 127),
    Case("tensor s8 narrow", per_tensor(-127, 127), -127, 127),
    Case("tensor u16", per_tensor(0, 65535), 0, 65535),
    Case("channels u8", per_channel(0, 255), 0, 255),
    Case("channels s4", per_channel(-8, 7), -8, 7),
]


def exported(model: nn.Module, x: Tensor) -> onnx.ModelProto:
    program = torch.onnx.export(
        model, (x,), dynamo=True, custom_translation_table=translation_table(), opset_version=21, verbose=False
    )
    assert program is not None
    return program.model_proto


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_runtime_gives_the_numbers_of_training(case: Case, dtype: torch.dtype) -> None:
    pool = torch.cat([hard_values(s, case.low, case.high, dtype) for s in (0.1, 0.02, 3.0)])
    pool = pool[pool.abs() < 1e6]  # what a code beyond int32, or of NaN, becomes is each runtime's own
    x = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))][: len(pool) // 3 * 3].reshape(-1, 3)
    model = Model(case.call)
    expected = model(x).numpy()
    proto = exported(model, x)
    kinds = {node.op_type for node in proto.graph.node}
    assert kinds >= QDQ and kinds <= QDQ | PLAIN, kinds
    feed = {proto.graph.input[0].name: x.numpy()}
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, feed)[0], expected)
    if dtype == torch.float32:
        np.testing.assert_array_equal(ReferenceEvaluator(proto).run(None, feed)[0], expected)


@pytest.mark.parametrize("axis", [None, 0, 1], ids=["tensor", "axis 0", "axis 1"])
@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_float8(format: str, axis: int | None) -> None:
    scale = torch.tensor(0.02) if axis is None else torch.tensor([0.02, 1.0, 30.0])
    x = torch.randn(3, 3, 50, generator=torch.Generator().manual_seed(0)) * 40

    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ops.fake_quantize_float(x, scale.to(x.device), format, axis=axis)

    proto = exported(Cast(), x)
    assert QDQ <= {node.op_type for node in proto.graph.node} <= QDQ | PLAIN
    feed = {proto.graph.input[0].name: x.numpy()}
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, feed)[0], Cast()(x).numpy())
    np.testing.assert_array_equal(ReferenceEvaluator(proto).run(None, feed)[0], Cast()(x).numpy())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.fake_quantize_float(x, None, "e2m1"), "must have a format among 'e4m3', 'e5m2'.*'e2m1'"),
        (lambda x: ops.fake_quantize_float(x, None, "e4m3", seed=1), "no seed in ONNX: got a seed"),
        (lambda x: ops.fake_quantize_float(x, torch.rand(3, 4) + 1, "e4m3"), "along one axis in ONNX: got 2 axes"),
    ],
)
def test_what_onnx_has_no_form_for(call: Any, message: str) -> None:
    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call(x)

    with pytest.raises(Exception) as caught:
        exported(Cast(), torch.randn(3, 4))
    chain, error = [], caught.value
    while error is not None:
        chain.append(str(error))
        error = error.__cause__  # type: ignore[assignment]
    assert any(re.search(message, text) for text in chain)
