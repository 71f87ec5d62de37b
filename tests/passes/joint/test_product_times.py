"""Measuring a product: how often, in which order, on how much of it, and what is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxquant.passes.joint import product_times
from fxquant.passes.joint.product_times import Problem, Times, times

MATMUL = Problem(lhs=(8, 32), rhs=(32, 16), dtype=torch.float32, device="cpu", signed=False)


class Clock:
    """Time of one thread that passes as calls say: each of the float product's takes the next of ``floats``."""

    def __init__(self, floats: list[float], integers: list[float]) -> None:
        self.now, self.called = 0.0, ""
        self._takes = {"f": iter([0.0, *floats]), "i": iter([0.0, *integers])}  # the first calls are not timed

    def thread_time(self) -> float:
        return self.now

    def call(self, which: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            self.called += which
            self.now += next(self._takes[which])
            return torch.empty(0)

        return run


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Clock], Times]]:
    def measure(clock: Clock) -> Times:
        monkeypatch.setattr(product_times, "time", clock)
        monkeypatch.setattr(product_times, "_calls", lambda problem: (clock.call("f"), clock.call("i")))
        times.cache_clear()
        return times(MATMUL)

    yield measure
    times.cache_clear()


def test_fast_products_are_timed_seven_times_in_turns(measured: Callable[[Clock], Times]) -> None:
    clock = Clock([5e-4, 4e-4, 3e-4, 1e-4, 2e-4, 3e-4, 9e-4], [2e-4, 1e-4, 3e-4, 3e-4, 2e-4, 3e-4, 9e-4])
    found = measured(clock)
    assert clock.called == "fi" + "fi" * 7, "once to build the kernels"
    assert (found.floating, found.integer) == pytest.approx((1e-4, 1e-4)), "the least of each"


def test_slow_products_are_timed_twice(measured: Callable[[Clock], Times]) -> None:
    clock = Clock([0.5, 0.4], [0.1, 0.2])
    found = measured(clock)
    assert clock.called == "fi" * 3 and (found.floating, found.integer) == pytest.approx((0.4, 0.1))


def test_those_between_stop_when_the_time_is_up(measured: Callable[[Clock], Times]) -> None:
    """Rounds of 0.007 s: after the third, 0.021 s have passed."""
    clock = Clock([0.004] * 7, [0.003] * 7)
    measured(clock)
    assert clock.called == "fi" * 4


def test_threads_and_fake_mode_are_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool, bool]] = []

    def broken() -> Tensor:
        made = torch.ones(1)
        seen.append((torch.get_num_threads(), isinstance(made, FakeTensor), torch.is_grad_enabled()))
        raise RuntimeError("no kernel")

    monkeypatch.setattr(product_times, "_calls", lambda problem: (broken, broken))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with FakeTensorMode(), pytest.raises(RuntimeError, match="no kernel"):
            times(replace(MATMUL, lhs=(9, 32)))
        assert seen == [(1, False, False)] and torch.get_num_threads() == 3
        assert torch.is_grad_enabled()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("problem", "work"),
    [
        (MATMUL, 32 * 16),
        (replace(MATMUL, rhs=(32, 0)), 1),
        # 8 × 4 places of 16 sums of 4 · 3 · 3
        (replace(MATMUL, lhs=(2, 4, 8, 7), rhs=(16, 4, 3, 3), convolution=((1, 2), (1, 1), (1, 1), 1)), 32 * 16 * 36),
        (replace(MATMUL, lhs=(2, 8, 5), rhs=(8, 1, 3), convolution=((1,), (0,), (1,), 8)), 5 * 8 * 3),
    ],
    ids=["matrices", "nothing", "a strided convolution", "one in groups"],
)
def test_the_work_of_a_row_or_an_image(problem: Problem, work: int) -> None:
    assert product_times._work(problem) == work


@pytest.mark.parametrize(("rows", "timed"), [(10, 10), (64, 64), (1000, 131), (10**6, 131)])
def test_rows_beyond_the_work_are_cut(rows: int, timed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_times, "_WORK", 131 * 32 * 16 + 5)
    floating, integers = product_times._calls(replace(MATMUL, lhs=(rows, 32)))
    assert floating().shape == integers().shape == (timed, 16)


@pytest.mark.parametrize(("signed", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_operands_are_as_the_graph_has_them(signed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right ones turned, which is how weights lie in memory."""
    seen: list[Any] = []

    def product(x: Tensor, w: Tensor) -> Tensor:
        seen.append((x.dtype, w.dtype, tuple(x.shape), tuple(w.shape), w.stride()))
        return x

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(torch, "_int_mm", product)
    for call in product_times._calls(replace(MATMUL, signed=signed, dtype=dtype)):
        call()
    code = torch.int8 if signed else torch.uint8
    assert seen == [
        (dtype, dtype, (8, 32), (32, 16), (1, 32)),
        (code, torch.int8, (8, 32), (32, 16), (1, 32)),
    ]


def test_both_forms_of_a_grouped_convolution_multiply_alike() -> None:
    """27 products of 3 · 3 in integers, of 0.3 · 0.3 in float, in the middle."""
    window = ((1, 1), (1, 1), (1, 1), 2)
    problem = replace(MATMUL, lhs=(2, 6, 5, 5), rhs=(4, 3, 3, 3), convolution=window)
    floating, integers = (call() for call in product_times._calls(problem))
    assert floating.shape == integers.shape == (2, 4, 5, 5)
    assert float(integers[0, 0, 2, 2]) == 27 * 9 and float(floating[0, 0, 2, 2]) == pytest.approx(27 * 0.09)
