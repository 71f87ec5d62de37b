"""Trained quantizers: values against torch and numpy, gradients against formulas and straight-through autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.errors import InvalidArgument
from fxquant.numerics.learnable import power_of_two
from fxquant.ops.fake_quantize import fake_quantize_per_channel_affine, fake_quantize_per_tensor_affine
from fxquant.ops.learnable import (
    fake_quantize_learnable_per_channel_affine,
    fake_quantize_learnable_per_tensor_affine,
    fake_quantize_lsq_plus,
    fake_quantize_pact,
    fake_quantize_tqt,
    lsq_grad_factor,
)
from tests.ops.cases import Case
from tests.ops.cases_learnable import LEARNABLE_CASES, MODELS, decomposing
from tests.ops.oracle import FORMATS, assert_same_bits, hard_values

INF, NAN = float("inf"), float("nan")
LEARNABLE = fake_quantize_learnable_per_tensor_affine
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(function: Callable[..., Tensor], grad: Tensor, *leaves: Tensor) -> list[Tensor]:
    """The value and one gradient per leaf."""
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def trained(case: Case, x: Tensor) -> tuple[Any, ...]:
    """The arguments, each tensor with a gradient."""
    return tuple(a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in case.args(x))


# --- forward, against torch -------------------------------------------------------------------------------------


def zero_points(low: int, high: int) -> list[float]:
    middle = (low + high) // 2
    return [0.0, low, high, middle, middle + 0.5, middle + 1.5, -0.5, -0.3, low - 0.6, high + 0.5, 1e9, -1e9, INF, -INF]


@pytest.mark.parametrize("scale", [0.1, 0.25, 1e-6, 3e4])
@pytest.mark.parametrize("name", FORMATS)
def test_forward_equals_torch(name: str, scale: float) -> None:
    low, high = FORMATS[name]
    x = hard_values(scale, low, high)
    points = torch.tensor(zero_points(low, high))
    scales = torch.full_like(points, scale)
    for point in points.split(1):
        args = (x, scales[:1], point, low, high)
        assert_same_bits(
            fake_quantize_learnable_per_tensor_affine(*args),
            torch._fake_quantize_learnable_per_tensor_affine(*args),
        )
    channels = (x.expand(len(points), -1).contiguous(), scales, points, 0, low, high)
    assert_same_bits(
        fake_quantize_learnable_per_channel_affine(*channels),
        torch._fake_quantize_learnable_per_channel_affine(*channels),
    )


@pytest.mark.parametrize("rounding", ["reciprocal", "divide"])
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64], ids=str)
def test_forward_equals_fake_quantize_with_the_rounded_zero_point(dtype: torch.dtype, rounding: str) -> None:
    """So that a model gives the same numbers after its parameters are frozen."""
    low, high = -8, 7
    x = hard_values(0.3, low, high, dtype)
    points = torch.tensor([0.0, 2.5, -3.2, 9.0])
    scales = torch.tensor([0.3, 0.1, 1.7, 0.01])
    frozen = points.round().clamp(low, high).int()
    for i in range(len(points)):
        one = slice(i, i + 1)
        got = fake_quantize_learnable_per_tensor_affine(x, scales[one], points[one], low, high, rounding=rounding)
        expected = fake_quantize_per_tensor_affine(x, scales[one], frozen[one], low, high, rounding=rounding)
        assert_same_bits(got, expected)
    rows = x.repeat(4, 1)
    got = fake_quantize_learnable_per_channel_affine(rows, scales, points, 0, low, high, rounding=rounding)
    assert_same_bits(got, fake_quantize_per_channel_affine(rows, scales, frozen, 0, low, high, rounding=rounding))


# --- gradients, against torch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("point", [0.0, 3.0, 4.0, 6.3])
@pytest.mark.parametrize("factor", [1.0, 0.37])
def test_gradients_equal_torch_away_from_ties(point: float, factor: float) -> None:
    x, grad = random(5, 400).float() * 3, random(5, 400, seed=1).float()
    for channels in (False, True):
        count = 5 if channels else 1
        scale, zero_point = torch.linspace(0.1, 0.5, count), torch.full((count,), point)
        axis = (0,) if channels else ()

        def ours(x: Tensor, s: Tensor, z: Tensor, channels: bool = channels, axis: Any = axis) -> Tensor:
            kind = fake_quantize_learnable_per_channel_affine if channels else fake_quantize_learnable_per_tensor_affine
            return kind(x, s, z, *axis, -8, 7, factor)

        def theirs(x: Tensor, s: Tensor, z: Tensor, channels: bool = channels, axis: Any = axis) -> Tensor:
            kind = (
                "_fake_quantize_learnable_per_channel_affine"
                if channels
                else "_fake_quantize_learnable_per_tensor_affine"
            )
            return getattr(torch, kind)(x, s, z, *axis, -8, 7, factor)

        got, expected = (gradients(f, grad, x, scale, zero_point) for f in (ours, theirs))
        assert_same_bits(got[0], expected[0])
        assert_same_bits(got[1], expected[1])
        for mine, other in zip(got[2:], expected[2:], strict=True):
            torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-4)
        assert got[2].shape == scale.shape and got[3].shape == zero_point.shape


def test_one_rounding_where_torch_has_two() -> None:
    """x = 126.5 with an odd zero point: 126 + 1 is a code, and y is 126; torch's backward takes 127.5 for clamped."""
    leaves = torch.tensor([126.5]), torch.tensor([1.0]), torch.tensor([1.0])
    one = torch.ones(1)
    got = gradients(lambda *a: fake_quantize_learnable_per_tensor_affine(*a, -128, 127), one, *leaves)
    theirs = gradients(lambda *a: torch._fake_quantize_learnable_per_tensor_affine(*a, -128, 127), one, *leaves)
    assert [t.item() for t in got] == [126.0, 1.0, -0.5, 0.0]
    assert [t.item() for t in theirs] == [126.0, 0.0, 126.0, -1.0]


