"""Launches of ``cuda/affine.cu``: what `fxquant.numerics.affine` computes, with the same bits.

The functions take the arguments of the operators that they stand for, with a launcher in front, and raise `NotServed`
for all that a kernel does not serve, invalid arguments included: aten's checks then speak.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxquant.kernels.arguments import NUMBER, POINTS, SCALES, AffineArgs
from fxquant.kernels.launch import (
    Channels,
    Launcher,
    blocks_for,
    channels_of,
    dtype_name,
    is_aligned,
    laid_out_as,
    packed,
    require,
    same_device,
)

_ROUNDINGS = ("reciprocal", "divide")
_INT32 = 2**31
_ONE_BYTE = {torch.int8: (-128, 127), torch.uint8: (0, 255)}


class Qparams(NamedTuple):
    """Scale and zero point as an operator got them: numbers, one-element tensors, or with ``axis`` vectors."""

    scale: Tensor | float
    point: Tensor | int
    quant_min: int
    quant_max: int
    rounding: str
    axis: int | None = None


def _check(x: Tensor, by: Qparams) -> None:
    require(by.rounding in _ROUNDINGS, f"no rounding is called {by.rounding!r}")
    require(-_INT32 <= by.quant_min <= by.quant_max < _INT32, "its codes are not a range within int32")
    if isinstance(by.scale, Tensor) and isinstance(by.point, Tensor):
        same_device(x, by.scale, by.point)
        require(by.scale.dtype in SCALES, f"kernels read no scale of {by.scale.dtype}")
        require(by.point.dtype in POINTS, f"kernels read no zero point of {by.point.dtype}")
        if by.axis is None:
            require(by.scale.numel() == 1 == by.point.numel(), "its scale or zero point has several elements")
            return
        require(0 <= by.axis < x.dim(), "it has no such axis")
        shape = (x.shape[by.axis],)
        require(by.scale.shape == shape == by.point.shape, "scale and zero point do not fit the axis")
    else:
        assert not isinstance(by.point, Tensor)
        require(by.quant_min <= by.point <= by.quant_max, "its zero point is no code")


class _Call:
    """Arguments of one launch. It holds the tensors that they point to."""

    def __init__(self, x: Tensor, by: Qparams) -> None:
        self.x, self.by = x, by
        self.kept: list[Tensor] = []
        self.args = AffineArgs(count=x.numel(), quant_min=by.quant_min, quant_max=by.quant_max, row=1)
        if isinstance(by.scale, Tensor) and isinstance(by.point, Tensor):
            self.point_to("scale", by.scale.contiguous())
            self.point_to("point", by.point.contiguous())
            self.args.scale_type, self.args.point_type = SCALES[by.scale.dtype], POINTS[by.point.dtype]
        else:
            self.args.scale_type = self.args.point_type = NUMBER
            self.args.scale_value, self.args.point_value = by.scale, by.point
        place = Channels(1, max(1, x.numel())) if by.axis is None else channels_of(x, by.axis)
        self.args.channels, self.args.inner = place
        self.suffix = f"{dtype_name(x)}_{by.rounding}"

    def point_to(self, field: str, tensor: Tensor) -> None:
        self.kept.append(tensor)
        setattr(self.args, field, tensor.data_ptr())

    def place(self) -> str:
        return "tensor" if self.by.axis is None else "channel"

    def start(self, launcher: Launcher, kernel: str, *elements: Tensor, blocks: int | None = None) -> None:
        """``elements``: the tensors that threads take by chunks."""
        if not self.x.numel():
            return
        self.args.aligned = is_aligned(*elements) and (self.args.row == 1 or self.args.row % _lanes(self.x) == 0)
        blocks = blocks or blocks_for(launcher, self.x.device, self.x.numel(), self.x.element_size())
        launcher.launch("affine", kernel, blocks, self.args, self.x.device)


def _lanes(x: Tensor) -> int:
    return 16 // x.element_size()


def fake_quantize(launcher: Launcher, x: Tensor, by: Qparams) -> Tensor:
    """`fxquant.ops.fake_quantize_per_tensor_affine` and ``…_per_channel_affine``."""
    _check(x, by)
    dtype_name(x)
    x = packed(x)
    y = torch.empty_like(x)
    call = _Call(x, by)
    call.point_to("x", x)
    call.point_to("out", y)
    call.start(launcher, f"fake_quantize_{call.suffix}_{call.place()}", x, y)
    return y


def backward(launcher: Launcher, grad: Tensor, x: Tensor, by: Qparams) -> Tensor:
    """Their gradient: ``grad`` where the code of x lies in the range, times 0 elsewhere."""
    _check(x, by)
    dtype_name(x)
    same_device(x, grad)
    require(grad.dtype == x.dtype and grad.shape == x.shape, "gradient and input differ in dtype or shape")
    grad = packed(grad)
    x = laid_out_as(x, grad)
    found = torch.empty_like(grad)
    call = _Call(x, by)
    for field, tensor in (("x", x), ("grad", grad), ("out", found)):
        call.point_to(field, tensor)
    call.start(launcher, f"backward_{call.suffix}_{call.place()}", x, grad, found)
    return found


def quantize(launcher: Launcher, x: Tensor, by: Qparams, dtype: torch.dtype) -> Tensor:
    """`fxquant.ops.quantize_per_tensor` and ``quantize_per_channel`` to int8 and uint8."""
    require(dtype in _ONE_BYTE, f"kernels write int8 and uint8, and this is {dtype}")
    low, high = _ONE_BYTE[dtype]
    require(low <= by.quant_min and by.quant_max <= high, "its range does not fit the dtype")
    _check(x, by)
    dtype_name(x)
    if by.axis is not None and isinstance(by.point, Tensor) and by.rounding == "divide":
        require(not by.point.is_floating_point(), "its zero point is floating")
    x = packed(x)
    code = torch.empty_like(x, dtype=dtype)
    call = _Call(x, by)
    call.point_to("x", x)
    call.point_to("out", code)
    call.start(launcher, f"quantize_{call.suffix}_{call.place()}", x, code)
    return code


def _plane_rows(x: Tensor, dim: int) -> tuple[int, list[int]]:
    """Bytes of a row of the mask of contiguous x, and the mask's shape."""
    require(-x.dim() <= dim < x.dim() and x.shape[dim] % 8 == 0, "its mask does not fill whole bytes")
    shape = list(x.shape)
    shape[dim] //= 8
    return shape[dim] * x.stride(dim), shape


