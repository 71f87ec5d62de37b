"""The comparison of outputs by numbers that can be counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fxquant.errors import InvalidArgument
from fxquant.onnx.compare import Case, largest_difference, within_code
from fxquant.onnx.feeds import arrays
from tests.onnx.graphs import Graph

RAMP = np.linspace(0.0, 255.0, 256, dtype=np.float32)  # one 8-bit code of it is 1


@pytest.mark.parametrize(
    ("by", "share"),
    [(0.0, 1.0), (0.999, 1.0), (-0.999, 1.0), (1.01, 0.0), (-300.0, 0.0)],
)
def test_a_code_is_a_255th_of_the_range(by: float, share: float) -> None:
    found = [RAMP + np.float32(by)]
    assert within_code(found, [RAMP]) == share
    assert largest_difference(found, [RAMP]) == pytest.approx(abs(by), abs=1e-4)


def test_each_output_has_its_range_and_all_values_count() -> None:
    small = RAMP / 1000
    assert within_code([RAMP + 0.5, small + 0.5], [RAMP, small]) == 0.5
    assert largest_difference([RAMP + 0.5, small + 2], [RAMP, small]) == pytest.approx(2)
    assert within_code([RAMP[:64] + 5, RAMP[:192]], [RAMP[:64], RAMP[:192]]) == 0.75


def test_masks_of_infinity_are_equal_and_widen_no_range() -> None:
    masked = RAMP.copy()
    masked[:16] = -np.inf
    assert within_code([masked], [masked]) == 1.0
    moved = masked + np.where(np.isfinite(masked), np.float32(2), 0)
    assert within_code([moved], [masked]) == 16 / 256
    lost = masked.copy()
    lost[:16] = 0.0
    assert within_code([lost], [masked]) == 240 / 256


def test_integers_and_nothing_are_not_judged() -> None:
    labels = np.array([1, 2, 3])
    assert within_code([labels + 1, RAMP + 2], [labels, RAMP]) == 0.0
    assert within_code([labels + 1], [labels]) == within_code([], []) == within_code([RAMP[:0]], [RAMP[:0]]) == 1.0
    assert largest_difference([], []) == largest_difference([RAMP[:0]], [RAMP[:0]]) == 0.0


def test_outputs_of_another_number_are_no_comparison() -> None:
    for compare in (within_code, largest_difference):
        with pytest.raises(ValueError, match="zip"):
            compare([RAMP], [RAMP, RAMP])


def test_outputs_of_a_model_in_order() -> None:
    half = torch.tensor([1.5], dtype=torch.bfloat16, requires_grad=True)
    found = arrays({"a": half, "b": (torch.tensor([2]), "no tensor", None)})
    assert [value.tolist() for value in found] == [[1.5], [2]]
    assert [str(value.dtype) for value in found] == ["float32", "int64"]


def case(folder: Path, *args: torch.Tensor, **kwargs: torch.Tensor) -> Case:
    g = Graph()
    path = g.save(folder, g.op("Add", g.input(2, name="left"), g.input(2, name="right")))
    return Case(model=nn.Identity(), args=args, kwargs=kwargs, path=path, keys=())


def test_inputs_are_named_in_order(tmp_path: Path) -> None:
    one, two = torch.ones(2, requires_grad=True), torch.zeros(2)
    for given in (case(tmp_path, one, two), case(tmp_path, one, right=two)):
        assert {name: value.tolist() for name, value in given.feeds.items()} == {"left": [1, 1], "right": [0, 0]}


def test_inputs_of_another_number(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as caught:
        _ = case(tmp_path, torch.ones(2)).feeds
    assert str(caught.value) == "args and kwargs must hold the file's 2 inputs (left, right): got 1 tensors."
