"""Activations whose tokens each have a scale, and a zero point: their numbers, their gradient, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import QuantSpec, Recipe, Rule
from fxquant.errors import InvalidArgument
from fxquant.ops import affine_qparams, channel_min_max
from fxquant.spec.ranges import CurrentTensor, Learned

FORMATS: tuple[dict[str, Any], ...] = (
    {"bits": 4, "signed": False, "symmetric": False},
    {"bits": 8, "signed": False, "symmetric": False},
    {"bits": 4, "symmetric": False},
    {"bits": 8, "signed": False},
    {"bits": 8},
)
# As far below 0 as above: of 15 steps each end is at 7.5, and both round away from 0, one code too many.
MIRRORED = torch.linspace(-1, 1, 16) * torch.tensor([0.5, 1.0, 3.0]).reshape(1, 3, 1)
X = torch.cat(
    [torch.randn(2, 3, 16) * 3, torch.rand(2, 3, 16) + 2, -torch.rand(2, 3, 16), torch.zeros(2, 3, 16), MIRRORED]
)


def prepared(fields: dict[str, Any]) -> nn.Module:
    """What its product multiplies is its result."""
    model = nn.Linear(16, 16, bias=False)
    nn.init.eye_(model.weight)
    recipe = Recipe(name="tokens", activation=QuantSpec(group_size=-1, range=CurrentTensor(), **fields))
    floats = Rule(operand="weight", spec=None)
    return fxquant.prepare(model, (X,), recipe=recipe, target="generic", rules=[floats])


def oracle(x: Tensor, spec: QuantSpec) -> Tensor:
    """Row by row: the scale and what is rounded in float32, where ties are, all else in float64."""
    found = []
    for row in x.reshape(-1, x.shape[-1]):
        low, high = min(row.min().item(), 0.0), max(row.max().item(), 0.0)
        reach = (spec.quant_max - spec.quant_min) // 2
        width = max(-low, high) / reach if spec.symmetric else (high - low) / (spec.quant_max - spec.quant_min)
        scale = torch.tensor(max(width, 2.0**-60), dtype=torch.float32)
        middle = 0 if spec.signed else (spec.quant_min + spec.quant_max + 1) // 2
        point = middle if spec.symmetric else spec.quant_min - torch.round(low / scale)
        codes = (torch.round(row / scale) + point).clamp(spec.quant_min, spec.quant_max)
        found.append((codes.double() - point) * scale.double())
    return torch.stack(found).reshape(x.shape).float()


def test_zero_points_push_codes_out_of_the_range() -> None:
    """Which is what the gradients below must not see."""
    scale, point = affine_qparams(*channel_min_max(MIRRORED.reshape(-1, 16), 0), 0, 15, False)
    codes = torch.round(MIRRORED.reshape(-1, 16) / scale[:, None]) + point[:, None]
    assert codes.max() == 16


@pytest.mark.parametrize("fields", FORMATS, ids=str)
def test_numbers_are_those_of_each_token(fields: dict[str, Any]) -> None:
    step = torch.compile(prepared(fields), backend="fxquant_eager")
    x = X.clone().requires_grad_()
    y = step(x)
    torch.testing.assert_close(y, oracle(X, QuantSpec(group_size=-1, range=CurrentTensor(), **fields)))
    grad = torch.randn_like(X)
    y.backward(grad)
    assert torch.equal(x.grad, grad), "no code of a token lies outside its own range"


def test_compiled_numbers_are_the_same() -> None:
    model = prepared(FORMATS[0])
    found = []
    for backend in ("fxquant_eager", "fxquant"):
        torch._dynamo.reset()
        x = X.clone().requires_grad_()
        y = torch.compile(model, backend=backend)(x)
        y.square().sum().backward()
        found.append((y, x.grad))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_zero_point_that_follows_a_token_is_not_kept() -> None:
    with pytest.raises(InvalidArgument, match=r"activation\.range must be CurrentTensor\(\) for an activation in"):
        Recipe(name="r", activation=QuantSpec(signed=False, symmetric=False, group_size=-1, range=Learned()))


@pytest.mark.parametrize(("target", "asked"), [("openvino", "u4 token"), ("tensorrt", "s4 token")])
def test_targets_without_tokens_say_so(target: str, asked: str) -> None:
    """TensorRT would have no zero points anyway."""
    message = rf"must have a format that target '{target}' runs: got {asked} for an activation. It runs integers"
    with pytest.raises(InvalidArgument, match=message):
        fxquant.prepare(nn.Linear(16, 16), (X,), recipe="w4a4_dynamic", target=target)