def test_one_zero_point_where_torch_has_two() -> None:
    """zero_point = 0.5 is 0 forward; torch's backward per tensor takes 1."""
    leaves = torch.tensor([500.0]), torch.tensor([0.5]), torch.tensor([0.5])
    one = torch.ones(1)
    got = gradients(lambda *a: fake_quantize_learnable_per_tensor_affine(*a, -128, 127), one, *leaves)
    theirs = gradients(lambda *a: torch._fake_quantize_learnable_per_tensor_affine(*a, -128, 127), one, *leaves)
    assert [t.item() for t in got] == [63.5, 0.0, 127.0, -0.5]
    assert [t.item() for t in theirs] == [63.5, 0.0, 126.0, -0.5]


def test_negative_zero_point_is_not_shifted() -> None:
    """torch's backward per tensor takes −3 for −4, as it truncates −4 + 0.5; its backward per channel does not."""
    # In two dimensions: torch's per-channel sums over no dimension give a gradient of the wrong shape.
    leaves = torch.tensor([[500.0]]), torch.tensor([0.5]), torch.tensor([-4.0])
    one = torch.ones(1, 1)
    got = gradients(lambda *a: fake_quantize_learnable_per_tensor_affine(*a, -128, 127), one, *leaves)
    theirs = gradients(lambda *a: torch._fake_quantize_learnable_per_tensor_affine(*a, -128, 127), one, *leaves)
    channel = gradients(lambda *a: torch._fake_quantize_learnable_per_channel_affine(*a, 0, -128, 127), one, *leaves)
    assert [t.item() for t in got] == [t.item() for t in channel] == [65.5, 0.0, 131.0, -0.5]
    assert [t.item() for t in theirs] == [65.5, 0.0, 130.0, -0.5]


