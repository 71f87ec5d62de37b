"""cuda/arithmetic.cuh, compiled for the host, against fxquant.numerics bit for bit: specials, ten million values."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from fxquant.kernels import arguments
from fxquant.kernels.floating import block_element, float_grid
from fxquant.numerics import affine, blocks
from fxquant.numerics.blocks import MXINT8, Element, IntegerGrid
from fxquant.numerics.floating import round_to_float
from fxquant.numerics.formats import FLOAT_FORMATS, FloatFormat
from tests.kernels.host import address, assert_same_bits, random_bits, special_values

COUNT = 10_000_000  # random values a family; each of its parameter sets has an equal part
SCALES = (0.1, 1.0, 2.0**-7, 0.0123456789, 1e-30, 3.0e38, 2.0**-140, 0.0, -0.3, float("inf"), float("nan"))
INTEGER_POINTS, FRACTIONS = (0, 3, -128, 127), (0.0, 0.3, -7.75, 2.5, float("nan"))
RANGES = ((-128, 127), (0, 255), (-8, 7), (0, 1), (-32768, 32767))


def in_range(values: Tensor, seed: int) -> Tensor:
    """``values``, and as many about as large as what a quantizer sees."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([values, torch.randn(values.numel(), generator=generator) * 30])


def header(
    math: ctypes.CDLL,
    x: Tensor,
    scale: float,
    point: float,
    kind: int,
    codes: tuple[int, int],
    rounding: str,
    *,
    wrap: bool,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, values and clip mask by the header."""
    code, y, mask = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x, dtype=torch.uint8)
    math.affine(
        address(x),
        ctypes.c_int64(x.numel()),
        ctypes.c_float(scale),
        ctypes.c_double(point),
        kind,
        *map(ctypes.c_float, codes),
        int(rounding == "divide"),
        int(wrap),
        int(wide),
        *map(address, (code, y, mask)),
    )
    return code, y, mask.bool()


def check_per_tensor(math: ctypes.CDLL, x: Tensor, scale: float, point: int, codes: tuple[int, int], how: str) -> None:
    code, y, mask = header(math, x, scale, point, 0, codes, how, wrap=False)
    by = torch.tensor(scale), torch.tensor(point, dtype=torch.int32)
    assert_same_bits(code, affine.codes_per_tensor(x, *by, *codes, how))
    assert_same_bits(y, affine.fake_quantize_per_tensor(x, *by, *codes, how))
    assert torch.equal(mask, affine.clip_mask_per_tensor(x, *by, *codes, how))


def check_per_channel(
    math: ctypes.CDLL, x: Tensor, scale: float, point: Tensor, codes: tuple[int, int], how: str
) -> None:
    kind = {torch.float32: 1, torch.float16: 2}.get(point.dtype, 0)
    wide = how == "reciprocal" and kind > 0
    code, y, mask = header(math, x, scale, point.item(), kind, codes, how, wrap=how == "reciprocal", wide=wide)
    by = torch.tensor([scale]), point
    assert_same_bits(y, affine.fake_quantize_per_channel(x[None], *by, 0, *codes, how)[0])
    assert torch.equal(mask, affine.clip_mask_per_channel(x[None], *by, 0, *codes, how)[0])
    views = by[0].view(1, 1), point.view(1, 1)
    assert_same_bits(code, affine.codes_per_channel(x[None], *views, *codes, how)[0])


@pytest.mark.parametrize("how", ["reciprocal", "divide"])
def test_affine_specials(math: ctypes.CDLL, how: str) -> None:
    x = special_values()
    for scale in SCALES:
        for codes in RANGES:
            for point in INTEGER_POINTS:
                check_per_tensor(math, x, scale, point, codes, how)
                check_per_channel(math, x, scale, torch.tensor([point], dtype=torch.int32), codes, how)
            for fraction in FRACTIONS:
                check_per_channel(math, x, scale, torch.tensor([fraction]), codes, how)
                check_per_channel(math, x, scale, torch.tensor([fraction], dtype=torch.float16), codes, how)


@pytest.mark.parametrize("how", ["reciprocal", "divide"])
def test_affine_ten_million(math: ctypes.CDLL, how: str) -> None:
    cases = [(0.1, 0, (-128, 127)), (0.0123456789, 3, (0, 255)), (1e-3, -5, (-8, 7)), (2.0**-7, 0, (-32768, 32767))]
    for seed, (scale, point, codes) in enumerate(cases):
        x = in_range(random_bits(COUNT // 4 // len(cases), seed), seed)
        check_per_tensor(math, x, scale, point, codes, how)
        check_per_channel(math, x, scale, torch.tensor([point], dtype=torch.int32), codes, how)


def test_a_floating_zero_point_is_added_in_one_rounding(math: ctypes.CDLL) -> None:
    """The fused multiply-add of numerics, made of doubles, is the hardware's; of float16 there are two roundings."""
    x = in_range(random_bits(COUNT // 200, 9), 9)
    for dtype in (torch.float32, torch.float16):
        for scale, point in ((0.1, 0.3), (0.0123, -7.77), (1e-3, 100.001), (3.3e-5, 2.5)):
            check_per_channel(math, x, scale, torch.tensor([point]).to(dtype), (-128, 127), "reciprocal")


OVERFLOWS = [
    *((format, True) for format in FLOAT_FORMATS.values()),
    *((FLOAT_FORMATS[n], False) for n in ("e4m3", "e5m2")),
]


@pytest.mark.parametrize(("format", "saturate"), OVERFLOWS, ids=str)
def test_small_floats(math: ctypes.CDLL, format: FloatFormat, saturate: bool) -> None:
    x = torch.cat([special_values(), in_range(random_bits(COUNT // 16, 1), 2), torch.arange(-500, 500, 2.0**-7)])
    grid, y, bits = float_grid(format, saturate), torch.empty_like(x), torch.empty_like(x, dtype=torch.uint8)
    math.rounded(address(x), ctypes.c_int64(x.numel()), ctypes.byref(grid), address(y), address(bits))
    wanted = round_to_float(x, format, saturate=saturate)
    assert_same_bits(y, wanted)
    stored = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}.get(format.name)
    if stored is not None:
        known = ~wanted.isnan()
        assert torch.equal(bits[known], wanted.to(stored).view(torch.uint8)[known])
        assert bits.view(stored).to(torch.float32)[~known].isnan().all()


@pytest.mark.parametrize("name", ["half", "bfloat"])
def test_every_pattern_of_half_types(math: ctypes.CDLL, name: str) -> None:
    dtype = torch.float16 if name == "half" else torch.bfloat16
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    y = torch.empty(x.shape, dtype=torch.float32)
    getattr(math, f"widen_{name}")(address(x), ctypes.c_int64(x.numel()), address(y))
    assert_same_bits(y, x.to(torch.float32))


@pytest.mark.parametrize("name", ["half", "bfloat"])
def test_rounding_to_half_types(math: ctypes.CDLL, name: str) -> None:
    dtype = torch.float16 if name == "half" else torch.bfloat16
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(torch.float32)
    # All values, the middles between neighbours, and the floats next to those.
    middle = every + (torch.nextafter(every.to(dtype), torch.tensor(9e38).to(dtype)).to(torch.float32) - every) / 2
    ends = torch.tensor([-9e38, 9e38])
    near = [torch.nextafter(middle, end) for end in ends]
    x = torch.cat([special_values(), every, middle, *near, random_bits(COUNT // 4, 3)])
    y = torch.empty(x.shape, dtype=dtype)
    getattr(math, f"narrow_{name}")(address(x), ctypes.c_int64(x.numel()), address(y))
    assert_same_bits(y, x.to(dtype))


ELEMENTS: tuple[Element, ...] = (*FLOAT_FORMATS.values(), MXINT8, IntegerGrid(-8, 7), IntegerGrid(0, 15))


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
def test_elements_of_blocks(math: ctypes.CDLL, element: Element) -> None:
    x = torch.cat([special_values(), in_range(random_bits(COUNT // 40, 4), 5)])
    y, to = torch.empty_like(x), block_element(element)
    math.elements(address(x), ctypes.c_int64(x.numel()), ctypes.byref(to), address(y))
    # What is added to 0 has no sign of zero: a clamp at 0 may keep it or not.
    assert_same_bits(y + 0.0, blocks.round_to_element(x, element, None) + 0.0)


@pytest.mark.parametrize("rounding", ["floor", "ceil"])
@pytest.mark.parametrize("element", (*FLOAT_FORMATS.values(), MXINT8), ids=str)
def test_scales_of_mx(math: ctypes.CDLL, element: Element, rounding: str) -> None:
    amax = torch.cat([special_values(), random_bits(COUNT // 40, 6)]).abs()
    y, to = torch.empty_like(amax), block_element(element)
    unit = ctypes.c_float(2.0**-element.emax)
    math.mx_scales(
        address(amax), ctypes.c_int64(amax.numel()), ctypes.byref(to), unit, int(rounding == "ceil"), address(y)
    )
    assert_same_bits(y, blocks.mx_scale(amax, element, rounding))


@pytest.mark.parametrize("largest", [6.0 * 448, 1e-30, 1.7, 0.0, float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("element", [FLOAT_FORMATS["e2m1"], IntegerGrid(-8, 7)], ids=str)
def test_scales_in_a_float_format(math: ctypes.CDLL, element: Element, largest: float) -> None:
    amax = torch.cat([special_values(), random_bits(COUNT // 40, 7)])
    scales = FLOAT_FORMATS["e4m3"]
    y, to, grid = torch.empty_like(amax), block_element(element), float_grid(scales)
    math.quantized_scales(
        address(amax),
        ctypes.c_int64(amax.numel()),
        ctypes.c_float(largest),
        ctypes.c_float(element.max * scales.max),
        ctypes.byref(to),
        ctypes.byref(grid),
        address(y),
    )
    assert_same_bits(y, blocks._scale_by_tensor(amax, element, scales, torch.tensor(largest)))


def test_extremes_keep_nan(math: ctypes.CDLL) -> None:
    values = special_values()
    a, b = (grid.reshape(-1).contiguous() for grid in torch.meshgrid(values, values, indexing="ij"))
    least, largest = torch.empty_like(a), torch.empty_like(a)
    math.extremes(address(a), address(b), ctypes.c_int64(a.numel()), address(least), address(largest))
    assert_same_bits(least + 0.0, torch.minimum(a, b) + 0.0)
    assert_same_bits(largest + 0.0, torch.maximum(a, b) + 0.0)


@pytest.mark.parametrize("inner", [1, 9, 2**31 + 11, 2**40])
@pytest.mark.parametrize("channels", [1, 3, 1000, 2**33 + 1])
def test_places_of_elements_beyond_32_bits(math: ctypes.CDLL, channels: int, inner: int) -> None:
    """The 32-bit way and the 64-bit way, on both sides of where they change."""
    near = [base + offset for base in (0, 2**31, 2**32, 2**33, 2**45, channels * inner) for offset in range(-3, 4)]
    index = torch.tensor([at for at in near if 0 <= at < 2**63])
    channel, left = torch.empty_like(index), torch.empty_like(index)
    counts = map(ctypes.c_int64, (index.numel(), channels, inner))
    math.places(address(index), *counts, address(channel), address(left))
    assert channel.tolist() == [at // inner % channels for at in index.tolist()]
    assert left.tolist() == [inner - at % inner for at in index.tolist()]


def test_structs_are_as_large_as_in_c(math: ctypes.CDLL) -> None:
    math.size_of_grid.restype = math.size_of_element.restype = ctypes.c_int64
    assert math.size_of_grid() == ctypes.sizeof(arguments.FloatGrid)
    assert math.size_of_element() == ctypes.sizeof(arguments.Element)
