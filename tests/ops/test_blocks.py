"""Block quantizers against a loop over the blocks in numpy, with ml_dtypes for the small floats, bit for bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.errors import InvalidArgument
from fxquant.numerics.blocks import MXINT8, mx_scale
from fxquant.numerics.formats import FLOAT_FORMATS, float_format
from fxquant.ops.blocks import fake_quantize_blocks, fake_quantize_mx, fake_quantize_nvfp4
from fxquant.ops.floating import fake_quantize_float
from fxquant.ops.stochastic import uniform
from tests.ops.oracle import SPECIALS, assert_same_bits
from tests.ops.test_floating import cast

NAN, INF = float("nan"), float("inf")
ELEMENTS = (*FLOAT_FORMATS, "int8")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
elements = pytest.mark.parametrize("element", ELEMENTS)
roundings = pytest.mark.parametrize("rounding", ["floor", "ceil"])

# The reference


def boxes(shape: tuple[int, ...], sizes: dict[int, int]) -> Iterator[tuple[slice, ...]]:
    steps = [sizes.get(d, sizes.get(d - len(shape), 1)) for d in range(len(shape))]
    starts = (range(0, length, step) for length, step in zip(shape, steps, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(slice(start, start + step) for start, step in zip(corner, steps, strict=True))


def by_blocks(x: Tensor, sizes: dict[int, int], function: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """``function`` of each block, in float32 or float64, put together and rounded to x's dtype."""
    wide = (x if x.dtype == torch.float64 else x.float()).numpy()
    y = np.empty_like(wide)
    with np.errstate(all="ignore"):
        for box in boxes(wide.shape, sizes):
            y[box] = function(wide[box])
    return torch.from_numpy(y).to(x.dtype)


def largest(element: str) -> tuple[float, int]:
    return (127 / 64, 0) if element == "int8" else (FLOAT_FORMATS[element].max, FLOAT_FORMATS[element].emax)


def on_grid(x: np.ndarray, element: str) -> np.ndarray:
    if element == "int8":
        return np.clip(np.rint(x * x.dtype.type(64)), -127, 127) / x.dtype.type(64)
    return cast(x, FLOAT_FORMATS[element], True)


def mx_exponent(amax: float, element: str, rounding: str) -> int:
    """By exact fractions."""
    high, emax = largest(element)
    if rounding == "floor":
        return math.frexp(amax)[1] - 1 - emax
    k = -2000
    low, up = -2000, 2000
    while low < up:  # the smallest k that holds
        k = (low + up) // 2
        low, up = (low, k) if Fraction(amax) <= Fraction(high) * Fraction(2) ** k else (k + 1, up)
    return low


def mx_block(block: np.ndarray, element: str, rounding: str) -> np.ndarray:
    amax = float(np.abs(block).max())
    exponent = 0
    if 0 < amax < INF:
        exponent = min(max(mx_exponent(amax, element, rounding), -127), 127)
    scale = block.dtype.type(2.0**exponent)
    return on_grid(block / scale, element) * scale


def int_block(block: np.ndarray, low: int, high: int, amax: Any = None) -> np.ndarray:
    amax = np.abs(block).max() if amax is None else amax
    scale = block.dtype.type(amax) / block.dtype.type(high) if amax < INF else block.dtype.type(1)
    return np.clip(np.rint(block / (scale if scale > 0 else 1)), low, high) * scale


def nvfp4_block(block: np.ndarray, unit: np.float32) -> np.ndarray:
    amax = np.abs(block).max().astype(np.float32)
    ratio = amax / np.float32(6) / unit
    code = cast(np.array([ratio]), FLOAT_FORMATS["e4m3"], True)[0] if np.isfinite(ratio) else np.float32(448)
    scale = (code * unit).astype(block.dtype)
    return cast(block / (scale if scale > 0 else block.dtype.type(1)), FLOAT_FORMATS["e2m1"], True) * scale


def nvfp4_unit(amax: float) -> np.float32:
    with np.errstate(all="ignore"):
        unit = np.float32(amax) / np.float32(2688)
    return unit if 0 < unit < INF else np.float32(1)


