"""Fake values computed once: what is remembered, what is not, and that nothing can be told from the first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fxquant.graph import fakes
from fxquant.graph.fakes import computed, memoized
from fxquant.ops import fake_quantize, qparams
from fxquant.ops.library import ARITHMETIC

aten = torch.ops.aten
STATIC = {"rounding": "divide"}


@pytest.fixture
def mode() -> FakeTensorMode:
    return FakeTensorMode(shape_env=ShapeEnv())


def fake(mode: FakeTensorMode, *size: int, **options: Any) -> Tensor:
    return mode.from_tensor(torch.empty(*size, **options))


def dynamic(mode: FakeTensorMode, *size: int) -> Tensor:
    """Of a batch that is not known."""
    kinds = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (len(size) - 1)]
    return mode.from_tensor(torch.empty(*size), symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))


def quantize(mode: FakeTensorMode, x: Tensor, quant_min: int = -128, **kwargs: Any) -> Tensor:
    scale, point = fake(mode, 1), fake(mode, 1, dtype=torch.int32)
    return computed(mode, fake_quantize.PER_TENSOR, (x, scale, point, quant_min, 127), kwargs or STATIC)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The operators that were really computed."""
    found: list[Any] = []
    key = fakes.result_of

    def counted(value: Any) -> Any:
        found.append(value)
        return key(value)

    monkeypatch.setattr(fakes, "result_of", counted)
    return found


def test_equal_operands_are_computed_once(mode: FakeTensorMode, calls: list[Any]) -> None:
    with memoized():
        first, second = quantize(mode, fake(mode, 4, 3)), quantize(mode, fake(mode, 4, 3))
    assert len(calls) == 1
    assert second is not first and second.untyped_storage()._cdata != first.untyped_storage()._cdata
    assert (second.shape, second.stride(), second.dtype, second.device) == ((4, 3), (3, 1), torch.float32, first.device)
    assert getattr(second, "fake_mode", None) is mode


@pytest.mark.parametrize(
    "other",
    [
        lambda m: quantize(m, fake(m, 4, 5)),
        lambda m: quantize(m, fake(m, 3, 4).t()),
        lambda m: quantize(m, fake(m, 8, 3)[4:]),
        lambda m: quantize(m, fake(m, 4, 3, dtype=torch.float16)),
        lambda m: quantize(m, fake(m, 4, 3), -127),
        lambda m: quantize(m, fake(m, 4, 3), rounding="reciprocal"),
        lambda m: quantize(m, dynamic(m, 4, 3)),
    ],
    ids=["size", "stride", "offset", "dtype", "number", "keyword", "symbol"],
)
def test_what_differs_is_computed_anew(other: Any, mode: FakeTensorMode, calls: list[Any]) -> None:
    with memoized():
        quantize(mode, fake(mode, 4, 3))
        found = other(mode)
    alone = other(mode)
    assert len(calls) == 2
    assert (found.stride(), found.dtype) == (alone.stride(), alone.dtype)


def test_numbers_that_compare_equal_are_told_apart(mode: FakeTensorMode) -> None:
    """``full(…, 1)``, ``full(…, 1.0)`` and ``full(…, True)`` have three dtypes."""
    with memoized():
        found = [computed(mode, aten.full.default, ([2], n), {"device": "cpu"}).dtype for n in (1, 1.0, True)]
    assert found == [torch.int64, torch.float32, torch.bool]


def test_several_results_stay_apart(mode: FakeTensorMode, calls: list[Any]) -> None:
    def ranges() -> tuple[Tensor, Tensor]:
        limits = fake(mode, 1), fake(mode, 1)
        return computed(mode, qparams.AFFINE_QPARAMS, (*limits, -128, 127, False), {})

    with memoized():
        first, (scale, point) = ranges(), ranges()
    assert len(calls) == 1 and isinstance(first, tuple)
    assert (scale.dtype, point.dtype) == (torch.float32, torch.int32)
    assert len({t.untyped_storage()._cdata for t in (*first, scale, point)}) == 4


