"""Whole nn.LSTM and nn.GRU layers: their weights quantized in training and in the file, by torch's fused kernels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fxquant
from fxquant.prepared.root import plan_of
from fxquant.targets.session import session
from tests.nets import prepared

LAYERS = [
    pytest.param(nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}, id="lstm"),
    pytest.param(nn.LSTM, {"proj_size": 3, "bias": False}, id="projected"),
    pytest.param(nn.GRU, {"num_layers": 2}, id="gru"),
]


class Recurrent(nn.Module):
    """A layer between two others."""

    def __init__(self, layer: nn.Module, width: int = 6) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(4, 4), layer, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.layer(self.first(x))[0]))
        return y


@pytest.fixture(autouse=True)
def cold() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def codes_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """By hand, a scale a row: codes and scales."""
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    return torch.round(weight.detach() / scale).clamp(-127, 127), scale


def by_hand(layer: Any) -> Any:
    """A copy with the values that the codes of its weights stand for."""
    found = copy.deepcopy(layer)
    for name, parameter in found.named_parameters():
        if name.startswith("weight"):
            codes, scale = codes_of(parameter)
            parameter.data.copy_(codes * scale)
    return found


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_training_computes_with_the_values_of_the_codes(kind: Any, options: dict[str, Any]) -> None:
    x = torch.randn(3, 5, 4)
    layer = kind(4, 6, **options)
    expected = by_hand(layer)
    model = prepared(layer, x)
    plan = plan_of(model)
    weights = {name for name, _ in expected.named_parameters() if name.startswith("weight")}
    assert plan is not None and {site.key for site in plan.sites} == weights and not plan.declined
    held = list(layer._flat_weights)
    compiled = torch.compile(model, backend="fxquant_eager")
    y, y_expected = compiled(x)[0], expected(x)[0]
    torch.testing.assert_close(y, y_expected, rtol=0, atol=0)
    y.square().sum().backward()
    y_expected.square().sum().backward()
    for (name, parameter), other in zip(expected.named_parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=0, atol=0, msg=name)
    assert all(one is other for one, other in zip(layer._flat_weights, held, strict=True))
    assert not torch.equal(layer(x)[0], y), "without torch.compile it is the float model"
    assert {row.status for row in fxquant.explain(model).rows} == {"in Python"} and not fxquant.explain(model).unbound


@pytest.mark.filterwarnings("ignore:The tensor attributes self.layer._flat_weights")  # torch.export's
@pytest.mark.parametrize(
    ("kind", "options", "target"),
    [
        pytest.param(*LAYERS[0].values, "onnxruntime", id="lstm-onnxruntime"),
        pytest.param(*LAYERS[2].values, "openvino", id="gru-openvino"),
        pytest.param(*LAYERS[0].values, "tensorrt", id="lstm-tensorrt"),
    ],
)
def test_the_file_holds_the_codes(kind: Any, options: dict[str, Any], target: str, tmp_path: Path) -> None:
    x, path = torch.randn(3, 5, 4), tmp_path / "model.onnx"
    model = Recurrent(kind(4, 6, **options), 12 if "bidirectional" in options else 6)
    fxquant.prepare(model, (x,), target=target)
    step = torch.compile(model, backend="fxquant_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        step(x).square().mean().backward()
        optimizer.step()
    report = fxquant.export_onnx(model.eval(), (x,), path)
    assert not report.notes
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    weights = [(name, p) for name, p in model.layer.named_parameters() if name.startswith("weight")]
    for name, parameter in weights:
        assert (held[f"layer__{name}__codes"] == codes_of(parameter)[0].to(torch.int8).numpy()).all(), name
    assert {f"layer.{name}" for name, _ in weights} <= set(report.weights)
    verified = fxquant.verify_onnx(model, (x,), path, rounds=0, runtime=None if target != "tensorrt" else "onnxruntime")
    assert sum(row.differing for row in verified.codes) == 0
    assert verified.max_output_difference < 1e-6 < verified.output_spread
    if target == "tensorrt":
        assert fxquant.verify_onnx(model, (x,), path).lint


@pytest.mark.filterwarnings("ignore:The tensor attributes self.layer._flat_weights")
def test_a_layer_of_half_type_is_exported_with_its_gradients(tmp_path: Path) -> None:
    """torch.export sets the gradients of a recurrent layer's parameters anew, which must then be of their type."""
    x, path = torch.randn(3, 5, 4).half(), tmp_path / "model.onnx"
    model = Recurrent(nn.LSTM(4, 6)).half()
    fxquant.prepare(model, (x,), target="openvino")
    torch.compile(model, backend="fxquant_eager")(x).float().square().mean().backward()
    report = fxquant.export_onnx(model.eval(), (x,), path)
    assert report.float_dtype == "float16" and "layer.weight_hh_l0" in report.weights
    assert all(p.grad is not None and p.grad.dtype == torch.float16 for p in model.layer.parameters())


