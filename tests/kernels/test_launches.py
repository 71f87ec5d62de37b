"""The kernels themselves, all threads of small grids run on the host, against the operators' arithmetic bit for bit.

What runs is what CUDA tensors run: the functions of the dispatch key, the structs, the kernels' index arithmetic.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxquant.ops.amax  # noqa: F401  its operators
from fxquant.kernels import affine, arguments
from fxquant.kernels.affine import Qparams
from fxquant.kernels.dispatch import ENTRIES
from fxquant.kernels.launch import NotServed
from fxquant.numerics import planes
from fxquant.ops import library, saved
from tests.kernels.host import HostLauncher, assert_same_bits, random_bits, special_values

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDINGS = ("reciprocal", "divide")
few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def arithmetic(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return library.ARITHMETIC[getattr(getattr(torch.ops.fxquant, packet), overload or "default")]


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random values with specials strewn in."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 8
    flat, special = x.view(-1), special_values()
    picked = torch.randint(len(special), (flat.numel(),), generator=generator)
    return torch.where(torch.rand(flat.shape, generator=generator) < 0.2, special[picked], flat).view(shape).to(dtype)


@st.composite
def tensors(draw: st.DrawFn, dims: int = 4, least: int = 0) -> Tensor:
    """Any dtype, up to four dimensions, contiguous or not: shifted, permuted, strided, expanded."""
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=least, max_size=dims)))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))
    kind = draw(st.sampled_from(["plain", "shifted", "permuted", "strided", "expanded"]))
    if kind == "shifted":  # one element after an aligned address
        count = torch.Size(shape).numel()
        return values((count + 1,), dtype, seed)[1:].view(shape)
    x = values(shape, dtype, seed)
    if kind == "permuted" and shape:
        return x.permute(draw(st.permutations(range(len(shape)))))
    if kind == "strided" and shape:
        return x[..., ::2]
    if kind == "expanded" and shape:
        return x[:1].expand(draw(st.integers(1, 6)) if shape[0] else 0, *shape[1:])
    return x


qranges = st.sampled_from([(-128, 127), (0, 255), (-8, 7), (0, 1)])
scales = st.sampled_from([0.1, 1.0, 0.0123456789, 2.0**-7, 1e-30, 0.0, float("nan")])


def check(launcher: HostLauncher, name: str, *args: Any, kernel: str, **kwargs: Any) -> None:
    """The entry gives the bits, dtype and strides of the arithmetic, by way of a kernel whose name starts so."""
    launcher.launched.clear()
    found, wanted = ENTRIES[name](launcher, *args, **kwargs), arithmetic(name)(*args, **kwargs)
    assert_same_bits(found, wanted)
    names = [launched for _, launched, _ in launcher.launched]
    assert names == [] if wanted.numel() == 0 else len(names) == 1 and names[0].startswith(kernel)


@few
@given(x=tensors(), codes=qranges, scale=scales, point=st.integers(-8, 7), rounding=st.sampled_from(ROUNDINGS))
def test_numbers(launcher, x, codes, scale, point, rounding) -> None:  # type: ignore[no-untyped-def]
    point = min(max(point, codes[0]), codes[1])
    rest = (scale, point, *codes)
    check(launcher, "fake_quantize_per_tensor_affine", x, *rest, rounding=rounding, kernel="fake_quantize_")
    dtype = torch.int8 if codes[0] < 0 else torch.uint8
    check(launcher, "quantize_per_tensor", x, *rest, dtype, rounding=rounding, kernel="quantize_")


scale_dtypes = st.sampled_from([torch.float32, torch.bfloat16])
point_dtypes = st.sampled_from([torch.int32, torch.int64, torch.float32, torch.float16])


@few
@given(
    x=tensors(),
    codes=qranges,
    scale=scales,
    point=st.sampled_from([0, 1, -3, 2.75]),
    kinds=st.tuples(scale_dtypes, point_dtypes),
    rounding=st.sampled_from(ROUNDINGS),
)
def test_one_element_tensors(launcher, x, codes, scale, point, kinds, rounding) -> None:  # type: ignore[no-untyped-def]
    rest = (torch.tensor([scale]).to(kinds[0]), torch.tensor(point).to(kinds[1]), *codes)
    name = "fake_quantize_per_tensor_affine.tensor_qparams"
    check(launcher, name, x, *rest, rounding=rounding, kernel="fake_quantize_")
    grad = values(tuple(x.shape), x.dtype, 5)
    name = "fake_quantize_per_tensor_affine_backward"
    check(launcher, name, grad, x, *rest, rounding=rounding, kernel="backward_")
    dtype = torch.int8 if codes[0] < 0 else torch.uint8
    check(launcher, "quantize_per_tensor.tensor_qparams", x, *rest, dtype, rounding=rounding, kernel="quantize_")


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_zero_point_of_64_bits(launcher: HostLauncher, rounding: str) -> None:
    """Per tensor its low 32 bits count, per channel all of it does: the casts of numerics."""
    x, scale, point = values((1, 37), torch.float32), torch.tensor([0.1]), torch.tensor([2**32 + 3])
    name = "fake_quantize_per_tensor_affine.tensor_qparams"
    check(launcher, name, x, scale, point, -8, 7, rounding=rounding, kernel="fake_quantize_")
    name = "fake_quantize_per_channel_affine"
    check(launcher, name, x, scale, point, 0, -8, 7, rounding=rounding, kernel="fake_quantize_")


@few
@given(
    x=tensors(least=1),
    axis=st.integers(0, 3),
    codes=qranges,
    kinds=st.tuples(scale_dtypes, point_dtypes),
    rounding=st.sampled_from(ROUNDINGS),
)
def test_channels(launcher, x, axis, codes, kinds, rounding) -> None:  # type: ignore[no-untyped-def]
    axis = axis % x.dim()
    count = x.shape[axis]
    scale = (torch.rand(count, generator=torch.Generator().manual_seed(1)) + 0.01).to(kinds[0])
    point = torch.linspace(-3, 2.5, count).to(kinds[1])
    rest = (scale, point, axis, *codes)
    check(
        launcher,
        "fake_quantize_per_channel_affine",
        x,
        *rest,
        rounding=rounding,
        kernel="fake_quantize_",
        pass_through=True,
    )
    grad = values(tuple(x.shape), x.dtype, 5).movedim(0, -1).contiguous().movedim(-1, 0)
    name = "fake_quantize_per_channel_affine_backward"
    check(launcher, name, grad, x, *rest, rounding=rounding, kernel="backward_")
    if rounding == "divide" and point.is_floating_point():
        return
    dtype = torch.int8 if codes[0] < 0 else torch.uint8
    check(launcher, "quantize_per_channel", x, *rest, dtype, rounding=rounding, kernel="quantize_")


@few
@given(
    x=tensors(),
    format=st.sampled_from(["e4m3", "e5m2", "e3m2", "e2m3", "e2m1"]),
    saturate=st.booleans(),
    place=st.sampled_from(["none", "number", "channel"]),
)
def test_small_floats(launcher, x, format, saturate, place) -> None:  # type: ignore[no-untyped-def]
    scale = None if place == "none" else torch.tensor(0.37)
    if place == "channel" and x.dim():
        axis = x.dim() // 2
        shape = [1] * (x.dim() - axis)
        shape[0] = x.shape[axis]
        scale = torch.linspace(0.1, 2.0, shape[0]).view(shape)
    saturate = saturate or format not in ("e4m3", "e5m2")
    name = "fake_quantize_float"
    check(launcher, name, x, scale, format, saturate=saturate, kernel=f"{name}_")
    stored = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}.get(format)
    if stored is not None:
        found = ENTRIES["quantize_float"](launcher, x, scale, stored, saturate=saturate)
        wanted = arithmetic("quantize_float")(x, scale, stored, saturate=saturate)
        assert found.dtype == stored and found.shape == wanted.shape
        assert_same_bits(found.to(torch.float32), wanted.to(torch.float32))


amaxes = st.sampled_from([3.0, 0.0, 1e-9, 2.0**-24, -1.0, 1e38, float("inf"), float("nan")])


@few
@given(
    x=tensors(),
    reach=amaxes,
    bits=st.sampled_from([(8, False, True), (8, True, True), (4, False, False), (16, False, True), (1, True, False)]),
    format=st.sampled_from([(4, 3), (5, 2), (2, 1)]),
    kind=st.sampled_from([torch.float32, torch.bfloat16]),
    place=st.sampled_from(["none", "number", "channel"]),
)
def test_by_amax(launcher, x, reach, bits, format, kind, place) -> None:  # type: ignore[no-untyped-def]
    amax = torch.tensor([reach]).to(kind)
    if place == "channel" and x.dim():
        axis = x.dim() // 2
        shape = [1] * x.dim()
        shape[axis] = x.shape[axis]
        amax = torch.linspace(-0.1, 20, shape[axis]).view(shape).to(kind)
    for name in ("fake_tensor_quant", "fake_tensor_quant.pass_through", "fake_tensor_quant_learnable"):
        check(launcher, name, x, amax, *bits, kernel="amax_")
    for name in ("scaled_float", "scaled_float.pass_through"):
        check(launcher, name, x, None if place == "none" else amax, *format, kernel="amax_")
    check(launcher, "scaled_float_learnable", x, amax, *format, kernel="amax_")


@pytest.mark.parametrize("amax", [0.7, 1e-3, 2.9e-39, 3e38])
def test_a_million_values_by_amax(launcher: HostLauncher, amax: float) -> None:
    reach = torch.tensor(amax)
    x = torch.cat([random_bits(500_000, 1), torch.randn(500_000) * amax, special_values()])
    check(launcher, "fake_tensor_quant", x, reach, kernel="amax_")
    check(launcher, "scaled_float", x, reach, kernel="amax_")


@st.composite
def blocked(draw: st.DrawFn) -> tuple[Tensor, int]:
    """A tensor whose last axis is some blocks long, and their size: 1 to 32 threads' worth."""
    dtype = draw(st.sampled_from(DTYPES))
    size = 16 // dtype.itemsize * draw(st.sampled_from([1, 2, 4, 8, 16, 32]))
    rows, blocks, shifted = draw(st.integers(0, 5)), draw(st.integers(0, 4)), draw(st.booleans())
    x = values((rows * blocks * size + shifted,), dtype, draw(st.integers(0, 99)))
    x = x[int(shifted) :].view(rows, blocks * size)
    return (x.t().contiguous().t() if draw(st.booleans()) else x), size


