"""Computed scales become constants, weights integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from fxquant.errors import ExportError
from fxquant.graph.edit import item
from fxquant.graph.nodes import call_nodes
from fxquant.graph.views import FakeQuant
from fxquant.ops.bias import FAKE_QUANTIZE_BIAS
from fxquant.ops.fake_quantize import PER_CHANNEL, PER_TENSOR
from fxquant.ops.qparams import AFFINE_QPARAMS
from fxquant.passes.captured.insert_fake_quantize import Insertion
from fxquant.passes.export import freeze
from fxquant.passes.export.freeze import Freeze, Frozen
from fxquant.plan.plan import Role
from fxquant.spec.mode import Mode
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import CurrentTensor
from tests.passes.export.written import Written, same_numbers
from tests.passes.graphs import show, untouched

aten = torch.ops.aten
X = torch.tensor([[[[1.0, -2.0], [0.37, 5.0]], [[0.0, 0.24], [9.0, -1.0]]]])  # 1 × 2 × 2 × 2
WEIGHT = torch.tensor([[1.0, -0.33], [0.12, 0.5], [2.0, 2.0]])
SCALE, POINT = torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32)


def site(node: fx.Node, label: str, role: Role, spec: QuantSpec | None = None) -> fx.Node:
    node.meta["site"] = Insertion(label=label, role=role, spec=spec or QuantSpec(), edges=(), mode=Mode.STATIC)
    return node


def quantized_input(g: Written, x: fx.Node, label: str = "conv.input", scale: Tensor = SCALE) -> fx.Node:
    held = g.held(f"{label}.s", scale), g.held(f"{label}.z", POINT)
    return site(g.call(PER_TENSOR, x, *held, 0, 255, rounding="divide"), label, "activation")


def quantized_weight(g: Written, weight: fx.Node, scale: Tensor, label: str = "conv.weight") -> fx.Node:
    held = g.held("w.s", scale), g.held("w.z", torch.zeros_like(scale, dtype=torch.int32))
    if scale.numel() == 1:
        return site(g.call(PER_TENSOR, weight, *held, -127, 127, rounding="divide"), label, "weight")
    return site(g.call(PER_CHANNEL, weight, *held, 0, -127, 127, rounding="divide"), label, "weight")


def conv(scale: Tensor, bias: Tensor | None = None, weight: Tensor = WEIGHT) -> fx.GraphModule:
    """A quantized convolution, its bias in the units of its sums."""
    g = Written()
    x = g.input(1, 2, 2, 2)
    source = quantized_input(g, x)
    w = quantized_weight(g, g.held("weight", weight.reshape(3, 2, 1, 1)), scale)
    if bias is None:
        return g.done(g.call(aten.conv2d.default, source, w))
    grids = source.args[1], w.args[1]
    quantized = g.call(FAKE_QUANTIZE_BIAS, g.held("bias", bias), *grids)
    return g.done(g.call(aten.conv2d.default, source, w, quantized))


def frozen(gm: fx.GraphModule, x: Tensor = X) -> Frozen:
    result = same_numbers(Freeze(), gm, x)
    assert result.modified
    return result.product(Frozen)


def test_snapshot() -> None:
    gm = conv(torch.tensor([0.01, 0.005, 0.02]), torch.tensor([0.5, -1.0, 0.25]))
    found = frozen(gm)
    assert_expected_inline(
        show(gm),
        """\
