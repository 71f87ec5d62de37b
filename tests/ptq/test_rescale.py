"""equalize and smooth: the float function stays, ranges move along; the papers' equations; what is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxquant
from fxquant import ptq
from fxquant.prepared.quantizer import quantizers
from tests.ptq.nets import Forms, Perceptron, images, ready, vectors


def function(model: nn.Module, data: list[Tensor]) -> Tensor:
    """What the model computes in float64, without quantizers."""
    with torch.no_grad():
        return fxquant.strip(copy.deepcopy(model)).eval().double()(torch.cat(data).double())


def ranges(model: nn.Module) -> dict[str, tuple[float, float]]:
    return {key: (q.min_val.item(), q.max_val.item()) for key, q in quantizers(model) if q.stateful}


@pytest.mark.parametrize("method", [ptq.equalize, ptq.smooth])
def test_the_float_function_stays_and_ranges_move_along(method):
    data = images()
    model = ready(Forms, data)
    before, weights = function(model, data), {k: v.detach().clone() for k, v in model.named_parameters()}
    report = method(model, data, progress=False)
    assert torch.allclose(function(model, data), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    changed = {k for k, v in model.named_parameters() if not torch.equal(v, weights[k])}
    norms = {"before.weight", "before.bias", "attend.in_proj_weight"} if method is ptq.smooth else set()
    assert changed == {"norm.weight", "norm.bias", "deep.weight", "flat.weight", "flat.bias", "matrix"} | norms
    moved = ranges(model)
    fxquant.calibrate(model, data, progress=False)
    for key, ends in ranges(model).items():
        assert moved[key] == pytest.approx(ends, rel=1e-5, abs=1e-6), key
    declined = dict(report.declined)
    assert "read by layer_norm" in declined["matmul0_rhs"]
    assert declined["attend.linear1_weight"] == "its result is read by what the model gives back"
    assert {row.key for row in report.rows} >= {"conv.weight", "deep.weight", "flat.weight"}
    assert all(row.before > 0 and row.after > 0 for row in report.rows)


def test_equalized_layers_have_one_range_for_each_channel():
    data = vectors()
    model = ready(Perceptron, data)
    up, down = (layer.weight.detach().clone().double() for layer in (model.up, model.down))
    ptq.equalize(model, data, progress=False)
    r1, r2 = up.abs().amax(1), down.abs().amax(0)
    s = (r1 / r2).sqrt()
    assert torch.allclose(model.up.weight.double(), up / s[:, None], rtol=1e-6)
    assert torch.allclose(model.down.weight.double(), down * s, rtol=1e-6)
    assert torch.allclose(model.up.weight.abs().amax(1), model.down.weight.abs().amax(0), rtol=1e-5)


class Block(nn.Module):
    """A gated layer behind RMSNorm as it is written out, and attention's values: what language models have."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(8) + 0.5)
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12, bias=False), nn.Linear(12, 8)
        self.q, self.v, self.o = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.gamma * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
        y = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        q, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q(y), self.v(y)))
        mixed = functional.scaled_dot_product_attention(q, q.tanh(), v).transpose(1, 2).flatten(2)
        found: Tensor = self.o(mixed)
        return found


@pytest.fixture(scope="module")
def block() -> nn.Module:
    data = [torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 8)]
    return ready(Block, data), data


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smooth_is_the_paper_s_equation(block, alpha):
    model, data = copy.deepcopy(block[0]), block[1]
    before = function(model, data)
    x = data[0]
    seen = (model.gamma * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))).abs().amax((0, 1)).detach()
    weights = torch.cat([model.gate.weight, model.up.weight]).abs().amax(0).detach()
    s = seen**alpha / weights ** (1 - alpha)
    gamma, gate = model.gamma.detach().clone(), model.gate.weight.detach().clone()
    report = ptq.smooth(model, data, alpha, progress=False)
    assert torch.allclose(model.gamma, gamma / s, rtol=1e-5)
    assert torch.allclose(model.gate.weight, gate * s, rtol=1e-5)
    assert torch.allclose(function(model, data), before, rtol=1e-5, atol=1e-5)
    rows = {row.key for row in report.rows}
    assert {"up.weight", "v.weight"} <= rows, "through a gate, and through attention"
    declined = dict(report.declined)
    assert "silu" in declined["gate.weight"]


def test_what_is_read_elsewhere_is_left_alone():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(12, 12), nn.Linear(12, 12)
            self.last.weight = self.first.weight
            self.twice = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            y = self.last(torch.relu(self.first(x)))
            found: Tensor = self.twice(torch.relu(self.twice(torch.sigmoid(y))))
            return found

    model = ready(Tied, vectors(1))
    with pytest.raises(fxquant.errors.InvalidArgument, match="got none that it can use"):
        ptq.equalize(model, vectors(1), progress=False)


def test_fixed_ranges_do_not_move():
    data = vectors(1)
    torch.manual_seed(0)
    rule = fxquant.Rule(
        path="down",
        operand="activation",
        spec=fxquant.QuantSpec(signed=False, symmetric=False, range=fxquant.Fixed(min=0, max=6)),
    )
    model = fxquant.calibrate(fxquant.prepare(Perceptron(), (data[0],), rules=(rule,)), data)
    with pytest.raises(fxquant.errors.InvalidArgument, match=r"the range of down\.input does not move"):
        ptq.equalize(model, data, progress=False)


def test_trained_scales_are_found_again():
    """Of weights as they have become, and of activations as their extremes have moved."""
    data = vectors(1)
    model = ready(Perceptron, data, recipe="w4a4")
    held, before = dict(quantizers(model)), function(model, data)
    ends = held["down.input"].range.ends(held["down.input"].state, held["down.input"].spec)
    scales = held["down.weight"].scale.detach().clone()
    assert len(ptq.equalize(model, data, progress=False).rows) == 1
    assert torch.allclose(function(model, data), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    assert all(quantizer.resolved for quantizer in held.values())
    moved = {key: quantizer.scale.detach().clone() for key, quantizer in held.items()}
    assert not torch.allclose(moved["down.weight"], scales, rtol=1e-2)
    assert held["down.input"].range.ends(held["down.input"].state, held["down.input"].spec) != ends
    fxquant.calibrate(model, data, progress=False)
    for key in ("up.weight", "down.weight"):
        assert torch.equal(held[key].scale, moved[key]), key
    report = ptq.gptq(model, data, progress=False)
    assert [row.key for row in report.rows] == ["up.weight", "down.weight"], str(report)


@pytest.mark.parametrize("recipe", ["int8_dynamic", "fp8"])
def test_other_formats_are_scaled_too(recipe):
    data = vectors(1)
    model = ready(Perceptron, data, recipe=recipe, target="generic")
    before = function(model, data)
    assert len(ptq.equalize(model, data, progress=False).rows) == 1
    assert torch.allclose(function(model, data), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
