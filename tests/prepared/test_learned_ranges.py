"""Models whose ranges are trained: what optimizers get, what is told, frozen, saved, changed and exported."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import CurrentTensor, Learned, QuantSpec, Recipe
from fxquant.errors import InvalidArgument, NotQuantizedWarning
from fxquant.plan.plan import Plan
from fxquant.prepared.optimizers import parameter_groups, range_parameters, unwatch_optimizers, watch_optimizers
from fxquant.prepared.quantizer import quantizers
from fxquant.prepared.root import plan_of
from tests.onnx.agreement import assert_codes_agree
from tests.ops.cases_learnable import ste_affine

EAGER = "fxquant_eager"
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield


def recipe(method: Any = "lsq", bits: int = 4, **weight: Any) -> Recipe:
    weights = Learned(method="lsq" if method == "lsq_plus" else method)
    return Recipe(
        name="learned",
        activation=QuantSpec(bits=bits, signed=False, symmetric=False, range=Learned(method=method)),
        weight=QuantSpec(bits=bits, narrow=True, **{"axis": 0, "range": weights, **weight}),
    )


def prepared(method: Any = "lsq", net: nn.Module | None = None, calibrated: bool = True, **weight: Any) -> nn.Module:
    torch.manual_seed(0)
    model = fxquant.prepare(net or Net(), (X,), recipe=recipe(method, **weight))
    return fxquant.calibrate(model, [X], progress=False) if calibrated else model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor = X) -> Tensor:
    optimizer.zero_grad()
    out = torch.compile(model, backend=EAGER)(x)
    out.square().mean().backward()
    optimizer.step()
    return out


# --- parameters -----------------------------------------------------------------------------------------------------


def test_they_are_parameters_with_groups_of_their_own() -> None:
    model = prepared("lsq_plus")
    names = list(range_parameters(model))
    assert names == [
        f"{layer}.{site}" for layer in ("up", "down") for site in ("input.scale", "input.offset", "weight.scale")
    ]
    assert {id(p) for p in range_parameters(model).values()} < {id(p) for p in model.parameters()}
    own, ranges = fxquant.parameter_groups(model, lr=0.1, scale_lr=0.01, weight_decay=0.2)
    assert (own["lr"], own["weight_decay"], ranges["lr"], ranges["weight_decay"]) == (0.1, 0.2, 0.01, 0.0)
    assert [id(p) for p in ranges["params"]] == [id(p) for p in range_parameters(model).values()]
    assert len(own["params"]) == 4 and len(parameter_groups(prepared(net=Net()))) == 2
    assert [set(group) for group in fxquant.parameter_groups(model)] == [{"params"}, {"params", "weight_decay"}]
    optimizer = torch.optim.AdamW(fxquant.parameter_groups(model, lr=0.1), weight_decay=0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    plain = fxquant.prepare(Net(), (X,))
    assert len(fxquant.parameter_groups(plain)) == 1 and not range_parameters(plain)


def test_bad_rates_are_refused() -> None:
    model = prepared(calibrated=False)
    for given in ({"lr": -1.0}, {"scale_lr": "0.1"}, {"weight_decay": float("nan")}):
        with pytest.raises(InvalidArgument, match=f"{next(iter(given))} must be a number of at least 0, or None: got"):
            fxquant.parameter_groups(model, **given)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="parameter_groups must be given a prepared model"):
        fxquant.parameter_groups(Net())


def told(optimizers: list[torch.optim.Optimizer]) -> list[str]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for optimizer in optimizers * 2:
            optimizer.step()
    return [str(w.message) for w in seen if w.category is NotQuantizedWarning]


def test_an_optimizer_made_before_prepare_is_told_of_once() -> None:
    net = Net()
    early = torch.optim.SGD(net.parameters(), 0.1)
    model = prepared(net=net, calibrated=False)
    (words,) = told([early])
    assert "4 of 4 learned ranges of Net are in no optimizer" in words and "up.input.scale, up.weight.scale" in words
    assert "Make the optimizer after fxquant.prepare" in words and told([early]) == []
    fxquant.override(model, {"up.input": None})  # a new plan is looked at again
    assert "3 of 3" in told([early])[0]


def test_nothing_is_told_where_another_optimizer_holds_them_or_nothing_is_trained() -> None:
    model = prepared(calibrated=False)
    own, ranges = (group["params"] for group in fxquant.parameter_groups(model))
    other = torch.optim.Adam(ranges, 0.1)
    assert told([torch.optim.SGD(own, 0.1), other]) == []
    del other
    held = prepared(calibrated=False)
    fxquant.freeze_ranges(held)
    assert told([torch.optim.SGD(held.up.parameters(), 0.1)]) == []
    groups = fxquant.parameter_groups(prepared(calibrated=False))
    assert len(told([torch.optim.SGD(groups[0]["params"], 0.1)])) == 1, "a list of parameters is no optimizer"
    unwatch_optimizers()
    fresh = prepared(calibrated=False)
    unwatch_optimizers()  # which preparing has called again
    assert told([torch.optim.SGD([fresh.up.bias], 0.1)]) == []
    watch_optimizers()


# --- training -------------------------------------------------------------------------------------------------------


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def test_all_gradients_of_a_model_are_those_of_lsq_in_float64() -> None:
    """Straight-through estimators written with torch's own operators, and the gradient scales of the paper."""
    model = prepared()
    state = {name: p.detach().double() for name, p in model.named_parameters()}
    points = {key: q.zero_point.double() for key, q in quantizers(model) if key.endswith("input")}
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}

    def site(x: Tensor, key: str, count: int, most: int) -> Tensor:
        scale = ScaledGradient.apply(leaves[key], (count * most) ** -0.5)
        if "weight" in key:
            return torch.stack([ste_affine(r, s, r.new_zeros(1), -most, most) for r, s in zip(x, scale, strict=True)])
        return ste_affine(x, scale, points[key.replace(".quantizers", "").replace(".scale", "")], 0, most)

    def layer(x: Tensor, name: str) -> Tensor:
        w = site(leaves[f"{name}.weight"], f"{name}.quantizers.weight.scale", 8, 7)
        x = site(x, f"{name}.quantizers.input.scale", 8, 15)
        return nn.functional.linear(x, w, leaves[f"{name}.bias"])

    expected = layer(layer(X.double(), "up").relu(), "down")
    expected.square().mean().backward()
    out = torch.compile(model, backend=EAGER)(X)
    out.square().mean().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.double(), leaves[name].grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", ["lsq", "lsq_plus", "pact", "tqt", "amax"])