quantize_dequantize_default = quantize_dequantize(x, 0.10000000149011612, 3, 0, 255, conv.input)
dequantize_affine_default = dequantize(conv__weight__codes, conv__weight__scale, conv__weight__zero_point, 0)
dequantize_affine_default_1 = dequantize(conv__bias__codes, conv__bias__scale, conv__bias__zero_point, 0)
conv2d_default = conv2d(quantize_dequantize_default, dequantize_affine_default, dequantize_affine_default_1)
return [conv2d_default]
""",
    )
    labels = {"fake_quantize_per_tensor_affine_tensor_qparams": "conv.input"}
    assert found == Frozen(weights=["conv.weight"], activations=["conv.input"], labels=labels)
    codes = gm.get_buffer("conv__weight__codes")
    assert codes.dtype == torch.int8 and codes.flatten().tolist() == [100, -33, 24, 100, 100, 100]
    bias = gm.get_buffer("conv__bias__codes")
    assert bias.dtype == torch.int32 and bias.tolist() == [500, -2000, 125]


def test_one_scale_for_a_weight_is_a_scalar() -> None:
    gm = conv(torch.tensor([0.02]))
    frozen(gm)
    assert gm.get_buffer("conv__weight__scale").dim() == 0
    assert "conv__weight__zero_point, None)" in show(gm)


class Largest(TorchDispatchMode):
    """The most values that an operator computed at once."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and func not in (aten.empty_like.default, aten.slice.Tensor, aten.copy_.default):
            self.count = max(self.count, result.numel())
        return result


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("axis", [None, 0, 1, 3])
@pytest.mark.parametrize("element", [None, "e4m3", "e2m1"])
def test_codes_are_computed_a_few_rows_at_a_time(
    axis: int | None, channels_last: bool, element: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same codes in the same strides; values between are no larger than a few rows."""
    weight = torch.randn(10, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    weight = weight.contiguous(memory_format=torch.channels_last) if channels_last else weight
    scale = torch.linspace(0.01, 0.05, 1 if axis is None else weight.shape[axis])
    point = torch.zeros_like(scale, dtype=torch.int32)
    limits = {} if element is None else {"element": element}
    g = Written()
    g.input(1)
    args = (g.held("weight", weight), g.held("s", scale), g.held("z", point))
    made = g.call(PER_TENSOR, *args, -127, 127, rounding="divide", **limits) if axis is None else None
    node = made or g.call(PER_CHANNEL, *args, axis, -127, 127, rounding="divide", **limits)
    view = FakeQuant.of(node)
    assert view is not None
    whole = freeze._codes(view, weight, scale, point, axis)
    monkeypatch.setattr(freeze, "_AT_ONCE", 3 * weight[0].numel())
    with Largest() as largest:
        found = freeze._codes(view, weight, scale, point, axis)
    assert torch.equal(found, whole) and found.dtype == whole.dtype and len(found.unique()) > 4
    assert found.stride() == weight.stride() and 0 < largest.count <= 3 * weight[0].numel()


def test_a_scale_that_leaves_no_room_for_the_bias_is_raised() -> None:
    vanished = WEIGHT * torch.tensor([[1.0], [0.0], [1.0]])
    gm = conv(torch.tensor([0.02, 1e-30, 0.02]), torch.tensor([0.5, 100.0, 0.5]), vanished)
    found = Freeze().run(gm).product(Frozen)
    assert found.notes == ["conv.weight: scale of 1 vanishing channels raised, so that their bias fits int32"]
    raised = gm.get_buffer("conv__weight__scale")
    assert raised[0] == raised[2] == torch.tensor(0.02) and raised[1] > 1e-30
    held = gm.get_buffer("conv__bias__codes").double() * gm.get_buffer("conv__bias__scale").double()
    torch.testing.assert_close(held, torch.tensor([0.5, 100.0, 0.5], dtype=torch.float64), rtol=1e-3, atol=0)


def test_labels_of_one_site_in_several_places() -> None:
    g = Written()
    x = g.input(2, 2)
    twice = quantized_input(g, g.call(aten.relu.default, quantized_input(g, x)))
    twice.meta["stands_for"] = ["other.input"]
    gm = g.done(twice)
    names = [node.name for node in call_nodes(gm.graph) if node.target is PER_TENSOR]
    found = frozen(gm, torch.ones(2, 2))
    labels = ["conv.input", "conv.input@1"]
    assert found == Frozen(activations=labels, absorbed=["other.input"], labels=dict(zip(names, labels, strict=True)))


def test_a_constant_that_is_no_weight_is_stored_and_absorbed() -> None:
    g = Written()
    g.input(2, 2)
    query = quantized_input(g, g.held("query", torch.tensor([[1.0, 2.0]])), "attention.query")
    gm = g.done(g.call(aten.add.Tensor, g.first, query))
    assert frozen(gm, torch.ones(2, 2)) == Frozen(activations=["attention.query"], absorbed=["attention.query"])
    assert gm.get_buffer("attention__query__codes").dtype == torch.uint8


def test_what_parameters_alone_decide_is_computed_once() -> None:
    g = Written()
    x = g.input(2)
    folded = g.call(aten.mul.Tensor, g.held("a", torch.tensor([2.0, 3.0])), g.held("b", torch.tensor([5.0, 7.0])))
    gm = g.done(g.call(aten.add.Tensor, x, g.call(aten.neg.default, folded)))
    frozen(gm, torch.ones(2))
    assert [str(node.target) for node in call_nodes(gm.graph)] == ["aten.add.Tensor"]
    assert [value.tolist() for name, value in gm.named_buffers() if name.startswith("folded")] == [[-10.0, -21.0]]


@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_in_groups_keeps_its_form(axis: int) -> None:
    """As `InsertFakeQuantize` writes it: groups as rows, then the weight's form again."""
    weight = torch.arange(24.0).reshape(4, 6) if axis == 0 else torch.arange(24.0).reshape(6, 4)
    g = Written()
    x = g.input(2, 6)
    value = g.held("weight", weight)
    if axis:
        value = g.call(aten.transpose.int, value, 0, 1)
    rows = g.call(aten.reshape.default, value, [12, 2])
    scale = 2.0 ** -torch.arange(12.0)  # sums are exact, in whatever order
    spec = QuantSpec(axis=axis, group_size=2, range=CurrentTensor())
    held = g.held("s", scale), g.held("z", torch.zeros(12, dtype=torch.int32))
    node = site(g.call(PER_CHANNEL, rows, *held, 0, -128, 127, rounding="divide"), "fc.weight", "weight", spec)
    end = g.call(aten.reshape.default, node, [4, 6])
    if axis:
        end = g.call(aten.transpose.int, end, 0, 1)
    gm = g.done(g.call(aten.linear.default if axis == 0 else aten.matmul.default, x, end))
    assert frozen(gm, torch.arange(12.0).reshape(2, 6)).weights == ["fc.weight"]
    (stored,) = (n for n in call_nodes(gm.graph) if "dequantize" in n.name)
    assert stored.args[3:] == (1 - axis, 2)
    assert gm.get_buffer("fc__weight__codes").shape == weight.shape
    assert gm.get_buffer("fc__weight__scale").shape == ((4, 3) if axis == 0 else (3, 4))


def test_a_scale_that_follows_the_input() -> None:
    g = Written()
    x = g.input(2, 2)
    ends = (g.call(op, x, [0, 1], True) for op in (aten.amin.default, aten.amax.default))
    both = g.call(AFFINE_QPARAMS, *ends, 0, 255, False)
    scale, point = (item(g.graph, both, index) for index in (0, 1))
    gm = g.done(site(g.call(PER_TENSOR, x, scale, point, 0, 255, rounding="divide"), "fc.input", "activation"))
    with pytest.raises(ExportError, match=r"scale of fc\.input must not depend on the input: its range follows each"):
        Freeze().run(gm)


def test_a_float_graph_stays() -> None:
    g = Written()
    gm = g.done(g.call(aten.relu.default, g.input(2)))
    assert untouched(Freeze(), gm).product(Frozen) == Frozen()
