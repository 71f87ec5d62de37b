"""Which values of a graph could be computed once for many calls, and the words for those that could not."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._higher_order_ops.wrap import tag_activation_checkpoint, wrap
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fxquant.graph.edit import call
from fxquant.ops import fake_quantize
from fxquant.passes.captured.constant_weights import reasons, reasons_inside, written_inputs

aten = torch.ops.aten


class Graph:
    """A captured graph in the making, with the tensors that its inputs hold."""

    def __init__(self, mode: FakeTensorMode | None = None) -> None:
        self.gm, self.inputs = fx.GraphModule({}, fx.Graph()), []
        self.mode = mode or FakeTensorMode(allow_non_fake_inputs=True)

    def state(self, name: str, value: Tensor | None = None) -> fx.Node:
        """A parameter or buffer."""
        return self.given(f"self.{name}", value, state=True)

    def given(self, name: str, value: Tensor | None = None, state: bool = False) -> fx.Node:
        """An input of this name in the user's code."""
        value = torch.ones(4, 4) if value is None else value
        node = self.gm.graph.placeholder(name.replace(".", "_"))
        node.meta.update(source=f"L['{name}']", state=state, val=self.mode.from_tensor(value.detach()))
        self.inputs.append(value)
        return node

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an operator."""
        return call(self.gm.graph, op, *args, like=next(iter(self.gm.graph.nodes)), **kwargs)

    def python(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """A call of what is no operator."""
        return self.gm.graph.call_function(function, args)

    def body(self, other: Graph, name: str = "body") -> fx.Node:
        """The node that reads a nested graph."""
        setattr(self.gm, name, other.gm)
        return self.gm.graph.get_attr(name)

    def why(self, node: fx.Node) -> str | None:
        """Why a node cannot be computed once."""
        return reasons(self.gm, self.inputs)[node]


# --- calls ---------------------------------------------------------------------------------------------


def test_a_fake_quantized_parameter() -> None:
    g = Graph()
    weight = g.state("weight", torch.nn.Parameter(torch.ones(4, 4)))
    detached = g.call(aten.detach.default, weight)
    least = g.call(aten.amin.default, detached)
    made = g.call(torch.ops.fxquant.affine_qparams.default, least, least, 0, 255, False)
    scale, zero = (g.call(operator.getitem, made, index) for index in (0, 1))
    quantized = g.call(fake_quantize.PER_TENSOR, weight, scale, zero, 0, 255)
    assert [g.why(node) for node in (weight, detached, least, made, scale, zero, quantized)] == [None] * 7


def test_what_reads_the_models_input() -> None:
    g = Graph()
    weight, x = g.state("weight"), g.given("x")
    product = g.call(aten.mul.Tensor, weight, g.call(aten.relu.default, x))
    assert g.why(product) == "it depends on L['x'], which is no parameter or buffer"


def test_the_first_reason_is_handed_on() -> None:
    g = Graph()
    x, y = g.given("x"), g.given("y")
    both = g.call(aten.add.Tensor, g.call(aten.neg.default, y), x)
    assert g.why(both) == "it depends on L['y'], which is no parameter or buffer"


def test_what_is_random() -> None:
    g = Graph()
    noise = g.call(aten.rand_like.default, g.state("weight"))
    assert g.why(noise) == "it depends on rand_like_default, which is random"


def test_what_is_no_function_of_its_operands() -> None:
    g = Graph()
    counter, weight = g.state("counter"), g.state("weight")
    assert (
        g.why(g.call(aten.add_.Tensor, counter, 1)) == "it depends on L['self.counter'], which the graph itself changes"
    )
    made = g.python(max, weight, weight)
    assert g.why(made) == f"it depends on {made.name}, which is no function of its operands alone"
    copied = g.call(aten.neg.default, weight)
    changed = g.call(aten.mul_.Tensor, copied, 2)
    assert g.why(changed) == f"it depends on {changed.name}, which is no function of its operands alone"


def test_constants_of_the_graph() -> None:
    g = Graph()
    g.state("weight")
    g.gm.register_buffer("table", torch.ones(4))
    assert g.why(g.gm.graph.get_attr("table")) == "it reads table, a constant of the graph"


def test_where_autocast_is_switched() -> None:
    """Only what casts nothing is the same there; what comes after is as it was before."""
    g = Graph()
    weight, scale, zero = (
        g.state("weight"),
        g.state("s", torch.ones(1)),
        g.state("z", torch.zeros(1, dtype=torch.int32)),
    )
    before = g.call(aten.mul.Tensor, weight, weight)
    outer = g.python(_enter_autocast, "cpu", torch.bfloat16, True, True)
    inner = g.python(_enter_autocast, "cpu", torch.bfloat16, False, True)
    product = g.call(aten.mul.Tensor, weight, weight)
    turned = g.call(aten.t.default, weight)
    quantized = g.call(fake_quantize.PER_TENSOR, turned, scale, zero, 0, 255)
    g.python(_exit_autocast, inner)
    still = g.call(aten.add.Tensor, weight, 1)
    g.python(_exit_autocast, outer)
    after = g.call(aten.mul.Tensor, weight, weight)
    assert [g.why(node) for node in (before, turned, quantized, after)] == [None] * 4
    for node in (product, still):
        assert g.why(node) == f"it depends on {node.name}, computed where the model switches autocast"


# --- inputs --------------------------------------------------------------------------------------------


class Named(Tensor):
    """A kind of tensor of somebody else's."""


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.nn.Parameter(torch.ones(2)), None),
        (torch.ones(2, dtype=torch.int8), None),
        (torch.ones(2).as_subclass(Named), "it depends on L['self.w'], a Named whose changes are not told"),
        (torch.eye(2).to_sparse(), "it depends on L['self.w'], a Tensor whose changes are not told"),
    ],
    ids=["a parameter", "a buffer", "a subclass", "sparse"],
)
def test_kinds_of_tensors(value: Tensor, reason: str | None) -> None:
    g = Graph()
    weight = g.given("self.w", torch.ones(2), state=True)
    g.inputs = [value]
    assert g.why(weight) == reason


