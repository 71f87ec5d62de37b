"""sensitivity: every effect against the model with its quantizers' own switches, one compile for each."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

import fxquant
from fxquant.errors import InvalidArgument, MissingDependency, NotQuantizedWarning, RangeNotSet
from fxquant.prepared.quantizer import quantizers
from fxquant.probe import visitor
from fxquant.report import SensitivityReport, SensitivityRow, sqnr
from fxquant.search import sweep
from tests import forked


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Folded(nn.Module):
    """BatchNorm, dropout, a module that runs twice, a buffer that counts, and a result that is no plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.again, self.drop = nn.Conv2d(4, 4, 1), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.calls += 1
        y = torch.relu(self.norm(self.conv(x)))
        y = self.drop(torch.tanh(self.again(torch.tanh(self.again(y)))))
        return {"y": y, "sizes": list(y.shape), "mean": y.mean((2, 3))}


class Broken(nn.Module):
    """A frame that breaks in its middle: instances then share graphs that know nothing of the whole model."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        torch._dynamo.graph_break()
        return torch.tanh(self.down(torch.relu(y)))


class Frames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.blocks = nn.Linear(6, 6), nn.ModuleList([Broken(), Broken()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        for block in self.blocks:
            x = block(x)
        return x


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ready(model: nn.Module, *batches: Any) -> nn.Module:
    torch._dynamo.reset()
    first = batches[0]
    fxquant.prepare(model, first if isinstance(first, tuple) else (first,))
    return fxquant.calibrate(model, list(batches))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return ready(Net(), random(16, 6))


# ---------------------------------------------------------------- what the numbers are


def evaluated(model: nn.Module, on: set[str], x: Tensor) -> list[Tensor]:
    """The oracle: switches on the quantizers themselves, and a fresh compile; the outputs in float64."""
    model = copy.deepcopy(model).eval()
    for key, quantizer in quantizers(model):
        quantizer.enabled = key in on
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(model, backend="fxquant_eager", dynamic=False)(x)
    parts = out.values() if isinstance(out, dict) else out if isinstance(out, tuple) else [out]
    found = [value for value in parts if isinstance(value, Tensor)]
    return [value.double() for value in found]


def distance(outputs: list[Tensor], reference: list[Tensor]) -> float:
    parts = [(y - y0).square().sum() for y, y0 in zip(outputs, reference, strict=True)]
    return math.sqrt(float(sum(parts)) / float(sum(y0.square().sum() for y0 in reference)))


@pytest.mark.parametrize(
    ("net", "shape"), [(Net, (16, 6)), (Folded, (2, 3, 4, 4)), (Frames, (5, 6))], ids=["two layers", "folded", "frames"]
)
def test_effects_are_those_of_the_quantizers_own_switches(net: type[nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = random(*shape)
    model = ready(net(), x)
    report = fxquant.sensitivity(model, [x])
    keys = {key for key, _ in quantizers(model)}
    assert {row.key for row in report.rows} == keys and report.unmeasured == ()
    reference = evaluated(model, set(), x)
    assert report.every == pytest.approx(distance(evaluated(model, keys, x), reference), rel=1e-3)
    for row in report.rows:
        assert row.alone == pytest.approx(distance(evaluated(model, {row.key}, x), reference), rel=1e-3), row.key
        if net is not Frames or row.key.startswith("blocks.1"):  # each side of each site is a compile of every frame
            without = distance(evaluated(model, keys - {row.key}, x), reference)
            assert row.without == pytest.approx(without, rel=1e-3), row.key


def test_sqnr_is_that_of_sqnr(model: nn.Module) -> None:
    x = random(16, 6)
    report = fxquant.sensitivity(model, [x])
    assert {row.key: row.sqnr_db for row in report.rows} == pytest.approx(sqnr(model, (x,)), abs=1e-9)


def test_batches_sum_up_in_the_ratio_of_the_definition(model: nn.Module) -> None:
    batches = [random(4, 6, seed=1), random(9, 6, seed=2), 3 * random(2, 6, seed=3)]
    report = fxquant.sensitivity(model, iter(batches))
    reference = [y for x in batches for y in evaluated(model, set(), x)]
    for row in report.rows:
        outputs = [y for x in batches for y in evaluated(model, {row.key}, x)]
        assert row.alone == pytest.approx(distance(outputs, reference), rel=1e-3)


def test_a_loss_is_measured_above_that_of_the_float_model(model: nn.Module) -> None:
    pairs = [(random(4, 6, seed=1), torch.tensor([0, 1, 2, 1])), ([random(2, 6, seed=2)], torch.tensor([2, 0]))]
    report = fxquant.sensitivity(model, pairs, F.cross_entropy)

    def mean(on: set[str]) -> float:
        inputs = [args[0] if isinstance(args, list) else args for args, _ in pairs]
        losses = [F.cross_entropy(evaluated(model, on, x)[0], y) for x, (_, y) in zip(inputs, pairs, strict=True)]
        return sum(map(float, losses)) / 2

    keys = {key for key, _ in quantizers(model)}
    assert report.measure == "loss" and report.float_loss == pytest.approx(mean(set()), rel=1e-5)
    assert report.every == pytest.approx(mean(keys) - mean(set()), abs=1e-6)
    for row in report.rows:
        assert row.alone == pytest.approx(mean({row.key}) - mean(set()), abs=1e-6)
        assert row.without == pytest.approx(mean(keys - {row.key}) - mean(set()), abs=1e-6)


@pytest.mark.parametrize("layer", ["up", "down"])
def test_the_layer_with_an_outlier_comes_first(layer: str) -> None:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        # One huge weight for an input that is always 0 takes the whole range of its row, and nothing of the result.
        weight = getattr(net, layer).weight
        weight[:, 0] = 40.0
        net.up.weight[0], net.up.bias[0] = (net.up.weight[0], -1e3) if layer == "down" else (net.up.weight[0], 0.0)
    x = random(16, 6)
    x[:, 0] = 0
    report = fxquant.sensitivity(ready(net, x), [x])
    first, second = report.rows[:2]
    assert first.key == f"{layer}.weight" and first.rank == 1
    assert first.alone > 5 * second.alone and first.without < 0.5 * report.every
    assert [row.alone for row in report.rows] == sorted((row.alone for row in report.rows), reverse=True)


class Branch(Net):
    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        return self.down(torch.relu(self.up(x))) if both else self.up(x)


def test_a_site_costs_nothing_in_a_batch_that_does_not_run_it() -> None:
    torch.manual_seed(0)
    model = ready(Branch(), random(16, 6))
    whole, part = random(4, 6, seed=1), random(4, 6, seed=2)
    report = fxquant.sensitivity(model, [{"x": whole}, {"x": part, "both": False}])
    rows = {row.key: row for row in report.rows}
    weight = model.up.weight.detach()
    reference = [*evaluated(model, set(), whole), F.linear(part, weight, model.up.bias.detach()).double()]
    expected = distance([*evaluated(model, {"down.weight"}, whole), reference[1]], reference)
    assert rows["down.weight"].alone == pytest.approx(expected, rel=1e-3)
    assert rows["down.weight"].without == pytest.approx(report.every, rel=0.2)
    only_part = fxquant.sensitivity(model, [{"x": part, "both": False}])
    assert only_part.unmeasured == ("down.input", "down.weight")
    assert "not measured, since no batch ran them quantized: down.input, down.weight" in str(only_part)


def test_a_site_that_is_switched_off_is_not_measured(model: nn.Module) -> None:
    dict(quantizers(model))["down.input"].enabled = False
    report = fxquant.sensitivity(model, [random(4, 6)])
    assert report.unmeasured == ("down.input",) and len(report.rows) == 3
    keys = {row.key for row in report.rows}
    x = random(4, 6)
    assert report.every == pytest.approx(distance(evaluated(model, keys, x), evaluated(model, set(), x)), rel=1e-3)


def test_every_run_draws_the_same_random_numbers() -> None:
    class Noisy(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(x.shape[0], 3)

    torch.manual_seed(0)
    report = fxquant.sensitivity(ready(Noisy(), random(16, 6)), [random(16, 6)])
    assert all(row.alone < 0.02 for row in report.rows)


def test_masked_outputs_and_half_precision_count_where_they_are_finite() -> None:
    class Masked(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = super().forward(x)
            return y.masked_fill(torch.ones_like(y).tril().bool(), -math.inf), (100 * y).half()

    torch.manual_seed(0)
    x = random(4, 6)
    model = ready(Masked(), x)
    report = fxquant.sensitivity(model, [x])
    for row in report.rows:
        parts = [evaluated(model, on, x) for on in ({row.key}, set())]
        kept = [[y[y0.isfinite()] for y, y0 in zip(out, parts[1], strict=True)] for out in parts]
        assert row.alone == pytest.approx(distance(*kept), rel=1e-3)


# ---------------------------------------------------------------- what it costs, and what it leaves behind


@pytest.mark.parametrize("shapes", [(4,), (4, 5, 6), (4, 4, 4)], ids=str)
def test_a_batch_costs_two_runs_a_site_and_a_shape_one_compile(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, shapes: tuple[int, ...]
) -> None:
    counts = {"runs": 0, "compiles": 0, "steps": 0, "announced": 0}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return counted

    def track(items: Any, *_: Any, **__: Any) -> Iterator[Any]:
        counts["announced"] = len(items)
        for item in items:
            counts["steps"] += 1
            yield item

    @contextlib.contextmanager
    def visiting(*args: Any) -> Iterator[visitor.Run]:
        with visitor.visiting(*args) as run:
            yield counting("runs", run)

    monkeypatch.setattr(sweep, "visiting", visiting)
    monkeypatch.setattr(visitor, "quantize_graph", counting("compiles", visitor.quantize_graph))
    monkeypatch.setattr(sweep, "track", track)
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        report = fxquant.sensitivity(model, [random(size, 6) for size in shapes])
        assert torch._dynamo.config.recompile_limit == 1
    assert report.unmeasured == ()
    assert counts["runs"] == len(shapes) * (2 * 4 + 2)
    assert counts["compiles"] == len(set(shapes))
    assert counts["steps"] == counts["announced"] == len(shapes) * (2 * 4 + 1)


def state(model: nn.Module) -> dict[str, Any]:
    held = dict(quantizers(model))
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)},
        "modes": [module.training for module in model.modules()],
        "switches": {key: (q.enabled, q.observing, q.resolved, q.calibrating) for key, q in held.items()},
        "random": torch.random.get_rng_state(),
        "limits": (torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit),
        "grad": torch.is_grad_enabled(),
    }


def fails_later() -> Iterator[Any]:
    yield random(4, 3, 4, 4), torch.zeros(4)
    raise KeyError("worker died")


def fails_in_the_tenth_call() -> Callable[[Any, Any], float]:
    calls = iter(range(9))

    def loss(output: Any, target: Any) -> float:
        if next(calls, None) is None:
            raise ZeroDivisionError("no loss")
        return float(output["y"].sum())

    return loss


@pytest.mark.parametrize(
    ("data", "loss", "error"),
    [
        ([random(4, 3, 4, 4)], None, None),
        (fails_later(), lambda output, target: output["y"].sum(), KeyError),
        ([(random(4, 3, 4, 4), None)], fails_in_the_tenth_call(), ZeroDivisionError),
        ([random(4, 2)], None, Exception),
    ],
    ids=["success", "loader fails", "loss fails", "model fails"],
)
def test_the_model_is_as_before(data: Any, loss: Any, error: type[Exception] | None) -> None:
    torch.manual_seed(0)
    model = ready(Folded(), random(4, 3, 4, 4)).train()
    model.norm.eval()
    before = state(model)
    if error is None:
        fxquant.sensitivity(model, data, loss)
    else:
        with pytest.raises(error):
            fxquant.sensitivity(model, data, loss)
    after = state(model)
    for name in ("tensors", "random"):
        torch.testing.assert_close(after.pop(name), before.pop(name), rtol=0, atol=0, equal_nan=True)
    assert after == before
    assert all(parameter.grad is None for parameter in model.parameters())


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("data", "loss", "message"),
    [
        ([], None, "data must hold at least one batch: got none"),
        ([3], None, "each batch of data must be a tensor, a tuple of arguments or a mapping: got int"),
        ([random(4, 6)], F.cross_entropy, r"must be a pair \(arguments, target\) where a loss is given: got Tensor"),
        ([(1, 2, 3)], F.cross_entropy, r"must be a pair .* got tuple of 3"),
        ([(random(4, 6), None)], lambda y, t: y, r"loss must give one number: got a tensor of shape \(4, 3\)"),
        ([(random(4, 6), None)], lambda y, t: math.nan, "loss must be finite for the float model: got nan"),
    ],
    ids=["empty", "wrong type", "no pair", "three parts", "loss of a tensor", "loss nan"],
)
def test_wrong_data_and_losses(model: nn.Module, data: Any, loss: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        fxquant.sensitivity(model, data, loss)


def test_models_that_have_nothing_to_measure() -> None:
    with pytest.raises(InvalidArgument, match="sensitivity must be given a prepared model: got Net without a plan"):
        fxquant.sensitivity(Net(), [random(4, 6)])
    unset = fxquant.prepare(Net(), (random(4, 6),))
    with pytest.raises(RangeNotSet, match=r"ranges are set: got none for down\.input, up\.input\. Run fxquant\.calib"):
        fxquant.sensitivity(unset, [random(4, 6)])

    class Counts(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    with pytest.raises(InvalidArgument, match=r"return a floating-point tensor where no loss .* got Tensor without"):
        fxquant.sensitivity(ready(Counts(), random(4, 6)), [random(4, 6)])


def test_a_frame_left_in_python_is_an_error_and_no_row() -> None:
    torch.manual_seed(0)
    model = ready(Net(), random(4, 6))
    for module in (model, model.up, model.down):
        module.forward = torch.compiler.disable(module.forward)
    with (
        pytest.warns(NotQuantizedWarning, match="ran in eager Python inside torch.compile"),
        pytest.raises(InvalidArgument, match="must be given data that runs a quantized site: got none that ran"),
    ):
        fxquant.sensitivity(model, [random(4, 6)])


def test_submodules_do_not_hide_the_functions_of_their_names() -> None:
    code = "import fxquant, fxquant.report, fxquant.override as _; print(callable(fxquant.calibrate), "
    code += "callable(fxquant.prepare), callable(fxquant.override), callable(fxquant.sensitivity))"
    result = forked.run(["-c", code])
    assert result.stdout.split() == ["True"] * 4


# ---------------------------------------------------------------- how it shows


REPORT = SensitivityReport(
    rows=(
        SensitivityRow(
            key="up.weight", role="weight", spec="s8 axis 0", sqnr_db=41.25, alone=0.0123, without=0.001, rank=1
        ),
        SensitivityRow(key="up.input", role="activation", spec="u8", sqnr_db=math.inf, alone=0.0, without=0.02, rank=2),
    ),
    measure="loss",
    every=0.02,
    float_loss=0.5,
    unmeasured=("down.input",),
)


def test_report_prints_as_a_table() -> None:
    assert_expected_inline(
        str(REPORT),
        """\
