from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from fxquant.graph.meta import is_saved_as_codes
from fxquant.ops import fake_quantize, saved
from fxquant.ops.quantize import QUANTIZE_TENSOR
from fxquant.passes.joint.save_quantized_activations import SaveQuantizedActivations, plane_dim
from fxquant.passes.joint.tag_recompute import TagRecompute
from tests.passes.graphs import apply, untouched

aten = torch.ops.aten
DIVIDE = {"rounding": "divide"}


def quantized(x: Tensor, scale: Tensor, zero: Tensor, low: int = 0, high: int = 255) -> Tensor:
    return fake_quantize.PER_TENSOR(x, scale, zero, low, high, **DIVIDE)


def masked(grad: Tensor, x: Tensor, scale: Tensor, zero: Tensor, low: int = 0, high: int = 255) -> Tensor:
    return fake_quantize.PER_TENSOR_BACKWARD(grad, x, scale, zero, low, high, **DIVIDE)


def linear(x: Tensor, v: Tensor, w: Tensor, scale: Tensor, zero: Tensor, tangents: Tensor) -> tuple[Tensor, ...]:
    """``fq(x @ v) @ w`` and the gradients of v and w."""
    hidden = x @ v
    y = quantized(hidden, scale, zero)
    back = masked(tangents @ w.t(), hidden, scale, zero)
    return y @ w, x.t() @ back, y.t() @ tangents


def inputs(rows: int = 160, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, v, w, tangents = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, 5), (5, 7), (7, 3), (rows, 3))
    )
    return x, v, w, torch.tensor([0.02]), torch.tensor([100], dtype=torch.int32), tangents


def traced(step: Callable[..., Any], args: tuple[Tensor, ...]) -> fx.GraphModule:
    return make_fx(step, tracing_mode="fake")(*args)


def shown(gm: fx.GraphModule) -> str:
    """The graph's calls, one a line."""
    lines = []
    for node in gm.graph.nodes:
        if node.op == "call_function":
            name = getattr(node.target, "__name__", str(node.target)).removesuffix(".default")
            args = ", ".join(str(arg).replace("_per_tensor", "").replace("_qparams", "") for arg in node.args)
            lines.append(f"{node.name} = {name}({args})".replace("_per_tensor", "").replace("_qparams", ""))
    return "\n".join(lines)


