"""Products of rounded gradients and codes, held to sums in float64 and int64; the numbers that they are rounded by."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from fxquant.errors import InvalidArgument
from fxquant.numerics import gradients
from fxquant.numerics.gradients import Form, chance, codes_of, product, step_of
from fxquant.ops.integer_matmul import multiplies_exactly
from fxquant.ops.rounding_words import ROUNDING_WORDS, rounding_words

exact_sums = pytest.mark.skipif(
    bool(multiplies_exactly("matmul", "cpu", False)), reason="this machine has no exact integer product"
)


def words(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, gradients.WORDS, (count,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


def test_the_numbers_are_those_of_the_formula() -> None:
    """In Python's integers, element by element."""
    given = words(7)
    given[0], given[3] = 2**24 - 1, 2**24 - 1
    found = chance(given, (3, 4))
    for m, n in itertools.product(range(3), range(4)):
        assert found[m, n].item() == (given[m].item() + given[3 + n].item()) % 2**24 / 2**24
    assert found[0, 0].item() == (2**25 - 2 - 2**24) / 2**24, "the largest words wrap around"


def test_the_numbers_are_uniform_and_those_of_a_column_independent() -> None:
    """Of 2 × 3 elements, drawn 20,000 times: mean, variance and covariance of each two, the joint law of one column."""
    draws = 20_000
    first, second = words(2 * draws, 1).view(draws, 2, 1), words(3 * draws, 2).view(draws, 1, 3)
    u = (((first + second) & (gradients.WORDS - 1)).double() / gradients.WORDS).flatten(1) - 0.5
    assert ((12 * u.T @ u / draws - torch.eye(6)).abs() < 5 / draws**0.5).all()
    assert (u.mean(0).abs() * (12 * draws) ** 0.5 < 5).all()
    cells = torch.histogramdd(u[:, [0, 3]].float(), [4, 4], range=[-0.5, 0.5, -0.5, 0.5]).hist
    assert ((cells - draws / 16).abs() < 5 * (draws / 16) ** 0.5).all()


def test_words_follow_the_generator() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = rounding_words(30), rounding_words(30)
    torch.set_rng_state(state)
    assert torch.equal(rounding_words(30), first) and not torch.equal(first, second)
    assert first.shape == (30,) and first.dtype == torch.int32
    many = rounding_words(10_000)
    assert 0 <= int(many.min()) < 2**14 and 2**24 - 2**14 < int(many.max()) < 2**24
    with pytest.raises(InvalidArgument, match=r"count must be at least 0: got -1\."):
        rounding_words(-1)
    torch.library.opcheck(ROUNDING_WORDS, (2,), {"device": torch.device("cpu")}, test_utils=("test_faketensor",))


def test_rounding_to_the_nearest_is_within_half_a_step() -> None:
    grad = torch.randn(64, 9) * torch.logspace(-6, 6, 9)
    for dim in (0, 1):
        step = step_of(grad, dim)
        assert torch.equal(step, grad.abs().amax(dim, keepdim=True) * (1 / 127))
        codes = codes_of(grad, step, None)
        assert codes.dtype == torch.int8 and int(codes.abs().amax(dim).min()) == 127
        assert ((codes * step - grad).abs() <= step * 0.50001).all()


def test_rounding_by_chance_gives_the_neighbours_and_the_gradient_on_average() -> None:
    steps = torch.tensor([-127.0, -3.75, -1.0, -0.001, 0.0, 0.25, 0.5, 2.9, 127.0])
    draws = 4000
    codes = codes_of(steps.expand(draws, -1), torch.ones(1), words(draws + 9, 2)).double()
    assert ((codes >= steps.floor()) & (codes <= steps.ceil())).all()
    spread = ((steps - steps.floor()) * (steps.ceil() - steps) / draws).sqrt()
    assert ((codes.mean(0) - steps).abs() <= 5 * spread + 1e-7).all()


@pytest.mark.parametrize("size", [31, 32, 33, 64, 96])
def test_extremes_of_long_columns_are_taken_in_blocks(size: int) -> None:
    """The largest of each column in another row."""
    grad = torch.rand(size, size) - 2 * torch.eye(size)
    assert torch.equal(step_of(grad, 0), grad.abs().amax(0, keepdim=True) * (1 / 127))
    assert (step_of(grad, 0) > 1 / 127).all()


