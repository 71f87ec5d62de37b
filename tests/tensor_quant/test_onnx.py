"""The amax quantizers in ONNX: which nodes, and what two runtimes compute with them."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from fxquant.errors import ExportError, InvalidArgument
from fxquant.onnx.translate_amax import amax_translations
from fxquant.ops.amax import fake_affine_tensor_quant, fake_tensor_quant, scaled_float
from fxquant.tensor_quant import (
    FakeTensorQuantFunction,
    QuantDescriptor,
    ScaledE4M3Function,
    TensorQuantFunction,
    TensorQuantizer,
)

CHANNELS = [[[[0.5]], [[1.0]], [[2.0]], [[0.0]]]]
# fields of a descriptor → opset, operators in order where amax is constant, whether onnxruntime runs it
DESCRIPTORS: dict[str, tuple[dict[str, Any], int, list[str], bool]] = {
    "int8": ({"amax": 1.5}, 21, [], True),
    "int8 narrow": ({"amax": 1.5, "narrow_range": True}, 21, ["Clip"], True),
    "int8, opset 19": ({"amax": 1.5, "narrow_range": True}, 19, ["Clip"], True),
    "uint8": ({"amax": 1.5, "unsigned": True}, 21, [], True),
    "int6": ({"amax": 1.5, "num_bits": 6}, 21, ["Clip"], True),
    "int4": ({"amax": 1.5, "num_bits": 4}, 21, [], True),
    "uint4": ({"amax": 1.5, "num_bits": 4, "unsigned": True}, 21, [], True),
    "int2": ({"amax": 1.5, "num_bits": 2}, 21, ["Clip"], True),
    "int16": ({"amax": 1.5, "num_bits": 16}, 21, [], True),
    "scaled": ({"amax": 1.5, "scale_amax": 0.5}, 21, [], True),
    "axis": ({"amax": CHANNELS, "axis": 1}, 21, [], True),
    "axis, narrow": ({"amax": CHANNELS, "axis": 1, "narrow_range": True}, 21, ["Max", "Min"], True),
    "axis, int3": ({"amax": CHANNELS, "axis": 1, "num_bits": 3}, 21, ["Max", "Min"], True),
    "zero": ({"amax": 0.0}, 21, [], True),
    "learned": ({"amax": 1.5, "learn_amax": True}, 21, [], True),
    "e4m3": ({"amax": 1.5, "num_bits": (4, 3)}, 21, [], True),
    "e4m3, axis": ({"amax": CHANNELS, "axis": 1, "num_bits": (4, 3)}, 21, [], True),
    "e5m2": ({"amax": 1.5, "num_bits": (5, 2)}, 21, [], True),
    "e2m1": ({"amax": 1.5, "num_bits": (2, 1)}, 23, [], False),
}
KINDS = {
    **dict.fromkeys(("int8", "int8, opset 19", "int6", "int2", "axis, int3"), "INT8"),
    "uint8": "UINT8",
    "int4": "INT4",
    "uint4": "UINT4",
    "int16": "INT16",
    "e4m3": "FLOAT8E4M3FN",
    "e5m2": "FLOAT8E5M2",
    "e2m1": "FLOAT4E2M1",
}
# Of 16384 values: how many may fall on a tie that x·(B/amax) and x/(amax/B) round apart.
MOST_APART = {8: 2, 16: 16}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def export(module: nn.Module, x: Tensor, opset: int = 21, **kwargs: Any) -> onnx.ModelProto:
    table = amax_translations(opset)
    program = torch.onnx.export(
        module, (x,), dynamo=True, custom_translation_table=table, opset_version=opset, verbose=False, **kwargs
    )
    onnx.checker.check_model(program.model_proto)
    assert {entry.domain for entry in program.model_proto.opset_import} == {""}
    return program.model_proto


def run(model: onnx.ModelProto, x: Tensor, *, runtime: bool = True) -> list[np.ndarray]:
    """By both runtimes. onnx's evaluator converts to int32 before it saturates, so it meets nothing that overflows."""
    name, most = model.graph.input[0].name, min(7e4, torch.finfo(x.dtype).max)
    found = [ReferenceEvaluator(model).run(None, {name: x.clamp(-most, most).numpy()})[0]]
    if runtime:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        found.append(session.run(None, {name: x.numpy()})[0])
    return found


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node if node.op_type != "Constant"]


