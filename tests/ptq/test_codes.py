"""gptq and adaround: the codes against brute force and the paper's equations, and that the file holds them."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

import fxquant
from fxquant import ptq
from fxquant.ptq.adaround import adaround_codes
from fxquant.ptq.choose_codes import Matrices, choose_codes
from fxquant.ptq.gptq import gptq_codes
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import CurrentTensor
from fxquant.spec.recipes import Recipe
from tests.ptq.nets import Forms, Perceptron, images, ready, vectors

LIMITS = (-7, 7)


class Problem:
    """Rows of 8 weights of 4 bits with correlated inputs, float64."""

    def __init__(self, seed: int, rows: int = 4, length: int = 8) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(rows, length, generator=generator, dtype=torch.float64)
        mix = torch.randn(length, length, generator=generator, dtype=torch.float64)
        x = torch.randn(64, length, generator=generator, dtype=torch.float64) @ mix
        self.x, self.moments = x, x.T @ x
        amax = self.weight.abs().amax(1, keepdim=True)
        self.scale, self.fixed = (amax / 7).expand_as(self.weight), self.weight.abs() == amax

    def errors(self, codes: Tensor) -> Tensor:
        """Of each row, from the products themselves."""
        return ((self.weight - codes * self.scale) @ self.x.T).square().sum(1)

    @property
    def nearest(self) -> Tensor:
        return (self.weight / self.scale).round()

    def best(self) -> Tensor:
        """The least error of all ways to round each weight up or down."""
        least = torch.full((len(self.weight),), torch.inf, dtype=torch.float64)
        for bits in itertools.product((0.0, 1.0), repeat=self.weight.shape[1]):
            codes = ((self.weight / self.scale).floor() + torch.tensor(bits, dtype=torch.float64)).clamp(*LIMITS)
            least = torch.minimum(least, self.errors(torch.where(self.fixed, self.nearest, codes)))
        return least

    def gptq(self, **options: object) -> Tensor:
        options = {"damping": 1e-8, "ordered": True, **options}
        return gptq_codes(self.weight, self.moments, self.scale, self.fixed, LIMITS, **options)


PROBLEMS = [Problem(seed) for seed in range(10)]


def adaround(problems: list[Problem]) -> list[Tensor]:
    """Of all of them at once, as groups of a convolution are."""
    names = ("weight", "moments", "scale", "fixed")
    stacked = (torch.stack([getattr(problem, name) for problem in problems]) for name in names)
    return list(adaround_codes(*stacked, LIMITS, steps=500, strength=10.0))


def gptq(problems: list[Problem]) -> list[Tensor]:
    return [problem.gptq() for problem in problems]


@pytest.mark.parametrize("method", [gptq, adaround])
def test_errors_are_near_the_best_of_all_roundings(method):
    """Both are searches that need not find it: on 40 rows of 256 roundings each."""
    shares, nearest = [], []
    for problem, found in zip(PROBLEMS, method(PROBLEMS), strict=True):
        best = problem.best()
        assert bool((found.abs() <= 7).all()) and torch.equal(found[problem.fixed], problem.nearest[problem.fixed])
        shares += (problem.errors(found) / best).tolist()
        nearest += (problem.errors(problem.nearest) / best).tolist()
    assert np.median(shares) < 1.15 and np.mean(shares) < 1.35 < 2 < np.mean(nearest)
    if method is adaround:
        assert max(np.array(shares) / np.array(nearest)) <= 1 + 1e-9, "never worse than nearest"
        assert min(shares) >= 1 - 1e-9, "up or down only"
        assert np.mean(np.array(shares) < 1 + 1e-9) > 0.5, "the best of all, mostly"


@pytest.mark.parametrize("ordered", [False, True])
def test_gptq_is_the_optimal_brain_surgeon_s_update_column_by_column(ordered):
    """With the inverse of what is left of H in each step, instead of one Cholesky factor."""
    problem, damping = PROBLEMS[0], 0.01
    damped = problem.moments + damping * problem.moments.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    order = problem.moments.diagonal().argsort(descending=True).tolist() if ordered else list(range(8))
    w, codes = problem.weight.clone(), torch.zeros_like(problem.weight)
    for at, i in enumerate(order):
        left = order[at:]
        inverse = torch.linalg.inv(damped[left][:, left])
        code = (w[:, i] / problem.scale[:, i]).round().clamp(*LIMITS)
        codes[:, i] = torch.where(problem.fixed[:, i], problem.nearest[:, i], code)
        error = (w[:, i] - codes[:, i] * problem.scale[:, i]) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
    assert torch.equal(problem.gptq(damping=damping, ordered=ordered), codes)


@pytest.mark.parametrize("method", [gptq, adaround])
def test_inputs_that_do_not_depend_on_each_other_leave_nearest(method):
    problem = Problem(0)
    problem.moments = torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64))
    problem.x = problem.moments.sqrt()
    assert torch.equal(method([problem])[0], problem.nearest)


def test_columns_in_blocks_are_the_same_as_one_by_one(monkeypatch):
    problem = Problem(3, rows=3, length=20)
    whole = problem.gptq(damping=0.01)
    monkeypatch.setattr(sys.modules["fxquant.ptq.gptq"], "_AT_ONCE", 3)
    assert torch.equal(problem.gptq(damping=0.01), whole)


def weight_spec(bits: int, **fields: object) -> QuantSpec:
    return QuantSpec(bits=bits, range=CurrentTensor(), **fields)


RECIPES = {
    "4 bits a channel": Recipe(name="channel", weight=weight_spec(4, axis=0, narrow=True)),
    "8 bits a channel": Recipe(name="channel8", weight=weight_spec(8, axis=0)),
    "4 bits a tensor": Recipe(name="tensor", weight=weight_spec(4)),
    "4 bits a group": Recipe(name="group", activation=None, weight=weight_spec(4, axis=0, group_size=4)),
}


def file_weights(path: str) -> list[np.ndarray]:
    """The integers of a file's weights."""
    graph = onnx.load(path).graph
    return [a for a in map(numpy_helper.to_array, graph.initializer) if a.ndim >= 2 and a.dtype.kind not in "f"]