def test_onnxruntime_unpacks_the_weights_as_it_loads_the_file(tmp_path: Path) -> None:
    """A DequantizeLinear before the layer would run each time: seven times slower than the float layer."""
    x, path, run = torch.randn(3, 5, 4), tmp_path / "model.onnx", tmp_path / "run.onnx"
    model = Recurrent(nn.LSTM(4, 6, bidirectional=True), 12)
    fxquant.prepare(model, (x,))
    fxquant.calibrate(model, [x], progress=False)
    fxquant.export_onnx(model, (x,), path)
    session(path, optimize=True, optimized_path=run)
    graph = onnx.load(run).graph
    (layer,) = [node for node in graph.node if node.op_type == "LSTM"]
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert [kinds.get(name) for name in layer.input[1:3]] == [onnx.TensorProto.FLOAT] * 2


class Packed(nn.Module):
    """A layer over sequences of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(4, 6, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y: Tensor = self.layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[0].data
        return y


def test_packed_sequences_train_quantized_too() -> None:
    x, lengths = torch.randn(3, 5, 4), torch.tensor([2, 5, 3])
    model = Packed()
    expected = copy.deepcopy(model)
    expected.layer = by_hand(model.layer)
    prepared(model, x, lengths)
    y = torch.compile(model, backend="fxquant_eager")(x, lengths)
    torch.testing.assert_close(y, expected(x, lengths), rtol=0, atol=0)


def test_a_rule_leaves_a_layer_in_float_by_its_class() -> None:
    x = torch.randn(3, 5, 4)
    model = Recurrent(nn.LSTM(4, 6))
    fxquant.prepare(model, (x,), rules=[fxquant.skip(module=nn.LSTM)])
    plan = plan_of(model)
    assert plan is not None and {site.owner for site in plan.sites} == {"first", "last"}
    assert [place.where for place in plan.declined] == ["lstm"]


def test_tensorrt_leaves_a_gru_in_float() -> None:
    """Its builder fails on one whose weights have codes, by a DequantizeLinear: 1.7.1, a fault of Myelin's."""
    x = torch.randn(3, 5, 4)
    plan = plan_of(fxquant.prepare(Recurrent(nn.GRU(4, 6)), (x,), target="tensorrt"))
    assert plan is not None and {site.owner for site in plan.sites} == {"first", "last"}
    assert {place.where: place.reason for place in plan.declined} == {
        "gru": "TensorRT's builder fails on a GRU whose weights have codes"
    }


def test_a_copy_quantizes_its_own_weights() -> None:
    x = torch.randn(3, 5, 4)
    model = prepared(nn.GRU(4, 6), x)
    compiled = torch.compile(model, backend="fxquant_eager")
    compiled(x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    expected = by_hand(fxquant.strip(copy.deepcopy(other)))
    torch.testing.assert_close(torch.compile(other, backend="fxquant_eager")(x)[0], expected(x)[0], rtol=0, atol=0)