def zero_point_type(model: onnx.ModelProto) -> str:
    (node,) = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    held = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for constant in model.graph.node:
        if constant.op_type == "Constant":
            held[constant.output[0]] = constant.attribute[0].t.data_type
    return onnx.TensorProto.DataType.Name(held[node.input[2]])


def inputs(unsigned: bool = False) -> Tensor:
    x = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x.reshape(-1)[:-7], torch.tensor([1e30, -1e30, 0.0, -0.0, 1e-30, 5.0, -5.0])]).reshape(x.shape)
    return x.abs() if unsigned else x


def steps(y: np.ndarray, x: Tensor, amax: Any, num_bits: Any, unsigned: bool) -> np.ndarray:
    """Codes of an integer format; values themselves, in units of the largest, of a float one."""
    reach = np.asarray(amax, dtype=np.float64)
    reach = np.where(reach <= 2.0**-24, 1.0, reach)
    return y / reach * (2 ** (num_bits - 1 + unsigned) - 1 if isinstance(num_bits, int) else 1.0)


@pytest.mark.parametrize("name", DESCRIPTORS)
def test_quantizers(name: str) -> None:
    """Same codes but at ties, where x·(B/amax) and x/(amax/B) may round apart: counted."""
    fields, opset, in_front, runs = DESCRIPTORS[name]
    module = TensorQuantizer(QuantDescriptor(**fields))
    x = inputs(fields.get("unsigned", False))
    model = export(module, x, opset)
    assert operators(model) == [*in_front, "QuantizeLinear", "DequantizeLinear"]
    if name in KINDS:
        assert zero_point_type(model) == KINDS[name]
    num_bits, unsigned = module.num_bits, module.unsigned
    reach = (module.amax if module.scale_amax is None else module.amax * module.scale_amax).detach().numpy()
    expected = steps(module(x).detach().numpy(), x, reach, num_bits, unsigned)
    for got in run(model, x, runtime=runs):
        codes = steps(got, x, reach, num_bits, unsigned)
        if isinstance(num_bits, int):
            differing = np.rint(codes) != np.rint(expected)
            assert differing.sum() <= MOST_APART.get(num_bits, 0), f"{differing.sum()} of {differing.size} codes"
            assert np.abs(codes - expected).max() <= 1 + 1e-2
        else:
            np.testing.assert_allclose(codes, expected, rtol=1e-6, atol=0)