@pytest.mark.parametrize("value", [INF, 1e30], ids=str)
def test_infinity_is_above_per_tensor_and_below_per_channel(value: float) -> None:
    """Forward is torch's, and here the gradient follows it: torch's takes "below" for both."""
    leaves = torch.tensor([value]), torch.tensor([1.0]), torch.tensor([1.0])
    one = torch.ones(1)
    got = gradients(lambda *a: fake_quantize_learnable_per_tensor_affine(*a, -128, 127), one, *leaves)
    assert [t.item() for t in got] == [126.0, 0.0, 126.0, -1.0]
    got = gradients(lambda *a: fake_quantize_learnable_per_channel_affine(*a, 0, -128, 127), one, *leaves)
    assert [t.item() for t in got] == [-129.0, 0.0, -129.0, -1.0]
    divide = gradients(
        lambda *a: fake_quantize_learnable_per_channel_affine(*a, 0, -128, 127, rounding="divide"), one, *leaves
    )
    assert [t.item() for t in divide] == [126.0, 0.0, 126.0, -1.0]


# --- values and gradients, against numpy and straight-through autograd --------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_float64_formula(name: str) -> None:
    op, formula, straight_through, values, numbers, kwargs = MODELS[name]
    x, dy = random(3, 700) * 2, random(3, 700, seed=1)
    parameters = [torch.tensor([v], dtype=torch.float64) for v in values]
    got = gradients(lambda *leaves: op(*leaves, *numbers, **kwargs), dy, x, *parameters)
    expected = formula(x.numpy(), dy.numpy(), *(p.numpy() for p in parameters), *numbers)
    assert torch.equal(got[0], torch.from_numpy(expected[0]))
    assert torch.equal(got[1], torch.from_numpy(expected[1]))
    assert 0 < (got[1] == 0).double().mean() < 1, "some of x is clamped, some is not"
    for mine, other in zip(got[2:], expected[2:], strict=True):
        assert mine.item() == pytest.approx(float(other), rel=1e-11, abs=1e-11)
    autograd = gradients(lambda *leaves: straight_through(*leaves, *numbers), dy, x, *parameters)
    for mine, other in zip(got, autograd, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_float32_and_halves(name: str, dtype: torch.dtype) -> None:
    """Values as numpy has them in float32, rounded once; gradients near its sums in float64."""
    op, formula, _, values, numbers, kwargs = MODELS[name]
    x = torch.cat([(random(900) * 2).to(dtype), hard_values(values[0], -8, 15, dtype)[12:]])
    dy = random(len(x), seed=1).to(dtype)
    parameters = [torch.tensor([v]) for v in values]
    got = gradients(lambda *leaves: op(*leaves, *numbers, **kwargs), dy, x, *parameters)
    expected = formula(x.float().numpy(), dy.double().numpy(), *(p.numpy() for p in parameters), *numbers)
    assert expected[0].dtype == np.float32
    assert_same_bits(got[0] + 0.0, torch.from_numpy(expected[0]).to(dtype) + 0.0)
    assert torch.equal(got[1], torch.from_numpy(expected[1]).to(dtype))
    for mine, other, parameter in zip(got[2:], expected[2:], parameters, strict=True):
        assert mine.dtype == parameter.dtype
        assert mine.item() == pytest.approx(float(other), rel=1e-4, abs=1e-2)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=12),
    scale=st.floats(2.0**-10, 2.0**10, width=32),
    other=st.floats(-20, 20, width=32),
    bits=st.integers(2, 8),
)
def test_every_code_is_on_the_grid(values: list[float], scale: float, other: float, bits: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x, s, o = torch.tensor(values), torch.tensor([scale]), torch.tensor([other])
    z = o.round().clamp(low, high)
    for y, base in ((LEARNABLE(x, s, o, low, high), -z * s), (fake_quantize_lsq_plus(x, s, o, low, high), o)):
        codes = (y.double() - base.double()) / s.double()
        assert (codes - codes.round()).abs().max() < 1e-2
    assert fake_quantize_pact(x, s, bits).min() >= 0
    exponent = s.log2()
    y = fake_quantize_tqt(x, exponent, bits)
    step = 2.0 ** (math.ceil(exponent.item()) - bits + 1)
    assert torch.equal(y / step, (x / step).round().clamp(low, high) + 0.0)


@pytest.mark.parametrize("name", [case.name for case in LEARNABLE_CASES if "channel" in case.name])
def test_channels_are_separate(name: str) -> None:
    """Per channel equals one per-tensor call a channel, with its sums apart."""
    case = next(case for case in LEARNABLE_CASES if case.name == name)
    x, dy = random(3, 4, 5).float(), random(3, 4, 5, seed=1).float()
    _, scale, other, *numbers = case.args(x)
    got = gradients(lambda *leaves: case.op(*leaves, *numbers, **case.kwargs), dy, x, scale, other)
    lsq = case.name.startswith("lsq")
    rest = numbers[:-1] if lsq else numbers[1:]
    single = next(c.op for c in LEARNABLE_CASES if c.name == ("lsq+" if lsq else "learnable per tensor"))
    for i in range(4):
        one = gradients(
            lambda *leaves, rest=rest: single(*leaves, *rest, **case.kwargs),
            dy[:, i],
            x[:, i],
            scale[i].detach(),
            other[i].detach(),
        )
        assert_same_bits(got[0][:, i], one[0])
        assert_same_bits(got[1][:, i], one[1])
        for mine, alone in zip(got[2:], one[2:], strict=True):
            torch.testing.assert_close(mine[i], alone, rtol=1e-5, atol=1e-5)


def test_a_vector_per_element() -> None:
    """1-D input per channel: nothing is summed."""
    x, scale, point = torch.tensor([9.0, -9.0, 0.1]), torch.tensor([0.5, 1.0, 0.25]), torch.zeros(3)
    got = gradients(lambda *a: fake_quantize_learnable_per_channel_affine(*a, 0, -4, 3), torch.ones(3), x, scale, point)
    assert torch.equal(got[2], torch.tensor([3.0, -4.0, (0.0 - 0.1) * 4]))
    assert got[3].tolist() == [-0.5, -1.0, 0.0]


# --- what is exact ----------------------------------------------------------------------------------------------


def test_gradcheck_where_everything_is_clamped() -> None:
    """There y is linear in scale, offset and alpha: finite differences agree."""
    x = torch.tensor([9.0, -9.0, 7.5], dtype=torch.float64, requires_grad=True)
    scale, other = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.3, 0.2))
    fixed = other.detach()
    assert torch.autograd.gradcheck(lambda a, s: LEARNABLE(a, s, fixed, -4, 3), (x, scale))
    assert torch.autograd.gradcheck(lambda a, s, o: fake_quantize_lsq_plus(a, s, o, -4, 3), (x, scale, other))
    for signed in (False, True):
        assert torch.autograd.gradcheck(lambda a, s, b=signed: fake_quantize_pact(a, s, 4, b), (x, scale))


