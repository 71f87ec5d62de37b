"""Calibration by percentile, entropy and mean squared error: each against the formula written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import InvalidArgument, NotQuantizedWarning
from fxquant.prepared.quantizer import quantizers
from fxquant.probe.histograms import SiteHistogram
from fxquant.spec.quant_spec import QuantSpec
from tests.probe.nets import Pair, ready
from tests.spec.made_up_ranges import Peak

U8, S4 = QuantSpec(signed=False, symmetric=False), QuantSpec(bits=4)
BATCHES = [torch.randn(64, 6, generator=torch.Generator().manual_seed(k)) for k in range(3)]


def long_tailed(seed: int = 0, *, positive: bool = False) -> np.ndarray:
    x = np.random.default_rng(seed).laplace(size=20_000).astype(np.float32)
    return np.abs(x) if positive else x + np.float32(0.3)


def histogram(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts of magnitudes in bins that hold their upper edge, and the edges."""
    edges = np.arange(2049) * (np.abs(x).max().astype(np.float64) / 2048)
    edges[-1] = np.inf
    index = np.clip(np.searchsorted(edges, np.abs(x).astype(np.float64)) - 1, 0, 2047)
    edges[-1] = np.abs(x).max()
    return np.bincount(index, minlength=2048).astype(float), edges


def entropy_end(x: np.ndarray, levels: int) -> float:
    counts, edges = histogram(x)
    counts[0] = counts[1]
    best, end = np.inf, 0.0
    for kept in range(128, 2049, 4):
        clipped = counts[:kept].copy()
        clipped[-1] += counts[kept:].sum()
        level = np.arange(kept) * levels // kept
        quantized = np.zeros(kept)
        for k in range(levels):
            mine = (level == k) & (counts[:kept] > 0)
            if mine.any():
                quantized[mine] = counts[:kept][mine].sum() / mine.sum()
        p, q = clipped / clipped.sum(), quantized / quantized.sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            divergence = np.where(p > 0, p * np.log(p / q), 0.0).sum()
        if divergence <= best:
            best, end = divergence, edges[kept]
    return end