def test_symbols_stay_symbols(mode: FakeTensorMode, calls: list[Any]) -> None:
    """The key holds the expression: two batches with one hint are two, and a hit has the operand's own."""
    one, two = dynamic(mode, 4, 3), dynamic(mode, 4, 3)
    with memoized():
        found = [quantize(mode, x) for x in (one, two, one, two)]
    batches = [x.shape[0].node.expr for x in found]  # type: ignore[attr-defined]
    assert batches == [x.shape[0].node.expr for x in (one, two, one, two)]  # type: ignore[attr-defined]
    if batches[0] != batches[1]:  # else the environment gave sizes of one hint one symbol
        assert len(calls) == 2
    assert all(x.shape[0].node.shape_env is mode.shape_env for x in found)  # type: ignore[attr-defined]
    assert not mode.shape_env.guards, "no size was looked at"  # type: ignore[union-attr]


def test_expressions_of_symbols_are_keys_too(mode: FakeTensorMode, calls: list[Any]) -> None:
    x = dynamic(mode, 4, 3)
    with mode:
        twice = torch.cat([x, x])
    with memoized():
        found = [quantize(mode, t) for t in (x, twice, x, twice)]
    assert len(calls) == 2
    assert [t.shape[0].node.expr for t in found] == [t.shape[0].node.expr for t in (x, twice, x, twice)]  # type: ignore[attr-defined]


def test_views_keep_their_memory(mode: FakeTensorMode, calls: list[Any]) -> None:
    x = fake(mode, 4, 3)
    with memoized():
        views = [computed(mode, aten.detach.default, (x,), {}) for _ in range(2)]
        views += [computed(mode, aten.transpose.int, (x, 0, 1), {}) for _ in range(2)]
    assert not calls
    assert {v.untyped_storage()._cdata for v in views} == {x.untyped_storage()._cdata}


def test_writes_return_what_they_wrote_to(mode: FakeTensorMode, calls: list[Any]) -> None:
    first, second, new = fake(mode, 1), fake(mode, 1), fake(mode, 1)
    with memoized():
        assert computed(mode, aten.copy_.default, (first, new), {}) is first
        assert computed(mode, aten.copy_.default, (second, new), {}) is second
    assert not calls


def test_sizes_that_data_decides_are_new_each_time(mode: FakeTensorMode) -> None:
    """The two are no two counts of one tensor, which torch remembers on the tensor."""
    with memoized():
        found = [computed(mode, aten.nonzero.default, (fake(mode, 4),), {}).shape[0] for _ in range(2)]
    assert found[0].node.expr != found[1].node.expr


def test_nothing_is_remembered_outside(mode: FakeTensorMode, calls: list[Any]) -> None:
    for _ in range(2):
        quantize(mode, fake(mode, 4, 3))
    assert not calls
    for _ in range(2):
        with memoized():
            quantize(mode, fake(mode, 4, 3))
    assert len(calls) == 2


def test_a_block_in_a_block_shares_the_memory(mode: FakeTensorMode, calls: list[Any]) -> None:
    with memoized():
        with memoized():
            quantize(mode, fake(mode, 4, 3))
        quantize(mode, fake(mode, 4, 3))
    assert len(calls) == 1


def test_another_mode_is_another_world(mode: FakeTensorMode, calls: list[Any]) -> None:
    other = FakeTensorMode()
    with memoized():
        found = [quantize(m, fake(m, 4, 3)) for m in (mode, other)]
    assert len(calls) == 2 and [x.fake_mode for x in found] == [mode, other]  # type: ignore[attr-defined]


def test_unknown_arguments_are_computed(mode: FakeTensorMode, calls: list[Any]) -> None:
    """A sparse operand, or an object without a form of its own, is no key."""
    assert fakes._key(mode, aten.relu.default, (object(),), {}) is None
    assert fakes._key(mode, aten.relu.default, (torch.eye(2).to_sparse(),), {}) is None
    with memoized(), pytest.raises(RuntimeError):
        computed(mode, aten.relu.default, (object(),), {})
    assert not calls


def test_no_operator_of_ours_takes_what_the_memory_cannot_hold() -> None:
    """All that passes insert has a key: schemas without writes or views, of tensors, numbers, strings and lists."""
    assert [op for op in ARITHMETIC if op._schema.returns and not fakes._is_functional(op)] == []
