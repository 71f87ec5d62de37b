"""Weights that are computed, tied, or read by several calls: quantized is what the operator multiplies by."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fxquant
from fxquant.backend.reports import compile_reports
from fxquant.graph.dependence import constant_nodes, same_views, weight_computations
from fxquant.prepared.root import plan_of
from tests.backend.oracle import Activation, weight
from tests.nets import counted, grads, prepared, ranges, step, unset
from tests.onnx.agreement import assert_codes_agree
from tests.passes.graphs import captured

EAGER = "fxquant_eager"

pytestmark = pytest.mark.usefixtures("cold")

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).t()


def symmetric(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


COMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": old_weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "custom": symmetric,
}


def two_layers(change: Callable[[nn.Module], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(change(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 8)).double()


@pytest.mark.parametrize("name", COMPUTED)
def test_the_computed_weight_is_what_is_quantized(name: str) -> None:
    """Against the same parametrization in eager torch, its result quantized by hand."""
    change, x = COMPUTED[name], X.double()
    model, oracle = prepared(two_layers(change), x), two_layers(change)
    first, second = Activation(), Activation()
    compiled = torch.compile(model, backend=EAGER)
    for scale in (1.0, 5.0):
        model.zero_grad(), oracle.zero_grad()
        got = step(compiled, x * scale)
        one, two = oracle[0], oracle[2]
        if name == "old weight_norm":
            for hook in one._forward_pre_hooks.values():
                hook(one, None)
        h = torch.relu(F.linear(first(x * scale), weight(one.weight), one.bias))  # one read of the weight a step
        want = F.linear(second(h), weight(two.weight), two.bias)
        want.square().mean().backward()
        torch.testing.assert_close(got, want.detach(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(grads(model), grads(oracle), rtol=1e-5, atol=1e-7)
    assert set(ranges(model)) == {"0.input", "2.input"}
    plan = plan_of(model)
    assert plan is not None and [site.key for site in plan.sites if site.local.role == "weight"] == [
        "0.weight",
        "2.weight",
    ]


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "custom"])
def test_an_export_holds_the_computed_weight(name: str, tmp_path: Path) -> None:
    model = prepared(two_layers(COMPUTED[name]).float(), X)
    with counted() as found:
        step(torch.compile(model, backend=EAGER), X)
    assert found == {"graphs": 1, "breaks": 0}
    report = fxquant.export_onnx(model, (X,), tmp_path / "net.onnx")
    assert set(report.weights) == {"0.weight", "2.weight"}
    verified = fxquant.verify_onnx(model, (X,), tmp_path / "net.onnx", rounds=0)
    assert_codes_agree(verified)
    assert verified.integer_share == 1.0


def test_a_cached_parametrization_is_computed_once() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = symmetric(nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            with parametrize.cached():
                return self.layer(torch.tanh(self.layer(x)))

    model = prepared(Cached(), X)
    step(torch.compile(model, backend=EAGER), X)
    assert set(ranges(model)) == {"layer.input"} and not unset(model)


def test_what_only_computes_weights_is_told_from_products_of_constants() -> None:
    first, second, query = (nn.Parameter(torch.randn(8, 8)) for _ in range(3))

    def model(x: Tensor) -> Tensor:
        learned = F.linear(query, second)  # a product of constants that an activation's place reads
        return learned @ F.linear(x, first @ first.t()).t()

    gm = captured(model, X)
    constants = constant_nodes(gm.graph)
    computing = weight_computations(gm.graph, constants)
    names = [node.name for node in gm.graph.nodes if node.op == "call_function" and node in computing]
    assert names == ["t", "matmul"]
    assert {n.name for n in constants if n.op == "call_function"} == {"t", "matmul", "linear"}


class ThreeCalls(nn.Module):
    """One layer, three inputs: the weight is shared, each input has its own values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x))) + self.layer(-x)


class Repeated(nn.Sequential):
    """One module under three names: the plan, and the file, know it by the first."""

    def __init__(self) -> None:
        layer = nn.Linear(8, 8)
        super().__init__(layer, nn.ReLU(), layer, nn.Tanh(), layer)


class TwoInTurn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for index in (0, 1, 0):
            x = torch.relu(self.layers[index](x))
        return x


class Rows(nn.Module):
    """A Python loop over a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(row) for row in x])


@pytest.mark.parametrize(
    ("make", "sites", "calls"), [(ThreeCalls, 1, 3), (Repeated, 1, 3), (TwoInTurn, 2, 3), (Rows, 1, 4)]
)
def test_a_layer_that_is_called_often_has_one_site_for_each_operand(
    make: Callable[[], nn.Module], sites: int, calls: int, tmp_path: Path
) -> None:
    found = []
    for backend in ("aot_eager", EAGER):
        model = make() if backend == "aot_eager" else prepared(make(), X)
        with counted() as got:
            step(torch.compile(model, backend=backend), X)
        found.append(got)
    assert found[0] == found[1]
    assert len(ranges(model)) == sites and not unset(model)
    assert compile_reports()[-1].quantized >= calls
    fxquant.export_onnx(model, (X,), tmp_path / "net.onnx", dynamic_batch=False)
    report = fxquant.verify_onnx(model, (X,), tmp_path / "net.onnx", rounds=0)
    assert_codes_agree(report)
    assert report.integer_share == 1.0


def weights_of(model: nn.Module) -> list[tuple[int, str]]:
    """Edges and reason of each weight's site."""
    plan = plan_of(model)
    assert plan is not None
    return [(len(site.local.edges), site.reason) for site in plan.sites if site.local.role == "weight"]


class Transposed(nn.Module):
    """``x·w`` then ``·wᵀ``, or ``·wᵀ`` twice."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.both = both

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ (self.weight.t() if self.both else self.weight))
        return h @ self.weight.t()


def test_a_view_that_is_written_twice_is_one_weight(tmp_path: Path) -> None:
    model = prepared(Transposed(both=True), X)
    assert [edges for edges, _ in weights_of(model)] == [2]
    step(torch.compile(model, backend=EAGER), X)
    fxquant.export_onnx(model, (X,), tmp_path / "net.onnx")
    assert_codes_agree(fxquant.verify_onnx(model, (X,), tmp_path / "net.onnx", rounds=0))


def test_a_tensor_and_its_transpose_are_two_weights_and_both_say_so() -> None:
    model = prepared(Transposed(both=False), X)
    found = weights_of(model)
    assert [edges for edges, _ in found] == [1, 1]
    assert all("the tensor is also read transposed" in reason for _, reason in found)


def test_views_are_the_same_where_tensor_and_arguments_are() -> None:
    w = nn.Parameter(torch.randn(8, 8))
    gm = captured(lambda x: x @ w.t() @ w.t() @ w.view(4, 16).view(8, 8) @ w.view(2, 32).view(8, 8), X)
    first = same_views(gm.graph, constant_nodes(gm.graph))
    t, t_1, *views = (n for n in gm.graph.nodes if n.op == "call_function" and n in first)
    assert first[t_1] is t and first[t] is t
    assert [first[view] for view in views] == views
