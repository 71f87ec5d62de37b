"""Learned ranges: numbers against float64 and the papers' operators, scales above zero, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant import CurrentTensor, Fixed, Learned, MovingAverage, QuantSpec
from fxquant.errors import InvalidArgument
from fxquant.numerics import learned
from fxquant.numerics.learned import UNSET, Grid, range_of, scale_of, start, state_of
from fxquant.ops import learnable
from fxquant.ops.fake_quantize import PER_CHANNEL, PER_TENSOR
from fxquant.ops.learned import LEARNED_SCALE, LEARNED_ZERO_POINT
from fxquant.ops.qparams import symmetric_qparams
from fxquant.spec.ranges import Range
from tests.ops.cases_learnable import numpy_affine, numpy_lsq_plus, numpy_tqt, ste_affine, ste_lsq_plus, ste_tqt
from tests.ops.oracle import assert_same_bits

FLOOR = 2.0**-60
METHODS = ("lsq", "lsq_plus", "pact", "tqt", "amax")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, DY = random(40, 5) * 2, random(40, 5, seed=1)


def leaf(*numbers: float) -> Tensor:
    return torch.tensor(numbers, requires_grad=True)


def quantized(x: Tensor, first: Tensor, second: Tensor | None, grid: Grid, factor: float = 1.0) -> Tensor:
    """What the nodes of a site compute, in training."""
    apart = None if grid.method == "lsq_plus" else second
    scale = LEARNED_SCALE(first, apart, *grid)
    if grid.method == "lsq_plus":
        point = LEARNED_ZERO_POINT(second, scale, grid.quant_min, grid.quant_max)
    else:
        point = torch.full_like(scale, grid.middle if second is None else second.item(), dtype=torch.int32)
    options = {"rounding": "divide", "scale_gradient": factor, "error_gradient": grid.method != "pact"}
    return PER_TENSOR(x, scale, point, grid.quant_min, grid.quant_max, **options)


def gradients(y: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, leaves, DY.to(y.dtype))]


# --- the papers' equations ------------------------------------------------------------------------------------------


def test_lsq_is_the_papers_operator_bit_for_bit() -> None:
    """Scale and gradient scale of Esser et al., as `fxquant.ops` has them; with the zero point that a format fixes."""
    for low, high, point in ((-7, 7, 0), (0, 15, 6)):
        grid = Grid("lsq", low, high, point == 0, FLOOR)
        x, s = X.clone().requires_grad_(), leaf(0.3)
        ours = gradients(quantized(x, s, None if not point else torch.tensor([float(point)]), grid, 0.05), x, s)
        z = torch.tensor([float(point)])
        other = learnable.fake_quantize_learnable_per_tensor_affine(x, s, z, low, high, 0.05, rounding="divide")
        for one, two in zip(ours, gradients(other, x, s), strict=True):
            assert_same_bits(one, two)
    scales = torch.linspace(0.2, 0.4, 5).requires_grad_()
    options = {"rounding": "divide", "scale_gradient": 0.1}
    per_channel = PER_CHANNEL(X, scales, torch.zeros(5, dtype=torch.int32), 1, -7, 7, **options)
    other = learnable.fake_quantize_learnable_per_channel_affine(
        X, scales, torch.zeros(5), 1, -7, 7, 0.1, rounding="divide"
    )
    for one, two in zip(gradients(per_channel, scales), gradients(other, scales), strict=True):
        assert_same_bits(one, two)


def test_tqt_is_the_papers_operator_bit_for_bit() -> None:
    for bits, signed in ((4, True), (4, False), (8, True)):
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        grid = Grid("tqt", low, high, signed, FLOOR)
        x, p = X.clone().requires_grad_(), leaf(0.3)
        ours = gradients(quantized(x, p, None if signed else torch.zeros(1), grid), x, p)
        other = gradients(learnable.fake_quantize_tqt(x, p, bits, signed), x, p)
        assert_same_bits(ours[0], other[0])
        assert_same_bits(ours[1], other[1])
        torch.testing.assert_close(ours[2], other[2], rtol=1e-6, atol=1e-6)  # s before the sum, or after it


def test_lsq_plus_is_the_paper_with_a_zero_point_that_a_file_can_hold() -> None:
    """Where offset / scale is whole, the papers' operator itself; else its offset is moved to the nearest code."""
    grid = Grid("lsq_plus", 0, 15, False, FLOOR)
    for offset in (-1.25, -2.0, 0.0):
        x, s, b = X.clone().requires_grad_(), leaf(0.25), leaf(offset)
        ours = gradients(quantized(x, s, b, grid, 0.1), x, s, b)
        wide = [t.detach().double().requires_grad_() for t in (x, s, b)]
        y, dx, ds, db = numpy_lsq_plus(*(t.detach().numpy() for t in (wide[0], DY.double(), *wide[1:])), 0, 15)
        for one, two in zip(ours, (y, dx, 0.1 * ds, 0.1 * db), strict=True):
            torch.testing.assert_close(one.double().flatten(), torch.as_tensor(two).flatten(), rtol=1e-5, atol=1e-5)
        smooth = torch.autograd.grad(ste_lsq_plus(*wide, 0, 15), wide, DY.double())
        torch.testing.assert_close(ours[1].double(), smooth[0])
        torch.testing.assert_close(torch.cat(ours[2:]).double(), 0.1 * torch.cat(smooth[1:]), rtol=1e-5, atol=1e-5)
    y = quantized(X, leaf(0.25), leaf(-1.2), grid)
    assert torch.equal((y / 0.25 + 5).round(), ((X / 0.25).round() + 5).clamp(0, 15))


