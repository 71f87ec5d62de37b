"""What all kernels share on the host: where a tensor lies in memory, how many threads, and who launches them."""

from __future__ import annotations

import ctypes
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fxquant.kernels.arguments import DTYPES

THREADS = 256
VECTOR_BYTES = 16
# Threads go on with the next chunk of the grid, so more blocks than these bring nothing but their own start.
_BLOCKS_PER_PROCESSOR = 32


class NotServed(Exception):
    """A call that no kernel serves; aten takes it. The message completes "aten computes this, because …"."""


class Launcher(Protocol):
    """Starts a kernel by name. Tests have one that runs the same kernels on the host."""

    def processors(self, device: torch.device) -> int:
        """Multiprocessors of the device."""
        ...

    def launch(self, family: str, kernel: str, blocks: int, arguments: ctypes.Structure, device: torch.device) -> None:
        """Queues ``kernel`` of ``cuda/<family>.cu``, ``blocks`` × `THREADS` threads, on the device's current stream."""
        ...


def require(condition: bool, reason: str) -> None:
    """Declines unless ``condition``."""
    if not condition:
        raise NotServed(reason)


def dtype_name(x: Tensor) -> str:
    """The dtype as kernel names have it."""
    found = DTYPES.get(x.dtype)
    if found is None:
        raise NotServed(f"kernels read {', '.join(map(str, DTYPES))}, and this is {x.dtype}")
    return found


def packed(x: Tensor) -> Tensor:
    """x, or where its elements do not lie densely, overlap or repeat, a copy in the same order of dimensions."""
    like = torch.empty_like(x)
    return x if like.stride() == x.stride() else like.copy_(x)


def laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """x with the strides of ``like``, which is `packed`: itself, or a copy."""
    return x if x.stride() == like.stride() else torch.empty_like(like, dtype=x.dtype).copy_(x)


class Channels(NamedTuple):
    """A dense tensor in memory order as [outer, ``channels``, ``inner``]."""

    channels: int
    inner: int


def channels_of(x: Tensor, axis: int) -> Channels:
    """Where ``axis`` of a `packed` tensor lies in memory.

    Of dimensions of size 1 the strides say nothing. A channel axis of size 1 is one channel of everything.
    """
    if x.shape[axis] == 1:
        return Channels(1, x.numel())
    return Channels(x.shape[axis], x.stride(axis))


def broadcast_axis(x: Tensor, scale: Tensor | None) -> int | None:
    """The axis of a scale that broadcasts along one; None for one scale, or none at all."""
    if scale is None or scale.numel() == 1:
        return None
    require(scale.dim() <= x.dim(), "its scale does not broadcast to the input")
    shape = [1] * (x.dim() - scale.dim()) + list(scale.shape)
    axes = [axis for axis, size in enumerate(shape) if size != 1]
    require(len(axes) == 1 and shape[axes[0]] == x.shape[axes[0]], "its scale varies along several axes")
    return axes[0]


def is_aligned(*tensors: Tensor) -> bool:
    """Whether every thread finds its 16 bytes of each tensor at a multiple of what it takes of that tensor.

    A tensor of bytes is taken in as many elements as the widest one, in fewer bytes; 16 suits them too.
    """
    return all(tensor.data_ptr() % VECTOR_BYTES == 0 for tensor in tensors)


def blocks_for(launcher: Launcher, device: torch.device, elements: int, itemsize: int) -> int:
    """Thread blocks for ``elements`` of ``itemsize`` bytes, 16 bytes a thread at a time."""
    chunks = -(-elements * itemsize // VECTOR_BYTES)
    return max(1, min(-(-chunks // THREADS), _BLOCKS_PER_PROCESSOR * launcher.processors(device)))


def same_device(x: Tensor, *others: Tensor | None) -> None:
    """Declines where a tensor lies on another device than x."""
    for other in others:
        require(other is None or other.device == x.device, "its tensors lie on different devices")
