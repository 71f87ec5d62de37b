"""Training steps of both backends against QAT written by hand, and against each other.

Nets are float64 where matmuls are inexact: sums in another order then cannot move a value across a rounding
boundary, so that everything else can be held tightly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxquant
from fxquant.prepared.quantizer import quantizers
from tests.backend.oracle import Activation, OracleConvNet, OracleMlp
from tests.nets import ConvNet, Mlp, grads, prepared, ranges, same_bits

BACKENDS = ["fxquant_eager", "fxquant"]


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False)


class Pair(nn.Module):
    """Two regions, one inside the other's range of influence."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.one, self.two = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def three_steps(model: nn.Module, run: Callable[[Tensor], Tensor], xs: list[Tensor]) -> list[Any]:
    """Outputs and gradients of steps without an optimizer."""
    found = []
    for x in xs:
        model.zero_grad()
        x = x.clone().requires_grad_()
        out = run(x)
        (out * torch.arange(1, out.numel() + 1, dtype=out.dtype).view_as(out)).sum().backward()
        found.append((out.detach(), grads(model), x.grad))
    return found


def assert_same_ranges(model: nn.Module, oracle: nn.Module) -> None:
    """Sorted, since the hand-written net has no keys."""
    want = sorted((m.range[0].item(), m.range[1].item()) for m in oracle.modules() if isinstance(m, Activation))
    got = sorted(ranges(model).values())
    assert len(got) == len(want)
    for pair, want_pair in zip(got, want, strict=True):
        assert pair == pytest.approx(want_pair)


def batches(*shape: int) -> list[Tensor]:
    # The second is wider, so that a range read after its update gives another scale; the third clips.
    return [torch.randn(shape, dtype=torch.float64) * scale for scale in (1.0, 20.0, 0.3)]