def test_the_way_from_prepare_to_a_verified_file(method: Any, tmp_path: Path) -> None:
    model = prepared(method, calibrated=False, bits=8)
    assert {row.range for row in fxquant.explain(model).rows} == {"unset"}
    optimizer = torch.optim.Adam(fxquant.parameter_groups(model, lr=0.01))
    first = step(model, optimizer)
    assert all(q.resolved for _, q in quantizers(model)), "the first batch has set what was unset"
    before = {name: p.detach().clone() for name, p in range_parameters(model).items()}
    for factor in (1.5, 0.7):
        assert step(model, optimizer, X * factor).isfinite().all()
    moved = [name for name, p in range_parameters(model).items() if not torch.equal(p, before[name])]
    assert len(moved) >= 4 and first.isfinite().all()
    if method in ("lsq_plus", "tqt"):  # whose zero point, and scale, no other has
        fxquant.export_onnx(model, (X,), tmp_path / "m.onnx")
        assert_codes_agree(fxquant.verify_onnx(model, (X,), tmp_path / "m.onnx"))


@pytest.mark.parametrize("method", ["lsq", "pact", "tqt", "amax"])
def test_a_huge_learning_rate_makes_no_scale_zero_or_negative(method: Any) -> None:
    model = prepared(method)
    optimizer = torch.optim.SGD(fxquant.parameter_groups(model, lr=0.0, scale_lr=1e4))
    for factor in (1.0, 5.0, 1.0, 0.1):
        out = step(model, optimizer, X * factor)
        assert out.isfinite().all()
    told = [row.range for row in fxquant.explain(model).rows]
    assert not any("nan" in words or "unset" in words for words in told)
    assert method == "tqt" or not any("-" in words.replace("e-", "") for words in told)