@pytest.mark.parametrize(("point", "symmetric"), [(0.0, False), (8.0, False), (None, True)])
def test_pact_and_amax_are_their_clip_in_float64(point: float | None, symmetric: bool) -> None:
    """PACT: what is clipped, at alpha or −alpha, and nothing from inside; amax: the errors inside count, too."""
    low, high = (-7, 7) if symmetric else (0, 15)
    z = 0.0 if point is None else point
    second = None if point is None else torch.tensor([point])
    for method in ("pact", "amax"):
        x, p = X.clone().requires_grad_(), leaf(1.7)
        got = gradients(quantized(x, p, second, Grid(method, low, high, symmetric, FLOOR)), x, p)
        reach, wide, dy = p.detach().double(), X.double(), DY.double()
        s = reach / (high - z)
        code = (wide / s).round() + z
        inside = (code >= low) & (code <= high)
        slope = torch.where(code > high, high - z, low - z) / (high - z)
        errors = 0 if method == "pact" else ((code - z) * s - wide) / s / (high - z)
        torch.testing.assert_close(got[0].double(), (code.clamp(low, high) - z) * s, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got[1].double(), dy * inside)
        expected = (dy * torch.where(inside, errors, slope)).sum().reshape(1)
        torch.testing.assert_close(got[2].double(), expected, rtol=1e-5, atol=1e-5)


def test_references_agree() -> None:
    """The formulas that this file leans on are those of the operators' own tests."""
    arguments = [t.double().numpy() for t in (X, DY)]
    assert numpy_affine(*arguments, 0.3, 0.0, -7, 7)[2] == pytest.approx(numpy_lsq_plus(*arguments, 0.3, 0.0, -7, 7)[2])
    s, p = (torch.tensor([n], dtype=torch.float64, requires_grad=True) for n in (0.3, 0.2))
    zero = torch.zeros(1, dtype=torch.float64)
    (found,) = torch.autograd.grad(ste_affine(X.double(), s, zero, -7, 7), s, DY.double())
    assert found.item() == pytest.approx(numpy_affine(*arguments, 0.3, 0.0, -7, 7)[2])
    (found,) = torch.autograd.grad(ste_tqt(X.double(), p, 4, True), p, DY.double())
    assert found.item() == pytest.approx(numpy_tqt(*arguments, [0.2], 4, True)[2])


def test_gradients_of_the_parametrization_are_derivatives() -> None:
    """Of scales where they are smooth, by finite differences; of the zero point, of the quotient that is rounded."""
    for method in ("lsq", "pact", "amax"):
        for number in (0.4, -0.7):
            p = torch.tensor([number], dtype=torch.float64, requires_grad=True)
            assert torch.autograd.gradcheck(lambda v, m=method: LEARNED_SCALE(v, None, m, -7, 7, True, FLOOR), (p,))
    b, s = (torch.tensor([n], dtype=torch.float64, requires_grad=True) for n in (-0.9, 0.2))
    ours = torch.autograd.grad(LEARNED_ZERO_POINT(b, s, 0, 15), (b, s), torch.ones(1))
    smooth = torch.autograd.grad(-b / s, (b, s))
    torch.testing.assert_close(torch.cat(ours), torch.cat(smooth), rtol=1e-14, atol=0)


