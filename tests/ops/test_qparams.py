"""Ranges and scales, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.ops import (
    affine_qparams,
    average_min_max,
    batch_min_max,
    channel_min_max,
    extend_min_max,
    resolve_min_max,
    symmetric_qparams,
    update_min_max,
)
from fxquant.ops.fake_quantize import PER_TENSOR
from fxquant.ops.qparams import ACTIVATION_SCALE_FLOOR, NOTHING_SEEN, ONLY_ZEROS, WEIGHT_SCALE_FLOOR

NAN, INF = float("nan"), float("inf")
UNSET = (torch.tensor([NAN]), torch.tensor([NAN]))  # as version 0.1 wrote it
EMPTY = (torch.tensor([NOTHING_SEEN]), torch.tensor([-NOTHING_SEEN]))
ZEROS = (torch.tensor([ONLY_ZEROS]), torch.tensor([-ONLY_ZEROS]))
X = torch.tensor([[-2.0, 0.5], [4.0, 1.0]])


def pair(low: float, high: float) -> tuple[Tensor, Tensor]:
    return torch.tensor([low]), torch.tensor([high])


def numbers(found: tuple[Tensor, Tensor]) -> list[float]:
    assert all(t.shape == (1,) and t.dtype == torch.float32 for t in found)
    return [t.item() for t in found]


class TestRanges:
    @pytest.mark.parametrize("state", [UNSET, EMPTY, ZEROS], ids=["nan", "empty", "zeros"])
    def test_first_batch_sets(self, state: tuple[Tensor, Tensor]) -> None:
        assert numbers(update_min_max(X, *state, 0.01)) == [-2, 4]
        assert numbers(extend_min_max(X, *state)) == [-2, 4]
        assert numbers(resolve_min_max(X, *state)) == [-2, 4]
        shifted = X.abs() + 1
        assert numbers(update_min_max(-shifted, *state, 0.01)) == [-5, -1.5]
        assert numbers(update_min_max(shifted, *state, 0.01)) == [1.5, 5]
        assert numbers(extend_min_max(shifted, *state)) == [0 if state is ZEROS else 1.5, 5]

    @pytest.mark.parametrize("state", [UNSET, EMPTY, ZEROS], ids=["nan", "empty", "zeros"])
    def test_zeros_first_leave_it_empty(self, state: tuple[Tensor, Tensor]) -> None:
        zeros = torch.tensor([0.0, -0.0])
        for found in (update_min_max(zeros, *state, 0.01), extend_min_max(zeros, *state)):
            assert numbers(found) == [ONLY_ZEROS, -ONLY_ZEROS]
        assert numbers(update_min_max(zeros, *pair(-1.0, 0.0), 0.25)) == [-0.75, 0]
        assert numbers(affine_qparams(*ZEROS, 0, 255, False)[:1] * 2) == [2**-23, 2**-23]

    def test_zero_is_a_bound_as_any_other(self) -> None:
        assert numbers(update_min_max(X, *pair(0.0, 8.0), 0.25)) == [-0.5, 7]
        assert numbers(update_min_max(X, *pair(-1.0, 0.0), 0.25)) == [-1.25, 1]
        assert numbers(resolve_min_max(X, *pair(0.0, 0.0))) == [0, 0]

    def test_later_batches(self) -> None:
        assert numbers(update_min_max(X, *pair(-1.0, 8.0), 0.25)) == [-1.25, 7]
        assert numbers(extend_min_max(X, *pair(-1.0, 8.0))) == [-2, 8]
        assert numbers(resolve_min_max(X, *pair(-1.0, 8.0))) == [-1, 8]

    def test_moving_average_over_many_steps_in_float64(self) -> None:
        low, high = UNSET
        expected: list[float] = []
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            x = torch.randn(50, generator=generator)
            low, high = update_min_max(x, low, high, 0.05)
            batch = [x.min().double().item(), x.max().double().item()]
            expected = [r + 0.05 * (b - r) for r, b in zip(expected or batch, batch, strict=True)]
        assert numbers((low, high)) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    def test_non_finite_batch_keeps_the_range(self, bad: float) -> None:
        x = torch.tensor([1.0, bad, -3.0])
        assert numbers(update_min_max(x, *pair(-1.0, 8.0), 0.25)) == [-1, 8]
        assert numbers(extend_min_max(x, *pair(-1.0, 8.0))) == [-1, 8]
        assert all(map(math.isnan, numbers(update_min_max(x, *UNSET, 0.25))))
        assert all(map(math.isnan, numbers(extend_min_max(x, *UNSET))))

    def test_empty_input_keeps_the_range(self) -> None:
        x = torch.empty(0, 3)
        for state in (pair(-1.0, 8.0), UNSET):
            for found in (update_min_max(x, *state, 0.1), extend_min_max(x, *state), resolve_min_max(x, *state)):
                torch.testing.assert_close(found, state, equal_nan=True)
                assert found[0] is not state[0]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_ranges_are_float32_for_every_input(self, dtype: torch.dtype) -> None:
        assert numbers(update_min_max(X.to(dtype), *UNSET, 0.01)) == [-2, 4]

    def test_an_update_is_an_average_with_the_batchs_extremes(self) -> None:
        for x in (X, torch.empty(0, 3), torch.tensor([1.0, NAN]), torch.tensor([INF, 2.0])):
            low, high = batch_min_max(x)
            assert low.shape == high.shape == (1,)
            for state in (pair(-1.0, 8.0), UNSET):
                found = average_min_max(low, high, *state, 0.25)
                torch.testing.assert_close(found, update_min_max(x, *state, 0.25), rtol=0, atol=0, equal_nan=True)
        assert numbers(batch_min_max(torch.empty(0))) == [INF, -INF]

    def test_an_average_takes_many_ranges_at_once(self) -> None:
        low, high = torch.tensor([-2.0, -2.0, NAN]), torch.tensor([4.0, 4.0, 4.0])
        old = torch.tensor([-1.0, NAN, -1.0]), torch.tensor([8.0, NAN, 8.0])
        found = average_min_max(low, high, *old, 0.25)
        assert [t.tolist() for t in found] == [[-1.25, -2, -1], [7, 4, 8]]

    def test_inputs_stay(self) -> None:
        low, high = pair(-1.0, 8.0)
        update_min_max(X, low, high, 0.5)
        assert (low.item(), high.item()) == (-1, 8)


class TestAffine:
    @pytest.mark.parametrize(
        ("low", "high", "codes", "symmetric", "scale", "point"),
        [
            (-1.0, 3.0, (0, 255), False, 4 / 255, 64),
            (0.0, 6.0, (0, 255), False, 6 / 255, 0),
            (1.0, 6.0, (0, 255), False, 6 / 255, 0),  # widened to hold 0
            (-6.0, -1.0, (0, 255), False, 6 / 255, 255),
            (-1.0, 3.0, (-128, 127), False, 4 / 255, -64),
            (-1.0, 3.0, (-128, 127), True, 3 / 127, 0),
            (-1.0, 3.0, (-127, 127), True, 3 / 127, 0),
            (-1.0, 3.0, (0, 255), True, 3 / 127, 128),
            (-1.0, 3.0, (-2, 1), True, 3.0, 0),
            (0.0, 0.0, (0, 255), False, ACTIVATION_SCALE_FLOOR, 0),
            (-1e-9, 1e-9, (-128, 127), True, ACTIVATION_SCALE_FLOOR, 0),
            (5.0, 5.0, (0, 255), False, 5 / 255, 0),  # a constant tensor
        ],
    )
    def test_cases(
        self, low: float, high: float, codes: tuple[int, int], symmetric: bool, scale: float, point: int
    ) -> None:
        found, zero = affine_qparams(*pair(low, high), *codes, symmetric)
        assert found.item() == pytest.approx(scale, rel=1e-6) and zero.item() == point
        assert found.shape == zero.shape == (1,) and found.dtype == torch.float32 and zero.dtype == torch.int32

    @settings(deadline=None, derandomize=True, max_examples=150)
    @given(
        low=st.floats(-(2.0**125), 2.0**125, width=32),
        width=st.floats(0, 2.0**125, width=32),
        bits=st.integers(2, 16),
        signed=st.booleans(),
        symmetric=st.booleans(),
    )
    def test_zero_is_exact_and_the_scale_is_right(
        self, low: float, width: float, bits: int, signed: bool, symmetric: bool
    ) -> None:
        codes = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        minimum, maximum = torch.tensor([low]), torch.tensor([low + width]).float()
        scale, zero = affine_qparams(minimum, maximum, *codes, symmetric)
        assert codes[0] <= zero.item() <= codes[1] and scale.item() >= ACTIVATION_SCALE_FLOOR
        assert PER_TENSOR(torch.zeros(1), scale, zero, *codes, rounding="divide").item() == 0
        left, right = min(low, 0.0), max(maximum.double().item(), 0.0)
        steps = codes[1] - codes[0]
        exact = max(-left, right) / (steps // 2) if symmetric else (right - left) / steps
        assert scale.item() == pytest.approx(max(exact, ACTIVATION_SCALE_FLOOR), rel=1e-6)

    def test_a_range_wider_than_float32_makes_no_nan(self) -> None:
        scale, zero = affine_qparams(*pair(-3e38, 3e38), 0, 1, False)
        assert torch.isfinite(scale) and not PER_TENSOR(X, scale, zero, 0, 1).isnan().any()


class TestChannels:
    """Extremes of slices, which `affine_qparams` takes as it does those of tensors."""

    @given(st.integers(0, 2), st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    @settings(max_examples=20, deadline=None)
    def test_are_those_of_each_slice_alone(self, axis: int, dtype: torch.dtype) -> None:
        x = (torch.randn(3, 4, 5) * 10).to(dtype)
        low, high = channel_min_max(x, axis)
        assert low.dtype == high.dtype == torch.float32 and low.shape == high.shape == (x.shape[axis],)
        scales, points = affine_qparams(low, high, 0, 15, False)
        for i, each in enumerate(x.unbind(axis)):
            assert (low[i], high[i]) == (each.min().float(), each.max().float())
            scale, point = affine_qparams(*resolve_min_max(each, *UNSET), 0, 15, False)
            assert (scales[i], points[i]) == (scale.item(), point.item())

    def test_a_vector_keeps_its_elements(self) -> None:
        x = torch.tensor([7.0, -14.0])
        assert all(torch.equal(found, x) for found in channel_min_max(x, 0))

    def test_of_nothing_they_are_zero(self) -> None:
        assert [found.tolist() for found in channel_min_max(torch.empty(3, 0), 0)] == [[0, 0, 0]] * 2
        assert [found.tolist() for found in channel_min_max(torch.empty(0, 3), 0)] == [[], []]

    @pytest.mark.parametrize("size", [(3,), (3, 0), (3, 2)], ids=str)
    def test_results_have_memory_of_their_own(self, size: tuple[int, ...]) -> None:
        x = torch.randn(size)
        low, high = channel_min_max(x, 0)
        assert len({low.data_ptr(), high.data_ptr(), x.data_ptr() or -1}) == 3

    def test_a_slice_without_numbers_spoils_no_other(self) -> None:
        low, high = channel_min_max(torch.tensor([[NAN, 1.0], [2.0, INF], [-1.0, 3.0]]), 0)
        assert low.isnan().tolist() == [True, False, False] and (low[1], low[2]) == (2, -1)
        assert high.isnan().tolist() == [True, False, False] and (high[1], high[2]) == (INF, 3)


class TestSymmetric:
    def test_per_channel_is_amax_of_each_slice(self) -> None:
        w = torch.randn(4, 3, 5)
        for axis in range(3):
            scale, zero = symmetric_qparams(w, axis, 127)
            others = [d for d in range(3) if d != axis]
            expected = (w.double().abs().amax(others) / 127).float()
            assert torch.equal(scale, expected) and not zero.any() and zero.dtype == torch.int32

    def test_per_tensor_has_one_element(self) -> None:
        scale, zero = symmetric_qparams(torch.tensor([[1.0, -14.0]]), None, 7)
        assert scale.tolist() == [2.0] and zero.tolist() == [0]

    def test_a_vector_per_channel_keeps_its_elements(self) -> None:
        assert symmetric_qparams(torch.tensor([7.0, -14.0]), 0, 7)[0].tolist() == [1, 2]

    def test_scalar_and_empty(self) -> None:
        assert symmetric_qparams(torch.tensor(14.0), None, 7)[0].tolist() == [2]
        assert symmetric_qparams(torch.empty(3, 0), 0, 7)[0].tolist() == [WEIGHT_SCALE_FLOOR] * 3
        assert symmetric_qparams(torch.empty(0, 3), None, 7)[0].tolist() == [WEIGHT_SCALE_FLOOR]

    def test_zero_channel_gets_the_floor_and_stays_zero(self) -> None:
        scale, _ = symmetric_qparams(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), 0, 127)
        assert scale[0] == WEIGHT_SCALE_FLOOR

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_scales_are_float32(self, dtype: torch.dtype) -> None:
        assert symmetric_qparams(X.to(dtype), 0, 127)[0].dtype == torch.float32
