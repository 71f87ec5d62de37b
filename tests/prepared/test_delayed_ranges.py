"""Delayed ranges: what a step is quantized with, what backward sees of it, and what the compiler makes of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_fw_bw_and_get_code
from torch.utils.checkpoint import checkpoint

import fxquant
from fxquant.errors import InvalidArgument
from fxquant.prepared.quantizer import quantizers
from fxquant.prepared.root import plan_of
from fxquant.spec.mode import Mode
from fxquant.spec.ranges import CurrentTensor, MovingAverage
from tests.backend.oracle import EPS, Activation, OracleMlp, Qparams
from tests.nets import Blocks, Mlp, counted, grads, prepared, ranges, same_bits, step, unset

pytestmark = pytest.mark.usefixtures("cold")
BACKENDS = ["fxquant_eager", "fxquant"]


class DelayedActivation(Activation):
    """Quantizes with the range that it had at entry, its tensor's own the first time; then the range moves."""

    @torch.no_grad()
    def _qparams(self, x: Tensor) -> Qparams:
        low, high = x.min().float().reshape(1), x.max().float().reshape(1)
        used = was = self.range or (low, high)
        if self.training:
            self.range = was[0] + self.constant * (low - was[0]), was[1] + self.constant * (high - was[1])
        low, high = used[0].clamp(max=0), used[1].clamp(min=0)
        scale = ((high - low) / 255).clamp(min=EPS)
        return scale, (0 - torch.round(low / scale)).clamp(0, 255)


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False)