def targets(gm: fx.GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def assert_same_results(step: Callable[..., Any], args: tuple[Tensor, ...]) -> fx.GraphModule:
    """The rewritten graph computes the same bits; returns it."""
    gm = traced(step, args)
    before = gm(*args)
    assert apply(SaveQuantizedActivations(), gm).modified
    for got, expected in zip(gm(*args), before, strict=True):
        assert torch.equal(got, expected)
    return gm


def test_backward_reads_codes_and_a_packed_mask() -> None:
    gm = traced(linear, inputs())
    assert apply(SaveQuantizedActivations(), gm).rewrites == 1
    assert_expected_inline(
        shown(gm),
        """\
mm = mm(x_1, v_1)
fake_quantize_affine = fake_quantize_affine.tensor(mm, scale_1, zero_1, 0, 255)
quantize_tensor = quantize.tensor(mm, scale_1, zero_1, 0, 255, torch.uint8)
dequantize_tensor = dequantize.tensor(quantize_tensor, scale_1, zero_1)
clip_mask_affine_default = clip_mask_affine(mm, scale_1, zero_1, 0, 255)
pack_planes_default = pack_planes(clip_mask_affine_default, 1, 0)
t = t(w_1)
mm_1 = mm(tangents_1, t)
unpack_planes_default = unpack_planes(pack_planes_default, 1, 0)
ne_scalar = ne.Scalar(unpack_planes_default, 0)
convert_element_type_default = convert_element_type(ne_scalar, torch.float32)
mul_tensor = mul.Tensor(mm_1, convert_element_type_default)
mm_2 = mm(fake_quantize_affine, w_1)
t_1 = t(x_1)
mm_3 = mm(t_1, mul_tensor)
t_2 = t(dequantize_tensor)
mm_4 = mm(t_2, tangents_1)""",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_results_keep_their_bits(dtype: torch.dtype) -> None:
    assert_same_results(linear, inputs(dtype=dtype))


def test_special_values_keep_their_bits() -> None:
    args = list(inputs())
    args[0][0, 0], args[0][1, 0], args[0][2, 0] = torch.nan, torch.inf, -torch.inf

    def step(*args: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.nan_to_num(value, nan=7.0) for value in linear(*args[:-1], tangents=args[-1]))

    def named(x: Tensor, v: Tensor, w: Tensor, scale: Tensor, zero: Tensor, tangents: Tensor) -> tuple[Tensor, ...]:
        return step(x, v, w, scale, zero, tangents)

    assert_same_results(named, tuple(args))


@pytest.mark.parametrize(("low", "high", "bits"), [(0, 15, 4), (-8, 7, 4), (-7, 7, 4), (0, 3, 2), (-2, 1, 2)])
def test_small_codes_are_packed(low: int, high: int, bits: int) -> None:
    def step(x: Tensor, v: Tensor, w: Tensor, scale: Tensor, zero: Tensor, tangents: Tensor) -> tuple[Tensor, ...]:
        hidden = x @ v
        y = quantized(hidden, scale, zero, low, high)
        return y @ w, x.t() @ masked(tangents @ w.t(), hidden, scale, zero, low, high), y.t() @ tangents

    x, v, w, _, _, tangents = inputs()
    args = (x, v, w, torch.tensor([0.5]), torch.tensor([low + 1], dtype=torch.int32), tangents)
    gm = assert_same_results(step, args)
    packs = [node.args[1] for node in gm.graph.nodes if node.target is saved.PACK_PLANES]
    assert packs == [bits, 1]
    stored = next(n.meta["val"] for n in gm.graph.nodes if n.target is saved.PACK_PLANES and n.args[1] == bits)
    assert stored.dtype == torch.uint8 and stored.numel() * 8 == 160 * 7 * bits


def test_sixteen_bits_take_two_bytes() -> None:
    def step(x: Tensor, v: Tensor, w: Tensor, scale: Tensor, zero: Tensor, tangents: Tensor) -> tuple[Tensor, ...]:
        y = quantized(x @ v, scale, zero, 0, 65535)
        return y @ w, y.t() @ tangents

    gm = assert_same_results(step, inputs())
    codes = [node.meta["val"].dtype for node in gm.graph.nodes if node.target is QUANTIZE_TENSOR]
    assert codes == [torch.uint16]


def test_codes_no_smaller_than_the_float_are_declined() -> None:
    def step(x: Tensor, v: Tensor, scale: Tensor, zero: Tensor, tangents: Tensor) -> tuple[Tensor, ...]:
        y = quantized(x @ v, scale, zero, 0, 65535)
        return y, y.t() @ tangents

    x, v, _, scale, zero, _ = inputs(dtype=torch.bfloat16)
    result = untouched(SaveQuantizedActivations(), traced(step, (x, v, scale, zero, torch.ones(160, 3).bfloat16())))
    assert "codes of 16 bits and a mask are no smaller than torch.bfloat16" in str(result.declines[0])


def test_shapes_without_a_multiple_of_eight_are_declined() -> None:
    result = untouched(SaveQuantizedActivations(), traced(linear, inputs(rows=151)))
    assert "no dimension of its [151, 7] is a multiple of 8: it is saved in float" in str(result.declines[0])


def test_what_backward_has_anyway_is_left() -> None:
    def step(x: Tensor, v: Tensor, w: Tensor, scale: Tensor, zero: Tensor, tangents: Tensor) -> tuple[Tensor, ...]:
        hidden = x @ v
        y = quantized(hidden * 2 + 1, scale, zero)  # cheap steps from what the sine's gradient reads
        back = masked(tangents @ w.t(), hidden * 2 + 1, scale, zero)
        return y @ w + hidden.sin().sum(), back * hidden.cos(), y.t() @ tangents

    untouched(SaveQuantizedActivations(), traced(step, inputs()))


def test_what_backward_can_compute_again_is_left() -> None:
    def step(x: Tensor, v: Tensor, w: Tensor, scale: Tensor, zero: Tensor, tangents: Tensor) -> tuple[Tensor, ...]:
        hidden = x @ v
        y = quantized(hidden.erf(), scale, zero)
        return y @ w, tangents @ w.t() * hidden, y.t() @ tangents

    untouched(SaveQuantizedActivations(), traced(step, inputs()))


def test_a_result_that_backward_does_not_read_leaves_only_its_mask() -> None:
    def step(x: Tensor, v: Tensor, scale: Tensor, zero: Tensor, tangents: Tensor) -> tuple[Tensor, ...]:
        hidden = x @ v
        return quantized(hidden, scale, zero) + 1, x.t() @ masked(tangents, hidden, scale, zero)

    x, v, _, scale, zero, _ = inputs()
    gm = assert_same_results(step, (x, v, scale, zero, torch.ones(160, 7)))
    assert QUANTIZE_TENSOR not in targets(gm) and targets(gm).count(saved.PACK_PLANES) == 1


def test_values_moved_by_forward_are_moved_again() -> None:
    def step(x: Tensor, v: Tensor, w: Tensor, scale: Tensor, zero: Tensor, tangents: Tensor) -> tuple[Tensor, ...]:
        moved = quantized(x @ v, scale, zero).view(40, 28).view(160, 7)
        return moved @ w, moved.t() @ tangents

    gm = assert_same_results(step, inputs())
    product = next(n for n in reversed(gm.graph.nodes) if n.target is aten.mm.default)
    node = product
    while node.target is not torch.ops.fxquant.dequantize_per_tensor.tensor_qparams:
        node = node.all_input_nodes[0]  # fails at a placeholder, were the codes not read


Step = Callable[..., tuple[Tensor, ...]]


def pooled(between: Callable[..., Tensor]) -> Step:
    """The step of ``max_pool(between(x · v, x - v, scale, zero)) @ w`` and the gradient of w."""

    def step(x: Tensor, v: Tensor, w: Tensor, scale: Tensor, zero: Tensor, tangents: Tensor) -> tuple[Tensor, ...]:
        rows = aten.max_pool2d_with_indices(between(x * v, x - v, scale, zero), [2, 2])[0].float().flatten(1)
        return rows @ w, rows.t() @ tangents

    return step


def one(a: Tensor, b: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return quantized(a, scale, zero)


def joined(a: Tensor, b: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.cat([quantized(a, scale, zero), quantized(b, scale, zero)], 1)


def pooled_inputs(channels: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((16, 3, 4, 4), (16, 3, 4, 4), (4 * channels, 5), (16, 5))
    x, v, w, tangents = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, v, w, torch.tensor([0.02]), torch.tensor([100], dtype=torch.int32), tangents


@pytest.mark.parametrize(("between", "channels"), [(one, 3), (joined, 6)])
def test_what_a_max_pool_picks_is_saved_as_codes(between: Callable[..., Tensor], channels: int) -> None:
    gm = assert_same_results(pooled(between), pooled_inputs(channels))
    (codes,) = (n for n in gm.graph.nodes if n.target is QUANTIZE_TENSOR)
    assert codes.args[0].target is operator.getitem and codes.meta["val"].dtype == torch.uint8
    forward, backward = (n for n in gm.graph.nodes if n.target is aten.mm.default)
    (decoded,) = codes.users
    assert reaches(backward, decoded) and not reaches(forward, decoded)
    assert not apply(SaveQuantizedActivations(), gm).modified


def reaches(node: fx.Node, source: fx.Node) -> bool:
    return node is source or any(reaches(each, source) for each in node.all_input_nodes)


def test_every_code_comes_back_from_its_value() -> None:
    """16 bits, of a scale that no power of two divides, and at both ends of the range."""
    scale, zero = torch.tensor([0.0123]), torch.tensor([-7], dtype=torch.int32)
    values = (torch.arange(-(2**15), 2**15) + 7).float() * scale
    x = values.view(16, 8, 32, 16)

    def step(x: Tensor, w: Tensor, scale: Tensor, zero: Tensor, tangents: Tensor) -> tuple[Tensor, ...]:
        y = quantized(x, scale, zero, -(2**15), 2**15 - 1)
        rows = aten.max_pool2d_with_indices(y, [1, 1])[0].flatten(1)
        return rows @ w, rows.t() @ tangents

    assert_same_results(step, (x, torch.randn(4096, 2), scale, zero, torch.randn(16, 2)))


def test_other_grids_than_one_of_float32_are_left() -> None:
    def two_scales(a: Tensor, b: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return torch.cat([quantized(a, scale, zero), quantized(b, 2 * scale, zero)], 1)

    def rounded(a: Tensor, b: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return quantized(a, scale, zero).to(torch.bfloat16)

    def scaled(a: Tensor, b: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return 3 * quantized(a, scale, zero)

    for between, channels in ((two_scales, 6), (rounded, 3), (scaled, 3)):
        untouched(SaveQuantizedActivations(), traced(pooled(between), pooled_inputs(channels)))
    x, v, w, scale, zero, tangents = pooled_inputs()
    half = (x.bfloat16(), v.bfloat16(), w, scale, zero, tangents)
    untouched(SaveQuantizedActivations(), traced(pooled(one), half))


def test_what_was_picked_and_is_not_read_again_is_left() -> None:
    def step(x: Tensor, v: Tensor, w: Tensor, scale: Tensor, zero: Tensor, tangents: Tensor) -> tuple[Tensor, ...]:
        rows = aten.max_pool2d_with_indices(quantized(x * v, scale, zero), [2, 2])[0].flatten(1)
        return rows @ w, tangents @ w.t()

    untouched(SaveQuantizedActivations(), traced(step, pooled_inputs()))


def test_a_relus_mask_is_packed() -> None:
    def step(x: Tensor, v: Tensor, tangents: Tensor) -> tuple[Tensor, ...]:
        y = (x @ v).relu()
        return y, x.t() @ torch.where(y <= 0, 0.0, tangents)

    x, v = torch.randn(64, 5), torch.randn(5, 32)
    gm = assert_same_results(step, (x, v, torch.randn(64, 32)))
    assert targets(gm).count(saved.PACK_PLANES) == 1


def test_users_checkpoint_regions_are_left() -> None:
    gm = traced(linear, inputs())
    site = next(node for node in gm.graph.nodes if node.target is fake_quantize.PER_TENSOR)
    site.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    untouched(SaveQuantizedActivations(), gm)


def test_what_a_checkpoint_region_reads_is_left() -> None:
    gm = traced(linear, inputs())
    product = next(node for node in gm.graph.nodes if node.name == "mm_2")
    product.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    untouched(SaveQuantizedActivations(), gm)


def test_of_small_tensors_kept_in_float_nothing_is_said() -> None:
    assert untouched(SaveQuantizedActivations(), traced(linear, inputs(rows=9))).declines == []


def test_forward_alone_is_left() -> None:
    def step(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return quantized(x.exp(), scale, zero)

    untouched(SaveQuantizedActivations(), traced(step, (inputs()[0], *inputs()[3:5])))


def test_saved_sites_are_not_tagged_for_recomputation() -> None:
    gm = traced(linear, inputs())
    apply(SaveQuantizedActivations(), gm)
    site = next(node for node in gm.graph.nodes if node.target is fake_quantize.PER_TENSOR)
    assert is_saved_as_codes(site)
    untouched(TagRecompute(), gm)


@pytest.mark.parametrize(
    ("shape", "stride", "expected"),
    [
        ((16, 3), None, 0),
        ((3, 16), None, 1),
        ((8, 16, 4), None, 0),
        ((8, 16, 4), (1, 32, 8), 1),
        ((3, 5), None, None),
        ((0, 8), None, 1),
        ((), None, None),
    ],
    ids=str,
)
def test_planes_are_cut_from_the_outermost_dimension(
    shape: tuple[int, ...], stride: tuple[int, ...] | None, expected: int | None
) -> None:
    value = torch.empty(shape) if stride is None else torch.empty_strided(shape, stride)
    assert plane_dim(value) == expected
