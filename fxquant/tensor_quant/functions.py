"""The autograd functions of ModelOpt's ``tensor_quant``, over `fxquant.ops.amax`.

``FakeTensorQuantFunction.apply(x, amax, 8, False, True)`` as there, with as few of the trailing arguments as wanted
(``apply`` takes no keywords); names, order and defaults are ModelOpt's. They trace under
``torch.compile(fullgraph=True)``, and ``symbolic`` writes native QuantizeLinear and DequantizeLinear for
``torch.onnx.export(dynamo=False)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.errors import ExportError
from fxquant.numerics import amax as numerics
from fxquant.numerics.formats import float_format
from fxquant.ops.amax import (
    fake_affine_tensor_quant,
    fake_tensor_quant,
    legacy_fake_tensor_quant,
    scaled_float,
    tensor_quant,
)
from fxquant.tensor_quant import symbolic
from fxquant.tensor_quant.symbolic import TorchScript, torch_script_operand

__all__ = [
    "FakeAffineTensorQuantFunction",
    "FakeTensorQuantFunction",
    "LegacyFakeTensorQuantFunction",
    "ScaledE4M3Function",
    "TensorQuantFunction",
    "fake_affine_tensor_quant",
    "fake_tensor_quant",
    "scaled_e4m3",
    "scaled_e4m3_abstract",
    "tensor_quant",
]


def _tensor(value: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.full((), value, dtype=dtype, device=like.device)


def scaled_e4m3(
    input: Tensor, amax: Tensor | float | None = None, E: int = 4, M: int = 3, *, check: bool = False
) -> Tensor:
    """Rounds to E4M3 (or another float format), scaled so that amax becomes its largest value: `scaled_float`."""
    return scaled_float(input, amax, E, M, check=check)


def scaled_e4m3_abstract(input: Tensor, amax: Tensor | None) -> Tensor:
    """What `scaled_e4m3` returns, without its values: an empty tensor like the input."""
    return torch.empty_like(input)


def _integer_symbolic(g: Any, x: Any, amax: Any, num_bits: int, unsigned: bool, narrow_range: bool) -> Any:
    operands = torch_script_operand(x), torch_script_operand(amax)
    return symbolic.integer(TorchScript(g), *operands, num_bits, unsigned, narrow_range)


class _Clipped(torch.autograd.Function):
    """Backward of everything with an amax: the gradient where |x| ≤ amax."""

    @staticmethod
    def save(ctx: Any, inputs: Tensor, amax: Tensor | float) -> Tensor:
        """Keeps what backward reads; a number becomes a tensor."""
        reach = _tensor(amax, inputs)
        ctx.save_for_backward(inputs, reach)
        return reach

    @staticmethod
    def backward(ctx: Any, grad_outputs: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Straight-through estimator with clipping; no gradient to amax."""
        inputs, amax = ctx.saved_tensors
        return numerics.clipped(grad_outputs, inputs, amax), None, None, None, None


class TensorQuantFunction(_Clipped):
    """Integer-valued codes and their scale: `fxquant.ops.amax.tensor_quant`.

    >>> TensorQuantFunction.apply(torch.tensor([-2.0, 0.3, 1.0]), torch.tensor(1.0), 4)
    (tensor([-7.,  2.,  7.]), tensor(7.))
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        amax: Tensor | float,
        num_bits: int = 8,
        unsigned: bool = False,
        narrow_range: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """(outputs, scale); ``outputs / scale`` dequantizes."""
        return tensor_quant(inputs, _Clipped.save(ctx, inputs, amax), num_bits, unsigned, narrow_range)

    @staticmethod
    def symbolic(
        g: Any, inputs: Any, amax: Any, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
    ) -> Any:
        """Refused: QuantizeLinear gives codes that a float layer cannot take."""
        raise ExportError(
            "TensorQuantFunction must not be in a model that is exported: its codes have no float form in ONNX. "
            "Use FakeTensorQuantFunction (TensorQuantizer with fake_quant=True)."
        )


class FakeTensorQuantFunction(_Clipped):
    """Quantized and dequantized with one rounding at the end: `fxquant.ops.amax.fake_tensor_quant`.

    >>> FakeTensorQuantFunction.apply(torch.tensor([-2.0, 0.3, 1.0]), torch.tensor(1.0), 4)
    tensor([-1.0000,  0.2857,  1.0000])
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        amax: Tensor | float,
        num_bits: int = 8,
        unsigned: bool = False,
        narrow_range: bool = True,
    ) -> Tensor:
        """The fake-quantized tensor."""
        return fake_tensor_quant(inputs, _Clipped.save(ctx, inputs, amax), num_bits, unsigned, narrow_range)

    @staticmethod
    def symbolic(
        g: Any, inputs: Any, amax: Any, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
    ) -> Any:
        """QuantizeLinear → DequantizeLinear with scale amax/B and zero point 0."""
        return _integer_symbolic(g, inputs, amax, num_bits, unsigned, narrow_range)


