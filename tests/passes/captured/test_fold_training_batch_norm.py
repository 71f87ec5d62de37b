from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import fxquant
from fxquant.capture.dynamo import capture
from fxquant.passes.base import Pass
from fxquant.passes.captured.fold_batch_norm import FoldBatchNorm
from fxquant.passes.captured.fold_training_batch_norm import FoldTrainingBatchNorm
from fxquant.passes.joint.save_running_statistics import SaveRunningStatistics
from fxquant.passes.stages import JOINT, enter
from tests.passes.captured.test_fold_batch_norm import (
    LAYERS,
    SCHEMES,
    SHAPES,
    T2,
    Apart,
    Layer,
    apply_head,
    assert_same_steps,
    axis_of,
    bias_of,
    by_running,
    every_layer,
    every_scheme,
    fake,
    inserting,
    is_transposed,
    of_layer,
    row,
    steps,
    steps_apart,
    times,
)
from tests.passes.graphs import apply, captured, quantizing, untouched

FOLD = FoldTrainingBatchNorm()


def passes(scheme: str) -> tuple[Pass, ...]:
    return inserting(scheme), FoldBatchNorm(), FOLD


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def commutes(layer: Layer, scheme: str) -> bool:
    """Whether every output channel has a scale to itself."""
    return scheme == "per channel" and not (is_transposed(layer) and layer.head.groups > 1)


def by_batch(layer: Layer, x: Tensor, scheme: str) -> Tensor:
    """Scaled by the running statistics, corrected by the batch's, which are those of the float layer.

    The BatchNorm itself, run on the float layer's result, keeps the running statistics.
    """
    norm, weight = layer.norm, layer.head.weight
    running = (norm.running_var.clone() + norm.eps).sqrt()
    gamma = torch.ones_like(running) if norm.weight is None else norm.weight
    y = layer.head(x)
    others = [d for d in range(y.dim()) if d != 1]
    mean, deviation = y.mean(others), (y.var(others, correction=0) + norm.eps).sqrt()
    scaled = apply_head(layer, x, fake(times(layer, weight, gamma / running), axis_of(layer, scheme)))
    norm(y.detach())
    shift = bias_of(norm, gamma) - gamma * (mean - bias_of(layer.head, gamma)) / deviation
    return scaled * row(running / deviation, y) + row(shift, y)


def unfolded(layer: Layer, x: Tensor, scheme: str) -> Tensor:
    """The layer with its quantized weight, and BatchNorm after it."""
    y = apply_head(layer, x, fake(layer.head.weight, axis_of(layer, scheme)))
    return layer.norm(y + row(bias_of(layer.head, layer.norm.running_mean), y))


def assert_same_buffers(layer: nn.Module, oracle: nn.Module) -> None:
    own = {name: value for name, value in layer.named_buffers() if "quantizers" not in name}
    torch.testing.assert_close(own, dict(oracle.named_buffers()), rtol=1e-6, atol=1e-6)


@every_scheme
def test_training_steps(scheme: str) -> None:
    layers = every_layer()
    model = Apart(layers).train()
    oracles, seen = copy.deepcopy(layers), copy.deepcopy(model)
    gm = captured(seen, [torch.randn(shape).double() for shape in SHAPES], passes=passes(scheme)[:2])
    result, alone = apply(FOLD, gm), sum(commutes(layer, scheme) for layer in layers)
    assert (result.rewrites, gm.code.count("aten.batch_norm.default(")) == (len(layers) - alone, alone)
    assert not result.declines and (alone > 0) is (scheme == "per channel")
    found = steps_apart(layers, torch.compile(model, backend=quantizing(*passes(scheme))), SHAPES, 3)
    for name, layer, oracle, shape, got in zip(LAYERS, layers, oracles, SHAPES, found, strict=True):
        expected = unfolded if commutes(layer, scheme) else by_batch
        with of_layer(name):
            assert_same_steps(got, steps(oracle, lambda x, o=oracle, e=expected: e(o, x, scheme), shape, count=3))
            assert_same_buffers(layer, oracle)
            assert layer.norm.num_batches_tracked == 3


def test_a_scale_per_channel_already_is_the_folded_network() -> None:
    """The quantized folded weight scaled by σ/σ_B; the batch's statistics are those of the quantized layer there."""
    names = [name for name, (build, _) in LAYERS.items() if commutes(build(), "per channel")]
    layers = [LAYERS[name][0]().double() for name in names]
    xs = [torch.randn(LAYERS[name][1]).double() for name in names]
    wanted = [folded_by_batch(layer, x) for layer, x in zip(layers, xs, strict=True)]
    found = torch.compile(Apart(layers).train(), backend=quantizing(*passes("per channel")))(xs)
    for name, got, expected in zip(names, found, wanted, strict=True):
        with of_layer(name):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def folded_by_batch(layer: Layer, x: Tensor) -> Tensor:
    axis, norm = axis_of(layer, "per channel"), layer.norm
    y = apply_head(layer, x, fake(layer.head.weight, axis))
    others = [d for d in range(y.dim()) if d != 1]
    mean, deviation = y.mean(others), (y.var(others, correction=0) + norm.eps).sqrt()
    running = (norm.running_var + norm.eps).sqrt()
    gamma = torch.ones_like(running) if norm.weight is None else norm.weight
    scaled = apply_head(layer, x, fake(times(layer, layer.head.weight, gamma / running), axis))
    return scaled * row(running / deviation, y) + row(bias_of(norm, gamma) - gamma * mean / deviation, y)


