"""A Dynamo graph as the ATen graph that passes see: its inputs, and what is kept whole or traced through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

from fxquant.capture.dynamo import _Retrace, capture, dynamo_graphs
from fxquant.graph.bodies import is_checkpoint, is_transform, nested_graphs
from fxquant.graph.nodes import call_nodes
from fxquant.passes.stages import CAPTURED, stage_of

X = torch.tensor([[0.5, -1.0, 2.0], [2.0, 0.25, -0.5]])


def both(model: Callable[..., Any], *args: Tensor, **options: bool) -> tuple[fx.GraphModule, fx.GraphModule, Any]:
    """Dynamo's graph, what capture makes of it, and the inputs of both."""
    found: list[tuple[fx.GraphModule, fx.GraphModule, Any]] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        found.append((gm, capture(gm, inputs, **options), list(inputs)))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(*args)
    (one,) = found
    return one


def names(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in call_nodes(gm.graph)]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x) + self.shift)


def test_inputs_say_where_they_come_from_and_which_are_state() -> None:
    gm, traced, _ = both(Layer(), X)
    inputs = traced.graph.find_nodes(op="placeholder")
    assert len(inputs) == len(gm.graph.find_nodes(op="placeholder")), "in their order"
    described = {node.meta["source"]: node.meta["state"] for node in inputs}
    state = {source for source, is_state in described.items() if is_state}
    assert {source for source in described if source not in state} == {"L['x']"}
    assert (
        len(state) == 3 and sum("_parameters[" in s for s in state) == 2 and sum("_buffers[" in s for s in state) == 1
    )
    assert stage_of(traced) is CAPTURED


def test_a_trainable_leaf_is_state_and_what_follows_from_one_is_not() -> None:
    leaf = torch.ones(3, requires_grad=True)
    _, traced, _ = both(lambda x, leaf, product: x * leaf + product, X, leaf, leaf * 2)
    described = {n.meta["source"]: n.meta["state"] for n in traced.graph.find_nodes(op="placeholder")}
    assert described == {"L['x']": False, "L['leaf']": True, "L['product']": False}


def test_nodes_carry_values_modules_and_lines() -> None:
    model = nn.Sequential(Layer(), nn.Flatten())
    _, traced, inputs = both(model, X)
    assert names(traced) == ["aten.linear.default", "aten.add.Tensor", "aten.relu.default", "aten.flatten.using_ints"]
    linear, _, relu, flat = call_nodes(traced.graph)
    assert flat.meta["val"].shape == (2, 3) and isinstance(linear.meta["val"], torch._subclasses.FakeTensor)
    assert [kind for _, kind in linear.meta["nn_module_stack"].values()][-1] is nn.Linear
    assert [kind for _, kind in relu.meta["nn_module_stack"].values()][-1] is Layer
    assert "self.fc(x)" in linear.meta["stack_trace"]
    torch.testing.assert_close(traced(*inputs)[0], model(X))


