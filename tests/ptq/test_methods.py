"""correct_bias and clip_weights; all methods together, their errors, and that an error takes everything back."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import ptq
from fxquant.errors import InvalidArgument
from fxquant.prepared.quantizer import quantizers
from fxquant.ptq.clip_weights import best_ends
from fxquant.ptq.moments import Moments
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import CurrentTensor
from fxquant.spec.recipes import Recipe
from tests.onnx.agreement import assert_codes_agree
from tests.ptq.nets import Forms, Perceptron, images, ready, vectors

METHODS = ("equalize", "smooth", "clip_weights", "correct_bias", "adaround", "gptq")


def call(name: str, model: nn.Module, data: object, **options: object) -> ptq.PtqReport:
    return getattr(ptq, name)(model, data, progress=False, **options)


def outputs(model: nn.Module, data: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.compile(model.eval(), backend="fxquant_eager")(torch.cat(data))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {k for k, v in tensors(model).items() if not torch.equal(v, before[k])}


def test_expected_errors_are_gone():
    data = vectors()
    model = ready(Perceptron, data, recipe="w4a8")
    with torch.no_grad():
        exact = torch.cat(data) @ model.up.weight.T + model.up.bias
        exact = (torch.relu(exact) @ model.down.weight.T + model.down.bias).mean(0)
    start, before = (outputs(model, data).mean(0) - exact).norm(), tensors(model)
    report = call("correct_bias", model, data)
    end = (outputs(model, data).mean(0) - exact).norm()
    assert end < 1e-5 * exact.norm() < 1e-2 * start
    row = report.rows[-1]
    assert (row.key, row.before) == ("down.weight", pytest.approx(start.item(), rel=1e-4))
    assert row.after < 1e-5 * exact.norm()
    assert changed(model, before) == {"up.bias", "down.bias"}


def test_bias_of_a_folded_batch_norm_is_its_own():
    data = images()
    model = ready(Forms, data, recipe="w4a8")
    before = tensors(model)
    report = call("correct_bias", model, data)
    assert dict(report.declined) == {"deep.weight": "it has no bias"}
    bias_step = 1e-4  # codes of biases, which the convolution's kernel adds as integers
    for row in report.rows:
        assert row.after < (0.1 * row.before if row.key != "conv.weight" else row.before + bias_step), str(report)
    biases = {"norm.bias", "flat.bias", "shift", "attend.in_proj_bias", "attend.out_proj.bias"}
    assert changed(model, before) <= biases and "shift" in changed(model, before)


def test_ends_are_the_best_of_a_scan():
    w = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).double()
    numbers = torch.arange(6).unsqueeze(1).expand(6, 40)
    ends, before, after = best_ends(w.reshape(-1), numbers.reshape(-1), -7, 7)

    def error(row: Tensor, end: float) -> float:
        return float(((row / (end / 7)).round().clamp(-7, 7) * (end / 7) - row).square().sum())

    tops = w.abs().amax(1).tolist()
    least = [min(error(row, top * k / 100) for k in range(20, 101)) for row, top in zip(w, tops, strict=True)]
    assert [error(row, end) for row, end in zip(w, ends.tolist(), strict=True)] == pytest.approx(least)
    assert (before, after) == pytest.approx((sum(map(error, w, tops)), sum(least))) and after < 0.95 * before


@pytest.mark.parametrize("group", [None, 4])
def test_clipped_weights_have_the_range_that_was_chosen(group):
    data = vectors(1)
    weight = QuantSpec(bits=3, narrow=True, axis=0, group_size=group, range=CurrentTensor())
    model = ready(Perceptron, data, recipe=Recipe(name="w3", activation=None, weight=weight))
    before, start = model.up.weight.detach().clone(), tensors(model)
    report = call("clip_weights", model, data)
    rows = before.reshape(-1, group or 12)
    numbers = torch.arange(len(rows)).unsqueeze(1).expand_as(rows)
    ends, _, after = best_ends(rows.reshape(-1), numbers.reshape(-1), -3, 3)
    assert torch.equal(model.up.weight.detach().reshape(rows.shape), rows.clamp(-ends[:, None], ends[:, None]))
    row = next(row for row in report.rows if row.key == "up.weight")
    assert (
        row.after == pytest.approx((after / float(before.square().sum())) ** 0.5, rel=1e-4) and row.after < row.before
    )
    assert changed(model, start) <= {"up.weight", "down.weight"}


def test_all_of_them_then_training_then_the_file(tmp_path):
    """Nothing but weights and ranges changes before, and QAT goes on from there."""
    data = images()
    model = ready(Forms, data)
    model.norm.eval()
    modes, before = [m.training for m in model.modules()], tensors(model)
    for name in ("smooth", "equalize", "clip_weights", "correct_bias", "gptq", "adaround"):
        options = {"steps": 20} if name == "adaround" else {}
        assert call(name, model, data, **options).method == name
    fxquant.calibrate(model, data, method="mse", progress=False)
    assert [m.training for m in model.modules()] == modes
    assert not any("running" in key or "num_batches" in key for key in changed(model, before))
    assert all(q.calibrating is None and q.is_set() for _, q in quantizers(model))
    step = torch.compile(model.train(), backend="fxquant_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    step(data[0]).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    optimizer.step()
    fxquant.export_onnx(model.eval(), (data[0],), tmp_path / "model.onnx")
    assert_codes_agree(fxquant.verify_onnx(model, (data[0],), tmp_path / "model.onnx"))


def test_the_guide_s_example_runs(capsys):
    guide = (Path(__file__).parents[2] / "docs" / "ptq.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    exec(compile(example, "ptq.md", "exec"), {})
    shown = capsys.readouterr().out
    assert all(f"{name}: " in shown for name in ("equalize", "gptq", "correct_bias"))


FAULTS = {  # what is broken in its last step
    "equalize": ("fxquant.ptq.rescale", "_row"),
    "smooth": ("fxquant.ptq.rescale", "_row"),
    "clip_weights": ("fxquant.ptq.clip_weights", "_clipped"),
    "correct_bias": ("fxquant.ptq.correct_bias", "_move"),
    "adaround": ("fxquant.ptq.choose_codes", "_round"),
    "gptq": ("fxquant.ptq.choose_codes", "_round"),
}


@pytest.fixture(scope="module")
def perceptron() -> nn.Module:
    return ready(Perceptron, vectors(), recipe="w4a8")


@pytest.mark.parametrize("name", METHODS)
def test_an_error_takes_all_of_it_back(name, perceptron, monkeypatch):
    module, function = FAULTS[name]
    real, calls = getattr(sys.modules[module], function), []

    def broken(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == 2 or function == "_row":
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    before = tensors(perceptron)
    monkeypatch.setattr(sys.modules[module], function, broken)
    with pytest.raises(KeyboardInterrupt):
        call(name, perceptron, vectors())
    assert calls and not changed(perceptron, before)


@pytest.mark.parametrize("name", METHODS)
def test_bad_input(name, perceptron):
    with pytest.raises(InvalidArgument, match=f"{name} must be given a prepared model: got Perceptron without a plan"):
        call(name, Perceptron(), vectors())
    with pytest.raises(InvalidArgument, match="data must hold at least one batch: got none"):
        call(name, perceptron, [])
    with pytest.raises(InvalidArgument, match=r"each batch of data must be a tensor, .* got int"):
        call(name, perceptron, [3])


@pytest.mark.parametrize("name", ["adaround", "clip_weights", "gptq"])
def test_weights_of_small_floats_are_refused(name):
    """Not answered by a report of nothing."""
    x = torch.randn(8, 16)
    model = fxquant.prepare(nn.Sequential(nn.Linear(16, 4)), (x,), recipe="fp8", target="generic")
    fxquant.calibrate(model, [x], progress=False)
    with pytest.raises(InvalidArgument, match=rf"{name} must be given .*\(0.weight: its codes are small floats\)"):
        call(name, model, [x])


@pytest.mark.parametrize("name", METHODS)
def test_a_model_without_anything_for_it_is_refused(name):
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.table(x)
            return y @ y.transpose(-1, -2)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ready(Sums, [torch.randint(4, (2, 3))])
    with pytest.raises(InvalidArgument, match=rf"{name} must be given a model with .*: got none that it can use"):
        call(name, model, [torch.randint(4, (2, 3))])


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("smooth", {"alpha": 1.5}, r"alpha must be from 0 to 1: got 1\.5"),
        ("gptq", {"damping": 0.0}, r"damping must be positive: got 0\.0"),
        ("adaround", {"steps": 0}, "steps must be at least 1"),
        ("adaround", {"strength": -1.0}, "strength at least 0"),
    ],
)
def test_bad_options(name, options, match, perceptron):
    with pytest.raises(InvalidArgument, match=match):
        call(name, perceptron, vectors(), **options)


def test_shared_and_computed_weights_are_declined_with_a_reason():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(12, 12), nn.Linear(12, 12)
            self.last.weight = self.first.weight
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(12, 12))
            self.read, self.plain, self.wide = nn.Linear(12, 12), nn.Linear(12, 12), nn.ConvTranspose1d(1, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.normed(torch.tanh(self.last(torch.tanh(self.first(x)))))
            y = self.plain(self.read(y) * self.read.weight.mean())
            return self.wide(y.unsqueeze(1))

    data = vectors()
    report = call("gptq", ready(Shared, data, recipe="w4a8", target="generic"), data)
    reasons = dict(report.declined)
    assert [row.key for row in report.rows] == ["first_linear0_weight", "plain.weight"], "both uses of the first"
    assert reasons["wide.conv_transpose0_weight"] == "transposed convolutions are not looked at as matrices"
    assert reasons["read.weight"] == "mul reads the same parameter"
    assert any("scaled by what is computed from it" in w or "computed in the model" in w for w in reasons.values())
    assert "left alone" in str(report)


def test_two_runs_of_one_layer_add_up():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.again(torch.tanh(self.again(x)))

    data = vectors(1)
    model = ready(
        Twice, data, recipe=Recipe(name="w", activation=None, weight=QuantSpec(bits=4, axis=0, range=CurrentTensor()))
    )
    moments = Moments()
    with fxquant.ptq.running.opened(model, "test") as running:
        running.run(data[0], moments.watch, quantized=False)
    with torch.no_grad():
        x = torch.cat([data[0], torch.tanh(model.again(data[0]))]).double()
    assert torch.allclose(moments.sums["again.weight"][0], x.T @ x, rtol=1e-5)
