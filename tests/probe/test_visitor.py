"""visiting: what a visit sees, what it changes, and what a run leaves behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxquant
from fxquant.errors import InvalidArgument
from fxquant.ops import fake_quantize
from fxquant.prepared.quantizer import quantizers
from fxquant.prepared.root import plan_of
from fxquant.probe import visitor
from fxquant.probe.visitor import Use, visiting
from tests.probe.nets import Frames, Pair, Twice, random, ready

X = random(4, 6, seed=1)


@pytest.fixture(scope="module")
def pair() -> nn.Module:
    torch.manual_seed(0)
    return ready(Pair(), X)


def uses_of(model: nn.Module, x: Tensor) -> list[Use]:
    seen: list[Use] = []

    def visit(use: Use) -> None:
        assert isinstance(use.quantized, Tensor)  # what it gives later is computed within the visit
        seen.append(use)

    with visiting(model, "the test") as run:
        run((x,), {}, visit)
    return seen


def to_input(use: Use) -> Tensor:
    return use.input


# ---------------------------------------------------------------- what a visit sees


def test_every_site_is_seen_with_its_key_role_and_float_tensor(pair: nn.Module) -> None:
    seen = {use.keys: use for use in uses_of(pair, X)}
    plan = plan_of(pair)
    assert plan is not None
    assert {keys: use.role for keys, use in seen.items()} == {(s.key,): s.local.role for s in plan.sites}
    assert torch.equal(seen["up.input",].input, X)
    assert torch.equal(seen["up.weight",].input, pair.up.weight) and torch.equal(
        seen["down.weight",].input, pair.down.weight
    )


def test_scale_and_zero_point_are_those_of_the_stored_range(pair: nn.Module) -> None:
    (use,) = [use for use in uses_of(pair, X) if use.keys == ("up.input",)]
    held = dict(quantizers(pair))["up.input"]
    low, high = float(held.min_val), float(held.max_val)
    assert float(use.scale) == pytest.approx((high - low) / 255, rel=1e-6)
    assert int(use.zero_point) == round(-low / float(use.scale))


def test_the_quantized_tensor_is_the_nearest_of_the_grid(pair: nn.Module) -> None:
    for use in uses_of(pair, X):
        scale = use.scale.double() if use.scale.dim() == 0 else use.scale.double()[:, None]
        codes = use.quantized.double() / scale
        assert torch.allclose(codes, codes.round(), atol=1e-4), use.keys
        assert ((use.quantized - use.input).abs() <= scale * 0.5001).all(), use.keys


def test_a_use_computes_once_and_only_when_asked() -> None:
    calls = []

    def compute() -> Tensor:
        calls.append(1)
        return torch.ones(2)

    zero = torch.zeros(())
    use = Use(keys=("a",), role="weight", input=zero, scale=zero, zero_point=zero, compute=compute)
    assert calls == [] and "compute" not in repr(use)
    assert use.quantized is use.quantized and calls == [1]


def test_instances_of_a_class_that_share_graphs_are_told_apart() -> None:
    torch.manual_seed(0)
    model = ready(Frames(), X)
    seen = uses_of(model, X)
    plan = plan_of(model)
    assert plan is not None and {key for use in seen for key in use.keys} == {site.key for site in plan.sites}
    weights = {use.keys[0]: use.input for use in seen if use.role == "weight"}
    for key, weight in weights.items():
        assert torch.equal(weight, model.get_parameter(key)), key


# ---------------------------------------------------------------- what goes on


def test_without_a_say_the_output_is_that_of_fxquant_eager(pair: nn.Module) -> None:
    with visiting(pair, "the test") as run:
        output = run((X,), {}, lambda use: None)
    pair.eval()
    with torch.no_grad():
        assert torch.equal(output, torch.compile(pair, backend="fxquant_eager", dynamic=False)(X))
    pair.train()


def test_inputs_instead_of_codes_give_the_float_model(pair: nn.Module) -> None:
    with visiting(pair, "the test") as run:
        output = run((X,), {}, to_input)
    with torch.no_grad():
        torch.testing.assert_close(output, pair(X), rtol=0, atol=1e-6)


def test_what_a_visit_returns_goes_on(pair: nn.Module) -> None:
    weight = torch.randn(3, 8)

    def visit(use: Use) -> Tensor:
        return weight if use.keys == ("down.weight",) else use.input

    with visiting(pair, "the test") as run:
        output = run((X,), {}, visit)
    with torch.no_grad():
        wanted = F.linear(torch.relu(pair.up(X)), weight, pair.down.bias)
    torch.testing.assert_close(output, wanted, rtol=0, atol=1e-6)


def test_nothing_is_computed_where_the_input_goes_on(pair: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []
    plain = fx.Interpreter.run_node

    def run_node(self: fx.Interpreter, n: fx.Node) -> Any:
        computed.append(str(n.target))
        return plain(self, n)

    monkeypatch.setattr(fx.Interpreter, "run_node", run_node)
    names = {str(op) for op in fake_quantize.FAKE_QUANTIZE}
    with visiting(pair, "the test") as run:
        run((X,), {}, to_input)
        computed.clear()  # what the compile traced
        run((X,), {}, to_input)
        assert computed and not names & set(computed)
        run((X,), {}, lambda use: None)
    assert len([name for name in computed if name in names]) == 4


def test_a_fake_quant_of_the_model_itself_is_no_site() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = fxquant.ops.fake_quantize_per_tensor_affine(torch.tanh(self.fc(x)), 0.25, 0, -8, 7)
            return torch.sin(y)

    torch.manual_seed(0)
    model = ready(Own(), X)
    with visiting(model, "the test") as run:
        seen: list[str] = []
        output = run((X,), {}, lambda use: seen.extend(use.keys) or use.input)
    assert set(seen) == {"fc.input", "fc.weight"}
    with torch.no_grad():
        torch.testing.assert_close(output, model(X), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- how it runs, and what it leaves behind


def test_one_compile_for_each_shape(pair: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    compiles: list[int] = []
    plain: Callable[..., Any] = visitor.quantize_graph

    def counting(*args: Any) -> Any:
        compiles.append(1)
        return plain(*args)

    monkeypatch.setattr(visitor, "quantize_graph", counting)
    with visiting(pair, "the test") as run:
        for size in (4, 2, 4, 2):
            assert run((random(size, 6),), {}, to_input).shape == (size, 3)
    assert len(compiles) == 2


def test_a_watch_learns_each_graph_once_and_its_keys_in_each_run(pair: nn.Module) -> None:
    graphs: list[int] = []
    runs: list[Sequence[tuple[str, ...]]] = []

    def watch(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> Callable[[Sequence[tuple[str, ...]]], None]:
        graphs.append(len(nodes))
        assert all(node.graph is gm.graph for node in nodes)
        return runs.append

    with visiting(pair, "the test", watch) as run:
        for _ in range(3):
            run((X,), {}, to_input)
    assert graphs == [4] and len(runs) == 3 and runs[0] == runs[2]
    assert set(runs[0]) == {("up.input",), ("up.weight",), ("down.input",), ("down.weight",)}


def test_modes_come_back_and_gradients_are_off() -> None:
    torch.manual_seed(0)
    model = ready(Twice(), X).train()
    model.drop.eval()
    with visiting(model, "the test") as run:
        assert not model.training
        output = run((X,), {"scale": 2.0}, to_input)
        assert not output.requires_grad
    assert model.training and model.again.training and not model.drop.training and torch.is_grad_enabled()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(output, model(X, scale=2.0), rtol=0, atol=1e-6)


def test_after_an_error_in_a_visit_the_next_run_is_its_own(pair: nn.Module) -> None:
    def fails(use: Use) -> None:
        raise ZeroDivisionError(use.keys[0])

    pair.train()
    with pytest.raises(ZeroDivisionError), visiting(pair, "the test") as run:
        run((X,), {}, fails)
    assert pair.training
    with visiting(pair, "the test") as run:
        with pytest.raises(ZeroDivisionError, match=r"\.(weight|input)"):
            run((X,), {}, fails)
        run((X,), {}, to_input)


def test_an_unprepared_model_is_refused_in_the_caller_s_name() -> None:
    with (
        pytest.raises(InvalidArgument, match="sweeping must be given a prepared model: got Pair"),
        visiting(Pair(), "sweeping"),
    ):
        pass


def test_two_threads_visit_two_models_at_once() -> None:
    """Each visit waits for the other's, so both runs are in progress whenever a site is seen."""
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(ready(Pair(), random(4, 6, seed=seed)))
    together = threading.Barrier(2, timeout=120)

    def record(model: nn.Module) -> list[tuple[str, Tensor]]:
        seen: list[tuple[str, Tensor]] = []

        def visit(use: Use) -> None:
            together.wait()
            seen.append((use.keys[0], use.input))

        with visiting(model, "the test") as run:
            run((X,), {}, visit)
        return seen

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(record, models))
    for model, seen in zip(models, both, strict=True):
        assert sorted(key for key, _ in seen) == ["down.input", "down.weight", "up.input", "up.weight"]
        assert torch.equal(dict(seen)["down.weight"], model.down.weight)