def holds(weights: list[np.ndarray], codes: Tensor) -> bool:
    """Whether one of the file's weights is this matrix, in any of the forms that a product has it in."""
    matrix = codes.reshape(-1, codes.shape[-1]).numpy()
    forms = (matrix.ravel().tolist(), matrix.T.ravel().tolist())
    return any(w.astype(np.int64).ravel().tolist() in forms for w in weights)


@pytest.mark.parametrize(("name", "clip"), list(zip(RECIPES, (True, False, False, True), strict=True)))
def test_the_file_holds_the_chosen_codes(name, clip, tmp_path):
    """Linear, convolution with and without BatchNorm, matrix product; BatchNorm's factors have both signs."""
    net, data = (Perceptron, vectors()) if "group" in name else (Forms, images())
    model = ready(net, data, recipe=RECIPES[name])
    chosen: list[Tensor] = []

    def choose(problem: Matrices) -> Tensor:
        each = zip(problem.weight, problem.moments, problem.scale, problem.fixed, strict=True)
        codes = torch.stack([gptq_codes(*one, problem.limits, damping=0.01, ordered=True) for one in each])
        if problem.error(codes * problem.scale) < problem.error(problem.nearest):
            chosen.append(codes)
        return codes

    report = choose_codes(model, data, "gptq", choose, clip=clip, progress=False)
    assert len(report.rows) == len(chosen) >= 2, str(report)
    assert "does not hold its codes" not in str(report)
    path = str(tmp_path / "model.onnx")
    fxquant.export_onnx(model, (data[0],), path)
    weights = file_weights(path)
    assert all(holds(weights, codes) for codes in chosen), str(report)


@pytest.mark.parametrize(("method", "share"), [(ptq.gptq, 0.6), (ptq.adaround, 0.9)])
def test_the_report_has_the_products_errors(method, share):
    data = vectors()
    model = ready(Perceptron, data, recipe=Recipe(name="r", activation=None, weight=weight_spec(4, axis=0)))
    before = model.up.weight.detach().clone()
    report = method(model, data, progress=False)
    row = next(row for row in report.rows if row.key == "up.weight")

    def error(w: Tensor) -> float:
        x, float_w = torch.cat(data).double(), before.double()
        return float(((w.double() - float_w) @ x.T).norm() / (float_w @ x.T).norm())

    scale = before.abs().amax(1, keepdim=True) / 7
    nearest = (before / scale).round() * scale
    assert row.before == pytest.approx(error(nearest), rel=1e-4)
    assert row.after == pytest.approx(error(model.up.weight.detach()), rel=1e-4)
    assert row.after < share * row.before
    assert torch.allclose(model.up.weight.abs().amax(1), before.abs().amax(1), rtol=1e-6)
    assert "up.weight" in str(report) and report.to_dict()["rows"][0]["key"] == "up.weight"


def test_a_second_call_changes_nothing():
    data = vectors()
    model = ready(Perceptron, data, recipe=RECIPES["4 bits a channel"])
    ptq.gptq(model, data, progress=False)
    before = model.up.weight.detach().clone()
    ptq.gptq(model, data, progress=False)
    assert torch.equal(model.up.weight, before)


def test_clipped_scales_help_two_bits():
    data = vectors()
    recipe = Recipe(name="two", activation=None, weight=weight_spec(2, axis=0))
    errors = [
        {row.key: row.after for row in ptq.gptq(ready(Perceptron, data, recipe=recipe), data, clip=clip).rows}
        for clip in (False, True)
    ]
    assert errors[1]["up.weight"] < errors[0]["up.weight"]