@pytest.mark.parametrize("name", ["conv2d, no bias", "transposed 2d, groups"])
def test_training_and_deployment_quantize_the_same_weight(name: str) -> None:
    """With a batch whose statistics are the running ones, both graphs give one result."""
    build, shape = LAYERS[name]
    layer, x = build().double(), torch.randn(shape).double()
    y = layer.head(x)
    layer.norm.running_mean.copy_(y.mean((0, 2, 3)).detach())
    layer.norm.running_var.copy_(y.var((0, 2, 3), correction=0).detach())
    compiled = torch.compile(layer, backend=quantizing(*passes("per tensor")))
    deployed = compiled.eval()(x)
    torch.testing.assert_close(deployed, by_running(layer, x, "per tensor"), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(compiled.train()(x), deployed, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gamma", [[0.0] * 4, [-1.0, -2.0, -0.5, -3.0]], ids=["all zero", "all negative"])
def test_gamma(gamma: list[float]) -> None:
    layer = Layer(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), gamma).double()
    oracle, shape = copy.deepcopy(layer), (2, 3, 6, 6)
    expected = steps(oracle, lambda x: by_batch(oracle, x, "per tensor"), shape)
    got = steps(layer, torch.compile(layer, backend=quantizing(*passes("per tensor"))), shape)
    assert all(torch.isfinite(g).all() for _, gradients in got for g in gradients.values() if g is not None)
    assert_same_steps(got, expected)
    assert_same_buffers(layer, oracle)


class Calls(Layer):
    """The layer twice, in checkpoint regions if asked: its second call reads what the first has stored."""

    regions = False

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.once(x)) - self.once(x * 2 + 1)

    def once(self, x: Tensor) -> Tensor:
        body = super().forward
        return checkpoint(body, x, use_reentrant=False) if self.regions else body(x)


@pytest.mark.parametrize("regions", [False, True], ids=["plain", "checkpointed"])
def test_two_calls_of_one_layer(regions: bool) -> None:
    layer = Calls(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.5)).double()
    layer.regions, oracle, shape = regions, copy.deepcopy(layer), (2, 3, 6, 6)

    def run(x: Tensor) -> Tensor:
        return torch.tanh(by_batch(oracle, x, "per tensor")) - by_batch(oracle, x * 2 + 1, "per tensor")

    expected = steps(oracle, run, shape, count=3)
    # Prepared: which inputs of a region are weights is known then.
    fxquant.prepare(layer, (torch.randn(shape).double(),), recipe=SCHEMES["per tensor"], target="generic")
    assert_same_steps(steps(layer, torch.compile(layer, backend="fxquant_eager"), shape, 3), expected)
    assert_same_buffers(layer, oracle)


class Region(Layer):
    """The layer in a checkpoint region."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [(Layer, "fxquant"), (Region, "fxquant"), (Region, "fxquant_eager")],
    ids=["compiled", "compiled, checkpointed", "eager, checkpointed"],
)
def test_a_prepared_model(kind: type[Layer], backend: str) -> None:
    layer = kind(T2(6, 4, 3, groups=2), nn.BatchNorm2d(4, momentum=0.5)).double()
    oracle, shape = copy.deepcopy(layer), (2, 6, 4, 4)
    expected = steps(oracle, lambda x: by_batch(oracle, x, "per channel"), shape, count=3)
    x = torch.randn(shape).double()
    fxquant.prepare(layer, (x,), recipe=SCHEMES["per channel"], target="generic")
    got = steps(layer, torch.compile(layer, backend=backend), shape, count=3)
    assert_same_steps(got, expected)
    assert_same_buffers(layer, oracle)


def test_without_saving_gradients_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `SaveRunningStatistics` is for: with it switched off, backward reads the updated statistics."""
    layer = Layer(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.5)).double()
    oracle, shape = copy.deepcopy(layer), (2, 3, 6, 6)
    ((y, gradients),) = steps(oracle, lambda x: by_batch(oracle, x, "per tensor"), shape, count=1)
    monkeypatch.setattr(SaveRunningStatistics, "rewrite", lambda self, gm, result: 0)
    compiled = torch.compile(layer, backend=quantizing(*passes("per tensor")))
    ((got, wrong),) = steps(layer, compiled, shape, count=1)
    torch.testing.assert_close(got, y, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(wrong["head.weight"], gradients["head.weight"], rtol=0.05)


def test_marked_nodes_are_saved() -> None:
    layer = LAYERS["conv2d, no bias"][0]().train()
    gm = captured(layer, torch.randn(2, 3, 6, 6), passes=passes("per tensor"))
    marked = [n for n in gm.graph.nodes if "fxquant.running_statistic" in n.meta.get("custom", {})]
    assert [str(n.target) for n in marked] == ["aten.add.Scalar"]
    enter(gm, JOINT)  # AOTAutograd hands the mark on to its joint graph
    assert apply(SaveRunningStatistics(), gm).rewrites == 1
    tagged = {n: n.meta["recompute"] for n in gm.graph.nodes if "recompute" in n.meta}
    assert tagged == {marked[0]: CheckpointPolicy.MUST_SAVE}
    plain = enter(captured(layer.eval(), torch.randn(2, 3, 6, 6)), JOINT)
    assert untouched(SaveRunningStatistics(), plain).declines == []


def test_a_shared_weight_stays_as_it_is_for_others() -> None:
    layer = Layer(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
    oracle = copy.deepcopy(layer)

    def model(x: Tensor) -> Tensor:
        return layer(x) + layer.head(x)

    def reference(x: Tensor) -> Tensor:
        head = oracle.head
        return by_batch(oracle, x, "per tensor") + F.linear(x, fake(head.weight, None), head.bias)

    expected = steps(oracle, reference, (6, 4))
    assert_same_steps(steps(layer, torch.compile(model, backend=quantizing(*passes("per tensor"))), (6, 4)), expected)


def test_batches_of_any_size() -> None:
    layer = LAYERS["transposed 2d"][0]().double().train()
    oracle = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend=quantizing(*passes("per tensor")), dynamic=True)
    for batch in (2, 5, 3):
        x = torch.randn(batch, 3, 4, 4).double()
        torch.testing.assert_close(compiled(x), by_batch(oracle, x, "per tensor"), rtol=1e-6, atol=1e-6)
        assert_same_buffers(layer, oracle)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "half layer"])
