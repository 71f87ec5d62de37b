"""State of ranges that are trained, as ops: scale and zero point of parameters, and what these start with.

Internal to graphs (`fxquant.spec.ranges.learned`), as made by `fxquant.numerics.learned`, where the equations stand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.numerics import learned
from fxquant.numerics.learned import Grid, How, Init, Method
from fxquant.ops.library import define


def _grid(a: Any) -> Grid:
    return Grid(a.method, a.quant_min, a.quant_max, a.symmetric, a.floor)


def _scale(
    parameter: Tensor,
    zero_point: Tensor | None,
    method: Method,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    floor: float,
) -> Tensor:
    return learned.scale_of(parameter, zero_point, Grid(method, quant_min, quant_max, symmetric, floor))


def _scale_backward(a: Any, grad: Tensor) -> dict[str, Tensor]:
    return {"parameter": learned.scale_backward(grad, a.parameter, a.zero_point, _grid(a))}


def _point(offset: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    return learned.point_of(offset, scale, quant_min, quant_max)


def _point_backward(a: Any, grad: Tensor) -> dict[str, Tensor]:
    offset, scale = learned.point_backward(grad, a.offset, a.scale)
    return {"offset": offset, "scale": scale}


def _start(
    x: Tensor,
    parameter: Tensor,
    second: Tensor | None,
    axis: int | None,
    method: Method,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    floor: float,
    init: Init,
    how: How,
) -> tuple[Tensor, Tensor]:
    grid = Grid(method, quant_min, quant_max, symmetric, floor)
    return learned.start(x, parameter, second, grid, axis, init, how)


def _start_fake(x: Tensor, parameter: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(parameter), torch.empty_like(parameter)


_GRID = "str method, int quant_min, int quant_max, bool symmetric, float floor"

LEARNED_SCALE = define(
    f"learned_scale(Tensor parameter, Tensor? zero_point, {_GRID}) -> Tensor", _scale, backward=_scale_backward
)
LEARNED_ZERO_POINT = define(
    "learned_zero_point(Tensor offset, Tensor scale, int quant_min, int quant_max) -> Tensor",
    _point,
    backward=_point_backward,
)
LEARNED_START = define(
    f"learned_start(Tensor input, Tensor parameter, Tensor? second, int? axis, {_GRID}, str init, str how) "
    "-> (Tensor, Tensor)",
    _start,
    fake=_start_fake,
)

LEARNED_OPS = (LEARNED_SCALE, LEARNED_ZERO_POINT, LEARNED_START)