class OwnAutocast(nn.Module):
    """Enters autocast itself, leaves it for a while, and mixes what it gives with a mask of the same dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            q = self.fc(x)[None]
            y = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=q.new_zeros(2, 2))
            with torch.autocast("cpu", enabled=False):
                y = self.out(y.float())
            y = self.fc(y)
        return self.out(y.float())


def test_autocast_of_the_model_itself_is_that_of_the_values() -> None:
    model = OwnAutocast()
    _, traced, inputs = both(model, X)
    assert not torch.is_autocast_enabled("cpu")

    class Compared(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and n.op == "call_function":
                assert value.dtype == n.meta["val"].dtype, n
            return value

    assert torch.equal(Compared(traced).run(*inputs)[0], model(X))
    found = {n.name: n.meta["val"].dtype for n in call_nodes(traced.graph) if "linear" in n.name}
    half, single = torch.bfloat16, torch.float32
    assert list(found.values()) == [half, single, half, single]


def test_autocast_ends_with_an_error() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, True))
    graph.output(graph.call_function(torch.matmul, (x, x)))
    with pytest.raises(RuntimeError, match="shapes"):
        _Retrace(fx.GraphModule({}, graph)).run(X)
    assert not torch.is_autocast_enabled("cpu")


def test_symbolic_sizes_stay() -> None:
    x = X.clone()
    torch._dynamo.mark_dynamic(x, 0)
    _, traced, _ = both(lambda x: x.relu() * x.shape[0], x)
    (relu,) = (node for node in call_nodes(traced.graph) if "relu" in node.name)
    assert isinstance(relu.meta["val"].shape[0], torch.SymInt) and relu.meta["val"].shape[1] == 3
    kinds = [type(node.meta["val"]) for node in traced.graph.find_nodes(op="placeholder")]
    assert torch.SymInt in kinds


def test_what_nothing_reads_is_not_captured_but_what_is_written_is() -> None:
    def model(x: Tensor, state: Tensor) -> Tensor:
        x.exp()
        state.add_(1)
        return x.relu()

    _, traced, _ = both(model, X, torch.zeros(3))
    assert names(traced) == ["aten.add_.Tensor", "aten.relu.default"]


def test_dynamos_own_graph_is_left_alone() -> None:
    found = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        before = gm.code, [dict(node.meta) for node in gm.graph.nodes]
        capture(gm, inputs)
        found.append(before == (gm.code, [dict(node.meta) for node in gm.graph.nodes]))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(lambda x: vmap(torch.sin)(x) + 1, backend=backend)(X)
    assert found == [True]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, checkpoint(self.layer, x, use_reentrant=False), use_reentrant=False).exp()


def test_checkpointed_bodies_are_kept_and_traced() -> None:
    model = Checkpointed()
    _, traced, inputs = both(model, X)
    calls = list(filter(is_checkpoint, traced.graph.nodes))
    assert len(calls) == 2 and names(traced)[-1] == "aten.exp.default"
    for node in calls:
        (body,) = nested_graphs(traced, node)
        assert names(body) == ["aten.linear.default", "aten.add.Tensor", "aten.relu.default"]
        assert all("val" in each.meta for each in call_nodes(body.graph))
    torch.testing.assert_close(traced(*inputs)[0], model(X))


def test_checkpointed_bodies_are_inlined_each_in_a_region_of_its_own() -> None:
    _, traced, _ = both(Checkpointed(), X, inline_checkpoints=True)
    assert tag_activation_checkpoint not in {node.target for node in call_nodes(traced.graph)}
    regions = [node.meta.get("region") for node in call_nodes(traced.graph)]
    assert regions[:3] == [regions[0]] * 3 and regions[3:6] == [regions[3]] * 3
    assert None not in regions[:6] and regions[0] != regions[3] and regions[6] is None


class Doubled(torch.autograd.Function):
    """The identity, with a gradient that is none of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_a_function_with_a_gradient_of_its_own_is_kept() -> None:
    _, traced, _ = both(lambda x: Doubled.apply(x) * 3, X.clone().requires_grad_())
    (node,) = (node for node in call_nodes(traced.graph) if "autograd_function_apply" in str(node.target))
    assert len(nested_graphs(traced, node)) == 2
    x = X.clone().requires_grad_()
    traced(x)[0].sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(X, 6.0))


def test_transforms_are_one_call() -> None:
    gm, traced, _ = both(lambda x: vmap(torch.sin)(x).relu(), X)
    assert [is_transform(node) for node in call_nodes(traced.graph)] == [True, False, False]
    assert not any(map(is_transform, gm.graph.nodes))
    assert torch.equal(traced(X)[0], X.sin().relu())


def test_all_graphs_of_a_call() -> None:
    layer = Layer()

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = layer, nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            torch._dynamo.graph_break()
            return self.last(x)

    model = Broken()
    graphs = dynamo_graphs(model, (X,), {})
    assert [names(gm)[0] for gm in graphs] == ["aten.linear.default"] * 2
    assert [gm.meta["runs"] for gm in graphs] == [1, 1]
    assert [gm.meta["parameters"] for gm in graphs] == [
        {id(layer.fc.weight), id(layer.fc.bias)},
        {id(model.last.weight), id(model.last.bias)},
    ]


def test_a_graph_that_a_call_runs_twice() -> None:
    class Breaking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.sin()
            torch._dynamo.graph_break()
            return x.relu()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Breaking()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = self.inner(x)
            return x

    graphs = dynamo_graphs(Twice(), (X,), {})
    assert {names(gm)[0]: gm.meta["runs"] for gm in graphs} == {"aten.sin.default": 2, "aten.relu.default": 2}


def test_errors_of_the_model_come_through() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("mine")

    with pytest.raises(Exception, match="mine"):
        dynamo_graphs(Failing(), (X,), {})