def squared_error(x: np.ndarray, low: float, high: float, spec: QuantSpec) -> float:
    """Of the data themselves, quantized as ONNX does."""
    low, high = min(low, 0.0), max(high, 0.0)
    if spec.symmetric:
        scale, point = max(-low, high) / ((spec.quant_max - spec.quant_min) // 2), 0
    else:
        scale = (high - low) / (spec.quant_max - spec.quant_min)
        point = spec.quant_min - np.round(low / scale)
    code = np.clip(np.round(x.astype(np.float64) / scale) + point, spec.quant_min, spec.quant_max)
    return float((((code - point) * scale - x) ** 2).sum())


def found(x: np.ndarray, spec: QuantSpec, method: str, parts: int = 1) -> tuple[float, float]:
    seen = SiteHistogram(spec, method)
    for part in np.array_split(x, parts):
        seen.collect(torch.from_numpy(part))
    return seen.ends(99.913)


@pytest.mark.parametrize("positive", [False, True])
def test_percentile_is_the_bin_edge_above_that_share(positive):
    x = long_tailed(positive=positive)
    counts, edges = histogram(x)
    end = edges[np.argmax(np.cumsum(counts) >= 0.99913 * len(x)) + 1]
    assert found(x, U8, "percentile") == pytest.approx((max(-end, x.min()), end), rel=1e-6)
    assert (np.abs(x) <= end - edges[1]).mean() < 0.99913 <= (np.abs(x) <= end).mean()


@pytest.mark.parametrize(("positive", "spec", "levels"), [(False, U8, 128), (True, U8, 256), (False, S4, 8)])
def test_entropy_is_that_of_least_divergence(positive, spec, levels):
    x = long_tailed(positive=positive)
    end = entropy_end(x, levels)
    assert found(x, spec, "entropy") == pytest.approx((max(-end, float(x.min())), end), rel=1e-6)


@pytest.mark.parametrize("spec", [U8, S4, QuantSpec(bits=4, signed=False, symmetric=False)], ids=str)
@pytest.mark.parametrize("positive", [False, True])
def test_mse_is_as_good_as_the_best_of_its_candidates_on_the_data(positive, spec):
    x = long_tailed(positive=positive)
    top, least = float(np.abs(x).max()), float(x.min())
    ends = [top * k / 256 for k in range(256, 0, -1)]
    errors = [squared_error(x, max(-end, least), min(end, float(x.max())), spec) for end in ends]
    low, high = found(x, spec, "mse")
    assert high == pytest.approx(min(ends, key=lambda end: abs(end - high)), rel=1e-6), "one of the candidates"
    assert squared_error(x, low, high, spec) <= 1.002 * min(errors)  # centres of bins stand for the data
    if spec.bits == 4:
        assert min(errors) < 0.8 * errors[0], "where something is won"


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_memory_does_not_grow_with_the_data(method):
    seen = SiteHistogram(U8, method)
    for power in range(20):
        seen.collect(torch.tensor([-0.5, 1.0, 2.0]) * 1.5**power)
    assert sum(len(side.counts) for side in seen.sides) <= 2 * 2048
    low, high = seen.ends(100.0)
    assert high == pytest.approx(2 * 1.5**19, rel=2e-3) and low == pytest.approx(-0.5 * 1.5**19)


def test_batches_are_one_set_of_data():
    x = long_tailed()
    for method in ("percentile", "entropy", "mse"):
        one, parts = found(x, U8, method), found(np.sort(np.abs(x)), U8, method, parts=5)
        again = found(np.sort(np.abs(x)), U8, method, parts=5)
        assert parts == again, "deterministic"
        assert parts[1] == pytest.approx(one[1], rel=0.35)  # other bins, as the first batch was smaller


def test_zeros_and_nothing():
    seen = SiteHistogram(U8, "mse")
    assert seen.is_empty
    seen.collect(torch.zeros(0))
    assert seen.is_empty
    seen.collect(torch.zeros(4))
    assert seen.ends(99.0) == (0.0, 0.0)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return ready(Pair(), BATCHES[0])


def ranges(model: nn.Module) -> dict[str, tuple[float, float]]:
    return {key: (q.min_val.item(), q.max_val.item()) for key, q in quantizers(model) if q.stateful}


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_each_site_gets_the_range_of_its_tensor_in_float(model, method):
    assert fxquant.calibrate(model, BATCHES, method=method, percentile=95.0) is model
    for key, tensors in {
        "up.input": BATCHES,
        "down.input": [torch.relu(model.up(x)).detach() for x in BATCHES],
    }.items():
        seen = SiteHistogram(U8, method)
        for x in tensors:
            seen.collect(x)
        assert ranges(model)[key] == pytest.approx(seen.ends(95.0), rel=1e-5)
    assert all(q.resolved for _, q in quantizers(model) if q.stateful)


def test_minmax_is_max(model):
    fxquant.calibrate(model, BATCHES, method="max")
    before = ranges(model)
    fxquant.calibrate(model, BATCHES, method="minmax")
    assert ranges(model) == before


def test_first_calibration_and_zeros():
    """Of ranges that are unset before, and of a tensor that is 0."""
    net = Pair()
    with torch.no_grad():
        net.up.weight.zero_()
        net.up.bias.fill_(-1.0)  # the ReLU gives zeros
    model = fxquant.prepare(net, (BATCHES[0],))
    fxquant.calibrate(model, BATCHES, method="mse")
    quantizer = dict(quantizers(model))["down.input"]
    assert quantizer.is_set() and quantizer.range.is_degenerate(quantizer.state)


def test_bad_input_leaves_the_ranges(model):
    fxquant.calibrate(model, BATCHES)
    before = ranges(model)
    cases = [
        ({"method": "percentile", "percentile": 101.0}, BATCHES, "percentile must be above 0 and at most 100: got 101"),
        ({"method": "percentile", "percentile": 0.0}, BATCHES, "percentile must be above 0"),
        ({"method": "entropy"}, [], "data must hold at least one batch"),
        ({"method": "mse"}, [BATCHES[0], BATCHES[1] / 0.0], r"x must be finite .* That is the tensor of up\.input"),
    ]
    for options, data, match in cases:
        with pytest.raises(InvalidArgument, match=match):
            fxquant.calibrate(model, data, **options)
        assert ranges(model) == before
    assert all(q.resolved for _, q in quantizers(model) if q.stateful)


def test_trained_ranges_begin_with_what_a_method_finds():
    model = fxquant.prepare(Pair(), (BATCHES[0],), recipe="w4a4")
    held = dict(quantizers(model))
    fxquant.calibrate(model, BATCHES)
    weights = {key: q.scale.detach().clone() for key, q in held.items() if q.site.role == "weight"}
    for method in ("percentile", "mse"):
        fxquant.calibrate(model, BATCHES, method=method, percentile=95.0)
        for key, tensors in {"up.input": BATCHES, "down.input": [torch.relu(model.up(x)) for x in BATCHES]}.items():
            seen = SiteHistogram(held[key].spec, method)
            for x in tensors:
                seen.collect(x.detach())
            low, high = seen.ends(95.0)
            scale = (high - low) / 15
            assert held[key].scale.item() == pytest.approx(scale, rel=1e-5)
            assert abs(held[key].zero_point.item() + low / scale) <= 0.5 + 1e-5  # ±a lie half a code off
        assert all(torch.equal(held[key].scale, scale) for key, scale in weights.items()) and len(weights) == 2
    assert all(quantizer.resolved for quantizer in held.values())


@pytest.mark.parametrize(("method", "above"), [("tqt", 7), ("amax", 7), ("lsq_plus", None)])
def test_ends_of_trained_ranges(method, above):
    """What the methods make of them, and that they are what the state says again."""
    learned = fxquant.Learned(method=method)
    spec = QuantSpec(bits=4, signed=False, symmetric=False, range=learned)
    state = learned.initial_state(spec)
    learned.set_ends(state, spec, 0.0, 0.0)
    assert not learned.is_set(state) and learned.follow(state, spec, 2.0, 2.0)
    learned.set_ends(state, spec, -0.5, 3.0)
    low, high = learned.ends(state, spec)
    scale, point = learned.qparams_of_ends(torch.tensor([-0.5]), torch.tensor([3.0]), spec)
    step = {"tqt": 0.5, "amax": 3 / 7, "lsq_plus": 3.5 / 15}[method]
    zero = 8 if above else round(0.5 / step)
    assert (scale.item(), point.item()) == (pytest.approx(step), zero)
    assert high == pytest.approx(step * (15 - zero)) and low == pytest.approx(-step * (above or zero))
    learned.follow(state, spec, 2.0, 2.0)
    assert learned.ends(state, spec) == (pytest.approx(2 * low), pytest.approx(2 * high))


def test_ranges_that_take_no_ends_are_refused():
    other = fxquant.prepare(Pair(), (BATCHES[0],), ranges=Peak())
    with pytest.raises(InvalidArgument, match=r"for up\.input: got 'mse', but the range Peak"):
        fxquant.calibrate(other, BATCHES, method="mse")


@pytest.mark.parametrize(
    ("recipe", "method", "why"),
    [("fp8", "entropy", "e4m3 has no even levels"), ("nvfp4", "mse", "is by the scales of groups")],
)
def test_formats_that_a_method_has_no_answer_for_are_refused(recipe, method, why):
    net = nn.Linear(16, 16)
    other = fxquant.prepare(net, (torch.randn(4, 16),), recipe=recipe, target="generic")
    with pytest.raises(InvalidArgument, match=rf"for input: got '{method}', but .*{why}"):
        fxquant.calibrate(other, [torch.randn(4, 16)], method=method)


def test_mse_of_small_floats_is_that_of_their_values():
    x = long_tailed() * np.float32(100)
    spec = QuantSpec(element="e4m3")
    low, high = found(x, spec, "mse")

    def error(end: float) -> float:
        scaled = torch.from_numpy(x / np.float32(end / 448)).clamp(-448, 448).to(torch.float8_e4m3fn).double().numpy()
        return float(((scaled * (end / 448) - x) ** 2).sum())

    top = float(np.abs(x).max())
    assert error(max(-low, high)) <= 1.002 * min(error(top * k / 256) for k in range(256, 0, -1))


def test_sites_that_the_data_do_not_run_are_named(model):
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor, both: bool = True) -> torch.Tensor:
            return self.second(self.first(x)) if both else self.first(x)

    branch = fxquant.calibrate(fxquant.prepare(Branch(), (BATCHES[0],)), BATCHES)
    before = ranges(branch)
    with pytest.warns(NotQuantizedWarning, match=r"1 sites saw no data .*second\.input.* 1 of them keep"):
        fxquant.calibrate(branch, [{"x": BATCHES[0], "both": False}], method="mse")
    assert ranges(branch)["second.input"] == before["second.input"]