@pytest.mark.parametrize("wide", [False, True], ids=["size", "stride"])
def test_sizes_that_are_not_fixed(wide: bool) -> None:
    mode, g = FakeTensorMode(shape_env=ShapeEnv()), Graph()
    weight = g.state("w", torch.ones(3, 5))
    rows, columns = (DimDynamic.DYNAMIC if dynamic else DimDynamic.STATIC for dynamic in (not wide, wide))
    context = StatelessSymbolicContext(dynamic_sizes=[rows, columns])
    value = mode.from_tensor(torch.ones(3, 5), symbolic_context=context)
    weight.meta["val"] = value[:, 0] if wide else value
    assert g.why(weight) == "it depends on L['self.w'], whose size is not fixed"


BYTES = torch.zeros(100)
SPANS: dict[str, tuple[list[Tensor], list[bool]]] = {
    "side by side": ([BYTES[:50], BYTES[50:]], [False, False]),
    "the same": ([BYTES[10:20], BYTES[10:20]], [True, True]),
    "one inside": ([BYTES[40:60], BYTES, torch.zeros(3)], [True, True, False]),
    "two inside one, apart": ([BYTES[:90], BYTES[10:20], BYTES[50:60], BYTES[90:]], [True, True, True, False]),
    "by one number": ([BYTES[:51], BYTES[50:]], [True, True]),
    "every second, into each other": ([BYTES[0:10:2], BYTES[1:11:2]], [True, True]),
    "an empty one": ([BYTES, BYTES[50:50]], [False, False]),
}  # fmt: skip


@pytest.mark.parametrize("name", SPANS)
def test_inputs_that_share_memory(name: str) -> None:
    values, shared = SPANS[name]
    g = Graph()
    nodes = [g.state(f"w{index}", value) for index, value in enumerate(values)]
    expected = [
        f"L['self.w{i}'] shares its memory with another input" if each else None for i, each in enumerate(shared)
    ]
    assert [g.why(node) for node in nodes] == expected