def test_ties_are_where_the_two_divisions_round_apart() -> None:
    """Inputs on every tie of 8 bits, for many amax: differing codes exist, are few, and are neighbours."""
    amax = torch.rand(200, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    x = (torch.arange(-127, 127) + 0.5) * (amax / 127)
    fake = fake_tensor_quant(x, amax)
    scale = (amax / 127).numpy()
    divided = np.clip(np.rint(x.numpy() / scale), -127, 127)
    ours = np.rint(fake.numpy() / scale)
    apart = ours != divided
    assert np.abs(ours - divided).max() == 1
    assert 0 < apart.sum() < apart.size
    module = Fake(amax, {})
    for got in run(export(module, x), x):
        assert np.array_equal(np.rint(got / scale), divided)


class Fake(nn.Module):
    def __init__(self, amax: Any, kwargs: dict[str, Any], quantize: Any = fake_tensor_quant) -> None:
        super().__init__()
        self.register_buffer("amax", amax)
        self.kwargs = kwargs
        self.quantize = quantize

    def forward(self, x: Tensor) -> Tensor:
        return self.quantize(x, self.amax, **self.kwargs)


@pytest.mark.parametrize("fields", [{}, {"axis": 1}, {"num_bits": (4, 3)}, {"num_bits": (4, 3), "axis": 0}], ids=str)
def test_computed_amax(fields: dict[str, Any]) -> None:
    """From the data, in the graph; and with an open batch."""
    module, x = TensorQuantizer(QuantDescriptor(**fields)), inputs().clamp(-9, 9)
    model = export(module, x)
    assert operators(model)[-2:] == ["QuantizeLinear", "DequantizeLinear"] and "ReduceMax" in operators(model)
    for got in run(model, x):
        assert (np.abs(got - module(x).numpy()) > 1e-6 * 9).sum() <= 2
    if fields.get("axis") != 0:
        opened = export(module, x, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        for got in run(opened, x[:3]):
            assert (np.abs(got - module(x[:3]).numpy()) > 1e-6 * 9).sum() <= 2


def test_several_axes_divide_before_and_multiply_after() -> None:
    amax = torch.rand(1, 4, 8, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    for kwargs in ({}, {"num_bits": 3, "narrow_range": False}):
        x = inputs()
        model = export(Fake(amax, kwargs), x)
        wanted = ["Div", "Clip", "QuantizeLinear", "DequantizeLinear", "Mul"]
        assert operators(model) == wanted
        bound = 2 ** (kwargs.get("num_bits", 8) - 1) - 1
        for got in run(model, x):
            ours = fake_tensor_quant(x, amax, **kwargs).numpy()
            assert np.abs(got - ours).max() <= 1e-6 * 2
            assert np.array_equal(np.rint(got / amax.numpy() * bound), np.rint(ours / amax.numpy() * bound))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("num_bits", [8, (4, 3)], ids=str)
def test_other_dtypes_are_computed_in_float32(num_bits: Any, dtype: torch.dtype) -> None:
    module, x = TensorQuantizer(QuantDescriptor(num_bits=num_bits, amax=1.5)), inputs().clamp(-9, 9).to(dtype)
    model = export(module, x)
    assert operators(model) == ["Cast", "QuantizeLinear", "DequantizeLinear", "Cast"]
    if dtype == torch.bfloat16:
        return  # numpy has none to feed
    eps = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
    for got in run(model, x):
        assert got.dtype == module(x).numpy().dtype
        assert np.abs(got - module(x).numpy()).max() <= 1.5 * eps


def test_pass_through_bare_cast_and_legacy() -> None:
    from fxquant.ops.amax import legacy_fake_tensor_quant

    x = inputs()
    for module in (
        Fake(torch.tensor(1.5), {"pass_through": True}),
        Fake(torch.tensor(1.5), {}, legacy_fake_tensor_quant),
        Fake(torch.tensor(1.5), {"pass_through": True}, scaled_float),
        Fake(None, {}, scaled_float),
    ):
        model = export(module, x)
        assert operators(model)[-2:] == ["QuantizeLinear", "DequantizeLinear"]
        for got in run(model, x):
            np.testing.assert_allclose(got, module(x).numpy(), rtol=1e-6)


class Affine(nn.Module):
    def __init__(self, low: Any, high: Any, num_bits: int) -> None:
        super().__init__()
        self.low, self.high, self.num_bits = low, high, num_bits

    def forward(self, x: Tensor) -> Tensor:
        return fake_affine_tensor_quant(x, self.low, self.high, self.num_bits)


class AffineBuffers(Affine):
    def __init__(self, low: float, high: float, num_bits: int) -> None:
        nn.Module.__init__(self)
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("high", torch.tensor([high]))
        self.num_bits = num_bits


@pytest.mark.parametrize("kind", [Affine, AffineBuffers], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("num_bits", [8, 5, 4, 16])
@pytest.mark.parametrize("ends", [(-0.7, 1.9), (0.0, 6.0), (-3.0, 0.0)], ids=str)
def test_affine(ends: tuple[float, float], num_bits: int, kind: Any) -> None:
    module, x = kind(*ends, num_bits), inputs()
    model = export(module, x)
    assert operators(model)[-2:] == ["QuantizeLinear", "DequantizeLinear"]
    step = (ends[1] - ends[0]) / (2**num_bits - 1)
    ours = np.rint(module(x).numpy() / step)
    for got in run(model, x):
        assert np.array_equal(np.rint(got / step), ours)


@pytest.mark.parametrize("kind", [Affine, AffineBuffers], ids=lambda kind: kind.__name__)
def test_affine_without_zero_gives_nan_and_not_a_wrong_number(kind: Any) -> None:
    for ends in ((1.0, 2.0), (-2.0, -1.0)):
        for got in run(export(kind(*ends, 8), inputs()), inputs()):
            assert np.isnan(got).all()


@pytest.mark.parametrize(
    ("module", "opset", "message"),
    [
        (
            Fake(torch.tensor(1.0), {"E": 3, "M": 2}, scaled_float),
            21,
            r"\(E, M\) must have a type in ONNX: got \(3, 2\)",
        ),
        (Fake(torch.tensor(1.0), {"E": 2, "M": 1}, scaled_float), 21, "none before opset 23"),
        (
            Fake(torch.tensor(1.0), {"num_bits": 9}),
            18,
            "num_bits must be at most 8 before opset 21: got codes up to 255 in opset 18",
        ),
    ],
    ids=["e3m2", "e2m1", "int9"],
)
def test_errors(module: nn.Module, opset: int, message: str) -> None:
    with pytest.raises(Exception, match=message):
        export(module, inputs(), opset)


def test_unknown_opset() -> None:
    with pytest.raises(InvalidArgument, match="opset must be one that onnxscript has: got 99"):
        amax_translations(99)


def test_a_small_model() -> None:
    """Weights per channel, activations per tensor: one Q/DQ each, results as in torch."""

    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3)
            self.weight = TensorQuantizer(QuantDescriptor(axis=0, narrow_range=True))
            self.input = TensorQuantizer(QuantDescriptor(amax=3.0))
            self.weight.amax = self.conv.weight.detach().abs().amax((1, 2, 3), keepdim=True)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(self.input(x), self.weight(self.conv.weight), self.conv.bias).relu()

    torch.manual_seed(0)
    module, x = Quantized().eval(), inputs().clamp(-9, 9)
    model = export(module, x, optimize=True)
    assert operators(model).count("DequantizeLinear") == 2
    for got in run(model, x):
        np.testing.assert_allclose(got, module(x).detach().numpy(), rtol=1e-4, atol=1e-5)


class Applied(nn.Module):
    def __init__(self, function: Any, amax: Any, *args: Any) -> None:
        super().__init__()
        self.function, self.args = function, args
        self.register_buffer("amax", amax)

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x, self.amax, *self.args)


def script_export(module: nn.Module, x: Tensor, opset: int = 19) -> onnx.ModelProto:
    file = io.BytesIO()
    torch.onnx.export(module, (x,), file, dynamo=False, opset_version=opset)
    model = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(model)
    return model


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (Applied(FakeTensorQuantFunction, torch.tensor(1.5)), "INT8"),
        (Applied(FakeTensorQuantFunction, torch.tensor(CHANNELS), 8, False, False), "INT8"),
        (Applied(FakeTensorQuantFunction, torch.tensor(1.5), 5, True), "UINT8"),
        (Applied(ScaledE4M3Function, torch.tensor(1.5)), "FLOAT8E4M3FN"),
        (Applied(ScaledE4M3Function, None, 5, 2), "FLOAT8E5M2"),
    ],
    ids=["int8", "channels", "uint5", "e4m3", "e5m2"],
)
def test_symbolic_for_the_torchscript_exporter(module: Applied, kind: str) -> None:
    x = inputs(unsigned=kind == "UINT8")
    model = script_export(module, x)
    assert operators(model)[-2:] == ["QuantizeLinear", "DequantizeLinear"] and zero_point_type(model) == kind
    for got in run(model, x):
        np.testing.assert_allclose(got, module(x).numpy(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("module", "opset", "message"),
    [
        (Applied(FakeTensorQuantFunction, torch.tensor(1.5), 9), 19, "num_bits must be at most 8 before opset 21"),
        (Applied(ScaledE4M3Function, torch.tensor(1.5)), 18, "none before opset 19"),
        (Applied(ScaledE4M3Function, torch.tensor(1.5), 2, 1), 20, "none before opset 23"),
    ],
    ids=["int9", "e4m3 early", "e2m1"],
)
def test_symbolic_errors(module: Applied, opset: int, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        script_export(module, inputs(), opset)


def test_codes_have_no_symbolic() -> None:
    class Codes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return TensorQuantFunction.apply(x, torch.tensor(1.5))[0]

    with pytest.raises(ExportError, match="TensorQuantFunction must not be in a model that is exported"):
        script_export(Codes(), inputs())
