"""The layers that a table of costs measures: those of the nets that people deploy, and sizes between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fxquant.targets.costs import Size


@dataclass(frozen=True, kw_only=True)
class Conv:
    """A convolution of a square picture, batch one."""

    inputs: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    pixels: int  # of a side of its input

    @property
    def side(self) -> int:
        """Of its result."""
        return -(-self.pixels // self.stride)

    @property
    def size(self) -> Size:
        """As the table has it."""
        op = "depthwise" if self.groups > 1 else "pointwise" if self.kernel == 1 else "conv"
        depth = self.inputs // self.groups * self.kernel**2
        return Size(op=op, rows=self.side**2, depth=depth, columns=self.outputs, stride=self.stride)

    @property
    def is_chained(self) -> bool:
        """Whether a second one, with inputs and outputs the other way, can follow."""
        return self.stride == 1 and not self.is_first

    @property
    def is_first(self) -> bool:
        """Whether its few channels are those of a net's input."""
        return self.inputs <= 4

    @property
    def before(self) -> Conv:
        """A layer of its kind whose result it can read."""
        kernel = self.kernel if self.groups > 1 else 1
        return Conv(inputs=self.inputs, outputs=self.inputs, kernel=kernel, groups=self.groups, pixels=self.pixels)

    @property
    def turned(self) -> Conv:
        """The second one."""
        return Conv(
            inputs=self.outputs, outputs=self.inputs, kernel=self.kernel, groups=self.groups, pixels=self.pixels
        )


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product of ``rows`` × ``depth`` values and a weight, or of two activations in ``batches``."""

    rows: int
    depth: int
    columns: int
    batches: int = 0

    @property
    def size(self) -> Size:
        """As the table has it."""
        op = "matmul" if self.batches else "linear"
        return Size(op=op, rows=self.rows * max(1, self.batches), depth=self.depth, columns=self.columns)


# Channels at the narrow and at the wide end.
_POINTWISE = (
    *((16, 64), (16, 96), (24, 144), (32, 192), (40, 240), (64, 64), (64, 384), (96, 576), (112, 672), (128, 128)),
    *((160, 960), (192, 1152), (256, 256), (256, 1024), (320, 1280), (512, 2048)),
    *((8, 8), (8, 32)),
)
_GATES = ((8, 32), (4, 96), (6, 144), (10, 240), (20, 480), (28, 672), (48, 1152), (64, 960), (16, 256))
# Channels and pixels of a side.
_DENSE = (
    *((16, 112), (16, 56), (32, 56), (32, 28), (64, 112), (64, 56), (64, 28), (64, 14), (128, 28), (128, 14)),
    *((256, 14), (256, 7), (512, 7), (8, 64), (8, 16), (16, 16), (16, 8), (64, 8)),
)
_DEPTHWISE = (
    *((16, 112), (32, 112), (96, 112), (144, 56), (192, 28), (240, 28), (384, 14), (480, 14), (672, 14), (960, 7)),
    *((1152, 7), (8, 32), (8, 16), (16, 16), (64, 8)),
)
# Inputs, outputs, kernel, stride and pixels of a side.
_ENDED = (
    *((3, 16, 3, 2, 224), (3, 32, 3, 2, 224), (3, 64, 7, 2, 224), (3, 64, 3, 1, 112), (1, 32, 3, 1, 28)),
    *((3, 32, 3, 1, 48), (3, 96, 4, 4, 224), (3, 192, 16, 16, 224), (3, 768, 16, 16, 224), (3, 16, 3, 1, 32)),
    *((3, 3, 3, 1, 64), (3, 8, 3, 1, 224)),
    *((64, 128, 3, 2, 56), (128, 256, 3, 2, 28), (256, 512, 3, 2, 14), (64, 128, 1, 2, 56), (256, 512, 1, 2, 28)),
    (32, 64, 3, 2, 112),
)
# Depth and columns.
_WEIGHTS = (
    *((4, 4), (16, 16), (64, 64), (192, 192), (192, 768), (384, 384), (384, 1536), (768, 768), (768, 3072)),
    *((3072, 768), (1280, 1000), (2048, 1000), (1152, 256), (256, 10)),
)
_MOST = 600_000_000  # multiply-adds of a case: larger ones cost as much for each


def convolutions() -> Iterator[Conv]:
    """A picture's layers."""
    for narrow, wide in _POINTWISE:
        for pixels in (112, 56, 28, 14, 7):
            if 2_000 < narrow * wide * pixels**2 < _MOST // 4:
                yield Conv(inputs=narrow, outputs=wide, pixels=pixels)
    for narrow, wide in _GATES:
        yield Conv(inputs=wide, outputs=narrow, pixels=1)
    for channels, pixels in _DENSE:
        yield Conv(inputs=channels, outputs=channels, kernel=3, pixels=pixels)
    yield Conv(inputs=64, outputs=64, kernel=5, pixels=28)
    for inputs, outputs, kernel, stride, pixels in _ENDED:
        yield Conv(inputs=inputs, outputs=outputs, kernel=kernel, stride=stride, pixels=pixels)
    for channels, pixels in _DEPTHWISE:
        for kernel in (3, 5, 7):
            yield Conv(inputs=channels, outputs=channels, kernel=kernel, groups=channels, pixels=pixels)
        for kernel in (3, 5):
            yield Conv(inputs=channels, outputs=channels, kernel=kernel, groups=channels, pixels=pixels, stride=2)


def products() -> Iterator[Product]:
    """Linear layers, and the products of attention."""
    for depth, columns in _WEIGHTS:
        for rows in (1, 16, 128, 512):
            if rows * depth * columns <= _MOST:
                yield Product(rows=rows, depth=depth, columns=columns)
    for heads in (3, 12):
        for length in (16, 64, 128, 256):
            for width in (32, 64):
                yield Product(rows=length, depth=width, columns=length, batches=heads)
                yield Product(rows=length, depth=length, columns=width, batches=heads)


ADDS = (1_000, 10_000, 100_000, 1_000_000)
