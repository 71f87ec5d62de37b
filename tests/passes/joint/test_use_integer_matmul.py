from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.errors import InvalidArgument
from fxquant.graph import inline
from fxquant.numerics import integer
from fxquant.ops import (
    fake_quantize_mx,
    fake_quantize_per_channel_affine,
    fake_quantize_per_tensor_affine,
    quantize_per_channel,
    quantize_per_tensor,
)
from fxquant.ops.integer_matmul import INTEGER_CONVOLUTION, integer_convolution, multiplies_exactly
from fxquant.passes.base import PassResult
from fxquant.passes.joint import product_times, use_integer_matmul
from fxquant.passes.joint.kept_times import instructions
from fxquant.passes.joint.product_times import Problem, Times, times
from fxquant.passes.joint.use_integer_matmul import UseIntegerMatmul
from fxquant.targets.cpu import sums_saturate
from tests.passes.graphs import apply, untouched

aten = torch.ops.aten
EVERYWHERE = UseIntegerMatmul(mode=True)
SCALE, POINT = torch.tensor([0.031]), torch.tensor([113], dtype=torch.int32)
ZERO = torch.zeros(1, dtype=torch.int32)

pytestmark = pytest.mark.skipif(
    bool(multiplies_exactly("matmul", "cpu", False)), reason="this machine has no exact integer product"
)

# Larger weights saturate without VNNI, in onnxruntime's kernels and in torch's convolutions.
LARGEST = 63 if sums_saturate() else 127

exact_convolutions = pytest.mark.skipif(
    bool(multiplies_exactly("conv", "cpu", False)), reason="this machine's integer convolutions saturate"
)


def u8(x: Tensor, scale: Tensor | None = None, point: Tensor | None = None) -> Tensor:
    """With SCALE and POINT where none are given, made here: traced code may not hold real tensors."""
    scale = torch.full((1,), SCALE.item()) if scale is None else scale
    point = torch.full((1,), 113, dtype=torch.int32) if point is None else point
    return fake_quantize_per_tensor_affine(x, scale, point, 0, 255, rounding="divide")


def s8(x: Tensor, bits: int = 8) -> Tensor:
    half, zero = 2 ** (bits - 1), torch.zeros(1, dtype=torch.int32)
    return fake_quantize_per_tensor_affine(x, torch.full((1,), SCALE.item()), zero, -half, half - 1, rounding="divide")


def channels(w: Tensor, scale: Tensor, axis: int = 0, low: int = -127, high: int = 127) -> Tensor:
    points = torch.zeros_like(scale, dtype=torch.int32)
    return fake_quantize_per_channel_affine(w, scale, points, axis, low, high, rounding="divide")


def traced(model: Callable[..., Any], *args: Tensor) -> fx.GraphModule:
    return make_fx(model, tracing_mode="fake")(*args)


def targets(gm: fx.GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes]


def reasons(result: PassResult) -> list[str]:
    assert all(d.pass_name == "UseIntegerMatmul" for d in result.declines)
    return [d.reason.removeprefix("float product: ") for d in result.declines]


def operands(m: int = 6, k: int = 40, n: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(shape, generator=generator) * 2 for shape in ((m, k), (n, k)))
    return x, w, w.abs().amax(1) / 127