@few
@given(
    given=blocked(),
    element=st.sampled_from(["e4m3", "e5m2", "e2m1", "e2m3", "int8"]),
    how=st.sampled_from(["floor", "ceil"]),
)
def test_mx(launcher, given, element, how) -> None:  # type: ignore[no-untyped-def]
    x, size = given
    static = {"axes": [-1], "sizes": [size], "element": element, "scale_rounding": how}
    check(launcher, "fake_quantize_mx", x, **static, kernel="blocks_")


@few
@given(
    given=blocked(), element=st.sampled_from([None, "e2m1"]), largest=st.sampled_from([None, 3.0, 0.0, float("nan")])
)
def test_blocks(launcher, given, element, largest) -> None:  # type: ignore[no-untyped-def]
    x, size = given
    static = {"axes": [1], "sizes": [size], "element": element, "quant_min": -8, "quant_max": 7}
    check(launcher, "fake_quantize_blocks", x, **static, kernel="blocks_")
    amax = None if largest is None else torch.tensor([largest])
    # The sign of a zero whose scale is 0 or NaN is the rounding's: e2m1 here, scales in e4m3.
    check(launcher, "fake_quantize_blocks.amax", x, None, amax, **static, scale_format="e4m3", kernel="blocks_")


@st.composite
def maskable(draw: st.DrawFn) -> tuple[Tensor, int]:
    """A tensor with a dimension that fills whole bytes of a mask, and that dimension."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    dim = draw(st.integers(0, len(shape) - 1))
    shape[dim] = 8 * draw(st.integers(0, 5))
    shifted = draw(st.booleans())
    flat = values((torch.Size(shape).numel() + shifted,), draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)))
    return flat[int(shifted) :].view(shape), dim


@few
@given(given=maskable(), codes=qranges, scale=scales, rounding=st.sampled_from(ROUNDINGS))
def test_masks(launcher, given, codes, scale, rounding) -> None:  # type: ignore[no-untyped-def]
    x, dim = given
    by = Qparams(torch.tensor(scale), torch.tensor(0, dtype=torch.int32), *codes, rounding)
    y, mask = affine.fake_quantize_with_mask(launcher, x, by, dim)
    name = "fake_quantize_per_tensor_affine.tensor_qparams"
    assert_same_bits(y, arithmetic(name)(x, *by[:4], rounding=rounding))
    wanted = library.ARITHMETIC[saved.CLIP_MASK](x, *by[:4], rounding=rounding)
    assert torch.equal(mask, planes.pack_planes(wanted, 1, dim))
    grad = values(tuple(x.shape), x.dtype, 6)
    found = affine.backward_from_mask(launcher, grad, mask, dim)
    assert_same_bits(found, affine.backward(launcher, grad, x, by))


@few
@given(x=tensors(), rounding=st.sampled_from(ROUNDINGS), finite=st.booleans())
def test_ranges(launcher, x, rounding, finite) -> None:  # type: ignore[no-untyped-def]
    x = torch.nan_to_num(x, 1.0) if finite else x
    y, low, high = affine.fake_quantize_with_range(launcher, x, Qparams(0.1, 3, 0, 255, rounding))
    assert_same_bits(y, arithmetic("fake_quantize_per_tensor_affine")(x, 0.1, 3, 0, 255, rounding=rounding))
    wanted = arithmetic("batch_min_max")(x)
    assert_same_bits(torch.stack([low, high]) + 0.0, torch.stack(wanted) + 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("count", [1, 3, 7, 8, 255, 4096, 70001])
def test_tails_and_large_grids(launcher: HostLauncher, count: int, shift: int, dtype: torch.dtype) -> None:
    """Threads that go round many times, and a last chunk of each length."""
    launcher.threads = 64
    x = values((count + shift,), dtype)[shift:]
    check(launcher, "fake_quantize_per_tensor_affine", x, 0.1, 0, -128, 127, kernel="fake_quantize_")
    by = torch.linspace(0.1, 1, count), torch.zeros(count, dtype=torch.int32)
    check(launcher, "fake_quantize_per_channel_affine", x, *by, 0, -128, 127, kernel="fake_quantize_")


def test_memory_format_is_kept(launcher: HostLauncher) -> None:
    x = values((2, 8, 3, 5), torch.float32).to(memory_format=torch.channels_last)
    by = Qparams(torch.rand(8) + 0.1, torch.zeros(8, dtype=torch.int32), -8, 7, "divide", 1)
    found = affine.fake_quantize(launcher, x, by)
    wanted = arithmetic("fake_quantize_per_channel_affine")(x, by[0], by[1], 1, -8, 7, rounding="divide")
    assert found.stride() == wanted.stride() == x.stride()
    assert_same_bits(found, wanted)
    assert affine.backward(launcher, x, x, by).stride() == x.stride()
    assert affine.quantize(launcher, x, by, torch.int8).stride() == x.stride()


def test_grids_are_bounded(launcher: HostLauncher) -> None:
    launcher.blocks_at_most = 1
    by = Qparams(0.1, 0, -8, 7, "divide")
    for count, blocks in ((1, 1), (1024, 1), (1025, 2), (10**6, 64)):  # 2 processors of the host, 32 blocks each
        affine.fake_quantize(launcher, torch.ones(count), by)
        assert launcher.launched[-1] == ("affine", "fake_quantize_f32_divide_tensor", blocks)


def test_no_element_is_left_unwritten(launcher: HostLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results start as garbage, not as zeros that look right."""
    real = torch.empty_like

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        return real(*args, **kwargs).fill_(-77)

    monkeypatch.setattr(torch, "empty_like", poisoned)
    for shape in ((1000,), (7, 13), (8, 3)):
        x = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)
        assert (affine.fake_quantize(launcher, x, Qparams(0.1, 0, -8, 7, "divide")) > -2).all()
        assert (affine.backward(launcher, x, x, Qparams(0.1, 0, -8, 7, "divide")) > -2).all()
        assert (affine.quantize(launcher, x, Qparams(0.1, 0, -8, 7, "divide"), torch.int8) > -9).all()