@pytest.mark.parametrize("case", LEARNABLE_CASES, ids=str)
def test_gradient_is_linear_and_differentiable(case: Case) -> None:
    x = random(2, 3, 4)
    args = trained(case, x)
    leaves = [a for a in args if isinstance(a, Tensor)]
    y = case.op(*args, **case.kwargs)
    grad = random(2, 3, 4, seed=1).requires_grad_()
    found = torch.autograd.grad(y, leaves, grad, create_graph=True)
    twice = torch.autograd.grad(y, leaves, grad.detach() * 2, retain_graph=True)
    for once, double in zip(found, twice, strict=True):
        torch.testing.assert_close(once * 2, double)
    (second,) = torch.autograd.grad(found[1].sum(), grad)
    torch.testing.assert_close((second * grad).sum(), found[1].sum().double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_power_of_two(dtype: torch.dtype) -> None:
    bias = 1023 if dtype == torch.float64 else 127
    exponents = torch.arange(-bias - 60, bias + 60)
    got = power_of_two(exponents.to(dtype))
    expected = [math.ldexp(1.0, max(1 - bias, min(bias, e))) for e in exponents.tolist()]
    assert got.dtype == dtype and got.tolist() == expected
    ends = power_of_two(torch.tensor([INF, -INF, NAN], dtype=dtype))
    assert ends[:2].tolist() == [math.ldexp(1.0, bias), math.ldexp(1.0, 1 - bias)] and ends[2].isnan()


def test_tqt_scale_is_exact() -> None:
    """The threshold's ceiling, at whole numbers and beside them."""
    whole = torch.arange(-100.0, 100.0)
    for t in (whole, torch.nextafter(whole, whole + 1), torch.nextafter(whole, whole - 1)):
        for value in t:
            y = fake_quantize_tqt(torch.tensor([INF]), value, 8)
            assert y.item() == 127 * math.ldexp(1.0, math.ceil(value.item()) - 7)


# --- specials ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinities(dtype: torch.dtype) -> None:
    """NaN is clamped to the lower end, in value and in gradient."""
    one = torch.ones(3)
    x, s = torch.tensor([NAN, -INF, INF], dtype=dtype), torch.tensor([0.5])

    def columns(function: Callable[..., Tensor], *parameters: Tensor) -> list[list[float]]:
        """Value and gradients of each element by itself."""
        found = [gradients(function, one[:1], x[i : i + 1], *parameters) for i in range(3)]
        return [[t.item() for t in column] for column in zip(*found, strict=True)]

    assert columns(lambda *a: LEARNABLE(*a, -4, 3), s, torch.tensor([1.0])) == [
        [-2.5, -2.5, 1.0], [0, 0, 0], [-5, -5, 2], [-0.5] * 3,
    ]  # fmt: skip
    assert columns(lambda *a: fake_quantize_lsq_plus(*a, -4, 3), s, torch.tensor([0.25])) == [
        [-1.75, -1.75, 1.75], [0, 0, 0], [-4, -4, 3], [1, 1, 1],
    ]  # fmt: skip
    assert columns(lambda *a: fake_quantize_pact(*a, 2), s) == [[0, 0, 0.5], [0, 0, 0], [0, 0, 1]]
    assert columns(lambda *a: fake_quantize_pact(*a, 2, True), s) == [[-0.5, -0.5, 0.5], [0, 0, 0], [-1, -1, 1]]
    got = columns(lambda *a: fake_quantize_tqt(*a, 3), torch.tensor([2.0]))
    assert got[:2] == [[-4, -4, 3], [0, 0, 0]]
    assert got[2] == pytest.approx([-4 * math.log(2), -4 * math.log(2), 3 * math.log(2)])


def test_nan_parameters() -> None:
    x, one, nan = torch.tensor([1.0, 50.0]), torch.ones(1), torch.tensor([NAN])
    assert LEARNABLE(x, nan, one, -4, 3).isnan().all()
    assert torch.equal(LEARNABLE(x, one, nan, -4, 3), LEARNABLE(x, one, torch.tensor([-4.0]), -4, 3))
    assert fake_quantize_lsq_plus(x, one, nan, -4, 3).isnan().all()
    assert fake_quantize_pact(x, nan).isnan().all()
    assert fake_quantize_tqt(x, nan).isnan().all()


@pytest.mark.parametrize("case", LEARNABLE_CASES, ids=str)
def test_zeros_have_no_sign(case: Case) -> None:
    x = torch.tensor([[-0.0, -1e-9, 0.0]]).expand(2, 3)
    y = case.op(*case.args(x), **case.kwargs)
    assert not torch.signbit(y[y == 0]).any()


def test_empty_input() -> None:
    for x in (torch.empty(0, 3), torch.empty(2, 0)):
        scale, point = torch.ones(1), torch.zeros(1)
        got = gradients(lambda *a: LEARNABLE(*a, 0, 15), torch.empty_like(x), x, scale, point)
        assert got[0].shape == x.shape and got[2].tolist() == [0.0] and got[3].tolist() == [0.0]


# --- transforms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LEARNABLE_CASES, ids=str)
def test_opcheck(case: Case) -> None:
    args = trained(case, random(*case.shape).float())
    assert len(case.grads) == sum(isinstance(a, Tensor) for a in args)
    torch.library.opcheck(case.op, args, case.kwargs)


@pytest.mark.parametrize("case", LEARNABLE_CASES, ids=str)
def test_vmap(case: Case) -> None:
    """Over the input, over every tensor, and the gradient through it."""
    x = random(4, 2, 3, 5).float()
    _, *rest = case.args(x[0])
    tensors = [t.detach() for t in rest if isinstance(t, Tensor)]
    numbers = [v for v in rest if not isinstance(v, Tensor)]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return case.op(x, *parameters, *numbers, **case.kwargs)

    in_dims = (0, *(None for _ in tensors))
    assert_same_bits(torch.vmap(call, in_dims)(x, *tensors), torch.stack([call(s, *tensors) for s in x]))
    many = [torch.stack([t * (1 + 0.1 * i) for i in range(4)]) for t in tensors]
    each = torch.stack([call(s, *(m[i] for m in many)) for i, s in enumerate(x)])
    assert_same_bits(torch.vmap(call)(x, *many), each)
    dy = random(4, 2, 3, 5, seed=1)
    together = gradients(lambda *leaves: torch.vmap(call, in_dims)(*leaves), dy, x, *tensors)
    apart = [gradients(call, dy[i], x[i], *tensors) for i in range(4)]
    assert_same_bits(together[1], torch.stack([grads[1] for grads in apart]))
    for i in range(2, len(together)):
        torch.testing.assert_close(together[i], sum(grads[i] for grads in apart), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend: str) -> None:
    """Values and input gradients bit for bit; the sums add in another order."""
    x = torch.stack([hard_values(0.3, -8, 7)] * 3)[None]
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    for cases in (LEARNABLE_CASES[:5], LEARNABLE_CASES[5:]):

        def every(leaves: list[list[Tensor]], cases: list[Case] = cases) -> list[Tensor]:
            found = []
            for case, tensors in zip(cases, leaves, strict=True):
                numbers = [v for v in case.args(tensors[0]) if not isinstance(v, Tensor)]
                found.append(case.op(*tensors, *numbers, **case.kwargs))
            return found

        def run(function: Callable[..., list[Tensor]], cases: list[Case] = cases) -> list[tuple[Tensor, ...]]:
            # Leaves of their own: a sum of gradients would lose the sign of a zero.
            leaves = [
                [t.detach().clone().requires_grad_() for t in case.args(x) if isinstance(t, Tensor)] for case in cases
            ]
            outputs = function(leaves)
            return [
                (y.detach(), *torch.autograd.grad(y, tensors, dy, retain_graph=True))
                for y, tensors in zip(outputs, leaves, strict=True)
            ]

        torch._dynamo.reset()
        compiled = torch.compile(every, backend=decomposing if backend == "inductor" else backend, fullgraph=True)
        for got, expected in zip(run(compiled), run(every), strict=True):
            assert_same_bits(got[0], expected[0])
            assert_same_bits(got[1], expected[1])
            for mine, other in zip(got[2:], expected[2:], strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3, equal_nan=True)


# --- arguments --------------------------------------------------------------------------------------------------


def test_lsq_grad_factor() -> None:
    assert lsq_grad_factor(64 * 9, 127) == 1 / math.sqrt(64 * 9 * 127)
    with pytest.raises(InvalidArgument, match="`quant_max` must be positive: got 0"):
        lsq_grad_factor(4, 0)
    with pytest.raises(InvalidArgument, match="`numel` must be positive: got 0"):
        lsq_grad_factor(0, 4)


def test_parameters_of_other_dtypes() -> None:
    """A parameter in the input's own dtype has its gradient in that dtype and shape, 0-d too."""
    for dtype in DTYPES:
        x = random(8).to(dtype)
        scale, point = torch.tensor(0.25, dtype=dtype), torch.tensor(1.0, dtype=dtype)
        got = gradients(lambda *a: LEARNABLE(*a, -4, 3), torch.ones(8), x, scale, point)
        assert [t.dtype for t in got] == [dtype] * 4 and got[2].shape == got[3].shape == ()
        single = gradients(lambda *a: LEARNABLE(*a, -4, 3), torch.ones(8), x, scale.float(), point.float())
        assert_same_bits(got[0], single[0])


X, S, Z = torch.zeros(2, 3), torch.ones(1), torch.zeros(1)
S3, Z3 = torch.ones(3), torch.zeros(3)
CHANNELS = fake_quantize_learnable_per_channel_affine


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LEARNABLE(X, S, Z.int(), 0, 15), "`zero_point` must be a floating-point .* gradient: got Int"),
        (lambda: CHANNELS(X, S3, Z3.long(), 1, 0, 15), "`zero_point` must be a floating-point .*got Long"),
        (lambda: LEARNABLE(X, S.int(), Z, 0, 15), "`scale` must be a floating-point"),
        (lambda: LEARNABLE(X, S.double(), Z, 0, 15), "`scale` must be Float for an input of Float: got Double"),
        (lambda: LEARNABLE(X.half(), S.bfloat16(), Z, 0, 15), "`scale` must be Float or Half for an input of Half"),
        (lambda: LEARNABLE(X.half(), S, Z.half(), 0, 15), "must have the dtype of `scale`: got Half and Float"),
        (lambda: LEARNABLE(X, S.to("meta"), Z, 0, 15), "`scale` must be on the input's device: got meta and cpu"),
        (lambda: LEARNABLE(X, S, Z.to("meta"), 0, 15), "`zero_point` must be on the input's device: got meta and cpu"),
        (lambda: LEARNABLE(X.int(), S, Z, 0, 15), "`input` must be a floating-point tensor: got Int"),
        (lambda: LEARNABLE(X, S3, Z, 0, 15), r"`scale` must be a 1-element tensor: got shape \(3,\)"),
        (lambda: LEARNABLE(X, S, Z, 5, 4), "`quant_min` should be less than or equal"),
        (lambda: LEARNABLE(X, S, Z, 0, 15, rounding="up"), "`rounding` must be one of"),
        (lambda: CHANNELS(X, S3, Z3, 0, 0, 15), "one element for each of the 2 slices of axis 0: got 3"),
        (lambda: CHANNELS(X, S3, Z, 1, 0, 15), "`zero_point` must have one element for each of the 3 slices"),
        (lambda: CHANNELS(X, S3[None], Z3, 1, 0, 15), r"`scale` must be a 1-D tensor: got shape \(1, 3\)"),
        (lambda: CHANNELS(X, S3, Z3, -1, 0, 15), "`axis` must be between 0 and the number .*: got -1 of 2"),
        (lambda: fake_quantize_lsq_plus(X, S3, Z3, 0, 15, axis=2), "`axis` must be between .*: got 2 of 2"),
        (lambda: fake_quantize_lsq_plus(X, S, Z.int(), 0, 15), "`offset` must be a floating-point"),
        (lambda: fake_quantize_lsq_plus(X, S, Z, 5, 4), "`quant_min` should be less"),
        (lambda: fake_quantize_pact(X, S3), "`alpha` must be a 1-element tensor"),
        (lambda: fake_quantize_pact(X, S, 0), "`num_bits` must be between 1 and 24 with signed=False: got 0"),
        (lambda: fake_quantize_pact(X, S, 1, True), "`num_bits` must be between 2 and 24 with signed=True: got 1"),
        (lambda: fake_quantize_tqt(X, S, 25), "`num_bits` must be between 2 and 24 with signed=True: got 25"),
        (lambda: fake_quantize_tqt(X, S.double()), "`log2_threshold` must be Float for an input of Float: got Double"),
    ],
)  # fmt: skip
def test_errors(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
