"""QAT written out by hand in plain eager torch: what the backends are held to. Nothing here uses fxquant."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = torch.finfo(torch.float32).eps
Qparams = tuple[Tensor, Tensor]


class FakeQuantize(torch.autograd.Function):
    """Divide, round half to even, clamp; the gradient passes where the code was in range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        code = torch.round(x / scale) + zero_point
        ctx.save_for_backward((code >= low) & (code <= high))
        steps = code.clamp(low, high) - zero_point
        # As in torch, one scale for a float64 tensor makes a float32 product, a scale per channel a float64 one.
        return ((steps.float() if scale.dim() == 1 else steps) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return torch.where(mask, grad, 0.0), None, None, None, None


class Activation(nn.Module):
    """Unsigned 8 bits, asymmetric; min and max follow by a moving average, updated before use."""

    def __init__(self, constant: float = 0.01) -> None:
        super().__init__()
        self.constant = constant
        self.range: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def _qparams(self, x: Tensor) -> Qparams:
        low, high = x.min().float().reshape(1), x.max().float().reshape(1)
        if self.range is None or not self.training:
            found = self.range or (low, high)
        else:
            was = self.range
            found = was[0] + self.constant * (low - was[0]), was[1] + self.constant * (high - was[1])
        if self.training:
            self.range = found
        low, high = found[0].clamp(max=0), found[1].clamp(min=0)
        scale = ((high - low) / 255).clamp(min=EPS)
        return scale, (0 - torch.round(low / scale)).clamp(0, 255)

    def forward(self, x: Tensor) -> Tensor:
        scale, zero_point = self._qparams(x.detach())
        self.scale = scale
        return FakeQuantize.apply(x, scale, zero_point, 0, 255)


def weight_scale(w: Tensor, bits: int = 8) -> Tensor:
    """One per slice of axis 0."""
    return (w.detach().flatten(1).abs().amax(1).float() / (2 ** (bits - 1) - 1)).clamp(min=2.0**-60)


def weight(w: Tensor, bits: int = 8) -> Tensor:
    """Signed narrow codes."""
    high = 2 ** (bits - 1) - 1
    scale = weight_scale(w, bits).view(-1, *[1] * (w.dim() - 1))
    return FakeQuantize.apply(w, scale, torch.zeros_like(scale), -high, high)


def bias(b: Tensor, input_scale: Tensor, w: Tensor) -> Tensor:
    """In units of the integer sum, where 32 bits hold it; straight through."""
    unit = input_scale * weight_scale(w)
    code = torch.round(b.detach() / unit)
    return b + torch.where(code.abs() < 2**31, code * unit - b.detach(), 0)


def normalized(x: Tensor, norm: nn.BatchNorm2d, input_scale: Tensor, w: Tensor) -> Tensor:
    """BatchNorm after a convolution; evaluated, it is a part of that, and what it adds a bias."""
    if norm.training:
        return norm(x)
    assert norm.running_mean is not None and norm.running_var is not None
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    added = norm.bias - norm.running_mean * factor
    shift = bias(added, input_scale, w * factor.view(-1, 1, 1, 1)) - added
    return norm(x) + shift.view(1, -1, 1, 1)


class OracleMlp(nn.Module):
    """`nets.Mlp` with its four sites."""

    def __init__(self, model: nn.Module, bits: int = 8) -> None:
        super().__init__()
        self.first, self.second, self.bits = model.first, model.second, bits
        self.inputs = nn.ModuleList([Activation(), Activation()])

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.inputs[0](x), weight(self.first.weight, self.bits), self.first.bias)
        x = self.inputs[1](torch.relu(x))
        return F.linear(x, weight(self.second.weight, self.bits), self.second.bias)


class OracleConvNet(nn.Module):
    """`nets.ConvNet`: quantized are the image, each conv unit's result, both operands and result of the sum, pool."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.image, self.unit, self.conv2, self.sum, self.pool = (Activation() for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        m = self.model
        x = F.conv2d(self.image(x), weight(m.conv1.weight), None, padding=1)
        x = self.unit(torch.relu(normalized(x, m.bn1, self.image.scale, m.conv1.weight)))
        shift = bias(m.conv2.bias, self.unit.scale, m.conv2.weight)
        y = self.conv2(F.conv2d(x, weight(m.conv2.weight), shift, padding=1))
        x = self.sum(torch.relu(y + x))
        x = self.pool(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return F.linear(x, weight(m.head.weight), m.head.bias)