NUMBERS = (0.1, 0, -8, 7)
ONE, ZERO = torch.tensor([1.0]), torch.tensor([0], dtype=torch.int32)
X = torch.ones(4, 32)
BLOCKS = {"axes": [-1], "sizes": [16], "element": "e2m1", "quant_min": 0, "quant_max": 0}
DECLINED: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "kernels read torch.float32": ("fake_quantize_per_tensor_affine", (X.double(), *NUMBERS), {}),
    "no rounding is called 'up'": ("fake_quantize_per_tensor_affine", (X, *NUMBERS), {"rounding": "up"}),
    "its zero point is no code": ("fake_quantize_per_tensor_affine", (X, 0.1, 9, -8, 7), {}),
    "its codes are not a range": ("fake_quantize_per_tensor_affine", (X, 0.1, 0, 7, -8), {}),
    "kernels read no scale of torch.float64": (
        "fake_quantize_per_tensor_affine.tensor_qparams",
        (X, ONE.double(), ZERO, -8, 7),
        {},
    ),
    "kernels read no zero point of torch.int8": (
        "fake_quantize_per_tensor_affine.tensor_qparams",
        (X, ONE, ZERO.to(torch.int8), -8, 7),
        {},
    ),
    "lie on different devices": (
        "fake_quantize_per_tensor_affine.tensor_qparams",
        (X, ONE.to("meta"), ZERO, -8, 7),
        {},
    ),
    "several elements": (
        "fake_quantize_per_tensor_affine.tensor_qparams",
        (X, ONE.expand(2), ZERO, -8, 7),
        {},
    ),
    "no such axis": ("fake_quantize_per_channel_affine", (X, ONE, ZERO, -1, -8, 7), {}),
    "do not fit the axis": ("fake_quantize_per_channel_affine", (X, ONE, ZERO, 0, -8, 7), {}),
    "gradient and input differ": (
        "fake_quantize_per_tensor_affine_backward",
        (X.half(), X, ONE, ZERO, -8, 7),
        {},
    ),
    "kernels write int8 and uint8": ("quantize_per_tensor", (X, *NUMBERS, torch.int16), {}),
    "range does not fit the dtype": ("quantize_per_tensor", (X, 0.1, 0, -8, 300, torch.uint8), {}),
    "its zero point is floating": (
        "quantize_per_channel",
        (X, torch.ones(4), torch.ones(4), 0, -8, 7),
        {},
    ),
    "no kernel rounds by chance": ("fake_quantize_float", (X, None, "e4m3", ZERO), {}),
    "no format is called": ("fake_quantize_float", (X, None, "e9m9"), {}),
    "its format always saturates": ("fake_quantize_float", (X, None, "e2m1"), {"saturate": False}),
    "kernels read float32 scales": ("fake_quantize_float", (X, ONE.double(), "e4m3"), {}),
    "varies along several axes": ("fake_quantize_float", (X, X, "e4m3"), {}),
    "does not broadcast": ("fake_quantize_float", (X, X[None, None], "e4m3"), {}),
    "kernels write float8": ("quantize_float", (X, None, torch.int8), {}),
    "along several axes": ("fake_quantize_mx", (X,), {"axes": [0, 1], "sizes": [2, 2], "element": "e4m3"}),
    "not lie along the last axis": ("fake_quantize_mx", (X,), {"axes": [0], "sizes": [2], "element": "e4m3"}),
    "do not divide the last axis": ("fake_quantize_mx", (X,), {"axes": [1], "sizes": [20], "element": "e4m3"}),
    "and these have 2": ("fake_quantize_mx", (X,), {"axes": [1], "sizes": [2], "element": "e4m3"}),
    "no element is called": ("fake_quantize_mx", (X,), {"axes": [1], "sizes": [16], "element": "e9m9"}),
    "no rounding of scales": (
        "fake_quantize_mx",
        (X,),
        {"axes": [1], "sizes": [16], "element": "e4m3", "scale_rounding": "up"},
    ),
    "largest magnitude of each block": ("fake_quantize_blocks.amax", (X, ONE, None), BLOCKS),
    "no use without float scales": ("fake_quantize_blocks.amax", (X, None, ONE), BLOCKS),
    "scales by blocks of them": ("fake_quantize_blocks", (X,), {**BLOCKS, "scale_bits": 8}),
    "no such number of bits": ("fake_tensor_quant", (X, ONE, 17), {}),
    "kernels read no amax of torch.float64": ("fake_tensor_quant", (X, ONE.double()), {}),
    "no format has 7 and 7 bits": ("scaled_float", (X, ONE, 7, 7), {}),
    "do not hold 0": ("fake_quantize_blocks", (X,), {**BLOCKS, "element": None}),
}