def test_a_weight_of_zeros_trains_and_gets_its_scale_when_it_is_one() -> None:
    net = Net()
    nn.init.zeros_(net.up.weight)
    with torch.no_grad():
        net.down.weight[1] = 0
    model = prepared(net=net, calibrated=False)
    optimizer = torch.optim.SGD(fxquant.parameter_groups(model, lr=0.1))
    step(model, optimizer)
    held = dict(quantizers(model))
    assert not held["up.weight"].is_set() and held["down.weight"].is_set() and model.down.weight[1].any()
    nn.init.normal_(net.up.weight)
    out = step(model, optimizer)
    assert held["up.weight"].resolved and (held["up.weight"].scale > 1e-3).all() and out.isfinite().all()


def test_frozen_ranges_stand_still_and_checkpoints_hold_that() -> None:
    model = prepared()
    fxquant.freeze_ranges(model)
    assert not any(p.requires_grad for p in range_parameters(model).values()) and model.up.weight.requires_grad
    before = {name: p.clone() for name, p in range_parameters(model).items()}
    step(model, torch.optim.SGD(model.parameters(), 0.5, weight_decay=0.1))
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in range_parameters(model).items())
    other = prepared(calibrated=False)
    other.load_state_dict(model.state_dict())
    assert not any(p.requires_grad for p in range_parameters(other).values())
    fxquant.freeze_ranges(other, frozen=False)
    step(other, torch.optim.SGD(other.parameters(), 0.5))
    assert all(p.grad is not None for p in range_parameters(other).values())


def test_saved_copied_and_pickled() -> None:
    model = prepared("lsq_plus")
    step(model, torch.optim.SGD(model.parameters(), 0.1))
    expected = torch.compile(model.eval(), backend=EAGER)(X)
    loaded = prepared("lsq_plus", calibrated=False)
    loaded.load_state_dict(copy.deepcopy(model.state_dict()))
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in range_parameters(other).values())
        assert torch.equal(torch.compile(other.eval(), backend=EAGER)(X), expected)
    half = copy.deepcopy(model).half()
    assert {p.dtype for p in range_parameters(half).values()} == {torch.float32}
    plan = plan_of(model)
    assert plan is not None and Plan.from_json(plan.to_json()) == plan
    assert [site.scales for site in plan.sites] == [1, 8, 1, 3]


def test_override_keeps_the_range_in_other_codes_and_resets_what_no_longer_fits() -> None:
    model = prepared()
    held = dict(quantizers(model))
    scale, before = held["up.input"].scale, held["up.input"].scale.item()
    eight = recipe(bits=8)
    fxquant.override(model, {"*.input": eight.activation, "*.weight": eight.weight})
    held = dict(quantizers(model))
    assert held["up.input"].scale is scale and scale.item() == pytest.approx(before * 15 / 255, rel=0.02)
    assert held["up.input"].resolved and held["up.weight"].resolved
    fxquant.override(model, {"up.weight": QuantSpec(bits=4, narrow=True, range=Learned())})
    assert (
        dict(quantizers(model))["up.weight"].scale.shape == (1,) and not dict(quantizers(model))["up.weight"].resolved
    )
    fxquant.override(model, {"up.weight": QuantSpec(bits=4, narrow=True, axis=0, range=CurrentTensor())})
    assert not dict(quantizers(model))["up.weight"].stateful
    assert torch.compile(model, backend=EAGER)(X).isfinite().all()


def test_a_plan_of_an_older_version_says_what_it_lacks() -> None:
    model = fxquant.prepare(Net(), (X,))
    plan = plan_of(model)
    assert plan is not None
    text = plan.to_json().replace('"shape": [8, 8]', '"shape": null')
    old = Plan.from_json(text)
    assert [site.shape for site in old.sites][:2] == [None, None] and old == Plan.from_json(text)
    model.__dict__["_fxquant_root"].plan = old
    with pytest.raises(fxquant.errors.UnsupportedModel, match=r"weight of up.weight must be of fixed size.*Prepare"):
        fxquant.override(model, {"up.weight": recipe().weight})
    assert fxquant.explain(model).rows


# --- per group, and with what folds ---------------------------------------------------------------------------------


