"""Sizes left open: as the inputs are, and as torch.export wants them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.capture.open_sizes import by_parameter, keywords_named, open_as_asked, open_batch
from fxquant.errors import InvalidArgument

OPEN = {0: torch.export.Dim.AUTO}
X, ONE = torch.zeros(3, 2), torch.zeros(1)


class Variadic(nn.Module):
    def forward(self, first: Tensor, *others: Tensor, scale: Any = None, **more: Any) -> Tensor:
        return first


class Plain(nn.Module):
    def forward(self, first: Tensor, second: Any = None) -> Tensor:
        return first


def test_every_tensor_of_the_first_one_s_batch_is_open() -> None:
    args, kwargs = (X, [X, ONE], 2), {"mask": X, "size": torch.tensor(3)}
    assert open_batch(args, kwargs) == ((OPEN, [OPEN, None], None), {"mask": OPEN, "size": None})


@pytest.mark.parametrize("asked", [{"first": OPEN, "second": None}, (OPEN, None), {"first": OPEN}], ids=repr)
def test_torch_s_form_of_a_plain_signature(asked: Any) -> None:
    assert open_as_asked(Plain(), (X,), {"second": X}, asked) == ((OPEN,), {"second": None})


def test_torch_s_form_of_a_variadic_signature_and_back() -> None:
    model, more = Variadic(), {"left": X, "scale": 2.0}
    asked = {"first": OPEN, "others": (None, OPEN), "more": {"left": OPEN}}
    sizes = open_as_asked(model, (X, X, X), more, asked)
    assert sizes == ((OPEN, None, OPEN), {"left": OPEN, "scale": None})
    with keywords_named(model, more):
        assert by_parameter(model.forward, sizes) == {
            "first": OPEN,
            "others": (None, OPEN),
            "scale": None,
            "left": OPEN,
        }


def test_a_collection_of_shapes() -> None:
    asked = torch.export.ShapesCollection()
    asked[X] = OPEN
    assert open_as_asked(Plain(), (X,), {}, asked) == ((OPEN,), {})


def test_a_name_of_no_input_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"for, \['first'\]: got \['x'\]\."):
        open_as_asked(Plain(), (X,), {}, {"x": OPEN})


@pytest.mark.parametrize("own", [False, True])
def test_the_model_s_forward_is_its_own_again(own: bool) -> None:
    model = Variadic()
    if own:
        model.forward = model.forward  # on the instance, as a wrapper puts it
    before = dict(vars(model))
    with pytest.raises(RuntimeError), keywords_named(model, {"left": X}):
        assert "left" in inspect.signature(model.forward).parameters and model(X, left=X) is X
        raise RuntimeError
    assert vars(model) == before


def test_a_signature_without_more_keywords_stays() -> None:
    model = Plain()
    with keywords_named(model, {"second": X}):
        assert "forward" not in vars(model)
