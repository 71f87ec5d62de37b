"""Launches of ``cuda/floating.cu``: small floats with one scale, a scale per channel, or a scale per block.

The bits are those of `fxquant.numerics.floating` and `fxquant.numerics.blocks`. As in `fxquant.kernels.affine`, what no
kernel serves is declined.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.kernels import arguments
from fxquant.kernels.arguments import BlockArgs, FloatArgs
from fxquant.kernels.launch import (
    Channels,
    Launcher,
    blocks_for,
    broadcast_axis,
    channels_of,
    dtype_name,
    is_aligned,
    packed,
    require,
    same_device,
)
from fxquant.numerics.blocks import MXINT8, Element
from fxquant.numerics.formats import FLOAT_FORMATS, FloatFormat

_MANTISSA = 23
_FLOAT8 = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


def float_grid(format: FloatFormat, saturate: bool = True) -> arguments.FloatGrid:
    """The numbers that rounding to a format needs: those of `fxquant.numerics.floating`."""
    overflow = arguments.SATURATE
    if not saturate and format.overflows:
        overflow = arguments.TO_INFINITY if format.has_infinity else arguments.TO_NAN
    lift = 2.0 ** (_MANTISSA - format.mantissa_bits)
    return arguments.FloatGrid(
        max=format.max,
        limit=format.max if overflow == arguments.SATURATE else 2.0 ** (format.emax + 1),
        lift=lift,
        lowest=lift * 2.0**format.emin,
        overflow=overflow,
        mantissa_bits=format.mantissa_bits,
        emin=format.emin,
    )


def block_element(element: Element) -> arguments.Element:
    """The same of what a block is made of."""
    if isinstance(element, FloatFormat):
        return arguments.Element(grid=float_grid(element), max=element.max)
    return arguments.Element(low=element.low, high=element.high, step=element.step, max=element.max, integer=1)


def _run(
    launcher: Launcher, kernel: str, x: Tensor, scale: Tensor | None, grid: arguments.FloatGrid, out: Tensor
) -> None:
    axis = broadcast_axis(x, scale)
    place = Channels(1, max(1, x.numel())) if axis is None else channels_of(x, axis)
    scale = None if scale is None else scale.contiguous()
    args = FloatArgs(
        x=x.data_ptr(),
        out=out.data_ptr(),
        scale=None if scale is None else scale.data_ptr(),
        count=x.numel(),
        channels=place.channels,
        inner=place.inner,
        grid=grid,
        aligned=is_aligned(x, out),
    )
    name = f"{kernel}_{dtype_name(x)}_{'tensor' if axis is None else 'channel'}"
    if x.numel():
        blocks = blocks_for(launcher, x.device, x.numel(), x.element_size())
        launcher.launch("floating", name, blocks, args, x.device)


def _check_scale(x: Tensor, scale: Tensor | None) -> None:
    dtype_name(x)
    same_device(x, scale)
    require(scale is None or scale.dtype == torch.float32, "kernels read float32 scales")
    broadcast_axis(x, scale)


def fake_quantize_float(
    launcher: Launcher, x: Tensor, scale: Tensor | None, format: str, seed: Tensor | None, saturate: bool
) -> Tensor:
    """`fxquant.ops.fake_quantize_float`."""
    require(seed is None, "no kernel rounds by chance")
    require(format in FLOAT_FORMATS, f"no format is called {format!r}")
    require(saturate or FLOAT_FORMATS[format].overflows, "its format always saturates")
    _check_scale(x, scale)
    x = packed(x)
    y = torch.empty_like(x)
    _run(launcher, "fake_quantize_float", x, scale, float_grid(FLOAT_FORMATS[format], saturate), y)
    return y


def quantize_float(launcher: Launcher, x: Tensor, scale: Tensor | None, dtype: torch.dtype, saturate: bool) -> Tensor:
    """`fxquant.ops.quantize_float`."""
    require(dtype in _FLOAT8, f"kernels write float8_e4m3fn and float8_e5m2, and this is {dtype}")
    _check_scale(x, scale)
    x = packed(x)
    code = torch.empty_like(x, dtype=dtype)
    _run(launcher, "quantize_float", x, scale, float_grid(FLOAT_FORMATS[_FLOAT8[dtype]], saturate), code)
    return code


def _lanes(x: Tensor, axes: Sequence[int], sizes: Sequence[int]) -> int:
    """Threads that share a block: blocks lie along the last axis, and 1 to 32 threads hold one exactly."""
    width = _width(x)
    require(len(axes) == 1 == len(sizes) and x.dim() > 0, "its blocks lie along several axes")
    require(axes[0] in (-1, x.dim() - 1), "its blocks do not lie along the last axis")
    size = sizes[0]
    require(size > 0 and x.shape[-1] % size == 0, "its blocks do not divide the last axis")
    lanes = size // width
    fits = lanes * width == size and lanes in (1, 2, 4, 8, 16, 32)
    require(fits, f"kernels take blocks of {width} elements times 1, 2, 4, …, 32 here, and these have {size}")
    return lanes


def _width(x: Tensor) -> int:
    """Elements in the 16 bytes that a thread takes."""
    return 16 // x.element_size()


def _blocks(launcher: Launcher, x: Tensor, lanes: int, args: BlockArgs) -> Tensor:
    like = torch.empty_like(x)
    x = x.contiguous()  # blocks lie along the last axis in memory too
    y = torch.empty_like(x)
    args.x, args.out, args.count, args.lanes = x.data_ptr(), y.data_ptr(), x.numel(), lanes
    args.aligned = is_aligned(x, y)
    if x.numel():
        blocks = blocks_for(launcher, x.device, x.numel(), x.element_size())
        launcher.launch("floating", f"blocks_{dtype_name(x)}", blocks, args, x.device)
    return y if y.stride() == like.stride() else like.copy_(y)


def fake_quantize_mx(
    launcher: Launcher,
    x: Tensor,
    seed: Tensor | None,
    axes: Sequence[int],
    sizes: Sequence[int],
    element: str,
    scale_rounding: str,
) -> Tensor:
    """`fxquant.ops.fake_quantize_mx` for blocks along the last axis that divide it."""
    require(seed is None, "no kernel rounds by chance")
    require(scale_rounding in ("floor", "ceil"), f"no rounding of scales is called {scale_rounding!r}")
    require(element == "int8" or element in FLOAT_FORMATS, f"no element is called {element!r}")
    dtype_name(x)
    found: Element = MXINT8 if element == "int8" else FLOAT_FORMATS[element]
    mode = arguments.MX_FLOOR if scale_rounding == "floor" else arguments.MX_CEIL
    args = BlockArgs(element=block_element(found), unit=2.0**-found.emax, mode=mode)
    return _blocks(launcher, x, _lanes(x, axes, sizes), args)


def fake_quantize_blocks(
    launcher: Launcher,
    x: Tensor,
    tensor_amax: Tensor | None,
    axes: Sequence[int],
    sizes: Sequence[int],
    element: Element,
    scale_format: str | None,
) -> Tensor:
    """`fxquant.ops.fake_quantize_blocks` and ``fake_quantize_nvfp4``, for the same blocks.

    The largest magnitude of the tensor, which scales of a float format need, is aten's reduction where it is not given.
    """
    dtype_name(x)
    lanes = _lanes(x, axes, sizes)
    args = BlockArgs(element=block_element(element), mode=arguments.FULL)
    if scale_format is not None:
        require(scale_format in FLOAT_FORMATS, f"no format is called {scale_format!r}")
        scales = FLOAT_FORMATS[scale_format]
        args.mode, args.scales, args.reach = arguments.FLOAT_SCALES, float_grid(scales), element.max * scales.max
        tensor_amax = _tensor_amax(x, tensor_amax)
        args.tensor_amax = tensor_amax.data_ptr()
    return _blocks(launcher, x, lanes, args)


def _tensor_amax(x: Tensor, given: Tensor | None) -> Tensor:
    if given is None:
        found = torch.linalg.vector_norm(x, float("inf")) if x.numel() else x.new_zeros(())
        return found.to(torch.float32)
    require(given.numel() == 1, "its amax has several elements")
    same_device(x, given)
    return given.to(torch.float32)
