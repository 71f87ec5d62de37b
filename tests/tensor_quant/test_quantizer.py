"""`TensorQuantizer`: what it computes for each descriptor, its states, and how it is stored."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import InvalidArgument, RangeNotSet
from fxquant.ops.amax import fake_tensor_quant_learnable, scaled_float, scaled_float_learnable
from fxquant.ops.blocks import fake_quantize_blocks, fake_quantize_mx, fake_quantize_nvfp4
from fxquant.tensor_quant import (
    HistogramCalibrator,
    MaxCalibrator,
    QuantDescriptor,
    TensorQuantizer,
    fake_tensor_quant,
    tensor_quant,
)
from tests.ops.oracle import assert_same_bits

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantizer(**fields: Any) -> TensorQuantizer:
    return TensorQuantizer(QuantDescriptor(**fields))


X = randn(4, 6, 32)
AMAX = [[[0.5 + 0.1 * k] for k in range(6)]]
MX = {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}
NVFP4 = {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}
PER_ROW = X.abs().amax((0, 2), keepdim=True)

# fields of the descriptor -> what comes out for X
EXPECTED: dict[str, tuple[dict[str, Any], Any]] = {
    "given amax": ({"amax": 1.5}, lambda x: fake_tensor_quant(x, 1.5, 8, False, False)),
    "narrow": ({"amax": 1.5, "narrow_range": True, "num_bits": 4}, lambda x: fake_tensor_quant(x, 1.5, 4)),
    "scaled amax": ({"amax": 1.5, "scale_amax": 0.5}, lambda x: fake_tensor_quant(x, 0.75, 8, False, False)),
    "amax per channel": (
        {"amax": AMAX, "axis": 1},
        lambda x: fake_tensor_quant(x, torch.tensor(AMAX), 8, False, False),
    ),
    "from the data": ({}, lambda x: fake_tensor_quant(x, x.abs().amax().float(), 8, False, False)),
    "from the data, axis": (
        {"axis": -2},
        lambda x: fake_tensor_quant(x, x.abs().amax((0, 2), keepdim=True).float(), 8, False, False),
    ),
    "from the data, axes": (
        {"axis": (0, 2)},
        lambda x: fake_tensor_quant(x, x.abs().amax(1, keepdim=True).float(), 8, False, False),
    ),
    "dynamic": (
        {"amax": 0.1, "dynamic": True},
        lambda x: fake_tensor_quant(x, x.abs().amax().float(), 8, False, False),
    ),
    "fp8": ({"num_bits": (4, 3), "amax": 2.0}, lambda x: scaled_float(x, 2.0)),
    "e5m2": ({"num_bits": (5, 2)}, lambda x: scaled_float(x, x.abs().amax().float(), 5, 2)),
    "learned": ({"amax": 1.5, "learn_amax": True}, lambda x: fake_tensor_quant(x, 1.5, 8, False, False)),
    "learned fp8": ({"amax": 1.5, "learn_amax": True, "num_bits": (4, 3)}, lambda x: scaled_float(x, 1.5)),
    "mx": (
        {"num_bits": (4, 3), "block_sizes": MX},
        lambda x: fake_quantize_mx(x, {-1: 32}, "e4m3", scale_rounding="ceil"),
    ),
    "mx int8": ({"block_sizes": MX}, lambda x: fake_quantize_mx(x, {-1: 32}, "int8", scale_rounding="ceil")),
    "nvfp4": ({"num_bits": (2, 1), "block_sizes": NVFP4}, lambda x: fake_quantize_nvfp4(x, None, {-1: 16})),
    "nvfp4, amax": (
        {"num_bits": (2, 1), "block_sizes": NVFP4, "amax": 2.0},
        lambda x: fake_quantize_nvfp4(x, torch.tensor(2.0), {-1: 16}),
    ),
    "blocks, static, unset": ({"block_sizes": {-1: 8}}, lambda x: fake_quantize_blocks(x, {-1: 8}, 8)),
    "blocks, dynamic": (
        {"block_sizes": {-1: 8, -2: 3, "type": "dynamic"}, "num_bits": 4, "narrow_range": True},
        lambda x: fake_quantize_blocks(x, {-1: 8, -2: 3}, 4, narrow=True),
    ),
    "blocks, scaled twice": (
        {"block_sizes": {-1: 8, "scale_bits": 8, "scale_block_sizes": {-1: 2}}, "num_bits": 4},
        lambda x: fake_quantize_blocks(x, {-1: 8}, 4, scale_bits=8, scale_block_sizes={-1: 2}),
    ),
    "blocks, e4m3": (
        {"block_sizes": {-1: 8}, "num_bits": (4, 3)},
        lambda x: fake_quantize_blocks(x, {-1: 8}, (4, 3)),
    ),
}
each = pytest.mark.parametrize("name", EXPECTED)


@each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(dtype: torch.dtype, name: str) -> None:
    fields, expected = EXPECTED[name]
    x = X.to(dtype)
    y = quantizer(**fields)(x)
    assert_same_bits(y.detach(), expected(x))
    assert y.dtype == dtype


@each
def test_compiled_equals_eager(name: str) -> None:
    fields, _ = EXPECTED[name]
    module = quantizer(**fields)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True)

    def run(call: Any) -> list[Tensor]:
        x = X.clone().requires_grad_()
        y = call(x)
        leaves = [x, *module.parameters()]
        return [y.detach(), *torch.autograd.grad(y, leaves, X.flip(0))]

    got, expected = run(compiled), run(module)
    for one, other in zip(got[:2], expected[:2], strict=True):
        assert_same_bits(one, other)
    for one, other in zip(got[2:], expected[2:], strict=True):  # a sum: its order is the compiler's
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@each
def test_state_deepcopy_and_pickle(name: str) -> None:
    fields, _ = EXPECTED[name]
    module = quantizer(**fields)
    expected = module(X).detach()
    fresh = quantizer(**{k: v for k, v in fields.items() if k != "amax"})
    fresh.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh):
        assert_same_bits(other(X).detach(), expected)
        assert other.extra_repr() == module.extra_repr()
    if name == "nvfp4, amax" or "amax" not in fields:
        return
    assert list(module.state_dict()) == ["_amax"]
    assert isinstance(fresh.amax, nn.Parameter) == bool(fields.get("learn_amax"))


@pytest.mark.parametrize("shape", [(), (6, 4), (6, 4, 5)], ids=str)
def test_layouts_and_shapes(shape: tuple[int, ...]) -> None:
    for fields in ({}, {"amax": 1.0}, {"num_bits": (4, 3)}):
        x = randn(*shape)
        assert_same_bits(quantizer(**fields)(x.mT.contiguous().mT if shape else x), quantizer(**fields)(x))
    image = randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    y = quantizer(axis=1)(image)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(y.contiguous(), quantizer(axis=1)(image.contiguous()))
    empty = torch.empty(0, 3)
    for fields in ({}, {"axis": 1}, {"num_bits": (4, 3)}, {"fake_quant": False}):
        assert quantizer(**fields)(empty).shape == (0, 3)


def test_codes_and_scale() -> None:
    module = quantizer(fake_quant=False, axis=1, narrow_range=True)
    with pytest.raises(RangeNotSet, match="scale must have been computed"):
        _ = module.scale
    x = X.clone().requires_grad_()
    codes = module(x)
    expected, scale = tensor_quant(X, PER_ROW)
    assert torch.equal(codes, expected) and torch.equal(module.scale, scale)
    assert torch.equal(codes, codes.round()) and not module.scale.requires_grad
    torch.testing.assert_close(codes / module.scale, fake_tensor_quant(X, PER_ROW))
    copy.deepcopy(module)
    torch._dynamo.reset()
    fresh = quantizer(fake_quant=False, axis=1, narrow_range=True)
    compiled = torch.compile(fresh, fullgraph=True)
    assert torch.equal(compiled(X), expected) and torch.equal(fresh.scale, scale)


def test_switches() -> None:
    module = quantizer(amax=1.0, num_bits=4)
    quantized = module(X)
    assert not torch.equal(quantized, X) and module.is_enabled
    module.disable()
    assert module(X) is X and not module.is_enabled and module.extra_repr() == "disabled"
    module.enable()
    assert torch.equal(module(X), quantized)
    module.disable_quant()
    assert module(X) is X
    module.enable_calib()
    assert module(X) is X and module.calibrator.compute_amax() == X.abs().max()
    module.disable_calib()
    module(X * 2)
    assert module.calibrator.compute_amax() == X.abs().max()
    module.enable_quant()
    module.load_calib_amax()
    assert_same_bits(module(X), fake_tensor_quant(X, X.abs().max(), 4, False, False))
    assert TensorQuantizer(disabled=True)(X) is X
    assert TensorQuantizer(if_quant=False, if_calib=True)(X) is X
    assert "calib" in TensorQuantizer(if_calib=True).extra_repr()
    disabled = TensorQuantizer(disabled=True, if_calib=True)
    disabled(X)
    assert disabled.calibrator.compute_amax() is None


@pytest.mark.parametrize(
    ("fields", "kwargs", "shape"),
    [
        ({}, {}, ()),
        ({"axis": 1}, {}, (1, 6, 1)),
        ({"calib_method": "histogram"}, {"method": "percentile", "percentile": 99}, ()),
        ({"calib_method": "histogram"}, {"method": "mse"}, ()),
        ({"calib_method": "histogram"}, {"method": "entropy", "stride": 8}, ()),
        ({"block_sizes": {-1: 8}}, {}, (4, 6, 4)),
        ({"block_sizes": {-1: 5, 0: 3}}, {}, (2, 6, 7)),
        ({"num_bits": (2, 1), "block_sizes": NVFP4}, {}, ()),
        ({"learn_amax": True, "axis": 0}, {}, (4, 1, 1)),
    ],
    ids=str,
)
def test_calibration(fields: dict[str, Any], kwargs: dict[str, Any], shape: tuple[int, ...]) -> None:
    module = TensorQuantizer(QuantDescriptor(**fields), if_quant=False, if_calib=True)
    for seed in range(3):
        assert module(randn(4, 6, 32, seed=seed)).shape == X.shape
    module.load_calib_amax(**kwargs)
    module.disable_calib()
    module.enable_quant()
    assert module.amax.shape == shape and module.amax.dtype == torch.float32
    most = max(randn(4, 6, 32, seed=seed).abs().max() for seed in range(3))
    assert module.amax.max() == most if "method" not in kwargs else 0 < module.amax <= most * 1.001
    y = module(X)
    fresh = quantizer(**fields)
    fresh.load_state_dict(module.state_dict())
    assert_same_bits(fresh(X).detach(), y.detach())
    if "block_sizes" in fields and fields["block_sizes"] is not NVFP4:
        assert_same_bits(y, fake_quantize_blocks(X, fields["block_sizes"], 8, amax=module.amax))


def test_loading_nothing() -> None:
    module = quantizer()
    with pytest.raises(RangeNotSet, match="amax must come from data"):
        module.load_calib_amax()
    with pytest.warns(UserWarning, match="amax must come from data"):
        module.load_calib_amax(strict=False)
    assert module.amax is None
    for fields in ({"dynamic": True}, {"num_bits": (4, 3), "block_sizes": MX}):
        for call in (quantizer(**fields).enable_calib, quantizer(**fields).load_calib_amax):
            with pytest.raises(InvalidArgument, match="calibration must have a use"):
                call()


def test_calibrators_by_method() -> None:
    assert type(quantizer().calibrator) is MaxCalibrator
    assert type(quantizer(calib_method="histogram").calibrator) is HistogramCalibrator
    assert quantizer(dynamic=True).calibrator is None
    with pytest.raises(InvalidArgument, match="axis must be None for a histogram"):
        quantizer(calib_method="histogram", axis=0)


def test_amax_can_be_assigned_and_reset() -> None:
    module = quantizer(axis=1)
    module.amax = [[1.0], [2.0]]
    buffer = module.amax
    module.amax = torch.tensor([[3.0], [4.0]], dtype=torch.float64)
    assert module.amax is buffer and buffer.tolist() == [[3.0], [4.0]]
    with pytest.raises(InvalidArgument, match=r"amax must keep its shape \(2, 1\): got \(\)"):
        module.amax = 1.0
    module.reset_amax()
    assert module.amax is None and not module.state_dict()
    module.amax = 1.0
    assert module.amax.shape == ()


def test_fields_can_be_assigned() -> None:
    module = quantizer(amax=1.0)
    module.num_bits = 4
    module.narrow_range = True
    assert (module.num_bits, module.narrow_range, module.unsigned, module.fake_quant) == (4, True, False, True)
    assert_same_bits(module(X), fake_tensor_quant(X, 1.0, 4))
    module.num_bits = (4, 3)
    assert_same_bits(module(X), scaled_float(X, 1.0))
    module.axis = 1
    assert module.amax is None and module.axis == 1
    assert_same_bits(module(X), scaled_float(X, PER_ROW))
    with pytest.raises(InvalidArgument, match="axis must be None when block_sizes is set"):
        module.block_sizes = {-1: 8}
    assert module.block_sizes is None and module.axis == 1
    module.axis = None
    module.block_sizes = {-1: 8}
    assert_same_bits(module(X), fake_quantize_blocks(X, {-1: 8}, (4, 3)))


@pytest.mark.parametrize("num_bits", [4, (4, 3)], ids=str)
@pytest.mark.parametrize("axis", [None, 1], ids=str)
def test_learned_amax_is_trained(axis: int | None, num_bits: Any) -> None:
    amax = AMAX if axis == 1 else 0.2
    module = quantizer(num_bits=num_bits, axis=axis, amax=amax, learn_amax=True)
    assert [name for name, _ in module.named_parameters()] == ["_amax"]
    assert "learned" in module.extra_repr()
    y = module(X)
    first = (y - X).square().mean()
    first.backward()
    learnable = fake_tensor_quant_learnable if num_bits == 4 else scaled_float_learnable
    reach = torch.tensor(amax).requires_grad_()
    args = (4, False, False) if num_bits == 4 else num_bits
    (learnable(X, reach, *args) - X).square().mean().backward()
    assert_same_bits(module.amax.grad, reach.grad)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (module(X) - X).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < first * 0.5


def test_scaled_learned_amax_keeps_its_gradient() -> None:
    module = quantizer(amax=0.5, learn_amax=True, scale_amax=0.5)
    module(torch.full((3,), 9.0)).sum().backward()
    assert module.amax.grad == 1.5


@pytest.mark.parametrize("learn", [False, True])
def test_amax_stays_float32(learn: bool) -> None:
    module = nn.Sequential(quantizer(amax=0.1, learn_amax=learn), nn.Linear(2, 2))
    exact = module[0].amax.detach().clone()
    for dtype in (torch.float16, torch.float64, torch.bfloat16):
        module.to(dtype)
        assert module[0].amax.dtype == torch.float32 and torch.equal(module[0].amax, exact)
        assert isinstance(module[0].amax, nn.Parameter) == learn and module[1].weight.dtype == dtype
        x = torch.ones(2, dtype=dtype) * 0.03
        assert_same_bits(module[0](x).detach(), fake_tensor_quant(x, exact, 8, False, False))


def test_it_loads_within_a_model_and_reports_what_is_missing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), quantizer(axis=0))
    model[1].amax = [[1.0], [2.0]]
    fresh = nn.Sequential(nn.Linear(4, 4), quantizer(axis=0))
    assert fresh.load_state_dict(model.state_dict()).missing_keys == []
    assert fresh[1].amax.tolist() == [[1.0], [2.0]]
    with pytest.raises(RuntimeError, match=r"Missing key.*1._amax"):
        model.load_state_dict(nn.Sequential(nn.Linear(4, 4), quantizer()).state_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fake_quant": False, "block_sizes": {-1: 8}}, "fake_quant must be True with block_sizes"),
        ({"block_sizes": {-1: 8, "scale_bits": (8, 0)}}, "'dynamic' with scale_bits"),
        ({"num_bits": 4, "block_sizes": MX}, r"num_bits must be \(E, M\) or signed 8"),
        ({"calib_method": "histogram", "block_sizes": {-1: 8}}, "calib_method must be 'max' for blocks"),
    ],
    ids=str,
)
def test_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        quantizer(**fields)


def test_value_errors_come_through() -> None:
    with pytest.raises(TypeError, match="Negative values encountered in unsigned quantization"):
        quantizer(unsigned=True)(X)
    with pytest.raises(ValueError, match="amax must be finite: got nan"):
        quantizer()(torch.tensor([float("nan")]))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "8bit fake per-tensor amax=dynamic calibrator=MaxCalibrator quant"),
        ({"amax": 1.5, "unsigned": True}, "8bit unsigned fake per-tensor amax=1.5000 calibrator=MaxCalibrator quant"),
        (
            {"amax": [0.5, 1.5], "axis": 0, "num_bits": (4, 3), "scale_amax": 2.0},
            "E4M3 fake axis=0 amax=[0.5000, 1.5000](2)*2.0 calibrator=MaxCalibrator quant",
        ),
        (
            {"block_sizes": {-1: 8, "type": "dynamic"}},
            "8bit fake block_sizes={-1: 8, 'type': 'dynamic'} amax=dynamic quant",
        ),
    ],
    ids=str,
)
def test_extra_repr(fields: dict[str, Any], expected: str) -> None:
    assert quantizer(**fields).extra_repr() == expected
