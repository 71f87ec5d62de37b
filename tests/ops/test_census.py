"""The census itself: 10⁸ values against torch, 10⁷ against onnxruntime, no bit and no code differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from tests.ops.census import (
    CODE_TYPES,
    DTYPES,
    FLOAT_POINTS,
    KINDS,
    Group,
    Row,
    census,
    formats,
    onnx_census,
    onnxruntime_session,
    table,
)

# Builds without a fused multiply-add round a product before a floating zero point is added to it, where torch's usual
# x86 kernels, which ours follow, round once.
FUSED = torch.backends.cpu.get_cpu_capability().startswith("AVX")
BEYOND_INT32 = 2e9


def differing(rows: Sequence[Row]) -> int:
    return sum(row.differing for row in rows if FUSED or row.kind != FLOAT_POINTS)


@pytest.mark.slow
def test_no_bit_differs_from_torch_in_1e8_values() -> None:
    rows = census(formats())
    print("\n" + table(rows))
    assert [(row.kind, row.dtype) for row in rows] == [(kind, dtype) for kind in KINDS for dtype in DTYPES]
    assert sum(row.values for row in rows) >= 10**8
    assert differing(rows) == 0, table(rows)


def test_no_bit_differs_from_torch_in_a_tenth_of_them() -> None:
    rows = census(formats()[::10], seed=1)
    assert sum(row.values for row in rows) >= 10**7
    assert differing(rows) == 0, table(rows)


def test_no_bit_differs_compiled() -> None:
    """One format, every kind and dtype in one graph, taken apart and fused by Inductor."""
    torch._dynamo.reset()
    rows = census(
        [form for form in formats() if (form.low, form.high, form.point) == (-8, 7, 3)],
        size=4,
        transform=lambda group: torch.compile(group, fullgraph=True),
    )
    assert sum(row.values for row in rows) >= 2 * 10**6
    assert differing(rows) == 0, table(rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_no_bit_differs_on_cuda(compiled: bool) -> None:
    torch._dynamo.reset()

    def transform(group: Group) -> Group:
        return torch.compile(group) if compiled else group

    rows = census(formats()[20:23] if compiled else formats()[::3], size=4, transform=transform, device="cuda")
    assert differing(rows) == 0, table(rows)


def test_the_census_counts_what_differs() -> None:
    """One value of every output with another sign, forward only."""

    def changed(group: Group) -> Group:
        def run(*args: Sequence[Tensor]) -> list[Tensor]:
            outputs = group(*args)
            for y in outputs:
                one = y.detach().view(-1)[3:4]
                one.copy_(-one)
            return outputs

        return run

    rows = census(formats()[50:51], transform=changed)
    assert [row.differing for row in rows if FUSED or row.kind != FLOAT_POINTS] == [1] * (16 if FUSED else 12)


def reference(model: onnx.ModelProto) -> Callable[[dict[str, Any]], Sequence[Any]]:
    evaluator = ReferenceEvaluator(model)
    return lambda feeds: evaluator.run(None, feeds)


def test_no_code_differs_from_onnxruntime_in_1e7_values() -> None:
    found = {
        name: onnx_census(
            kind, onnxruntime_session, calls=12, size=15000, reach=BEYOND_INT32 if kind.high < 16 else float("inf")
        )
        for name, kind in CODE_TYPES.items()
    }
    assert sum(values for values, _, _ in found.values()) >= 10**7
    assert {name: (codes, back) for name, (_, codes, back) in found.items() if codes or back} == {}


def test_no_code_differs_from_the_onnx_reference() -> None:
    found = {
        name: onnx_census(kind, reference, calls=6, size=300, reach=BEYOND_INT32) for name, kind in CODE_TYPES.items()
    }
    assert sum(values for values, _, _ in found.values()) >= 10**5
    assert {name: (codes, back) for name, (_, codes, back) in found.items() if codes or back} == {}


@pytest.mark.parametrize("name", ["int4", "uint4"])
def test_onnxruntime_does_not_saturate_4_bits_on_the_last_axis_beyond_int32(name: str) -> None:
    """Its defect, to be noticed when it goes: the standard saturates, and so do all its other paths."""
    _, codes, _ = onnx_census(CODE_TYPES[name], onnxruntime_session, calls=3, size=500)
    assert codes > 0
