"""Where a step's time goes: each product, integer or float, forward or backward, and all else, by torch's profiler.

A product is a call of a library, known by its operator and the shapes of its operands; those alike share a row. What is
no product is a kernel that the compiler generated (``loops``), or the rest: Python, reshapes, the loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from variants import Built

# Operators whose own time is a product's; those that call them (aten::linear) have little of their own.
INTEGER = ("aten::_int_mm", "onednn::qconv_pointwise", "onednn::qconv_prepack", "onednn::qlinear_pointwise")
FLOAT = (
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_convolution"),
    *("aten::convolution_backward", "aten::thnn_conv2d", "aten::_slow_conv2d_forward"),
    *("mkldnn::_linear_pointwise", "mkldnn::_convolution_pointwise", "aten::scaled_dot_product_attention"),
    *("aten::_scaled_dot_product_flash_attention_for_cpu",),
    *("aten::_scaled_dot_product_flash_attention_for_cpu_backward",),
)
LOOPS = "CompiledFxGraph"
HALVES = ("forward", "backward")


def where(built: Built, x: torch.Tensor, steps: int) -> list[dict[str, object]]:
    """Rows of ``half``, ``what``, ``kind`` ("integer", "float", "loops" or "rest"), ``calls`` a step, and ``share``.

    The share is of the time that one thread computes in forward and backward together; shares add up to 1.
    """
    model, step = built
    found: dict[tuple[str, str, str], Counter[str]] = {}
    for _ in range(steps):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as forward:
            loss = step(x).square().mean()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as backward:
            loss.backward()
        model.zero_grad()
        for half, profiled in zip(HALVES, (forward, backward), strict=True):
            add(found, half, profiled.key_averages(group_by_input_shape=True))
    return rows(found, steps)


def add(found: dict[tuple[str, str, str], Counter[str]], half: str, events: Iterable[Any]) -> None:
    """Adds what was profiled, by (half, what, kind)."""
    for event in events:
        what, kind = named(event.key, event.input_shapes)
        each = found.setdefault((half, what, kind), Counter())
        each["time"] += event.self_cpu_time_total
        each["calls"] += event.count if kind in ("integer", "float") else 0


def named(key: str, shapes: Iterable[Any]) -> tuple[str, str]:
    """What an event is called in the table, and its kind."""
    kind = "integer" if key in INTEGER else "float" if key in FLOAT else "loops" if LOOPS in key else "rest"
    if kind in ("loops", "rest"):
        return kind, kind
    sizes = ["x".join(map(str, shape)) for shape in shapes if isinstance(shape, (list, tuple)) and len(shape) > 1]
    return f"{key.split('::')[-1]} {' · '.join(size for size in sizes[:3] if size)}".rstrip(), kind


def rows(found: Mapping[tuple[str, str, str], Counter[str]], steps: int) -> list[dict[str, object]]:
    """The table, the largest share first."""
    total = sum(each["time"] for each in found.values()) or 1
    ordered = sorted(found.items(), key=lambda item: -item[1]["time"])
    return [
        {
            "half": half,
            "what": what,
            "kind": kind,
            "calls": round(each["calls"] / steps),
            "share": round(each["time"] / total, 4),
        }
        for (half, what, kind), each in ordered
    ]
