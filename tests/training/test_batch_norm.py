"""BatchNorm statistics of the quantized model, against a float64 computation of the same layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import InvalidArgument
from fxquant.prepared.freeze import freeze_batch_norm
from tests.nets import Mlp, ranges

BATCHES = [torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def net() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=0.2), nn.Dropout(0.5))
    found = fxquant.prepare(nn.Sequential(body, nn.Flatten(), nn.Linear(64, 4)), (BATCHES[0],), recipe="w4a8")
    fxquant.calibrate(found, BATCHES, progress=False)
    return found


def expected(model: nn.Module, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean over batches of each one's mean and unbiased variance behind the quantized convolution, in float64."""
    low, high = (torch.tensor(bound, dtype=torch.float64) for bound in ranges(model)["0.0.input"])
    scale = (high - low) / 255
    zero = (-low / scale).round()
    w = model[0][0].weight.detach().double()
    step = w.abs().amax((1, 2, 3), keepdim=True) / 7
    means, variances = [], []
    for x in batches:
        quantized = ((x.double() / scale).round() + zero).clamp(0, 255).sub(zero) * scale
        y = F.conv2d(quantized, (w / step).round() * step)
        means.append(y.mean((0, 2, 3)))
        variances.append(y.var((0, 2, 3)))
    return torch.stack(means).mean(0), torch.stack(variances).mean(0)


@pytest.mark.parametrize("frozen", [False, True])
def test_statistics_of_the_quantized_layer(frozen: bool) -> None:
    model = net()
    freeze_batch_norm(model, frozen)
    norm, before = model[0][1], copy.deepcopy(model.state_dict())
    assert fxquant.reestimate_batch_norm(model, BATCHES, progress=False) is model
    mean, variance = expected(model, BATCHES)
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-4, atol=1e-5)
    after = model.state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {"0.1.running_mean", "0.1.running_var", "0.1.num_batches_tracked"}
    assert norm.momentum == 0.2 and norm.training is not frozen and model.training and norm.num_batches_tracked == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data must hold at least one batch: got none"),
        ([BATCHES[0], "x"], "each batch of data must be a tensor, a tuple"),
    ],
)
def test_errors_leave_the_statistics(data: Any, message: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidArgument, match=message):
        fxquant.reestimate_batch_norm(model, data, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model[0][1].momentum == 0.2 and model[0][1].training


def test_a_model_without_statistics() -> None:
    with pytest.raises(InvalidArgument, match="must have a BatchNorm with running statistics: got Mlp, which has none"):
        fxquant.reestimate_batch_norm(fxquant.prepare(Mlp(), (torch.zeros(2, 8),)), BATCHES)
    with pytest.raises(InvalidArgument, match="reestimate_batch_norm must be given a prepared model"):
        fxquant.reestimate_batch_norm(Mlp(), BATCHES)
