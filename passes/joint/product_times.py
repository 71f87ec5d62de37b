"""How long a product takes in float and in integers: measured once per shape on a machine, and kept for all processes.

What is kept is what every later compile decides by, so that one machine chooses alike in each run and on each rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily  # private; tried on 2.13 and 2.15

from fxquant.ops.integer_matmul import integer_convolution
from fxquant.passes.joint.kept_times import kept
from fxquant.targets.cpu import integer_dot_support

aten = torch.ops.aten

# What is timed is cut along the batch to this many products of numbers, and no further than to so many rows.
_WORK = 2**26
_ROWS = 64
_ROUNDS = 7
_SECONDS = 0.02  # after which two rounds are enough


Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]  # stride, padding, dilation, groups


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A product as far as its time depends on it.

    Attributes:
        lhs: shape of the left operand, [M, K], or of a convolution's input.
        rhs: shape of the right operand, [K, N], or of a convolution's weight.
        dtype: of the float product.
        device: as text.
        signed: whether the left codes are int8.
        convolution: stride, padding, dilation and groups; None for a product of matrices.
    """

    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    dtype: torch.dtype
    device: str
    signed: bool
    convolution: Window | None = None


@dataclass(frozen=True)
class Times:
    """Seconds of one product, each the least of several in turn: of one thread's work on CPU."""

    floating: float
    integer: float


@functools.cache
def never_faster(device: str) -> str:
    """Why integers gain nothing on a device, whatever the product; empty where it takes a measurement to know.

    Without dot products of 8-bit integers torch's product of int8 matrices takes 20 to 35 times the float one's time
    (AVX2, a transformer's shapes).
    """
    if torch.device(device).type != "cpu" or integer_dot_support() is None:
        return ""
    return "integers are no faster on this CPU, which has no dot products of 8-bit integers (VNNI)"


@functools.lru_cache(maxsize=4096)
def times(problem: Problem) -> Times:
    """Both times, measured at the first call for a problem on a machine like this one (`kept_times`)."""
    found = kept(repr(problem), problem.device, lambda: list(dataclasses.astuple(_measured(problem))))
    return Times(*found)


def _measured(problem: Problem) -> Times:
    """Both times, of calls that take turns.

    On CPU what one thread computes is counted, not what passes meanwhile: with others on the machine, and threads that
    wait for one another, times that pass differ tenfold from call to call, and these by a tenth.
    """
    on_cpu = torch.device(problem.device).type == "cpu"
    with unset_fake_temporarily(), torch.no_grad(), _one_thread():
        calls = _calls(problem)
        for call in calls:  # the first call of a kernel builds it
            call()
        least = [float("inf")] * len(calls)
        started = time.thread_time()
        for done in range(_ROUNDS):
            for i, call in enumerate(calls):
                least[i] = min(least[i], _cpu_seconds(call) if on_cpu else _seconds(call))
            if done and time.thread_time() - started > _SECONDS:
                break
    return Times(*least)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _cpu_seconds(call: Callable[[], Tensor]) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started


def _seconds(call: Callable[[], Tensor]) -> float:
    torch.accelerator.synchronize()
    started = time.perf_counter()
    call()
    torch.accelerator.synchronize()
    return time.perf_counter() - started


def _calls(problem: Problem) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The float product and the integer one, on operands as the graph has them."""
    lhs = (rows_timed(problem), *problem.lhs[1:])
    code = torch.full(lhs, 3, dtype=torch.int8 if problem.signed else torch.uint8, device=problem.device)
    x = torch.full(lhs, 0.3, dtype=problem.dtype, device=problem.device)
    if problem.convolution is None:
        w = torch.full(problem.rhs[::-1], 3, dtype=torch.int8, device=problem.device)
        v = torch.full(problem.rhs[::-1], 0.3, dtype=problem.dtype, device=problem.device)
        return lambda: torch.mm(x, v.t()), lambda: torch._int_mm(code, w.t())
    stride, padding, dilation, groups = problem.convolution
    w = torch.full(problem.rhs, 3, dtype=torch.int8)
    v = torch.full(problem.rhs, 0.3, dtype=problem.dtype)
    zero, none = torch.zeros(1, dtype=torch.int32), [0] * len(stride)
    return (
        lambda: aten.convolution(x, v, None, stride, padding, dilation, False, none, groups),
        lambda: integer_convolution(code, w, zero, stride, padding, dilation, groups),
    )


def rows_timed(problem: Problem) -> int:
    """How many rows of a product, or images, `times` multiplies."""
    least = _ROWS if problem.convolution is None else 1
    return min(problem.lhs[0], max(least, _WORK // _work(problem)))


@functools.cache
def seconds_of_a_sweep() -> float:
    """Seconds per element of an elementwise float32 kernel on CPU that reads and writes memory, kept as `times` are."""

    def measured() -> list[float]:
        with unset_fake_temporarily(), torch.no_grad(), _one_thread():
            x = torch.zeros(2**20)
            out = torch.empty_like(x)
            return [min(_cpu_seconds(lambda: torch.neg(x, out=out)) for _ in range(_ROUNDS)) / x.numel()]

    return kept("a sweep", "cpu", measured)[0]


def places(problem: Problem) -> int:
    """How many numbers the rows, or images, that `times` multiplies result in."""
    rows = rows_timed(problem)
    if problem.convolution is None:
        return rows * problem.rhs[1]
    return rows * _places_of_an_image(problem) * problem.rhs[0]


def work(problem: Problem) -> int:
    """Multiply-adds of a product."""
    return problem.lhs[0] * _work(problem)


def _work(problem: Problem) -> int:
    """Multiply-adds of one row, or one image."""
    if problem.convolution is None:
        return max(1, math.prod(problem.rhs))
    return max(1, _places_of_an_image(problem) * math.prod(problem.rhs))


def _places_of_an_image(problem: Problem) -> int:
    assert problem.convolution is not None
    return math.prod(-(-size // step) for size, step in zip(problem.lhs[2:], problem.convolution[0], strict=True))
