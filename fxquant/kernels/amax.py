"""Launches of ``cuda/amax.cu``: the forward of what `fxquant.numerics.amax` computes, with the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.kernels.arguments import AmaxArgs
from fxquant.kernels.floating import float_grid
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
from fxquant.numerics.amax import code_range
from fxquant.numerics.formats import FloatFormat

_MAX_BITS = 16


def fake_tensor_quant(
    launcher: Launcher, x: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool
) -> Tensor:
    """`fxquant.ops.amax.fake_tensor_quant`."""
    require((1 if unsigned else 2) <= num_bits <= _MAX_BITS, "it has no such number of bits")
    lowest, bound = code_range(num_bits, unsigned, narrow_range)
    return _run(launcher, x, amax, AmaxArgs(lowest=lowest, bound=bound))


def scaled_float(launcher: Launcher, x: Tensor, amax: Tensor | None, format: FloatFormat) -> Tensor:
    """`fxquant.ops.amax.scaled_float`."""
    return _run(launcher, x, amax, AmaxArgs(grid=float_grid(format), floating=1))


def _run(launcher: Launcher, x: Tensor, amax: Tensor | None, args: AmaxArgs) -> Tensor:
    name = dtype_name(x)
    same_device(x, amax)
    if amax is not None:
        require(amax.is_floating_point() and amax.dtype != torch.float64, f"kernels read no amax of {amax.dtype}")
        amax = amax.to(torch.float32).contiguous()
        args.amax = amax.data_ptr()
    axis = broadcast_axis(x, amax)
    x = packed(x)
    y = torch.empty_like(x)
    place = Channels(1, max(1, x.numel())) if axis is None else channels_of(x, axis)
    args.x, args.out, args.count, args.aligned = x.data_ptr(), y.data_ptr(), x.numel(), is_aligned(x, y)
    args.channels, args.inner = place
    if x.numel():
        blocks = blocks_for(launcher, x.device, x.numel(), x.element_size())
        launcher.launch("amax", f"amax_{name}_{'tensor' if axis is None else 'channel'}", blocks, args, x.device)
    return y