def test_half(dtype: torch.dtype, autocast: bool) -> None:
    """Statistics are float32 under half values, as BatchNorm's are; results have the dtype that they had."""
    layer, x = LAYERS["conv2d, bias, groups"][0]().train(), torch.randn(8, 4, 6, 6)
    oracle = copy.deepcopy(layer)
    expected = by_batch(oracle, x, "per tensor")
    if not autocast:
        layer.head.to(dtype)
        x = x.to(dtype)
    plain = copy.deepcopy(layer)
    with torch.autocast("cpu", dtype, enabled=autocast):
        got = torch.compile(layer, backend=quantizing(*passes("per tensor")))(x)
        plain(x)
    got.sum().backward()
    assert got.dtype == dtype and all(p.grad is not None and p.grad.dtype == p.dtype for p in layer.parameters())
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(layer.norm, name), getattr(plain.norm, name), rtol=1e-5, atol=1e-6)


def reasons(model: Callable[..., Any], *args: Tensor, scheme: str = "per tensor") -> list[str]:
    result = untouched(FOLD, captured(model, *args, passes=passes(scheme)[:2]))
    assert all(d.pass_name == "FoldTrainingBatchNorm" for d in result.declines)
    return [d.reason for d in result.declines]


def test_declines() -> None:
    layer, x = Layer(nn.Linear(5, 4), nn.BatchNorm1d(4)), torch.randn(6, 5)
    assert reasons(layer, torch.randn(2, 4, 5)) == ["linear has its channels in another dimension"]
    assert reasons(lambda x: layer.norm(y := layer.head(x)) + y, x) == ["linear is used without its normalization too"]
    assert reasons(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(5)), x) == ["relu before it has no quantized weight"]
    stateless = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False))
    for scheme in SCHEMES:
        assert reasons(stateless, x, scheme=scheme) == ["it keeps no running statistics to fold"]


def test_a_momentum_computed_in_the_graph_is_declined() -> None:
    layer, x = Layer(nn.Linear(5, 4), nn.BatchNorm1d(4)), torch.randn(6, 5)
    for scheme, expected in (("per tensor", ["its momentum is computed in the graph"]), ("per channel", [])):
        gm = captured(layer, x, passes=passes(scheme)[:2])
        (norm,) = (node for node in gm.graph.nodes if node.name == "batch_norm")
        with gm.graph.inserting_before(norm):
            norm.update_arg(6, gm.graph.call_function(float, (0.5,)))
        gm.recompile()
        assert [d.reason for d in untouched(FOLD, gm).declines] == expected


def test_a_cumulative_average_is_not_seen() -> None:
    """Reading the count of batches into a number breaks the graph before the BatchNorm, which then runs in eager."""
    layer, targets = Layer(nn.Linear(5, 4), nn.BatchNorm1d(4, momentum=None)), []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        targets.extend(str(node.target) for node in capture(gm, inputs).graph.nodes if node.op == "call_function")
        return gm.forward

    torch.compile(layer, backend=backend)(torch.randn(6, 5))
    assert targets == ["aten.linear.default"]


def test_whole_momentum() -> None:
    """1 is a number too: only the last batch counts."""
    layer, x = Layer(nn.Linear(5, 4), nn.BatchNorm1d(4, momentum=1)).double(), torch.randn(6, 5).double()
    oracle = copy.deepcopy(layer)
    expected = by_batch(oracle, x, "per tensor")
    got = torch.compile(layer, backend=quantizing(*passes("per tensor")))(x)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert_same_buffers(layer, oracle)
