"""Extremes of tensors over all ranks of a process group."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import fx

aten = torch.ops.aten
Call = Callable[..., fx.Node]


def reduced(call: Call, lows: Sequence[fx.Node], highs: Sequence[fx.Node], group: str) -> tuple[list[fx.Node], ...]:
    """Minima and maxima over all ranks of a group, by one reduction::

        both = all_reduce(nan_to_num(cat(−lows, highs), inf), "max");  low_i = −both[i];  high_i = both[N + i]

    ``call`` makes a call of an operator. NaN counts as infinite, so that all ranks see that one met a non-finite value.
    """
    count, collectives = len(lows), torch.ops._c10d_functional
    negated = call(aten.neg.default, call(aten.cat.default, list(lows)))
    both = call(aten.cat.default, [negated, *highs])
    both = call(aten.nan_to_num.default, both, math.inf, math.inf, -math.inf)
    both = call(collectives.wait_tensor.default, call(collectives.all_reduce.default, both, "max", group))
    parts = [call(aten.slice.Tensor, both, 0, number, number + 1) for number in range(2 * count)]
    return [call(aten.neg.default, part) for part in parts[:count]], parts[count:]