sensitivity of 2 sites by loss; 0.02 with all of them on, above 0.5 in float
rank  site       role        format     SQNR [dB]  alone   without
────  ─────────  ──────────  ─────────  ─────────  ──────  ───────
1     up.weight  weight      s8 axis 0  41.2       0.0123  0.001
2     up.input   activation  u8         inf        0       0.02

not measured, since no batch ran them quantized: down.input""",
    )


def test_to_dict_is_plain() -> None:
    found = json.loads(json.dumps(REPORT.to_dict()))
    assert found["rows"][0] == {
        "key": "up.weight", "role": "weight", "spec": "s8 axis 0", "sqnr_db": 41.25, "alone": 0.0123,
        "without": 0.001, "rank": 1,
    }  # fmt: skip
    assert found["unmeasured"] == ["down.input"] and found["float_loss"] == 0.5 and found["rows"][1]["sqnr_db"] > 1e99


def test_plot_names_the_sites_and_equal_reports_give_equal_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg", "c.png"):
        REPORT.plot(tmp_path / name)
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "up.weight" in text and "up.input" in text and "loss above the float model" in text
    assert text == (tmp_path / "b.svg").read_text(encoding="utf-8")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    REPORT.plot(str(tmp_path / "one.svg"), most=1)
    assert "up.input" not in (tmp_path / "one.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "most", "message"),
    [("a.pdf", 1, "path must end in .svg or .png: got 'a.pdf'"), ("a.svg", 0, "most must be at least 1: got 0")],
    ids=["pdf", "no bars"],
)
def test_plot_refuses(path: str, most: int, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        REPORT.plot(path, most=most)


def test_plot_says_how_to_install_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match=r'found none\. Install it with: pip install "fxquant\[report\]"'):
        REPORT.plot(tmp_path / "a.svg")
