"""The damping of weights against the formula, and what it does to weights that oscillate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import CurrentTensor, QuantSpec, Stage
from fxquant.prepared.quantizer import quantizers

X = torch.zeros(2, 16)


def prepared(spec: QuantSpec) -> nn.Module:
    torch.manual_seed(0)
    return fxquant.prepare(nn.Sequential(nn.Linear(16, 4)), (X,), recipe=fxquant.Recipe(name="one", weight=spec))


def formula(w: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """``Σ (Q(w) − w)²`` and ``Q(w)`` in float64; with scales from the weight itself nothing is clipped."""
    rows = w.detach().double().reshape(-1, spec.group_size) if spec.group_size else w.detach().double()
    scale = (rows.abs().amax() if spec.axis is None else rows.abs().amax(1, keepdim=True)) / spec.quant_max
    quantized = ((rows / scale).round() * scale).reshape(w.shape)
    return (quantized - w.double()).square().sum(), quantized


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(bits=4, narrow=True, axis=0, range=CurrentTensor()),
        QuantSpec(bits=3, narrow=True, range=CurrentTensor()),
        QuantSpec(bits=4, narrow=True, axis=0, group_size=8, range=CurrentTensor()),
    ],
    ids=str,
)
def test_the_formula_and_its_gradient(spec: QuantSpec) -> None:
    model = prepared(spec)
    schedule = fxquant.Schedule(model, [Stage(at=0, damping=0.5), Stage(at=1, damping=0.0)])
    weight = model[0].weight
    value, quantized = formula(weight, spec)
    loss = schedule.damping()
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * value.item(), rel=1e-5)
    torch.testing.assert_close(weight.grad.double(), weight.double().detach() - quantized, rtol=1e-5, atol=1e-7)
    schedule.step()
    assert schedule.damping().item() == 0 and not schedule.damps


@pytest.mark.parametrize("recipe", ["w4a8", "int4_weight_only", "fp8", "mxfp4", "nvfp4"])
def test_of_every_format_it_is_the_distance_to_what_the_model_multiplies_with(recipe: str) -> None:
    """The rows of the identity come out of the layer as its quantized weight."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    eye = torch.eye(32)
    model = fxquant.prepare(nn.Sequential(nn.Linear(32, 16, bias=False)), (eye,), recipe=recipe, target="generic")
    fxquant.calibrate(model, [eye], progress=False)
    floats = {} if recipe == "int4_weight_only" else {"activations": "float"}
    schedule = fxquant.Schedule(
        model,
        [Stage(at=0, damping=1.0, **floats), Stage(at=1, weights="quantize", **dict.fromkeys(floats, "quantize"))],
    )
    schedule.damping().backward()
    weight = model[0].weight
    quantized = torch.compile(model, backend="fxquant_eager")(eye).detach().T
    assert torch.unique(quantized).numel() < 512
    torch.testing.assert_close(weight.grad, 2 * (weight.detach() - quantized), rtol=1e-5, atol=1e-7)


def test_only_what_is_quantized_and_trained_is_damped() -> None:
    model = prepared(QuantSpec(bits=4, narrow=True, axis=0, range=CurrentTensor()))
    schedule = fxquant.Schedule(
        model, [Stage(at=0, weights="float", damping=1.0), Stage(at=1, weights=8), Stage(at=2, weights="quantize")]
    )
    assert schedule.damping().item() == 0
    schedule.step()
    weight = model[0].weight
    eight = QuantSpec(bits=8, narrow=True, axis=0, range=CurrentTensor())
    assert schedule.damping().item() == pytest.approx(formula(weight, eight)[0].item(), rel=1e-4)
    weight.requires_grad_(False)
    assert schedule.damping().item() == 0


def test_what_is_clipped_is_not_pulled() -> None:
    """``clip(w)`` is ``Q(w)`` there: such a weight is at the end of its codes and oscillates between none."""
    model = prepared(QuantSpec(bits=3, narrow=True, range=fxquant.Learned(method="lsq")))
    weight = model[0].weight
    schedule = fxquant.Schedule(model, [Stage(at=0, damping=1.0)])
    (quantizer,) = (q for key, q in quantizers(model) if key.endswith("weight"))
    quantizer.state["scale"].data.fill_(0.05)
    schedule.damping().backward()
    w = weight.detach().double()
    assert (w.abs() > 0.175).any() and (w.abs() < 0.175).any()
    quantized = (w / 0.05).round().clamp(-3, 3) * 0.05
    apart = torch.where((w / 0.05).round().abs() > 3, 0.0, w - quantized)
    torch.testing.assert_close(weight.grad.double(), 2 * apart, rtol=1e-4, atol=1e-7)
    assert quantizer.state["scale"].grad is None, "the scale is trained by the loss of the task alone"


def test_weights_come_to_rest_where_they_oscillated() -> None:
    """A weight whose best value lies between two codes goes back and forth; damped, it stays on one."""
    moves = {}
    for factor in (0.0, 2.0):
        model = prepared(QuantSpec(bits=3, narrow=True, range=CurrentTensor()))
        layer = model[0]
        schedule = fxquant.Schedule(model, [Stage(at=0, damping=factor)])
        (quantizer,) = (q for key, q in quantizers(model) if key.endswith("weight"))
        assert quantizer.is_on
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(-1, 1, 64).view(4, 16))
        aim, codes, changed = layer.weight.detach() * 0.98 + 0.01, None, 0
        for _ in range(60):
            quantized = formula(layer.weight, quantizer.spec)[1].float()
            now = (quantized / quantized.abs().max() * 3).round()
            changed += 0 if codes is None else int((now != codes).sum())
            codes = now
            layer.weight.grad = None
            pulled = layer.weight + (quantized - layer.weight).detach()  # straight through
            ((pulled - aim).square().sum() + schedule.damping()).backward()
            with torch.no_grad():
                layer.weight -= 0.05 * layer.weight.grad
        moves[factor] = changed
    assert moves[0.0] > 100 and moves[2.0] < 0.5 * moves[0.0], moves