# Inputs


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Blocks of very different size, zeros among them, and ties."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x *= 2.0 ** torch.randint(-12, 9, (*shape[:-1], 1), generator=generator)
    x[torch.rand(shape, generator=generator) < 0.1] = 0
    ties = torch.rand(shape, generator=generator) < 0.3
    return torch.where(ties, (x * 8).round() / 8, x).to(dtype)


def extremes(dtype: torch.dtype) -> Tensor:
    """A row for each magnitude that a float can have, among others."""
    info = torch.finfo(dtype)
    tops = [info.max, info.max / 2, info.tiny, info.tiny * 1.99, info.tiny * 0.51, info.tiny * 0.13, *SPECIALS]
    step = 1 if dtype == torch.float16 else 11
    tops += [2.0**k * m for k in range(-24, 15, step) for m in (1, 1.5, 1.75, 1.875, 127 / 64, 1.96875, 1.99)]
    rows = torch.tensor(tops, dtype=torch.float64)[:, None] * torch.tensor([1.0, -0.6, 0.31, 0.02, 0.0, 1e-4])
    rows[0] = info.max * torch.tensor([1.0, -0.6, 0.31, 0.02, 0.0, 1e-4])
    return rows.to(dtype)


shapes = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)


@st.composite
def cut(draw: Any) -> tuple[tuple[int, ...], dict[int, int]]:
    """A shape and blocks of it: one or several axes, sizes that divide and that do not, beyond the end too."""
    shape = draw(shapes)
    axes = draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
    negative = draw(st.booleans())
    return shape, {axis - len(shape) * negative: draw(st.integers(1, 9)) for axis in axes}


# Microscaling