class Twice(nn.Module):
    """One layer at two places: two tensors move one range."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


def delayed(model: nn.Module, *args: Any, **keywords: Any) -> nn.Module:
    return prepared(model, *args, ranges="delayed", **keywords)


def modes(model: nn.Module) -> set[Mode]:
    return {q.mode(True) for _, q in quantizers(model) if q.stateful}


def batches(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    # A range that backward reads after its update gives another scale: the second batch is wider, the third clips.
    return [torch.randn(shape, dtype=dtype) * scale for scale in (1.0, 20.0, 0.3, 60.0)]


def steps(model: nn.Module, run: Any, xs: list[Tensor]) -> list[Any]:
    """Output, gradients and input gradient of each step, without an optimizer."""
    found = []
    for x in xs:
        model.zero_grad()
        x = x.clone().requires_grad_()
        out = run(x)
        (out * torch.arange(1, out.numel() + 1, dtype=out.dtype).view_as(out)).sum().backward()
        found.append((out.detach(), [g for _, g in sorted(grads(model).items())], x.grad))
    return found


def oracle_of(net: nn.Module) -> nn.Module:
    oracle = OracleMlp(copy.deepcopy(net))
    oracle.inputs = nn.ModuleList([DelayedActivation(), DelayedActivation()])
    return oracle


# ---------------------------------------------------------------- against QAT written by hand


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpoint"])
def test_steps_equal_the_oracle_bit_for_bit(checkpointed: bool) -> None:
    net = Mlp()
    oracle, xs = oracle_of(net), batches(5, 8)
    expected = steps(oracle, oracle, xs)
    model = delayed(Checkpointed(net) if checkpointed else net, xs[0])
    got = steps(net, torch.compile(model, backend="fxquant_eager", fullgraph=True), xs)
    for (out, gradients, dx), (want, want_gradients, want_dx) in zip(got, expected, strict=True):
        assert torch.equal(out, want) and torch.equal(dx, want_dx)
        assert len(gradients) == 4
        assert all(map(torch.equal, gradients, want_gradients))
    kept = sorted((m.range[0].item(), m.range[1].item()) for m in oracle.inputs)  # type: ignore[index]
    assert sorted(ranges(model).values()) == kept
    usual = OracleMlp(copy.deepcopy(net))
    assert not torch.allclose(steps(usual, usual, xs)[1][0], expected[1][0], rtol=1e-3), "the delay shows"


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpoint"])
def test_compiled_steps_are_the_oracles_up_to_float_noise(checkpointed: bool) -> None:
    net = Mlp().double()
    oracle, xs = oracle_of(net), batches(5, 8, dtype=torch.float64)
    expected = steps(oracle, oracle, xs)
    model = delayed(Checkpointed(net) if checkpointed else net, xs[0])
    got = steps(net, torch.compile(model, backend="fxquant", fullgraph=True), xs)
    for found, want in zip(got, expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-8)


def test_the_ranges_that_are_kept_are_those_without_delay() -> None:
    """Of the model's input, which no quantizer stands before."""
    xs, found = batches(4, 8), []
    for name in ("moving_average", "delayed"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = prepared(Mlp(), xs[0], ranges=name)
        compiled = torch.compile(model, backend="fxquant_eager")
        for x in xs:
            step(compiled, x)
        found.append(ranges(model)["first.input"])
    assert found[0] == found[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_uses_in_one_graph_read_the_range_at_entry_and_both_move_it(backend: str) -> None:
    net, x = Twice(), torch.randn(4, 8)
    model = delayed(net, x)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    step(compiled, x)
    (key, (low, high)) = next(iter(ranges(model).items()))
    assert (low, high) != (x.min().item(), x.max().item()), "the second use has moved it"
    before = torch.tensor([low]), torch.tensor([high])
    seen: list[Tensor] = []
    net.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        fxquant.strip(copy.deepcopy(model))(x)
    frozen = copy.deepcopy(model)
    fxquant.freeze_ranges(frozen)
    wide = 3 * x
    assert same_bits(step(compiled, wide), step(torch.compile(frozen, backend=backend), wide)), "both read the entry"
    assert ranges(model)[key] != (low, high) and ranges(frozen)[key] == (low, high)
    first = before[0] + 0.01 * (wide.min() - before[0])
    assert ranges(model)[key][0] != first.item(), "and the second moves on from the first"


# ---------------------------------------------------------------- unset ranges


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_step_has_the_batchs_range_and_one_more_graph(backend: str) -> None:
    model = delayed(Mlp(), torch.randn(2, 8))
    assert modes(model) == {Mode.FIRST}
    with counted() as found:
        compiled = torch.compile(model, backend=backend)
        x = torch.randn(4, 8)
        step(compiled, x)
        assert ranges(model)["first.input"] == (x.min().item(), x.max().item())
        assert modes(model) == {Mode.DELAYED}
        for _ in range(3):
            step(compiled, x)
    assert found == {"graphs": 2, "breaks": 0}


def test_a_calibrated_or_loaded_model_has_one_graph() -> None:
    source = fxquant.calibrate(delayed(Mlp(), torch.randn(2, 8)), [torch.randn(4, 8)], progress=False)
    loaded = delayed(Mlp(), torch.randn(2, 8))
    loaded.load_state_dict(source.state_dict())
    for model in (source, loaded):
        with counted() as found:
            compiled = torch.compile(model, backend="fxquant_eager")
            for _ in range(2):
                step(compiled, torch.randn(4, 8))
        assert found == {"graphs": 1, "breaks": 0}


def test_a_first_batch_that_sets_no_range_leaves_the_graph_that_looks() -> None:
    model = delayed(Mlp(), torch.randn(2, 8))
    compiled = torch.compile(model, backend="fxquant_eager")
    bad = torch.randn(4, 8)
    bad[0, 0] = float("inf")
    compiled(bad)
    assert unset(model) and modes(model) == {Mode.FIRST}
    out = step(compiled, good := torch.randn(4, 8))
    assert torch.isfinite(out).all() and modes(model) == {Mode.DELAYED}
    assert ranges(model)["first.input"] == (good.min().item(), good.max().item())


def test_a_later_batch_with_a_non_finite_value_leaves_the_range() -> None:
    model = delayed(Mlp(), torch.randn(2, 8))
    compiled = torch.compile(model, backend="fxquant_eager")
    step(compiled, torch.randn(4, 8))
    before = ranges(model)["first.input"]
    compiled(torch.full((4, 8), float("nan")))
    assert ranges(model)["first.input"] == before


def test_equal_blocks_share_their_graphs_and_each_settles_for_itself() -> None:
    graphs = []
    for name in ("moving_average", "delayed"):
        model = prepared(Blocks(4), torch.randn(2, 8), ranges=name)
        with counted() as found:
            for block in model.blocks:
                block.compile(backend="fxquant_eager")
            for _ in range(3):
                step(model, torch.randn(4, 8))
        assert not unset(model) and len(set(ranges(model).values())) == len(ranges(model)) == 8
        graphs.append(found["graphs"])
    assert modes(model) == {Mode.DELAYED}
    assert graphs[1] == 2 * graphs[0], "once for ranges that are unset, once for ranges that are set"


def test_evaluation_freezing_and_no_grad() -> None:
    model = delayed(Mlp(), torch.randn(2, 8))
    compiled = torch.compile(model, backend="fxquant_eager")
    step(compiled, torch.randn(4, 8))
    before = ranges(model)
    wide = torch.randn(4, 8) * 9
    compiled(wide) if model.eval() else None
    fxquant.freeze_ranges(model.train())
    step(compiled, wide)
    assert ranges(model) == before and modes(model) == {Mode.STATIC}
    fxquant.freeze_ranges(model, frozen=False)
    with torch.no_grad():
        compiled(wide)
    assert ranges(model) != before and modes(model) == {Mode.DELAYED}


def test_an_evaluated_model_is_the_one_without_delay() -> None:
    x = torch.randn(4, 8)
    source = delayed(Mlp(), x)
    step(torch.compile(source, backend="fxquant_eager"), x)
    twin = prepared(Mlp(), x)
    state = {key: value for key, value in source.state_dict().items() if key != "quantizers_plan"}
    assert not any(twin.load_state_dict(state, strict=True))
    outs = [torch.compile(model.eval(), backend="fxquant_eager")(x * 2) for model in (source, twin)]
    assert same_bits(*outs)


# ---------------------------------------------------------------- names


def test_names_and_plan() -> None:
    def found(**given: Any) -> set[Any]:
        plan = plan_of(prepared(Mlp(), torch.randn(2, 8), **given))
        assert plan is not None
        return {site.local.spec.range for site in plan.sites if site.local.role == "activation"}

    assert found() == found(ranges="moving_average") == {MovingAverage()}
    assert found(ranges="delayed") == {MovingAverage(delayed=True)}
    assert found(ranges=CurrentTensor()) == {CurrentTensor()}
    with pytest.raises(InvalidArgument, match=r"ranges must be one of 'moving_average', 'delayed', or .*: got 'late'"):
        prepared(Mlp(), torch.randn(2, 8), ranges="late")


# ---------------------------------------------------------------- the compiler


class Gelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.gelu(self.first(x)))


def test_producer_quantizer_and_extremes_are_one_loop() -> None:
    x, found = torch.randn(8, 16), {}
    for name in ("moving_average", "delayed"):
        model = fxquant.calibrate(prepared(Gelu(), x, ranges=name), [x], progress=False)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="fxquant")
        _, (forward, _) = run_fw_bw_and_get_code(lambda run=compiled: run(x))
        found[name] = forward.count(".erf()"), forward.count("for(int64_t")
    assert found["delayed"][0] == found["moving_average"][0] == 1
    assert found["delayed"][1] == found["moving_average"][1] - 2, "one loop less for each of the two tensors"
