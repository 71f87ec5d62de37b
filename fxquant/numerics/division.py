"""Divisions that every compiler rounds once.

Inductor's Triton multiplies by the reciprocal of a divisor that it sees to be constant, and CUDA's own kernels do so
where it is a plain number: two roundings. A reciprocal is, in Inductor of torch 2.11, the only division that its switch
for correct rounding leaves approximate.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Rounding = Literal["reciprocal", "divide"]
"""How a value is brought to codes: ONNX QuantizeLinear's ``x / scale``, or torch's ``x · (1 / scale)``."""

ROUNDINGS: tuple[str, ...] = get_args(Rounding)


def divide_by_number(tensor: Tensor, number: float) -> Tensor:
    """``tensor / number``: the divisor depends on the tensor, though only where the quotient is NaN anyway."""
    return tensor / torch.where(tensor != tensor, tensor, number)  # C++ has isnan for one number at a time


def reciprocal(tensor: Tensor) -> Tensor:
    """``1 / tensor``, as the division that it is."""
    return torch.full_like(tensor, 1.0) / tensor
