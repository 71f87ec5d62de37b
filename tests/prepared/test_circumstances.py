"""Whatever a thread has switched on while it prepares, the model trains afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fxquant
from fxquant.prepared.quantizer import quantizers
from tests.nets import ConvNet, Mlp, TiedLanguageModel, grads, prepared, ranges, step, unset

EAGER = "fxquant_eager"
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_a_model_that_was_prepared_in_inference_mode_trains() -> None:
    model = Mlp()
    parameters = list(model.parameters())
    with torch.inference_mode():
        prepared(model, X.clone())
        fxquant.calibrate(model, [X.clone()])
        fxquant.override(model, {"first.input": None})
    assert all(now is was for now, was in zip(model.parameters(), parameters, strict=True))
    step(torch.compile(model, backend=EAGER), X)
    assert len(grads(model)) == 4 and not unset(model)


def test_a_model_that_was_made_there_trains_with_its_weights_tied() -> None:
    """torch itself would refuse its backward."""
    tokens = torch.arange(6).view(2, 3)
    with torch.inference_mode():
        model = TiedLanguageModel()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        prepared(model, tokens)
    assert model.head.weight is model.embed.weight and not model.head.weight.is_inference()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    step(torch.compile(model, backend=EAGER), tokens)
    assert len(grads(model)) == 3 and not unset(model)


@pytest.mark.usefixtures("double")
def test_ranges_are_float32_whatever_the_default_is() -> None:
    model, x = prepared(ConvNet(), torch.randn(2, 3, 6, 6)), torch.randn(2, 3, 6, 6)
    assert x.dtype == torch.float64
    out = step(torch.compile(model, backend=EAGER), x)
    assert out.dtype == torch.float64
    assert {value.dtype for _, q in quantizers(model) for value in q.state.values()} == {torch.float32}
    assert ranges(model)["conv1.input"] == (x.min().float().item(), x.max().float().item())