# --- what the graph writes -----------------------------------------------------------------------------


def test_written_directly_and_through_views() -> None:
    g = Graph()
    one, two, three, four = (g.state(name) for name in "abcd")
    g.call(aten.copy_.default, one, three)
    g.call(aten.add_.Tensor, g.call(aten.select.int, g.call(aten.t.default, two), 0, 1), 1)
    g.call(aten.add_.Tensor, g.call(aten.clone.default, four), 1)
    assert written_inputs(g.gm) == {one, two}, "three is read, and of four a copy is changed"


def test_written_by_what_an_item_views() -> None:
    g = Graph()
    weight = g.state("w")
    parts = g.call(aten.split.Tensor, weight, 2)
    g.call(aten.zero_.default, g.call(operator.getitem, parts, 1))
    assert written_inputs(g.gm) == {weight}


def test_batch_norm_writes_its_statistics() -> None:
    g = Graph()
    x = g.given("x", torch.ones(2, 3))
    weight, bias, mean, var = (g.state(name, torch.ones(3)) for name in ("w", "b", "mean", "var"))
    g.call(aten.batch_norm.default, x, weight, bias, mean, var, True, 0.1, 1e-5, False)
    assert written_inputs(g.gm) == {mean, var}
    assert g.why(mean) == "it depends on L['self.mean'], which the graph itself changes" and g.why(weight) is None
    other = Graph()
    x = other.given("x", torch.ones(2, 3, 4))
    other.call(aten.instance_norm.default, x, None, None, None, None, True, 0.1, 1e-5, False)
    assert written_inputs(other.gm) == set()


def changing(g: Graph, changed: str) -> Graph:
    """A body of two inputs that changes the named one."""
    inner = Graph(g.mode)
    nodes = {name: inner.given(name) for name in ("first", "second")}
    inner.gm.graph.output((inner.call(aten.add_.Tensor, nodes[changed], 1),))
    return inner


def test_written_in_a_checkpointed_body() -> None:
    g = Graph()
    one, two = g.state("a"), g.state("b")
    g.python(tag_activation_checkpoint, g.body(changing(g, "second")), one, two)
    assert written_inputs(g.gm) == {two}


def test_written_in_a_body_of_another_operator() -> None:
    """Which operand is which is not known there: all of them may be."""
    g = Graph()
    one, two, three = g.state("a"), g.state("b"), g.state("c")
    g.python(wrap, g.body(changing(g, "second")), one, two)
    assert written_inputs(g.gm) == {one, two} and g.why(three) is None


# --- bodies --------------------------------------------------------------------------------------------


def test_a_body_knows_what_it_is_given() -> None:
    g, inner = Graph(), Graph()
    weight, x, bias = inner.given("w"), inner.given("x"), inner.given("b")
    inside = [inner.call(aten.neg.default, node) for node in (weight, x, bias)]
    outer = g.python(tag_activation_checkpoint, g.body(inner), g.state("w"), g.given("x"), 2)
    found = reasons_inside(outer, inner.gm, reasons_of(g))
    assert [found[node] for node in inside] == [
        None, "it depends on L['x'], which is no parameter or buffer", "it depends on 2",
    ]  # fmt: skip


def test_a_body_called_where_autocast_is_switched() -> None:
    g, inner = Graph(), Graph()
    weight = inner.given("w")
    turned, product = inner.call(aten.t.default, weight), inner.call(aten.mul.Tensor, weight, 2)
    state = g.state("w")
    enter = g.python(_enter_autocast, "cpu", torch.bfloat16, True, True)
    outer = g.python(tag_activation_checkpoint, g.body(inner), state)
    g.python(_exit_autocast, enter)
    found = reasons_inside(outer, inner.gm, reasons_of(g))
    assert found[turned] is None
    assert found[product] == f"it depends on {product.name}, computed where the model switches autocast"


def reasons_of(g: Graph) -> dict[fx.Node, str | None]:
    return reasons(g.gm, g.inputs)