@roundings
@elements
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mx_on_extreme_blocks(dtype: torch.dtype, element: str, rounding: str) -> None:
    x = extremes(dtype)
    expected = by_blocks(x, {0: 1, 1: 6}, lambda block: mx_block(block, element, rounding))
    assert_same_bits(fake_quantize_mx(x, {-1: 6}, element, scale_rounding=rounding), expected)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    at=cut(),
    element=st.sampled_from(ELEMENTS),
    rounding=st.sampled_from(["floor", "ceil"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_mx_on_any_blocks(
    at: tuple[tuple[int, ...], dict[int, int]], element: str, rounding: str, dtype: torch.dtype, seed: int
) -> None:
    shape, sizes = at
    x = values(shape, dtype, seed)
    got = fake_quantize_mx(x, sizes, element, scale_rounding=rounding)
    assert_same_bits(got, by_blocks(x, sizes, lambda block: mx_block(block, element, rounding)))
    assert got.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@elements
def test_mx_scales_over_all_exponents(element: str, dtype: torch.dtype) -> None:
    """Around every power of two, and where ceil goes up: amax = max · 2^k and its neighbours."""
    high, emax = largest(element)
    grid = MXINT8 if element == "int8" else FLOAT_FORMATS[element]
    powers = torch.tensor([2.0**k for k in range(-149, 128)], dtype=dtype)
    at = torch.cat([powers, powers / 2**emax * high])
    at = torch.cat([at, at.nextafter(torch.tensor(INF, dtype=dtype)), at.nextafter(torch.tensor(0.0, dtype=dtype))])
    at = at[(at > 0) & at.isfinite()]
    for rounding in ("floor", "ceil"):
        expected = [2.0 ** min(max(mx_exponent(a, element, rounding), -127), 127) for a in at.tolist()]
        assert_same_bits(mx_scale(at, grid, rounding), torch.tensor(expected, dtype=dtype))


@elements
def test_mx_ceil_never_saturates_and_floor_does(element: str) -> None:
    x = torch.linspace(1, 2, 1001)[:-1, None]  # one binade, and one block for each value
    ceil, floor = (fake_quantize_mx(x, {1: 1}, element, scale_rounding=r) for r in ("ceil", "floor"))
    high, emax = largest(element)
    fits = x <= high / 2**emax
    step = 2.0 ** -(6 if element == "int8" else FLOAT_FORMATS[element].mantissa_bits)
    coarser = 2 if element == "int8" else 1  # the step of integers grows with the scale, that of floats with x
    assert ((ceil - x).abs() <= torch.where(fits, step, step * coarser) / 2).all()
    assert (floor[~fits] == high / 2**emax).all() and 0 < fits.sum() < 1000
    assert_same_bits(floor[fits], ceil[fits])
    assert ceil.max() == 2


@elements
def test_mx_of_nan_inf_and_zero(element: str) -> None:
    high, _ = largest(element)
    x = torch.tensor([[NAN, 1.0, 0.25, 1e9], [INF, 1.0, -INF, 1e-9], [0.0, -0.0, 0.0, 0.0]])
    y = fake_quantize_mx(x, {-1: 4}, element)
    quarter = 0.25 if element != "e2m1" else 0.0
    assert_same_bits(y, torch.tensor([[NAN, 1.0, quarter, high], [high, 1.0, -high, 0.0], [0.0, -0.0, 0.0, 0.0]]))


def test_mx_defaults() -> None:
    x = values((3, 70), torch.float32)
    assert_same_bits(fake_quantize_mx(x), fake_quantize_mx(x, {1: 32}, "e4m3", scale_rounding="floor"))


# NVFP4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("amax", [None, 3.0, 1e-3, 0.0, 1e-42], ids=str)
def test_nvfp4_on_extreme_blocks(amax: float | None, dtype: torch.dtype) -> None:
    x = extremes(dtype)
    x = x[(x.abs() < 1e9).all(1)] if amax is None else x
    unit = nvfp4_unit(float(x.abs().max()) if amax is None else amax)
    expected = by_blocks(x, {0: 1, 1: 6}, lambda block: nvfp4_block(block, unit))
    assert_same_bits(fake_quantize_nvfp4(x, amax, {-1: 6}), expected)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    at=cut(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    amax=st.none() | st.floats(2**-20, 1000, width=32),
)
def test_nvfp4_on_any_blocks(
    at: tuple[tuple[int, ...], dict[int, int]], dtype: torch.dtype, seed: int, amax: float | None
) -> None:
    shape, sizes = at
    x = values(shape, dtype, seed)
    unit = nvfp4_unit(float(x.abs().max()) if amax is None else amax)
    got = fake_quantize_nvfp4(x, amax, sizes)
    assert_same_bits(got, by_blocks(x, sizes, lambda block: nvfp4_block(block, unit)))


def test_nvfp4_of_nan_and_inf() -> None:
    x = torch.tensor([[NAN, 1.0, -INF, 0.0], [1.0, 2.0, -3.0, 6.0]])
    # Its own amax is NaN: then g = 1, the first block has the scale 448 and the second e4m3(6 / 6).
    own = fake_quantize_nvfp4(x, None, {-1: 4})
    assert_same_bits(own, torch.tensor([[NAN, 0.0, -2688.0, 0.0], [1.0, 2.0, -3.0, 6.0]]))
    given_amax = fake_quantize_nvfp4(x, 6.0, {-1: 4})
    assert_same_bits(given_amax, torch.tensor([[NAN, 1.0, -6.0, 0.0], [1.0, 2.0, -3.0, 6.0]]))


def test_nvfp4_forms_of_amax() -> None:
    x = values((4, 40), torch.float32)
    expected = fake_quantize_nvfp4(x, 2.5)
    for amax in (torch.tensor(2.5), torch.tensor([2.5], dtype=torch.float64), torch.tensor([[2.5]])):
        assert_same_bits(fake_quantize_nvfp4(x, amax), expected)
    assert_same_bits(fake_quantize_nvfp4(x, None), fake_quantize_nvfp4(x, x.abs().max()))


def test_nvfp4_is_blocks_with_float_scales() -> None:
    x = values((4, 40), torch.float32)
    assert_same_bits(fake_quantize_blocks(x, {-1: 16}, (2, 1), scale_bits=(4, 3)), fake_quantize_nvfp4(x))
    tensor_amax = torch.tensor(2.0)
    got = fake_quantize_blocks(x, {-1: 16}, (2, 1), scale_bits=(4, 3), tensor_amax=tensor_amax)
    assert_same_bits(got, fake_quantize_nvfp4(x, 2.0))


# Integer blocks


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    at=cut(),
    bits=st.integers(2, 16),
    unsigned=st.booleans(),
    narrow=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_integer_blocks(
    at: tuple[tuple[int, ...], dict[int, int]], bits: int, unsigned: bool, narrow: bool, dtype: torch.dtype, seed: int
) -> None:
    shape, sizes = at
    x = values(shape, dtype, seed)
    high = 2 ** (bits if unsigned else bits - 1) - 1
    low = 0 if unsigned else -high if narrow else -high - 1
    got = fake_quantize_blocks(x, sizes, bits, unsigned=unsigned, narrow=narrow)
    assert_same_bits(got, by_blocks(x, sizes, lambda block: int_block(block, low, high)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integer_blocks_on_extremes(dtype: torch.dtype) -> None:
    x = extremes(dtype)
    expected = by_blocks(x, {0: 1, 1: 6}, lambda block: int_block(block, -8, 7))
    assert_same_bits(fake_quantize_blocks(x, {-1: 6}), expected)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(at=cut(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_given_amax_for_each_block(at: tuple[tuple[int, ...], dict[int, int]], dtype: torch.dtype, seed: int) -> None:
    shape, sizes = at
    x = values(shape, dtype, seed)
    positive = {axis % len(shape): size for axis, size in sizes.items()}
    grid = [-(-length // positive.get(d, 1)) for d, length in enumerate(shape)]
    amax = torch.rand(grid, generator=torch.Generator().manual_seed(seed)) * 2
    amax[torch.rand(grid, generator=torch.Generator().manual_seed(seed + 1)) < 0.2] = 0
    x.requires_grad_()
    got = fake_quantize_blocks(x, sizes, amax=amax)
    each = iter(amax.flatten().tolist())
    expected = by_blocks(x.detach(), sizes, lambda block: int_block(block, -8, 7, next(each)))
    assert_same_bits(got.detach(), expected)
    (grad,) = torch.autograd.grad(got, x, torch.ones_like(x))
    each = iter(amax.flatten().tolist())
    inside = by_blocks(x.detach(), sizes, lambda block: (np.abs(block) <= next(each)).astype(block.dtype))
    assert_same_bits(grad, inside)


def test_amax_broadcasts_to_the_grid() -> None:
    x = values((6, 5, 8), torch.float32)
    rows = torch.tensor([[0.5], [1.0], [2.0], [4.0], [8.0]])
    got = fake_quantize_blocks(x, {-1: 4}, amax=rows)
    assert_same_bits(got, fake_quantize_blocks(x, {-1: 4}, amax=rows.expand(6, 5, 2)))
    one = fake_quantize_blocks(x, {-1: 4}, amax=torch.tensor(2.0))
    assert_same_bits(one, fake_quantize_blocks(x, {0: 6, 1: 5, 2: 8}, amax=torch.full((1, 1, 1), 2.0)))


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_float_elements(name: str) -> None:
    format = float_format(name)
    x = values((5, 33), torch.float32)

    def block(part: np.ndarray) -> np.ndarray:
        scale = np.abs(part).max() / np.float32(format.max)
        return cast(part / (scale if scale > 0 else 1), format, True) * scale

    got = fake_quantize_blocks(x, {-1: 8}, (format.exponent_bits, format.mantissa_bits))
    assert_same_bits(got, by_blocks(x, {-1: 8}, block))


@pytest.mark.parametrize("scale_format", ["e4m3", "e5m2"])
def test_float_scales_of_integer_blocks(scale_format: str) -> None:
    format = float_format(scale_format)
    x = values((5, 33), torch.float32)
    unit = np.float32(x.abs().max()) / np.float32(7 * format.max)

    def block(part: np.ndarray) -> np.ndarray:
        scale = cast(np.array([np.abs(part).max() / np.float32(7) / unit]), format, True)[0] * unit
        return np.clip(np.rint(part / (scale if scale > 0 else 1)), -8, 7) * scale

    got = fake_quantize_blocks(x, {-1: 8}, scale_bits=(format.exponent_bits, format.mantissa_bits))
    assert_same_bits(got, by_blocks(x, {-1: 8}, block))


def test_integer_scales_in_blocks_of_their_own() -> None:
    x = values((5, 33), torch.float32)
    scales = np.array([np.abs(x.numpy()[box]).max() / np.float32(7) for box in boxes((5, 33), {-1: 8})])
    grid = torch.from_numpy(scales.reshape(5, 5))
    quantized = by_blocks(grid, {0: 2, 1: 3}, lambda part: int_block(part, 0, 255))
    each = iter(quantized.flatten().numpy())

    def block(part: np.ndarray) -> np.ndarray:
        scale = next(each)
        return np.clip(np.rint(part / (scale if scale > 0 else 1)), -8, 7) * scale

    got = fake_quantize_blocks(x, {-1: 8}, scale_bits=8, scale_block_sizes={0: 2, 1: 3})
    assert_same_bits(got, by_blocks(x, {-1: 8}, block))
    assert not torch.equal(got, fake_quantize_blocks(x, {-1: 8}))


# What all share

CALLS: dict[str, Callable[..., Tensor]] = {
    "mx": lambda x, **more: fake_quantize_mx(x, {-1: 4}, "e2m3", **more),
    "mx int8": lambda x, **more: fake_quantize_mx(x, {-1: 3}, "int8", **more),
    "nvfp4": lambda x, **more: fake_quantize_nvfp4(x, None, {-1: 5}, **more),
    "blocks": lambda x, **more: fake_quantize_blocks(x, {-1: 4}, 3, **more),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@each_call
def test_dynamic_gradient_is_straight_through_and_saves_nothing(call: Callable[..., Tensor]) -> None:
    x = torch.tensor([[1.0, -2.0, 1e9, 0.0, NAN, INF]]).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = call(x)
    grad = torch.randn(1, 6)
    assert_same_bits(torch.autograd.grad(y, x, grad)[0], grad)
    assert not saved


def test_nvfp4_gradient_with_amax() -> None:
    x = torch.tensor([[1.0, -2.0, 2.0, 2.1, NAN, -INF]], dtype=torch.float64).requires_grad_()
    y = fake_quantize_nvfp4(x, 2.0, {-1: 4})
    (first,) = torch.autograd.grad((y.nan_to_num() ** 2).sum(), x, create_graph=True)
    assert_same_bits(torch.autograd.grad(y.sum(), x, retain_graph=True)[0], x.new_tensor([[1, 1, 1, 0, 0, 0]]))
    (second,) = torch.autograd.grad(first.sum(), x)
    assert_same_bits(second, x.new_tensor([[2, 2, 2, 0, 0, 0]]))


def test_no_gradient_to_amax() -> None:
    x, amax = torch.randn(4, 8).requires_grad_(), torch.rand(4, 2).requires_grad_()
    y = fake_quantize_blocks(x, {-1: 4}, amax=amax)
    assert torch.autograd.grad(y.sum(), amax, allow_unused=True)[0] is None


@each_call
def test_stochastic_is_unbiased_and_uses_the_position(call: Callable[..., Tensor]) -> None:
    x = torch.full((20_000, 5), 0.37, dtype=torch.float64)
    x[:, 0] = 1.0
    y = call(x, seed=3)[:, 1]
    assert abs(y.mean() - 0.37) < 5 * y.std() / len(y) ** 0.5 + 1e-6
    assert_same_bits(call(x.t().contiguous().t(), seed=3), call(x, seed=3))
    assert not torch.equal(call(x, seed=3), call(x, seed=4))


def test_stochastic_draws_what_uniform_draws() -> None:
    x = values((4, 10), torch.float32)
    got = fake_quantize_mx(x, {-1: 4}, "int8", seed=5)
    scale = by_blocks(x, {-1: 4}, lambda block: np.full_like(block, 2.0 ** (math.frexp(np.abs(block).max())[1] - 1)))
    steps = x / scale * 64
    up = (uniform(5, x) < steps - steps.floor()).float()
    assert_same_bits(got, (steps.floor() + up).clamp(-127, 127) / 64 * scale)
    # One block of one tensor is the scaled float format.
    one = fake_quantize_blocks(x, {0: 4, 1: 10}, (4, 3), seed=5)
    assert_same_bits(one, fake_quantize_float(x, x.abs().max() / 448, "e4m3", seed=5))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (2, 0, 7)], ids=str)
@each_call
def test_empty(call: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, requires_grad=True)
    y = call(x)
    assert y.shape == shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape


def test_a_rest_is_not_kept_alive() -> None:
    y = fake_quantize_mx(torch.randn(3, 5), {-1: 32})
    assert y.untyped_storage().nbytes() == 15 * 4 and y.stride() == (5, 1)


@pytest.mark.parametrize("sizes", [{-1: 4}, {-1: 3}, {0: 2, 1: 4}], ids=["four", "three", "two axes"])
def test_a_dynamic_last_dimension_is_never_fixed(sizes: dict[int, int]) -> None:
    """Two graphs at most: torch asks whether the result, cut back, is contiguous, which is whether the size divides."""
    torch._dynamo.reset()
    graphs = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(gm)
        return gm

    def step(x: Tensor) -> Tensor:
        return fake_quantize_mx(x, sizes, "e2m1") + fake_quantize_nvfp4(x, None, sizes)

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for columns in (8, 12, 17, 21, 24, 30, 35):
        x = values((6, columns), torch.float32)
        torch._dynamo.mark_dynamic(x, 1)
        assert_same_bits(compiled(x), step(x))
    assert len(graphs) <= 2


def blocks(x: Tensor, *args: Any, **more: Any) -> Tensor:
    return fake_quantize_blocks(x, {1: 4}, *args, **more)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: fake_quantize_mx(x, {2: 4}), r"`block_sizes` must name axes from -2 to 1: got axis 2 in \{2: 4\}"),
        (lambda x: fake_quantize_mx(x, {1: 4, -1: 4}), r"`block_sizes` must name each axis once: got \{1: 4, -1: 4\}"),
        (lambda x: fake_quantize_mx(x, {1: 0}), "`block_sizes` must hold sizes above 0: got 0"),
        (lambda x: fake_quantize_nvfp4(x, None, {1: -4}), "`block_sizes` must hold sizes above 0: got -4"),
        (lambda x: fake_quantize_mx(x, {}), "`block_sizes` must name an axis: got {}"),
        (lambda x: fake_quantize_mx(x[0, 0]), "`input` must have a dimension to cut into blocks: got a 0-d tensor"),
        (lambda x: fake_quantize_mx(x, {1: 4}, "e8m0"), "`element` must name an MX element: got 'e8m0'.*'int8'"),
        (lambda x: fake_quantize_mx(x, scale_rounding="up"), r"`scale_rounding` must be one of .*: got 'up'"),
        (lambda x: fake_quantize_mx(x.int()), "`input` must be a floating-point tensor: got Int"),
        (lambda x: fake_quantize_nvfp4(x, torch.ones(2)), r"`amax` of the tensor must have one element: got .*\(2,\)"),
        (lambda x: fake_quantize_nvfp4(x, -1.0), "`amax` must be at least 0: got -1.0"),
        (lambda x: fake_quantize_nvfp4(x, NAN), "`amax` must be at least 0: got nan"),
        (lambda x: blocks(x, amax=torch.ones(2, 3)), r"`amax` must have the shape .*, \(2, 2\).*got shape \(2, 3\)"),
        (lambda x: blocks(x, amax=torch.ones(1, 2, 2)), r"`amax` must have .*got shape \(1, 2, 2\)"),
        (lambda x: blocks(x, amax=torch.tensor([[1.0, -2.0]])), "`amax` must be at least 0: got -2.0"),
        (lambda x: blocks(x, 1), "`num_bits` must be from 2 to 16: got 1"),
        (lambda x: blocks(x, 17, unsigned=True), "`num_bits` must be from 1 to 16: got 17"),
        (lambda x: blocks(x, (8, 0)), r"`format` must name .*got \(8, 0\)"),
        (lambda x: blocks(x, (4, 3), unsigned=True), "`unsigned` must be False for a float"),
        (lambda x: blocks(x, scale_bits=8), "`scale_block_sizes` must go with an integer"),
        (lambda x: blocks(x, scale_bits=(4, 3), scale_block_sizes={1: 2}), "`scale_block_sizes` must go with an int"),
        (lambda x: blocks(x, scale_bits=8, scale_block_sizes={5: 2}), "`scale_block_sizes` must name axes .*axis 5"),
        (lambda x: blocks(x, scale_bits=17, scale_block_sizes={1: 2}), "`scale_bits` must be from 1 to 16: got 17"),
        (lambda x: blocks(x, tensor_amax=torch.ones(1)), "`tensor_amax` must go with float scales: got .*=None"),
    ],
)
def test_errors(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises((InvalidArgument, NotImplementedError), match=message):
        call(torch.zeros(2, 8))
