"""Sites that training does not reach, though their owner is compiled or its parts are: named at the first step."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import NotQuantizedWarning
from tests.nets import prepared, ranges, step, unset

EAGER = "fxquant_eager"
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """Whose own sum has sites, one of them on a tensor that a child reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, twice: bool = True) -> Tensor:
        y = F.relu(self.a(x))
        return F.relu(self.b(y) + y).mean((2, 3)) if twice else y


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield


def untraced(module: nn.Module, inputs: object) -> None:
    """A hook that Dynamo breaks at, as at those of fully_shard."""
    torch._dynamo.graph_break()


def test_sites_after_a_break_that_prepare_did_not_see_are_named() -> None:
    model = prepared(Residual(), X)
    model.a.register_forward_pre_hook(untraced)
    model.b.register_forward_pre_hook(untraced)
    with pytest.warns(NotQuantizedWarning, match="fully_shard") as said:
        step(torch.compile(model, backend=EAGER), X)
    (told,) = [str(one.message) for one in said if one.category is NotQuantizedWarning]
    named = re.search(r"forward: (.*?)\. ", told)
    assert named is not None and named[1].split(", ") == ["b_conv0_input", "add0_lhs", "add0_output"]
    assert set(unset(model)) == {"b_conv0_input", "add0_lhs", "add0_output"}


def test_a_break_that_prepare_saw_and_an_operator_that_does_not_run_are_no_loss() -> None:
    model = Residual()
    model.b.register_forward_pre_hook(untraced)
    prepared(model, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotQuantizedWarning)
        step(torch.compile(model, backend=EAGER), X)
        assert not unset(model)
        other = prepared(Residual(), X)
        step(torch.compile(other, backend=EAGER), X, twice=False)
    assert "add0_lhs" in ranges(other)


def test_an_owner_that_runs_in_python_around_compiled_parts_is_named() -> None:
    model = prepared(Residual(), X)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotQuantizedWarning)
        model(X)
    model.a.compile(backend=EAGER)
    with pytest.warns(NotQuantizedWarning, match=r"around modules that are compiled.*\(b_conv0_input, add0_lhs"):
        model(X)
    status = {row.key: row.status for row in fxquant.explain(model).rows}
    assert (status["add0_lhs"], status["a.input"]) == ("eager", "compiled")