@pytest.mark.parametrize("recipe", ["int8", "w4a8"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpoint"])
def test_a_two_layer_net(recipe: str, checkpointed: bool) -> None:
    net = Mlp().double()
    oracle = OracleMlp(copy.deepcopy(net), bits=8 if recipe == "int8" else 4)
    xs = batches(5, 8)
    expected = three_steps(oracle, oracle, xs)
    model = prepared(Checkpointed(net) if checkpointed else net, xs[0], recipe=recipe)
    got = three_steps(net, torch.compile(model, backend="fxquant_eager"), xs)
    for (out, gradients, dx), (want, want_gradients, want_dx) in zip(got, expected, strict=True):
        torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(gradients, {k: want_gradients[k] for k in gradients}, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(dx, want_dx, rtol=1e-6, atol=1e-9)
        assert len(gradients) == 4
    assert_same_ranges(model, oracle)
    plain = three_steps(copy.deepcopy(net), fxquant.strip(copy.deepcopy(model)), xs)
    assert not torch.allclose(plain[1][0], expected[1][0]), "the oracle quantizes"


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_checkpointed_regions(backend: str) -> None:
    nets = Pair(lambda: Mlp().double())
    oracle = copy.deepcopy(nets)
    oracle.one, oracle.two = OracleMlp(oracle.one), OracleMlp(oracle.two)
    xs = batches(5, 8)
    expected = three_steps(oracle, oracle, xs)
    nets.one, nets.two = Checkpointed(nets.one), Checkpointed(nets.two)
    model = prepared(nets, xs[0])
    got = three_steps(nets, torch.compile(model, backend=backend), xs)
    for (out, gradients, dx), (want, want_gradients, want_dx) in zip(got, expected, strict=True):
        torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-9)
        flat = {name.replace(".body", ""): g for name, g in gradients.items()}
        torch.testing.assert_close(flat, {k: want_gradients[k] for k in flat}, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(dx, want_dx, rtol=1e-6, atol=1e-9)
    assert_same_ranges(model, oracle)


@pytest.mark.parametrize(
    ("backend", "checkpointed"), [("fxquant_eager", False), ("fxquant_eager", True), ("fxquant", False)]
)
def test_a_residual_conv_net(backend: str, checkpointed: bool) -> None:
    net = ConvNet().double()
    oracle = OracleConvNet(copy.deepcopy(net))
    xs = batches(2, 3, 6, 6)
    expected = three_steps(oracle, oracle, xs)
    model = prepared(Checkpointed(net) if checkpointed else net, xs[0])
    got = three_steps(net, torch.compile(model, backend=backend), xs)
    for (out, gradients, dx), (want, want_gradients, want_dx) in zip(got, expected, strict=True):
        torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-8)
        want_gradients = {name.removeprefix("model."): g for name, g in want_gradients.items()}
        torch.testing.assert_close(gradients, {k: want_gradients[k] for k in gradients}, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(dx, want_dx, rtol=1e-5, atol=1e-6)
    assert_same_ranges(model, oracle)
    if not checkpointed:  # checkpointing updates running statistics twice, in plain torch too
        torch.testing.assert_close(net.bn1.running_var, oracle.model.bn1.running_var, rtol=1e-6, atol=1e-9)


def test_batch_norm_with_weights_of_zero_and_below() -> None:
    net = ConvNet().double()
    with torch.no_grad():
        net.bn1.weight.copy_(torch.tensor([1.0, 0.0, -1.0, -0.5]))
        net.bn1.bias.copy_(torch.tensor([0.0, 0.5, 0.2, -0.1]))
    oracle = OracleConvNet(copy.deepcopy(net))
    xs = batches(2, 3, 6, 6)
    expected = three_steps(oracle, oracle, xs)
    model = prepared(net, xs[0])
    compiled = torch.compile(model, backend="fxquant_eager")
    got = three_steps(net, compiled, xs)
    for (out, gradients, _), (want, want_gradients, _) in zip(got, expected, strict=True):
        torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-8)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, want_gradients[f"model.{name}"], rtol=1e-5, atol=1e-6)
    net.eval(), oracle.eval()
    # Folding quantizes w·f instead of w: the same codes, up to their sign, and one rounding of the scale.
    torch.testing.assert_close(compiled(xs[0]), oracle(xs[0]), rtol=1e-4, atol=1e-4)


class Exact(nn.Module):
    """Integers throughout, small enough that every sum is exact in float32 in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 4, bias=False)
        generator = torch.Generator().manual_seed(0)
        for layer in (self.first, self.second):
            values = torch.randint(-7, 8, layer.weight.shape, generator=generator).float()
            values[:, 0] = 127.0  # the scale of every row is 1
            layer.weight.data = values

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.second(x - 16.0).abs() * 2 + 3


def test_compiled_equals_eager_to_the_last_bit_where_sums_are_exact() -> None:
    x = torch.randint(0, 16, (6, 8), generator=torch.Generator().manual_seed(1)).float()
    results = []
    for backend in BACKENDS:
        model = prepared(Exact(), x)
        for key, quantizer in quantizers(model):
            if quantizer.stateful:
                scale = {"first.input": 4.0, "second.input": 64.0}[key]
                quantizer.min_val.fill_(-128 * scale)
                quantizer.max_val.fill_(127 * scale)
        fxquant.freeze_ranges(model)
        compiled = torch.compile(model, backend=backend)
        results.append(three_steps(model, compiled, [x, 2 * x + 1, 10 * x]))
    for (out, gradients, dx), (want, want_gradients, want_dx) in zip(*results, strict=True):
        assert same_bits(out, want)
        assert gradients.keys() == want_gradients.keys() and len(gradients) == 2
        assert all(same_bits(gradients[name], want_gradients[name]) for name in gradients)
        assert same_bits(dx, want_dx)
    (_, saturated, dx) = results[0][2]
    assert (dx == 0).any() and (dx != 0).any(), "some codes clip, some do not"
    assert all(g.abs().max() > 0 for g in saturated.values())


class Elementwise(nn.Module):
    """One product per result, so that ranges may move: nothing is summed."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Linear(1, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.outer(x)) * x


def test_compiled_equals_eager_to_the_last_bit_while_ranges_move() -> None:
    xs = [torch.randn(32, 1) * scale for scale in (1.0, 5.0, 0.1)]
    results = []
    for backend in BACKENDS:
        torch.manual_seed(0)
        model = prepared(Elementwise(), xs[0])
        compiled = torch.compile(model, backend=backend)
        outs = []
        for x in xs:
            out = compiled(x)
            out[3:4].sum().backward()
            outs.append(out.detach())
        results.append((outs, ranges(model), [q.min_val.clone() for _, q in quantizers(model) if q.stateful]))
    (outs, found, _), (want, want_found, _) = results
    assert all(same_bits(a, b) for a, b in zip(outs, want, strict=True))
    assert found == want_found and len(found) == 1


def test_compiled_is_close_to_eager_in_float32() -> None:
    results = []
    for backend in BACKENDS:
        torch.manual_seed(0)
        net = ConvNet()
        model = prepared(net, torch.randn(2, 3, 6, 6))
        xs = [x.float() for x in batches(2, 3, 6, 6)]
        results.append((three_steps(net, torch.compile(model, backend=backend), xs), ranges(model)))
    (got, found), (want, want_found) = results
    for (out, gradients, _), (want_out, want_gradients, _) in zip(got, want, strict=True):
        # A sum one ULP off may fall on the other side of a rounding boundary: few values, one step each.
        for a, b in ((out, want_out), *((gradients[k], want_gradients[k]) for k in gradients)):
            assert (a - b).abs().mean() <= 2e-3 * b.abs().mean() + 1e-6
    for key, pair in found.items():
        assert pair == pytest.approx(want_found[key], rel=1e-2)