@exact_sums
@pytest.mark.parametrize("signed", [True, False], ids=["int8", "uint8"])
@pytest.mark.parametrize(("scale_dim", "zero_dim"), [(None, None), (0, 0), (1, 1), (1, None)])
def test_products_are_the_sums_of_the_codes(signed: bool, scale_dim: int | None, zero_dim: int | None) -> None:
    """Sums in int64 of codes computed by numpy, in all forms and orders, near to the exact ones."""
    inner, outer, summed = 5, 7, 40
    grad = torch.randn(inner, summed)
    low, high, dtype = (-128, 128, torch.int8) if signed else (0, 256, torch.uint8)
    code = torch.randint(low, high, (summed, outer), dtype=dtype)
    size = {None: 1, 0: summed, 1: outer}
    scale, zero = torch.rand(size[scale_dim]) + 0.5, torch.randint(-9, 9, (size[zero_dim],), dtype=torch.int32)

    def along(each: Tensor, dim: int | None) -> Tensor:
        return each.view(-1, 1) if dim == 0 else each.view(1, -1)

    shifted = code.to(torch.int64) - along(zero, zero_dim)
    values = grad * scale if scale_dim == 0 else grad
    step = np.abs(values.numpy()).max(1, keepdims=True) * np.float32(1 / 127)
    codes = np.rint(values.numpy() * (np.float32(1) / step)).astype(np.int64)
    sums = torch.from_numpy(codes) @ shifted
    factor = torch.from_numpy(step).double() * (1 if scale_dim == 0 else along(scale, scale_dim).double())
    expected = sums.double() * factor
    exact = grad.double() @ (shifted.double() * along(scale, scale_dim).double())
    bound = torch.from_numpy(step / 2 * 1.001).double() * (
        shifted.abs().double() * (1 if scale_dim == 0 else along(scale, scale_dim).double())
    ).sum(0)
    for columns, turned in itertools.product([True] if not signed else [True, False], [True, False]):
        form = Form(
            columns=columns, turned=turned, scale_dim=scale_dim, zero_dim=zero_dim, dtype=torch.float32
        )
        given = grad.t().contiguous() if columns else grad
        found = product(given, code, scale, zero, None, form)
        assert found.is_contiguous() or columns == turned
        found = found.t() if turned else found
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
        assert ((found.double() - exact).abs() <= bound).all()


@exact_sums
@pytest.mark.parametrize("columns", [True, False], ids=["columns", "rows"])
@pytest.mark.parametrize(("scale_dim", "zero_dim"), [(None, None), (0, 0), (1, 1), (1, None)])
def test_outliers_are_summed_as_floats(columns: bool, scale_dim: int | None, zero_dim: int | None) -> None:
    """What is largest adds its products in float64; all else is what it is where those are zeros."""
    inner, outer, summed, few = 5, 7, 40, [2, 11, 39]
    grad = torch.randn(inner, summed)
    grad[:, few] *= 100
    rest = grad.index_fill(1, torch.tensor(few), 0)
    code = torch.randint(-128, 128, (summed, outer), dtype=torch.int8)
    size = {None: 1, 0: summed, 1: outer}
    scale, zero = torch.rand(size[scale_dim]) + 0.5, torch.randint(-9, 9, (size[zero_dim],), dtype=torch.int32)
    form = Form(columns=columns, turned=False, scale_dim=scale_dim, zero_dim=zero_dim, dtype=torch.float32, outliers=3)

    def along(each: Tensor, dim: int | None) -> Tensor:
        return each.double().view(-1, 1) if dim == 0 else each.double().view(1, -1)

    def laid_out(each: Tensor) -> Tensor:
        return each.t().contiguous() if columns else each

    values = (code.double() - along(zero, zero_dim)) * along(scale, scale_dim)
    without = product(laid_out(rest), code, scale, zero, None, dataclasses.replace(form, outliers=0))
    found = product(laid_out(grad), code, scale, zero, None, form)
    expected = without.double() + (grad - rest).double() @ values
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


WEIGHT = Form(columns=True, turned=False, scale_dim=None, zero_dim=None, dtype=torch.float32)


@exact_sums
def test_the_mean_of_a_thousand_draws_is_the_exact_product() -> None:
    """dW of 1,000 equal gradients, each rounded by numbers of its own: their mean is within its standard errors."""
    draws, summed, outputs, inputs = 1000, 48, 3, 4
    grad = torch.randn(summed, outputs) * torch.rand(summed, 1).pow(4)
    code = torch.randint(0, 256, (summed, inputs), dtype=torch.uint8)
    scale, zero = torch.tensor([0.03]), torch.tensor([120], dtype=torch.int32)
    drawn = words(summed + outputs * draws, 7)
    found = product(grad.repeat(1, draws), code, scale, zero, drawn, WEIGHT).view(draws, outputs, inputs).double()
    exact = grad.t().double() @ ((code.double() - 120) * 0.03)
    error = found.std(0) / draws**0.5
    assert (error > 0).all() and ((found.mean(0) - exact).abs() < 4.5 * error).all()
    nearest = product(grad, code, scale, zero, None, WEIGHT).double()
    assert not torch.equal(found[0], nearest)


@exact_sums
def test_what_is_not_finite_stays_so_and_zeros_give_zeros() -> None:
    code, scale = torch.ones(40, 2, dtype=torch.uint8), torch.ones(1)
    grad = torch.zeros(40, 4)
    grad[3, 1], grad[4, 2], grad[5, 3] = float("inf"), float("nan"), 1e-44
    for key in (None, words(44)):
        found = product(grad, code, scale, None, key, WEIGHT)
        assert (found[0] == 0).all() and found[3].isfinite().all()
        assert not found[1].isfinite().any() and not found[2].isfinite().any()