# --- positive, always -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lsq", "lsq_plus", "pact", "tqt", "amax"])
def test_every_parameter_gives_a_scale_above_zero_and_a_gradient(method: Any) -> None:
    numbers = [0.0, -0.0, 1e-45, -1e-45, 1e-38, -3.0, 1e-20, -1e38, 3e38, float("inf"), -float("inf"), 1e4, -1e4]
    for low, high, symmetric in ((-7, 7, True), (0, 255, False), (-128, 127, False)):
        p = torch.tensor(numbers, requires_grad=True)
        point = None if symmetric or method == "lsq_plus" else torch.full_like(p, low).detach()
        scale = LEARNED_SCALE(p, point, method, low, high, symmetric, FLOOR)
        assert (scale > 0).all() and scale.isfinite().all() and (scale >= torch.finfo(torch.float32).tiny).all()
        scale.sum().backward()
        assert p.grad is not None and (p.grad != 0).all() and not p.grad.isnan().any()


def test_a_parameter_at_the_floor_or_above_is_the_scale_itself() -> None:
    p = torch.tensor([FLOOR, 0.1, 1 / 3, 7e4])
    assert_same_bits(LEARNED_SCALE(p, None, "lsq", -7, 7, True, FLOOR), p)


# --- what it starts with --------------------------------------------------------------------------------------------


def grids() -> list[Grid]:
    mirrored = [Grid(m, -7, 7, True, FLOOR) for m in METHODS if m != "lsq_plus"]
    return [Grid(m, 0, 15, False, FLOOR) for m in METHODS] + mirrored


def unset(grid: Grid, count: int = 1) -> tuple[Tensor, Tensor | None]:
    return torch.full((count,), UNSET), None if grid.symmetric else torch.full((count,), UNSET)


def error(x: Tensor, first: Tensor, second: Tensor | None, grid: Grid) -> float:
    with torch.no_grad():
        return (quantized(x, first, second, grid) - x).square().sum().item()


@pytest.mark.parametrize("grid", grids(), ids=lambda g: f"{g.method} {g.quant_min}")
def test_a_start_has_the_least_error_of_a_search_by_brute_force(grid: Grid) -> None:
    for x in (X, X.relu()):
        first, second = start(x, *unset(grid), grid, None, "mse", "resolve")
        second = None if grid.symmetric else second
        low, high = x.min().clamp(max=0.0).reshape(1), x.max().clamp(min=0.0).reshape(1)
        others = [state_of(low * part, high * part, grid) for part in torch.linspace(0.05, 1, 96).tolist()]
        least = min(error(x, p, None if grid.symmetric else q, grid) for p, q in others)
        assert error(x, first, second, grid) <= 1.05 * least
        most, at = start(x, *unset(grid), grid, None, "max", "resolve")
        ends = range_of(most, None if grid.symmetric else at, grid)
        slack = scale_of(most, None if grid.symmetric or grid.method == "lsq_plus" else at, grid)
        assert ends[0] <= low + slack and ends[1] >= high - slack


def test_an_8_bit_start_is_the_extremes_and_of_each_channel() -> None:
    w = random(6, 50) * torch.logspace(-3, 1, 6)[:, None]
    grid = Grid("lsq", -127, 127, True, FLOOR)
    first, _ = start(w, *unset(grid, 6), grid, 0, "max", "resolve")
    torch.testing.assert_close(first, symmetric_qparams(w, 0, 127)[0], rtol=1e-6, atol=0)


def test_nothing_is_set_by_zeros_and_a_channel_of_zeros_has_its_neighbours_mean() -> None:
    grid = Grid("lsq", -7, 7, True, FLOOR)
    first, _ = start(torch.zeros(3, 8), *unset(grid, 3), grid, 0, "mse", "resolve")
    assert torch.equal(first, torch.full((3,), UNSET))
    assert scale_of(first, None, grid).gt(0).all()
    w = torch.cat([random(2, 8), torch.zeros(1, 8)])
    first, _ = start(w, *unset(grid, 3), grid, 0, "max", "resolve")
    assert first[2] == first[:2].mean()
    for bad in (float("nan"), float("inf")):
        kept, _ = start(torch.tensor([[1.0, bad]]), *unset(grid), grid, None, "mse", "resolve")
        assert kept == UNSET


