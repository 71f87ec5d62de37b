"""The operators of trained ranges, for the checks of every op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxquant.ops.learned import LEARNED_SCALE, LEARNED_START, LEARNED_ZERO_POINT
from tests.ops.cases import Case

FLOOR = 2.0**-20


def state(x: Tensor, *numbers: float) -> Tensor:
    return torch.tensor(numbers, device=x.device)


def _scale(method: str, limits: tuple[int, int], point: float | None) -> Callable[[Tensor], tuple[Any, ...]]:
    def args(x: Tensor) -> tuple[Any, ...]:
        zero_point = None if point is None else state(x, point)
        return (state(x, 0.3), zero_point, method, *limits, point is None, FLOOR)

    return args


def _start(method: str, axis: int | None, symmetric: bool, how: str) -> Callable[[Tensor], tuple[Any, ...]]:
    def args(x: Tensor) -> tuple[Any, ...]:
        first = torch.full((1 if axis is None else x.shape[axis],), 0.1, device=x.device)
        return (x, first, None if symmetric else first * 0, axis, method, -7, 7, symmetric, FLOOR, "mse", how)

    return args


_PLAIN = {"grads": ("parameter",), "elementwise": False, "takes_x": False, "dtypes": (torch.float32,)}
CASES = [
    *(
        Case(f"learned scale, {method}, {point}", LEARNED_SCALE, _scale(method, (0, 15), point), **_PLAIN)
        for method in ("lsq", "pact", "tqt")
        for point in (None, 8.0)
    ),
    Case(
        "learned zero point",
        LEARNED_ZERO_POINT,
        lambda x: (state(x, -0.4), state(x, 0.1), 0, 15),
        grads=("offset", "scale"),
        elementwise=False,
        takes_x=False,
        dtypes=(torch.float32,),
    ),
    *(
        Case(
            f"learned start, {method}, {how}",
            LEARNED_START,
            _start(method, axis, axis is not None, how),
            grads=(),
            elementwise=False,
            fuses=False,
            takes_x=False,
        )
        for method, axis, how in (("lsq", 1, "resolve"), ("tqt", None, "extend"), ("lsq_plus", None, "follow"))
    ),
]
