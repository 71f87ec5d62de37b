"""A linear layer or a convolution whose weight is integers, as a module: what `UseIntegerLayers` puts into a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import InvalidArgument
from fxquant.ops.int4 import pack_int4, unpack_int4
from fxquant.ops.integer_matmul import widest_exact_code
from fxquant.ops.quantize import QUANTIZE_TENSOR

SATURATES = 2**15  # where pairs of products are added in 16 bits


@dataclass(frozen=True)
class Window:
    """How a convolution moves over its input, one number for each dimension after the channels."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class Epilogue:
    """What follows a product in its kernel: a clamp from ``low`` to ``high``, by which ReLU is one from 0 on."""

    low: float = -math.inf
    high: float = math.inf

    def __call__(self, value: Tensor) -> Tensor:
        """As an operator of torch."""
        return value if self == Epilogue() else value.clamp(self.low, self.high)

    @property
    def post_op(self) -> tuple[str, list[float]]:
        """As oneDNN names it."""
        if self == Epilogue():
            return "none", []
        return ("relu", []) if self == Epilogue(0.0) else ("hardtanh", [self.low, self.high])


class IntegerLayer(nn.Module):
    """``y = (Σ (code − zero_point) · weight) · (input_scale · scale) + bias`` of uint8 codes, by oneDNN.

    With an output grid the result is codes of the next layer, ``round(clamp(y) / output_scale) + output_zero_point``.
    Products are exact and added up exactly in int32. Where the CPU adds pairs of them in 16 bits, codes are multiplied
    in two halves, ``code = 2 · (code >> 1) + (code & 1)``, which these hold.

    A linear layer is a convolution of one by one over a row of pixels: its kernel alone takes its weight from another
    tensor than a constant of the compiled graph.

    Attributes:
        weight: int8 codes ``[out, in / groups, …]``; of 4 bits, uint8 ``[out, bytes]`` with two codes in each.
        scale: float32 ``[out]``. bias: float32 ``[out]`` or None.
        output_scale, output_zero_point: float32 and int32 numbers, or None where the result is float.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    output_scale: Tensor | None
    output_zero_point: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        *,
        window: Window | None,
        largest: int,
        packs: bool = False,
    ) -> None:
        """``window`` is None for a linear layer; ``largest``: of the input's codes; ``packs``: 4-bit weights."""
        super().__init__()
        self.shape, self.window, self.largest, self.packs = tuple(codes.shape), window, largest, packs
        self.epilogue = Epilogue()
        self.register_buffer("weight", pack_int4(codes.flatten(1)) if packs else codes.contiguous())
        self.register_buffer("scale", scale.expand(codes.shape[0]).contiguous())
        self.register_buffer("bias", bias)
        self.register_buffer("output_scale", None)
        self.register_buffer("output_zero_point", None)
        self._ready()

    def give_codes(self, scale: Tensor, zero_point: Tensor, epilogue: Epilogue) -> None:
        """From now on the result is codes."""
        self.epilogue, self.output_scale, self.output_zero_point = epilogue, scale, zero_point
        self._ready()

    def is_as(self, other: IntegerLayer) -> bool:
        """Whether both compute the same float values, and none codes."""
        mine, its = ((each.output_scale is None, each.window, each.packs, each.largest) for each in (self, other))
        states = self.state_dict(), other.state_dict()
        same = mine == its and mine[0] and states[0].keys() == states[1].keys()
        return same and all(torch.equal(value, states[1][name]) for name, value in states[0].items())

    def codes(self) -> Tensor:
        """The weight's codes, int8, in the layer's shape."""
        return unpack_int4(self.weight, math.prod(self.shape[1:])).reshape(self.shape) if self.packs else self.weight

    def extra_repr(self) -> str:
        """Sizes, bits, and what the result is."""
        window = "" if self.window is None else f", {self.window}"
        result = "float32" if self.output_scale is None else "codes"
        return f"{list(self.shape)}, {4 if self.packs else 8} bits{window} → {result}"

    def forward(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """``codes``: uint8, channels second, in a linear layer last; ``scale`` and ``zero_point`` are theirs."""
        x = self._as_picture(codes)
        if self._halved:
            upper = self._products(x >> 1, scale * 2, zero_point >> 1, self.bias, in_kernel=False)
            y = self.epilogue(upper + self._products(x & 1, scale, zero_point & 1, None, in_kernel=False))
            if self.output_scale is not None:
                grid = (self.output_scale, self.output_zero_point, 0, 255, torch.uint8)
                y = QUANTIZE_TENSOR(y, *grid, rounding="divide")
        else:
            y = self._products(x, scale, zero_point, self.bias, in_kernel=self.output_scale is not None)
        if self.window is None:
            return y.permute(0, 2, 3, 1).reshape(*codes.shape[:-1], self.shape[0])
        return y.squeeze(2) if len(self.shape) == 3 else y

    def _as_picture(self, codes: Tensor) -> Tensor:
        if self.window is None:
            return codes.reshape(1, 1, -1, self.shape[1]).permute(0, 3, 1, 2)
        return codes.unsqueeze(2) if len(self.shape) == 3 else codes

    def _products(
        self, x: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, *, in_kernel: bool
    ) -> Tensor:
        step, point = self._numbers if in_kernel else (1.0, 0)
        post_op, numbers = self.epilogue.post_op if in_kernel else ("none", [])
        result = (step, point, torch.uint8 if in_kernel else torch.float32, post_op, numbers, "")
        weight = (self._packed, self.scale, self._points)
        return torch.ops.onednn.qconv_pointwise.tensor(x, scale, zero_point, *weight, bias, *self._where, *result)

    def _ready(self) -> None:
        """What is made of the state: the weight as oneDNN's kernel has it, numbers of the output grid."""
        codes, window = self.codes(), self.window
        widest = widest_exact_code()
        if widest == 0:
            raise InvalidArgument(
                "a converted model must run on a CPU whose integer kernels torch has: got none in this build of torch, "
                f"{torch.__version__}. Use export_onnx."
            )
        # int(): −128 has no absolute value in int8.
        most = max(abs(int(end)) for end in codes.aminmax()) if codes.numel() else 0
        self._halved = self.largest > widest and 2 * self.largest * most >= SATURATES
        if window is None:
            codes, window = codes[:, :, None, None], Window((1, 1), (0, 0), (1, 1), 1)
        elif codes.dim() == 3:
            codes = codes.unsqueeze(2)
            window = Window((1, *window.stride), (0, *window.padding), (1, *window.dilation), window.groups)
        self._where = (list(window.stride), list(window.padding), list(window.dilation), window.groups)
        # Any zero point but 0, so that the kernel is one that knows them.
        self._packed = torch.ops.onednn.qconv_prepack(codes.contiguous(), self.scale, 1.0, 1, *self._where)
        self._points = torch.zeros(self.shape[0], dtype=torch.int32)
        if self.output_scale is not None and self.output_zero_point is not None:
            self._numbers = float(self.output_scale), int(self.output_zero_point)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._ready()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerLayer:
        found = fn(torch.zeros(1))
        if found.device.type != "cpu" or found.dtype != torch.float32:
            raise InvalidArgument(
                f"a converted model must stay on the CPU, in float32 where it is not integers: got {found.dtype} on "
                f"{found.device}. For other runtimes use export_onnx."
            )
        super()._apply(fn, recurse)
        self._ready()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without oneDNN's copy of the weight, which no file holds."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_packed", "_points")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._ready()