def runtime(nodes: list[Any], inputs: dict[str, Tensor], dtype: int = TensorProto.FLOAT) -> Tensor:
    """ONNX Runtime's result of a chain of its operators, as they are."""
    kinds = {torch.uint8: TensorProto.UINT8, torch.int8: TensorProto.INT8, torch.float32: TensorProto.FLOAT}
    given = [helper.make_tensor_value_info(n, kinds[t.dtype], list(t.shape)) for n, t in inputs.items()]
    out = helper.make_tensor_value_info("y", dtype, None)
    graph = helper.make_graph(nodes, "g", given, [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(np.asarray(session.run(None, {n: t.numpy() for n, t in inputs.items()})[0]))


# ---------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("point", [0, 113, 255])
def test_sums_and_values_are_those_of_onnxruntime(point: int) -> None:
    """MatMulInteger's sums exactly; then Cast, Mul, Add, bit for bit."""
    x, w, scales = operands()
    zero, bias = torch.tensor([point], dtype=torch.int32), torch.randn(5)
    code = quantize_per_tensor(x, SCALE, zero, 0, 255, torch.uint8)
    weight = quantize_per_channel(w, scales, torch.zeros(5, dtype=torch.int32), 0, -LARGEST, LARGEST, torch.int8).t()
    inputs = {"x": code, "w": weight.contiguous(), "z": zero.to(torch.uint8), "v": torch.zeros(1, dtype=torch.int8)}
    product = helper.make_node("MatMulInteger", ["x", "w", "z", "v"], ["total"])
    exact = runtime([helper.make_node("MatMulInteger", ["x", "w", "z", "v"], ["y"])], inputs, TensorProto.INT32)
    one = torch.ones(1)
    assert torch.equal(integer.matmul(code, weight, one, one, lhs_zero=zero, dtype=torch.float64), exact.double())
    wide = (code.to(torch.int64) - point) @ weight.to(torch.int64)
    assert torch.equal(exact.to(torch.int64), wide)

    nodes = [
        product,
        helper.make_node("Cast", ["total"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "t"], ["scale"]),
        helper.make_node("Mul", ["cast", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "b"], ["y"]),
    ]
    expected = runtime(nodes, {**inputs, "s": SCALE, "t": scales, "b": bias})
    assert torch.equal(integer.matmul(code, weight, SCALE, scales, lhs_zero=zero, bias=bias), expected)


def test_both_zero_points_are_taken_off() -> None:
    lhs = torch.randint(0, 256, (7, 30), dtype=torch.uint8)
    rhs = torch.randint(-128, 128, (30, 3), dtype=torch.int8)
    points, one = torch.tensor([-128, 0, 127], dtype=torch.int32), torch.ones(1)
    found = integer.matmul(lhs, rhs, one, one, lhs_zero=POINT, rhs_zero=points, dtype=torch.float64)
    assert torch.equal(found, (lhs.double() - 113) @ (rhs.double() - points))
    assert torch.equal(
        integer.matmul(lhs, rhs, one, one, rhs_zero=points, dtype=torch.float64), lhs.double() @ (rhs.double() - points)
    )


def test_a_sum_beyond_the_float_digits_is_rounded_once() -> None:
    lhs = torch.full((1, 1000), 255, dtype=torch.uint8)
    rhs = torch.full((1000, 1), 127, dtype=torch.int8)
    lhs[0, 0] = 254
    found = integer.matmul(lhs, rhs, torch.ones(1), torch.ones(1))
    assert found.item() == float(torch.tensor(255 * 127 * 1000 - 127).float()) != 255 * 127 * 1000 - 127


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"), [(1, 1, 1, 1), (2, 0, 1, 1), (1, 2, 2, 2), (1, 1, 1, 8)]
)
def test_a_convolution_has_exact_sums(dims: int, stride: int, padding: int, dilation: int, groups: int) -> None:
    code = torch.randint(0, 256, (2, 8, *[7] * dims), dtype=torch.uint8)
    weight = torch.randint(-LARGEST - 1, LARGEST + 1, (16, 8 // groups, *[3] * dims), dtype=torch.int8)
    where = ([stride] * dims, [padding] * dims, [dilation] * dims)
    found = integer_convolution(code, weight, POINT, *where, groups)
    wide = code.double() - 113, weight.double()
    assert torch.equal(found.double(), aten.convolution(*wide, None, *where, False, [0] * dims, groups))
    mode = FakeTensorMode()
    with mode:
        fake = INTEGER_CONVOLUTION(*map(mode.from_tensor, (code, weight, POINT)), *where, groups)
    assert fake.shape == found.shape and fake.stride() == found.stride() and fake.dtype == found.dtype


def test_a_convolution_has_the_sums_of_onnxruntime() -> None:
    code = torch.randint(0, 256, (1, 4, 6, 6), dtype=torch.uint8)
    weight = torch.randint(-LARGEST, LARGEST + 1, (5, 4, 3, 3), dtype=torch.int8)
    node = helper.make_node("ConvInteger", ["x", "w", "z"], ["y"], pads=[1, 1, 1, 1])
    expected = runtime([node], {"x": code, "w": weight, "z": torch.tensor(113, dtype=torch.uint8)}, TensorProto.INT32)
    found = integer_convolution(code, weight, POINT, [1, 1], [1, 1], [1, 1])
    assert torch.equal(found, expected.float())


@exact_convolutions
def test_the_largest_codes_do_not_saturate() -> None:
    code, weight = torch.full((1, 64, 5, 5), 255, dtype=torch.uint8), torch.full((16, 64, 5, 5), 127, dtype=torch.int8)
    found = integer_convolution(code, weight, ZERO, [1, 1], [0, 0], [1, 1])
    assert found.unique().tolist() == [torch.tensor(64 * 25 * 255 * 127).float().item()]


def test_the_operator_keeps_to_its_contract() -> None:
    code, weight = torch.zeros(1, 2, 4, 4, dtype=torch.uint8), torch.zeros(3, 2, 3, 3, dtype=torch.int8)
    torch.library.opcheck(INTEGER_CONVOLUTION, (code, weight, POINT, [1, 1], [1, 1], [1, 1], 1))
    where = ([1, 1], [0, 0], [1, 1])
    with pytest.raises(InvalidArgument, match=r"code must be torch.uint8: got torch.int8. Shift the codes by 128"):
        integer_convolution(code.to(torch.int8), weight, POINT, *where)
    with pytest.raises(InvalidArgument, match=r"weight must be torch.int8: got torch.uint8"):
        integer_convolution(code, weight.to(torch.uint8), POINT, *where)
    with pytest.raises(InvalidArgument, match=r"zero_point must be one element: got shape \(2,\)"):
        integer_convolution(code, weight, POINT.repeat(2), *where)


def test_what_the_machine_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert multiplies_exactly("conv", "cuda:0", False) == "torch convolves integers on CPU only"
    saturated = (torch.zeros(1), torch.ones(1))
    monkeypatch.setattr("fxquant.ops.integer_matmul._largest", lambda *_: saturated)
    found = multiplies_exactly.__wrapped__("matmul", "cpu", False)
    assert found == "the integer kernel of this machine saturates"


# ---------------------------------------------------------------- the graph


def test_a_linear_becomes_a_product_of_codes() -> None:
    x, w, scales = operands()
    bias = torch.randn(5)

    def model(x: Tensor, w: Tensor, scales: Tensor, bias: Tensor, s: Tensor, z: Tensor) -> Tensor:
        return aten.addmm(bias, u8(x, s, z), channels(w, scales).t())

    gm = traced(model, x, w, scales, bias, SCALE, POINT)
    before = gm(x, w, scales, bias, SCALE, POINT)
    assert apply(EVERYWHERE, gm).rewrites == 1
    found = targets(gm)
    assert aten._int_mm.default in found and aten.addmm.default not in found
    assert not [t for t in found if "fake_quantize" in str(t)], "nothing else reads the fake-quants"
    after = gm(x, w, scales, bias, SCALE, POINT)
    code = quantize_per_tensor(x, SCALE, POINT, 0, 255, torch.uint8)
    weight = quantize_per_channel(w, scales, torch.zeros(5, dtype=torch.int32), 0, -127, 127).t()
    assert torch.equal(after, integer.matmul(code, weight, SCALE, scales, lhs_zero=POINT, bias=bias))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert len([t for t in found if t is aten.sum.dim_IntList]) == 1, "a zero point of 0 is not taken off"


def test_operands_are_seen_through_what_moves_them() -> None:
    x = torch.randn(2, 3, 40)
    _, w, scales = operands()

    def model(x: Tensor, w: Tensor, scales: Tensor) -> Tensor:
        value = u8(x.transpose(0, 1)).transpose(0, 1).to(torch.bfloat16).clone().view(6, 40)
        weight = channels(w.t(), scales, axis=1).permute(1, 0).to(torch.bfloat16).transpose(-1, -2)
        return aten.mm(value, weight)

    gm = traced(model, x, w, scales)
    before = gm(x, w, scales)
    assert apply(EVERYWHERE, gm).rewrites == 1
    after = gm(x, w, scales)
    assert after.dtype == torch.bfloat16 and after.stride() == before.stride()
    exact = u8(x).double().view(6, 40) @ channels(w, scales).double().t()
    assert (after.double() - exact).abs().max() <= (before.double() - exact).abs().max()
    assert torch.equal(after, exact.to(torch.bfloat16))


def test_either_side_may_be_the_weight_and_unsigned_right_codes_are_shifted() -> None:
    x, w, scales = operands(m=6, n=5)
    gm = traced(lambda x, w, scales: aten.mm(channels(w, scales), u8(x).t()), x, w, scales)
    before = gm(x, w, scales)
    assert apply(EVERYWHERE, gm).rewrites == 1
    torch.testing.assert_close(gm(x, w, scales), before, rtol=1e-5, atol=1e-4)
    both = traced(lambda x, y: aten.mm(u8(x), u8(y).t()), x, w)
    before = both(x, w)
    assert apply(EVERYWHERE, both).rewrites == 1
    torch.testing.assert_close(both(x, w), before, rtol=1e-5, atol=1e-4)
    square = traced(lambda x: aten.mm(u8(x), u8(x)), torch.randn(8, 8))
    assert apply(EVERYWHERE, square).rewrites == 1


def test_specials_have_the_codes_of_the_fake_quantizer() -> None:
    x, w, scales = operands(k=8)
    x[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30])
    gm = traced(lambda x, w, scales: aten.mm(u8(x), channels(w, scales).t()), x, w, scales)
    before = gm(x, w, scales)
    apply(EVERYWHERE, gm)
    assert before.isfinite().all()
    torch.testing.assert_close(gm(x, w, scales), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("low", "high"), [(-8, 7), (-7, 7), (-2, 1), (0, 15)])
def test_fewer_bits_are_codes_of_8(low: int, high: int) -> None:
    x, w, scales = operands()
    gm = traced(lambda x, w, s: aten.mm(u8(x), channels(w, s * 127 / 7, 0, low, high).t()), x, w, scales)
    before = gm(x, w, scales)
    assert apply(EVERYWHERE, gm).rewrites == 1
    torch.testing.assert_close(gm(x, w, scales), before, rtol=1e-5, atol=1e-5)


@exact_convolutions
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("signed", [False, True])
def test_a_convolution(memory: torch.memory_format, signed: bool) -> None:
    x, w, b = torch.randn(2, 4, 6, 6).to(memory_format=memory), torch.randn(5, 4, 3, 3), torch.randn(5)
    scales = w.abs().amax((1, 2, 3)) / 127

    def model(x: Tensor, w: Tensor, scales: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(s8(x) if signed else u8(x), channels(w, scales), b, padding=1)

    gm = traced(model, x, w, scales, b)
    before = gm(x, w, scales, b)
    assert apply(EVERYWHERE, gm).rewrites == 1
    after = gm(x, w, scales, b)
    assert INTEGER_CONVOLUTION in targets(gm) and after.stride() == before.stride()
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-4)
    code = quantize_per_tensor(x, SCALE, POINT, 0, 255, torch.uint8)
    weight = quantize_per_channel(w, scales, torch.zeros(5, dtype=torch.int32), 0, -127, 127)
    if not signed:
        total = F.conv2d(code.double() - 113, weight.double(), padding=1).float()
        assert torch.equal(after, total * (SCALE * scales).view(-1, 1, 1) + b.view(-1, 1, 1))


def test_codes_are_made_once_and_tags_are_kept() -> None:
    x, w, scales = operands(n=40)

    def model(x: Tensor, w: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value = u8(x)
        return aten.mm(value, channels(w, scales).t()), aten.mm(value, channels(w, scales).t()), value

    gm = traced(model, x, w, scales)
    for node in gm.graph.nodes:
        if node.target is aten.mm.default:
            node.meta.update(recompute="of the product", ac_graph_id=7)
        elif "fake_quantize" in str(node.target):
            node.meta.update(recompute="of the fake-quant")
    assert apply(EVERYWHERE, gm).rewrites == 2
    assert len([t for t in targets(gm) if t is torch.ops.fxquant.quantize_per_tensor.tensor_qparams]) == 1
    assert [t for t in targets(gm) if "fake_quantize_per_tensor" in str(t)], "read by others, it stays"
    tags = {str(n.target): n.meta.get("recompute") for n in gm.graph.nodes if n.op == "call_function"}
    assert tags["fxquant.quantize_per_tensor.tensor_qparams"] == tags["fxquant.quantize_per_channel.default"]
    assert tags["fxquant.quantize_per_tensor.tensor_qparams"] == "of the fake-quant"
    assert tags["aten._int_mm.default"] == tags["aten.sub.Tensor"] == "of the product"


# ---------------------------------------------------------------- what is declined


def declined(model: Callable[..., Any], *args: Tensor) -> str:
    (reason,) = reasons(untouched(EVERYWHERE, traced(model, *args)))
    return reason


def test_scales_must_not_lie_along_the_sum() -> None:
    x, w, _ = operands(k=40, n=40)
    rows = torch.ones(40)
    wanted = "fake_quantize_per_channel_affine has a scale per channel of a dimension that is summed over"
    assert declined(lambda x, w, r: aten.mm(u8(x), channels(w, r)), x, w, rows) == wanted
    image, kernel = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
    per = torch.ones(4)
    assert declined(lambda x, w, r: F.conv2d(channels(x, r, 1), channels(w, r)), image, kernel, per) == wanted
    assert declined(lambda x, w, r: F.conv2d(u8(x), channels(w, r, 1)), image, kernel, per) == wanted


def test_formats_without_an_integer_kernel() -> None:
    x, w, scales = operands(k=32)

    found = "the codes of fake_quantize_per_tensor_affine have more than 8 bits: [-32768, 32767]"
    assert declined(lambda x, w, s: aten.mm(s8(x, 16), channels(w, s).t()), x, w, scales) == found
    found = declined(lambda x, w, s: aten.mm(fake_quantize_mx(x), channels(w, s).t()), x, w, scales)
    assert "is no affine quantizer" in found

    def number(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        return aten.mm(fake_quantize_per_tensor_affine(x, 0.1, 3, 0, 255), channels(w, s).t())

    assert declined(number, x, w, scales) == "the scale of fake_quantize_per_tensor_affine is a number"
    double = (t.double() for t in (x, w))
    found = declined(lambda x, w, s: aten.mm(u8(x), channels(w, s).t()), *double, scales)
    assert found == "fake_quantize_per_tensor_affine is float64"
    found = declined(lambda x, w, s, z: aten.mm(u8(x, None, z), channels(w, s).t()), x, w, scales, POINT.float())
    assert found == "the zero point of fake_quantize_per_tensor_affine is no integer"


def test_products_without_an_integer_kernel() -> None:
    x, w, scales = operands()
    a, b = torch.randn(3, 4, 5), torch.randn(3, 5, 4)
    batches = "torch has no product of batches of integer matrices"
    assert declined(lambda a, b: aten.bmm(u8(a), u8(b)), a, b) == batches
    assert declined(lambda a, b: aten.baddbmm(b[:, :4, :4], u8(a), u8(b)), a, b) == batches

    def scaled(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        return aten.addmm(s, u8(x), channels(w, s).t(), alpha=2)

    assert declined(scaled, x, w, scales) == "it is scaled by alpha or beta"
    image, kernel, per = torch.randn(1, 4, 5, 5), torch.randn(4, 3, 3, 3), torch.ones(4)
    found = declined(lambda x, w: F.conv_transpose2d(u8(x), s8(w)), image, kernel)
    assert found == "torch has no transposed convolution of integers"
    found = declined(lambda x, w, z: F.conv2d(u8(x), u8(w, None, z)), image, kernel.repeat(1, 2, 1, 1)[:, :4], POINT)
    assert found == "the zero point of its weight may be other than 0"
    long = torch.randn(1, 70000)
    found = declined(lambda x, w, s: aten.mm(u8(x), channels(w, s).t()), long, long, per[:1])
    assert found == "its sums of 70000 products may not fit int32"
    found = declined(lambda x, w, s: aten.mm(u8(x), channels(w, s).view(40, 5)), x, w, scales)
    assert found == "view moves the channels of fake_quantize_per_channel_affine"


@pytest.mark.parametrize("rows", [6, 1, 17])
def test_a_batch_of_any_size(rows: int) -> None:
    """A graph of symbolic sizes serves more rows, or fewer, than it was traced with."""
    x, w, scales = operands(m=9)
    mode = {"tracing_mode": "symbolic"}
    gm = make_fx(lambda x: aten.mm(u8(x), channels(w, scales).t()), _allow_non_fake_inputs=True, **mode)(x)
    assert apply(EVERYWHERE, gm).rewrites == 1
    x, _, _ = operands(m=rows, seed=1)
    code = quantize_per_tensor(x, SCALE, POINT, 0, 255, torch.uint8)
    weight = quantize_per_channel(w, scales, torch.zeros(5, dtype=torch.int32), 0, -127, 127).t()
    assert torch.equal(gm(x), integer.matmul(code, weight, SCALE, scales, lhs_zero=POINT))


def test_sums_of_any_length_are_declined() -> None:
    x, w, scales = operands()
    model = lambda x, w, s: aten.mm(u8(x), channels(w, s).t())  # noqa: E731
    gm = make_fx(model, tracing_mode="symbolic")(x, w, scales)
    assert reasons(untouched(EVERYWHERE, gm)) == ["the length of its sums is symbolic"]


def test_products_of_one_form_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, scales = operands(k=16, n=16)
    forms: list[int] = []
    traces = inline.traced
    monkeypatch.setattr(inline, "traced", lambda *given: forms.append(1) or traces(*given))

    def model(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        for _ in range(3):
            x = aten.mm(u8(x), channels(w, s).t())
        return aten.mm(u8(x[:2]), channels(w, s).t())

    gm = traced(model, x, w, scales)
    before = gm(x, w, scales)
    assert EVERYWHERE.run(gm).rewrites == 4 and len(forms) == 2, "six rows, and two"
    torch.testing.assert_close(gm(x, w, scales), before, rtol=1e-4, atol=1e-3)


def test_what_is_no_match_is_left_without_a_word() -> None:
    x, w, scales = operands()
    for model in (
        lambda x, w, s: aten.mm(x, channels(w, s).t()),
        lambda x, w, s: aten.mm(u8(x), w.t()),
        lambda x, w, s: aten.mm(torch.relu(u8(x)), channels(w, s).t()),
    ):
        assert not untouched(EVERYWHERE, traced(model, x, w, scales)).declines
    gm = traced(lambda x, w, s: aten.mm(u8(x), channels(w, s).t()), x, w, scales)
    next(n for n in gm.graph.nodes if n.target is aten.mm.default).meta["partitioner_tag"] = "is_backward"
    assert not untouched(EVERYWHERE, gm).declines


# ---------------------------------------------------------------- where it is worth it


def linear() -> fx.GraphModule:
    return traced(lambda x, w, s: aten.mm(u8(x), channels(w, s).t()), *operands())


@pytest.mark.parametrize(
    ("integer_time", "reason"),
    [(0.5, None), (0.9, None), (0.95, "integers take 0.95 of its time here, as measured"), (2.0, "integers take 2.00")],
)
@pytest.mark.usefixtures("dot_products")
def test_auto_goes_by_the_times(monkeypatch: pytest.MonkeyPatch, integer_time: float, reason: str | None) -> None:
    asked: list[Problem] = []
    monkeypatch.setattr(use_integer_matmul, "times", lambda problem: asked.append(problem) or Times(1.0, integer_time))
    gm = linear()
    result = UseIntegerMatmul().run(gm)
    assert result.rewrites == (reason is None) and result.modified == (reason is None)
    assert [found for found in reasons(result) if reason is not None and reason in found] == reasons(result)
    (problem,) = asked
    assert problem == Problem(lhs=(6, 40), rhs=(40, 5), dtype=torch.float32, device="cpu", signed=False)


@pytest.mark.usefixtures("dot_products")
def test_auto_asks_about_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Problem] = []
    monkeypatch.setattr(use_integer_matmul, "multiplies_exactly", lambda *_: "")
    monkeypatch.setattr(use_integer_matmul, "times", lambda problem: asked.append(problem) or Times(1.0, 0.1))
    x, w = torch.randn(2, 4, 6, 6, dtype=torch.bfloat16), torch.randn(6, 2, 3, 3, dtype=torch.bfloat16)
    gm = traced(lambda x, w, s: F.conv2d(u8(x), channels(w, s), None, 2, 1, 1, 2), x, w, torch.ones(6))
    assert UseIntegerMatmul().run(gm).rewrites == 1
    (problem,) = asked
    assert problem.convolution == ((2, 2), (1, 1), (1, 1), 2) and problem.dtype == torch.bfloat16
    assert gm(x, w, torch.ones(6)).dtype == torch.bfloat16


@pytest.mark.usefixtures("dot_products")
@pytest.mark.parametrize(("sweep", "ratio"), [(1e-4, None), (1e-3, "1.30")])
def test_auto_counts_what_rescaling_the_sums_of_a_convolution_costs(
    sweep: float, ratio: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve sweeps over 2 · 6 · 3 · 3 sums, beside 0.004 s of 1 s; a product of matrices has none."""
    monkeypatch.setattr(use_integer_matmul, "multiplies_exactly", lambda *_: "")
    monkeypatch.setattr(use_integer_matmul, "times", lambda problem: Times(1.0, 0.004))
    monkeypatch.setattr(use_integer_matmul, "seconds_of_a_sweep", lambda: sweep)
    x, w = torch.randn(2, 4, 6, 6), torch.randn(6, 4, 3, 3)
    gm = traced(lambda x, w, s: F.conv2d(u8(x), channels(w, s), None, 2, 1), x, w, torch.ones(6))
    found = reasons(UseIntegerMatmul().run(gm))
    assert found == ([] if ratio is None else [f"integers take {ratio} of its time here, as measured"])
    assert UseIntegerMatmul().run(linear()).rewrites == 1


@pytest.mark.usefixtures("dot_products")
def test_by_default_large_products_are_weighed_and_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(use_integer_matmul, "times", lambda problem: Times(1.0, 0.1))
    by_default = UseIntegerMatmul(by_default=True)
    assert untouched(by_default, linear()).declines == [], "1,200 multiply-adds"
    monkeypatch.setattr(use_integer_matmul, "_LEAST", 6 * 40 * 5)
    assert by_default.run(linear()).rewrites == 1
    monkeypatch.setattr(use_integer_matmul, "times", lambda problem: Times(1.0, 2.0))
    assert untouched(by_default, linear()).declines == []
    monkeypatch.setattr(use_integer_matmul, "times", lambda problem: Times(1.0, 0.1))
    monkeypatch.setattr(use_integer_matmul, "_problem", lambda *_: replace(_problem(), device="cuda"))
    assert untouched(by_default, linear()).declines == [], "elsewhere than on CPU nobody has measured"


def _problem() -> Problem:
    return Problem(lhs=(4096, 4096), rhs=(4096, 4096), dtype=torch.float32, device="cpu", signed=False)


def test_auto_measures_nothing_where_integers_never_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(problem: Problem) -> Times:
        raise AssertionError("it is measured")

    monkeypatch.setattr(use_integer_matmul, "times", measured)
    monkeypatch.setattr(use_integer_matmul, "never_faster", lambda device: f"no dot products on {device}")
    assert reasons(untouched(UseIntegerMatmul(), linear())) == ["no dot products on cpu"]
    assert UseIntegerMatmul(mode=True).run(linear()).rewrites == 1


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    calls: list[int] = []
    made = product_times._calls
    monkeypatch.setattr(product_times, "_calls", lambda problem: calls.append(1) or made(problem))
    times.cache_clear()
    yield calls
    times.cache_clear()


@pytest.mark.parametrize("convolution", [None, ((1, 1), (1, 1), (1, 1), 1)])
def test_times_are_measured_once(counted: list[int], convolution: Any) -> None:
    shapes = ((8, 32), (32, 8)) if convolution is None else ((2, 4, 6, 6), (8, 4, 3, 3))
    problem = Problem(lhs=shapes[0], rhs=shapes[1], dtype=torch.float32, device="cpu", signed=False)
    problem = Problem(**{**problem.__dict__, "convolution": convolution})
    threads = torch.get_num_threads()
    with FakeTensorMode():
        first = times(problem)
    assert first.floating > 0 and first.integer > 0 and torch.get_num_threads() == threads
    assert times(problem) is first and counted == [1]


def test_a_large_product_is_measured_on_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_times, "_WORK", 2**12)
    monkeypatch.setattr(product_times, "_ROWS", 4)
    problem = Problem(lhs=(1000, 32), rhs=(32, 16), dtype=torch.float32, device="cpu", signed=True)
    floating, integers = product_times._calls(problem)
    assert floating().shape == integers().shape == (8, 16) and integers().unique().tolist() == [32 * 9]
    convolution = ((1,), (0,), (1,), 1)
    problem = Problem(
        lhs=(1000, 4, 10), rhs=(4, 4, 1), dtype=torch.float32, device="cpu", signed=False, convolution=convolution
    )
    floating, integers = product_times._calls(problem)
    assert floating().shape == integers().shape == (25, 4, 10)


def test_the_choice_is_part_of_the_key() -> None:
    keys = {UseIntegerMatmul(mode="auto").uuid(), EVERYWHERE.uuid()}
    assert len(keys) == 2 and all(instructions() in key for key in keys)
