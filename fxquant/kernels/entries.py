"""The operators' own signatures after a launcher: each becomes one call of `affine`, `floating` or `amax`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.kernels import affine, amax, floating
from fxquant.kernels.affine import Qparams
from fxquant.kernels.launch import Launcher, NotServed, require
from fxquant.numerics.blocks import Element, IntegerGrid
from fxquant.numerics.formats import FLOAT_FORMATS, FloatFormat

_NO_ELEMENTS = "no kernel of the affine family has codes that are small floats"


def _per_tensor(
    launch: Launcher,
    x: Tensor,
    scale: Tensor | float,
    point: Tensor | int,
    low: int,
    high: int,
    *,
    rounding: str = "reciprocal",
    pass_through: bool = False,
    scale_gradient: float = 0.0,
    element: str | None = None,
    error_gradient: bool = True,
) -> Tensor:
    require(element is None, _NO_ELEMENTS)
    return affine.fake_quantize(launch, x, Qparams(scale, point, low, high, rounding))


def _per_channel(
    launch: Launcher,
    x: Tensor,
    scale: Tensor,
    point: Tensor,
    axis: int,
    low: int,
    high: int,
    *,
    rounding: str = "reciprocal",
    pass_through: bool = False,
    scale_gradient: float = 0.0,
    element: str | None = None,
    error_gradient: bool = True,
) -> Tensor:
    require(element is None, _NO_ELEMENTS)
    return affine.fake_quantize(launch, x, Qparams(scale, point, low, high, rounding, axis))


def _per_tensor_backward(
    launch: Launcher,
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    point: Tensor,
    low: int,
    high: int,
    *,
    rounding: str = "reciprocal",
    element: str | None = None,
) -> Tensor:
    require(element is None, _NO_ELEMENTS)
    return affine.backward(launch, grad, x, Qparams(scale, point, low, high, rounding))


def _per_channel_backward(
    launch: Launcher,
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    point: Tensor,
    axis: int,
    low: int,
    high: int,
    *,
    rounding: str = "reciprocal",
    element: str | None = None,
) -> Tensor:
    require(element is None, _NO_ELEMENTS)
    return affine.backward(launch, grad, x, Qparams(scale, point, low, high, rounding, axis))


def _quantize(
    launch: Launcher,
    x: Tensor,
    scale: Tensor | float,
    point: Tensor | int,
    low: int,
    high: int,
    dtype: torch.dtype = torch.int8,
    *,
    rounding: str = "divide",
) -> Tensor:
    return affine.quantize(launch, x, Qparams(scale, point, low, high, rounding), dtype)


def _quantize_channel(
    launch: Launcher,
    x: Tensor,
    scale: Tensor,
    point: Tensor,
    axis: int,
    low: int,
    high: int,
    dtype: torch.dtype = torch.int8,
    *,
    rounding: str = "divide",
) -> Tensor:
    return affine.quantize(launch, x, Qparams(scale, point, low, high, rounding, axis), dtype)


def _float(
    launch: Launcher, x: Tensor, scale: Tensor | None, format: str, seed: Tensor | None = None, *, saturate: bool = True
) -> Tensor:
    return floating.fake_quantize_float(launch, x, scale, format, seed, saturate)


def _quantize_float(
    launch: Launcher, x: Tensor, scale: Tensor | None, dtype: torch.dtype, *, saturate: bool = True
) -> Tensor:
    return floating.quantize_float(launch, x, scale, dtype, saturate)


def _mx(
    launch: Launcher,
    x: Tensor,
    seed: Tensor | None = None,
    *,
    axes: Sequence[int],
    sizes: Sequence[int],
    element: str,
    scale_rounding: str = "floor",
) -> Tensor:
    return floating.fake_quantize_mx(launch, x, seed, axes, sizes, element, scale_rounding)


def _blocks(launch: Launcher, x: Tensor, seed: Tensor | None = None, **static: Any) -> Tensor:
    return _blocks_amax(launch, x, None, None, seed, **static)


def _blocks_amax(
    launch: Launcher,
    x: Tensor,
    block_amax: Tensor | None,
    tensor_amax: Tensor | None,
    seed: Tensor | None = None,
    *,
    axes: Sequence[int],
    sizes: Sequence[int],
    element: str | None,
    quant_min: int,
    quant_max: int,
    scale_format: str | None = None,
    scale_bits: int = 0,
    scale_axes: Sequence[int] = (),
    scale_sizes: Sequence[int] = (),
) -> Tensor:
    require(seed is None, "no kernel rounds by chance")
    require(block_amax is None, "no kernel reads the largest magnitude of each block")
    require(not scale_bits, "no kernel quantizes scales by blocks of them")
    require(tensor_amax is None or scale_format is not None, "its amax has no use without float scales")
    grid = _element(element, quant_min, quant_max)
    return floating.fake_quantize_blocks(launch, x, tensor_amax, axes, sizes, grid, scale_format)


def _element(name: str | None, quant_min: int, quant_max: int) -> Element:
    if name is None:
        require(quant_min <= 0 < quant_max, "its codes do not hold 0 and something above")
        return IntegerGrid(quant_min, quant_max)
    require(name in FLOAT_FORMATS, f"no element is called {name!r}")
    return FLOAT_FORMATS[name]


def _tensor_quant(
    launch: Launcher, x: Tensor, reach: Tensor, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> Tensor:
    return amax.fake_tensor_quant(launch, x, reach, num_bits, unsigned, narrow_range)


def _scaled_float(launch: Launcher, x: Tensor, reach: Tensor | None, E: int = 4, M: int = 3) -> Tensor:
    return amax.scaled_float(launch, x, reach, _format(E, M))


def _format(exponent_bits: int, mantissa_bits: int) -> FloatFormat:
    for found in FLOAT_FORMATS.values():
        if (found.exponent_bits, found.mantissa_bits) == (exponent_bits, mantissa_bits):
            return found
    raise NotServed(f"no format has {exponent_bits} and {mantissa_bits} bits")


Entry = Callable[..., Tensor]

ENTRIES: dict[str, Entry] = {
    "fake_quantize_per_tensor_affine": _per_tensor,
    "fake_quantize_per_tensor_affine.tensor_qparams": _per_tensor,
    "fake_quantize_per_channel_affine": _per_channel,
    "fake_quantize_per_tensor_affine_backward": _per_tensor_backward,
    "fake_quantize_per_channel_affine_backward": _per_channel_backward,
    "quantize_per_tensor": _quantize,
    "quantize_per_tensor.tensor_qparams": _quantize,
    "quantize_per_channel": _quantize_channel,
    "fake_quantize_float": _float,
    "quantize_float": _quantize_float,
    "fake_quantize_mx": _mx,
    "fake_quantize_blocks": _blocks,
    "fake_quantize_blocks.amax": _blocks_amax,
    "fake_tensor_quant": _tensor_quant,
    "fake_tensor_quant.pass_through": _tensor_quant,
    "fake_tensor_quant_learnable": _tensor_quant,
    "scaled_float": _scaled_float,
    "scaled_float.pass_through": _scaled_float,
    "scaled_float_learnable": _scaled_float,
}
"""Op → its launch, with the launcher before the op's own arguments."""