def test_a_scale_for_each_group_of_a_weight(tmp_path: Path) -> None:
    weight = QuantSpec(bits=4, narrow=True, axis=0, group_size=4, range=Learned())
    model = fxquant.prepare(Net(), (X,), recipe=Recipe(name="groups", activation=None, weight=weight))
    scales = range_parameters(model)
    assert {name: p.numel() for name, p in scales.items()} == {"up.weight.scale": 16, "down.weight.scale": 6}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        step(model, optimizer)
    assert all(p.grad is not None and p.grad.any() for p in scales.values())
    expected = torch.compile(model.eval(), backend=EAGER)(X)
    fxquant.export_onnx(model, (X,), tmp_path / "m.onnx")
    (found,) = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"x": X.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([1.0, -0.5, 0.0, 2.0]))
            self.norm.bias.copy_(torch.tensor([0.1, 0.7, 0.3, -0.1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


IMAGES = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def test_batch_norm_folds_into_a_weight_with_trained_scales(tmp_path: Path) -> None:
    """``FQ(w·f, s·|f|)``: training with running statistics is the file's network, factors below 0 and of 0 included."""
    torch.manual_seed(0)
    model = fxquant.prepare(Normed(), (IMAGES,), recipe=recipe(bits=8))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(2):
        step(model, optimizer, IMAGES)
    unfolded = torch.compile(copy.deepcopy(model).eval(), backend=EAGER)(IMAGES)
    fxquant.freeze_batch_norm(model)
    out = torch.compile(model, backend=EAGER)(IMAGES)
    assert torch.equal(out, unfolded)
    out.square().mean().backward()
    assert model.conv.quantizers.weight.scale.grad.any() and model.norm.weight.grad.any()
    report = fxquant.export_onnx(model, (IMAGES,), tmp_path / "m.onnx")
    assert "BatchNormalization" not in str(report)
    assert_codes_agree(fxquant.verify_onnx(model, (IMAGES,), tmp_path / "m.onnx"))


def test_folding_gives_every_parameter_the_gradient_of_the_product() -> None:
    """The norm's factor by the weight, as with a scale of the weight's own; the scale as before the norm."""
    torch.manual_seed(0)
    found = Learned(gradient_scale=1.0)
    model = fxquant.prepare(Normed(), (IMAGES,), recipe=recipe(bits=8, range=found))
    fxquant.calibrate(model, [IMAGES], progress=False)
    fxquant.freeze_batch_norm(model)
    scale = model.conv.quantizers.weight.scale
    with torch.no_grad():
        scale.mul_(0.7)  # so that some are clipped
    torch.compile(model, backend=EAGER)(IMAGES).square().mean().backward()
    ours = scale.grad.clone()
    weight = model.conv.weight.detach()
    s = scale.detach()[:, None, None, None]
    steps = weight / s
    codes = steps.round().clamp(-127, 127)
    slope = torch.where(steps.abs().round() > 127, codes, codes - steps)
    assert (steps.abs() > 128).any()
    twin = copy.deepcopy(model)
    fxquant.override(twin, {"conv.weight": None})
    with torch.no_grad():
        twin.conv.weight.copy_(codes * s)
    twin.zero_grad()
    torch.compile(twin, backend=EAGER)(IMAGES).square().mean().backward()
    expected = (twin.conv.weight.grad * slope).sum((1, 2, 3))
    torch.testing.assert_close(ours, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        ({"axis": None}, "a trained scale that several channels share"),
        ({"narrow": False}, "a lowest code without a mirror.*narrow=True"),
    ],
)
def test_what_is_not_folded_says_why_and_is_exported_apart(weight: dict[str, Any], why: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = {"bits": 8, "narrow": True, "axis": 0, "range": Learned(), **weight}
    model = fxquant.prepare(Normed(), (IMAGES,), recipe=Recipe(name="r", weight=QuantSpec(**spec)))
    fxquant.calibrate(model, [IMAGES], progress=False)
    torch.compile(model.eval(), backend=EAGER)(IMAGES)
    assert torch.compile(model.eval(), backend=EAGER)(IMAGES).isfinite().all()
    fxquant.export_onnx(model, (IMAGES,), tmp_path / "m.onnx")
    assert_codes_agree(fxquant.verify_onnx(model, (IMAGES,), tmp_path / "m.onnx"))


# --- reports --------------------------------------------------------------------------------------------------------


def test_reports_take_them_as_any_range() -> None:
    model = prepared(bits=8)
    assert any("lsq" in row.spec and row.range.startswith("scale 0.") for row in fxquant.explain(model).rows)
    assert {row.key for row in fxquant.sensitivity(model, [X], progress=False).rows} >= {"up.input", "up.weight"}