@pytest.mark.parametrize("reason", DECLINED)
def test_what_no_kernel_serves_is_declined(launcher: HostLauncher, reason: str) -> None:
    name, args, kwargs = DECLINED[reason]
    with pytest.raises(NotServed) as found:
        ENTRIES[name](launcher, *args, **kwargs)
    assert reason in str(found.value)
    assert not launcher.launched


def test_masks_and_ranges_are_declined_too(launcher: HostLauncher) -> None:
    by = Qparams(torch.ones(4), torch.zeros(4, dtype=torch.int32), -8, 7, "divide", 0)
    for call in (affine.fake_quantize_with_mask, affine.fake_quantize_with_range):
        with pytest.raises(NotServed, match="for one scale only"):
            call(launcher, X, by)
    with pytest.raises(NotServed, match="whole bytes"):
        affine.fake_quantize_with_mask(launcher, X, Qparams(*NUMBERS, "divide"), 0)
    with pytest.raises(NotServed, match="does not fit the gradient"):
        affine.backward_from_mask(launcher, X, torch.zeros(4, 5, dtype=torch.uint8), 1)


@pytest.mark.parametrize("struct", [arguments.AffineArgs, arguments.FloatArgs, arguments.BlockArgs, arguments.AmaxArgs])
def test_structs_hold_no_surprise(struct: type[ctypes.Structure]) -> None:
    """Addresses and 64-bit counts first, so that C and Python pad alike."""
    wide = [ctypes.sizeof(kind) == 8 and kind in (ctypes.c_void_p, ctypes.c_int64) for _, kind, *_ in struct._fields_]
    assert wide == sorted(wide, reverse=True)