class LegacyFakeTensorQuantFunction(_Clipped):
    """`TensorQuantFunction`'s outputs divided by its scale: `fxquant.ops.amax.legacy_fake_tensor_quant`."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        amax: Tensor | float,
        num_bits: int = 8,
        unsigned: bool = False,
        narrow_range: bool = True,
    ) -> Tensor:
        """The fake-quantized tensor, rounded twice in float16 and bfloat16."""
        return legacy_fake_tensor_quant(inputs, _Clipped.save(ctx, inputs, amax), num_bits, unsigned, narrow_range)

    @staticmethod
    def symbolic(
        g: Any, inputs: Any, amax: Any, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
    ) -> Any:
        """As `FakeTensorQuantFunction.symbolic`."""
        return _integer_symbolic(g, inputs, amax, num_bits, unsigned, narrow_range)


class FakeAffineTensorQuantFunction(torch.autograd.Function):
    """Between a minimum and a maximum, with a zero point: `fxquant.ops.amax.fake_affine_tensor_quant`.

    >>> FakeAffineTensorQuantFunction.apply(torch.tensor([-2.0, 0.3, 1.0]), -1.0, 1.0, 4)
    tensor([-0.9333,  0.2667,  0.9333])
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, min_range: Tensor | float, max_range: Tensor | float, num_bits: int = 8
    ) -> Tensor:
        """The fake-quantized tensor."""
        low, high = _tensor(min_range, inputs), _tensor(max_range, inputs)
        ctx.save_for_backward(inputs, low, high)
        return fake_affine_tensor_quant(inputs, low, high, num_bits)

    @staticmethod
    def backward(ctx: Any, grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient where min ≤ x ≤ max."""
        return numerics.between(grad_outputs, *ctx.saved_tensors), None, None, None


class ScaledE4M3Function(torch.autograd.Function):
    """E4M3, or another small float format, scaled by amax and saturating: `fxquant.ops.amax.scaled_float`.

    >>> ScaledE4M3Function.apply(torch.tensor([0.3, 44.0, 1000.0]), None)
    tensor([3.1250e-01, 4.4000e+01, 4.4800e+02])
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, amax: Tensor | float | None, E: int = 4, M: int = 3) -> Tensor:
        """The rounded tensor."""
        reach = None if amax is None else _tensor(amax, inputs)
        ctx.save_for_backward(inputs, *([] if reach is None else [reach]))
        ctx.format = (E, M)
        return scaled_float(inputs, reach, E, M)

    @staticmethod
    def backward(ctx: Any, grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient where |x| ≤ amax, the format's largest value without amax."""
        inputs, *rest = ctx.saved_tensors
        amax = rest[0] if rest else None
        grad = numerics.scaled_float_clipped(grad_outputs, inputs, amax, float_format(ctx.format))
        return grad, None, None, None

    @staticmethod
    def symbolic(g: Any, inputs: Any, amax: Any = None, E: int = 4, M: int = 3) -> Any:
        """QuantizeLinear → DequantizeLinear with a float8e4m3fn (or float8e5m2) zero point."""
        reach = None if amax is None else torch_script_operand(amax)
        return symbolic.floating(TorchScript(g), torch_script_operand(inputs), reach, E, M)