def fake_quantize_with_mask(launcher: Launcher, x: Tensor, by: Qparams, dim: int = 0) -> tuple[Tensor, Tensor]:
    """`fake_quantize` per tensor, and where its gradient passes: bits as `fxquant.ops.saved.pack_planes` has them.

    x is read once. The size of ``dim`` must be a multiple of 8.
    """
    _check(x, by)
    dtype_name(x)
    require(by.axis is None, "a mask is packed for one scale only")
    x = x.contiguous()
    row, shape = _plane_rows(x, dim)
    y, mask = torch.empty_like(x), x.new_empty(shape, dtype=torch.uint8)
    call = _Call(x, by)
    call.args.row = row
    for field, tensor in (("x", x), ("out", y), ("mask", mask)):
        call.point_to(field, tensor)
    call.start(launcher, f"masked_{call.suffix}", x, y, mask)
    return y, mask


def backward_from_mask(launcher: Launcher, grad: Tensor, mask: Tensor, dim: int = 0) -> Tensor:
    """``grad · mask`` with the mask of `fake_quantize_with_mask`."""
    name = dtype_name(grad)
    same_device(grad, mask)
    grad, mask = grad.contiguous(), mask.contiguous()
    row, shape = _plane_rows(grad, dim)
    require(mask.dtype == torch.uint8 and list(mask.shape) == shape, "the mask does not fit the gradient")
    found = torch.empty_like(grad)
    call = _Call(grad, Qparams(1.0, 0, 0, 0, "divide"))
    call.args.row = row
    for field, tensor in (("grad", grad), ("mask", mask), ("out", found)):
        call.point_to(field, tensor)
    call.start(launcher, f"masked_backward_{name}", grad, found, mask)
    return found


def fake_quantize_with_range(launcher: Launcher, x: Tensor, by: Qparams) -> tuple[Tensor, Tensor, Tensor]:
    """`fake_quantize` per tensor, and the least and largest of x, float32 of shape [1]: one read of x.

    For a delayed scale, which does not depend on this batch's range. NaN where x has one; of nothing, (inf, −inf).
    """
    _check(x, by)
    dtype_name(x)
    require(by.axis is None, "a range is taken for one scale only")
    x = packed(x)
    y = torch.empty_like(x)
    blocks = blocks_for(launcher, x.device, x.numel(), x.element_size())
    # Every block writes its own; of nothing, nobody does.
    parts = x.new_empty((2, blocks), dtype=torch.float32)
    if not x.numel():
        parts[0], parts[1] = float("inf"), -float("inf")
    call = _Call(x, by)
    for field, tensor in (("x", x), ("out", y), ("range", parts)):
        call.point_to(field, tensor)
    call.start(launcher, f"ranged_{call.suffix}", x, y, blocks=blocks)
    return y, parts[0].amin().reshape(1), parts[1].amax().reshape(1)