def test_what_is_set_is_kept_widened_or_followed() -> None:
    for grid in grids():
        first, second = start(X, *unset(grid), grid, None, "max", "resolve")
        held = None if grid.symmetric else second
        same, _ = start(9 * X, first, held, grid, None, "max", "resolve")
        assert torch.equal(same, first)
        ends = range_of(first, held, grid)
        for how, least in (("extend", 2.9), ("follow", 1.1)):
            moved, at = start(3 * X, first, held, grid, None, "max", how)
            now = range_of(moved, None if grid.symmetric else at, grid)
            if grid.method != "tqt":  # whose steps are powers of two
                assert least <= now[1] / ends[1] <= 3.1
            again, _ = start(0.1 * X, moved, None if grid.symmetric else at, grid, None, "max", "extend")
            torch.testing.assert_close(again, moved, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_state_that_is_converted_has_the_same_range_in_other_codes(method: Any) -> None:
    found = Learned(method=method)
    wide, narrow = (QuantSpec(bits=bits, signed=False, symmetric=False, range=found) for bits in (8, 4))
    grid = Grid(method, 0, 255, False, 1e-7)
    state = dict(zip(found.names(wide), start(X, *unset(grid), grid, None, "max", "resolve"), strict=True))
    then = found.converted(state, wide, narrow)
    assert then is not None and tuple(then) == found.names(narrow)
    coarse = Grid(method, 0, 15, False, 1e-7)
    first, second = then.values()
    step = scale_of(first, None if method == "lsq_plus" else second, coarse)
    for one, two in zip(range_of(first, second, coarse), range_of(*state.values(), grid), strict=True):
        assert abs(one - two) <= step
    assert found.converted({**state, next(iter(state)): torch.tensor([UNSET])}, wide, narrow) is None


# --- plain data -----------------------------------------------------------------------------------------------------


def test_names_fields_and_words() -> None:
    spec = QuantSpec(bits=4, narrow=True, axis=0, range=Learned(method="lsq"))
    assert str(spec) == "s4 axis 0 lsq" and QuantSpec.from_dict(spec.to_dict()) == spec
    assert Learned().to_dict() == {"kind": "learned", "method": "lsq", "init": "mse", "gradient_scale": None}
    assert Range.from_dict(Learned(method="tqt").to_dict()) == Learned(method="tqt")
    assert [Learned(method=m).names(spec) for m in METHODS] == [
        ("scale",),
        ("scale",),
        ("alpha",),
        ("log2_threshold",),
        ("amax",),
    ]
    free = QuantSpec(signed=False, symmetric=False, range=Learned(method="lsq_plus"))
    assert Learned().names(free) == ("scale", "zero_point") and free.range.names(free) == ("scale", "offset")
    state = Learned().initial_state(free)
    assert [isinstance(v, torch.nn.Parameter) for v in state.values()] == [True, False]
    assert Learned().describe(state) == "unset"
    told = {"scale": torch.tensor([0.25, -0.5])}
    assert Learned().describe(told) == "scale 0.25 … 0.5"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Learned(method="lsq++"), r"Learned.method must be one of 'lsq', .*'amax': got 'lsq\+\+'"),
        (lambda: Learned(init="zero"), "Learned.init must be one of 'mse', 'max': got 'zero'"),
        (lambda: Learned(gradient_scale=0), "Learned.gradient_scale must be a positive number, or None .*: got 0"),
        (lambda: Learned(gradient_scale=math.nan), "Learned.gradient_scale must be a positive number.*: got nan"),
        (lambda: QuantSpec(range=Learned(method="lsq_plus")), "'lsq_plus'.* must go with a format whose zero point"),
        (lambda: QuantSpec(element="e4m3", range=Learned(method="pact")), "'pact'.* must go with integers: got .*e4m3"),
        (
            lambda: fxquant.Recipe(name="r", activation=QuantSpec(group_size=-1, range=Learned())),
            r"Recipe.activation.range must be CurrentTensor\(\) for an activation in groups: got Learned",
        ),
        (
            lambda: QuantSpec(axis=0, group_size=32, scale_format="e8m0", range=Learned()),
            "scale_format must be None beside a range with a scale of its own for each group",
        ),
        (lambda: fxquant.Recipe(name="r", weight=QuantSpec(range=Fixed(min=-1, max=1))), "or fxquant.Learned"),
        (lambda: QuantSpec(axis=0, group_size=8, range=MovingAverage()), r"CurrentTensor\(\) or Learned\(\)"),
    ],
)
def test_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make()


def test_other_ranges_have_the_names_that_they_had() -> None:
    spec = QuantSpec()
    assert MovingAverage().names(spec) == MovingAverage.state_names and CurrentTensor().names(spec) == ()
    assert Learned().initial_state(spec)["scale"].item() == learned.UNSET
