"""Products of graphs written node by node: how often they run, what they read, and why they stay float."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._higher_order_ops.wrap import tag_activation_checkpoint

from fxquant.plan.plan import FloatPlace, Plan
from fxquant.report.products import Product, opaque_bodies, products_of
from fxquant.report.sited_graph import SitedGraph
from tests.graph.by_hand import ByHand
from tests.report.plans_by_hand import plan, site

aten = torch.ops.aten
NOTHING = plan()
LINE = 'File "/src/net.py", line 7, in forward'


def sited(gm: fx.GraphModule, those: Plan = NOTHING, runs: int = 1) -> SitedGraph:
    gm.meta["runs"] = runs
    return SitedGraph(gm, those)


def quantize(graph: SitedGraph, node: fx.Node, *operands: str) -> None:
    """Says that a site serves these operands, as a graph with marks of owners would."""
    for name in operands:
        graph.located[node, name] = (site("m", "activation", f"- matmul 0 {name}"), ("m", "matmul", 0))


class Matmul:
    """``x @ y``, 2×3 by 3×5: 60 operations."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        graph = ByHand()
        self.x, self.y = graph.input("x", 2, 3, dtype=dtype), graph.input("y", 3, 5, dtype=dtype)
        self.product = graph.call(aten.matmul.default, self.x, self.y)
        self.product.meta["stack_trace"] = LINE
        self.gm = graph.module(self.product)


def only(graph: SitedGraph, those: Plan = NOTHING) -> Product:
    (found,) = products_of(graph, those)
    return found


# ---------------------------------------------------------------- work


@pytest.mark.parametrize("runs", [0, 1, 3])
def test_work_is_that_of_all_runs(runs: int) -> None:
    found = list(products_of(sited(Matmul().gm, runs=runs), NOTHING))
    assert [one.flops for one in found] == ([60 * runs] if runs else [])


def test_a_product_is_named_as_in_its_graph() -> None:
    net = Matmul()
    net.product.meta["nn_module_stack"] = {"m": ("L['self']._modules['m']", nn.Module)}
    found = only(sited(net.gm))
    assert (found.name, found.kind, found.source) == ("matmul_default", "matmul", "/src/net.py:7")
    assert found.module.endswith("m") and not found.second


def test_what_multiplies_nothing_is_no_product() -> None:
    graph = ByHand()
    x = graph.input("x", 2, 3)
    total = graph.call(aten.add.Tensor, graph.call(aten.mul.Tensor, x, x), x)
    assert not list(products_of(sited(graph.module(graph.call(aten.cat.default, [total, x]))), NOTHING))


def body_of_matmul() -> fx.GraphModule:
    return Matmul().gm


def running(target: Any, *args: Any) -> fx.GraphModule:
    """A graph that runs `body_of_matmul` by an operator: ``"body"`` among the arguments stands for it."""
    graph = ByHand()
    x, xs = graph.input("x", 2, 3), graph.input("xs", 4, 3, 5)
    named = {"x": x, "xs": xs, "body": graph.get_attr("body")}
    given = fx.node.map_aggregate(args, lambda value: named.get(value, value) if isinstance(value, str) else value)
    run = graph.call_function(target, tuple(given))
    return graph.module(run, body=body_of_matmul())


def test_a_scan_runs_its_body_once_a_slice() -> None:
    found = only(sited(running(torch.ops.higher_order.scan, "body", ["x"], ["xs"], ()), runs=2))
    assert found.flops == 2 * 4 * 60
    assert found.reason == "it runs in the body of scan, which is not looked into"
    empty = only(sited(running(torch.ops.higher_order.scan, "body", ["x"], [], ())))
    assert empty.flops == 60, "nothing tells how long it is"


def test_other_bodies_run_once() -> None:
    found = only(sited(running(tag_activation_checkpoint, "body", "x", "xs")))
    assert found.flops == 60 and found.reason.startswith("it runs in the body of tag_activation_checkpoint")


def autograd_function_apply(*_: Any) -> None:
    """By the name that torch's operator has."""


def test_bodies_of_a_custom_function_are_not_looked_into_but_named() -> None:
    graph = sited(running(autograd_function_apply, "body", "x"))
    assert not list(products_of(graph, NOTHING))
    assert list(opaque_bodies(graph)) == ["an autograd.Function in the model"]
    assert not list(opaque_bodies(sited(Matmul().gm)))


# ---------------------------------------------------------------- attention's second product


@pytest.mark.parametrize(
    ("moves", "weight", "second"),
    [([], False, True), (["cast", "view"], False, True), (["add"], False, False), ([], True, False)],
    ids=["straight", "after a cast and a view", "of a sum", "by a parameter"],
)
def test_the_product_after_a_softmax(moves: list[str], weight: bool, second: bool) -> None:
    graph = ByHand()
    x, y = graph.input("x", 2, 3), graph.input("y", 3, 5, state=weight)
    node = graph.call(aten.softmax.int, x, -1)
    for move in moves:
        if move == "cast":
            node = graph.call(aten.to.dtype, node, torch.float32)
        elif move == "view":
            node = graph.call(aten.view.default, node, [2, 3])
        else:
            node = graph.call(aten.add.Tensor, node, x)
    found = only(sited(graph.module(graph.call(aten.matmul.default, node, y))))
    assert found.second is second


# ---------------------------------------------------------------- why float


def test_a_product_whose_operands_have_sites_is_quantized() -> None:
    net = Matmul()
    graph = sited(net.gm)
    quantize(graph, net.product, "lhs", "rhs")
    found = only(graph)
    assert found.quantized and found.reason == ""


def test_one_operand_in_float_is_named() -> None:
    net = Matmul()
    graph = sited(net.gm)
    quantize(graph, net.product, "lhs")
    found = only(graph)
    assert not found.quantized and found.reason == "its rhs has no quantizer"
    assert only(sited(Matmul().gm)).reason == "its lhs and rhs has no quantizer"


def test_an_operand_that_is_no_float() -> None:
    assert only(sited(Matmul(torch.int64).gm)).reason == "its lhs holds torch.int64"


def test_an_operator_without_a_kind() -> None:
    graph = ByHand()
    x, y, z = graph.input("x", 2, 5), graph.input("y", 7, 2, 3), graph.input("z", 7, 3, 5)
    found = only(sited(graph.module(graph.call(aten.addbmm.default, x, y, z))))
    assert (found.kind, found.reason) == ("addbmm", "placement does not know addbmm")


def said(*reasons: str, where: str = "matmul_default", source: str = "/src/net.py:7") -> Plan:
    return plan(declined=tuple(FloatPlace(where=where, reason=reason, source=source) for reason in reasons))


@pytest.mark.parametrize(
    ("those", "expected"),
    [
        (said("a rule", "a rule", "another"), "a rule; another"),
        (said("its rhs: a rule", "its lhs: another"), "its rhs: a rule"),
        (said("its lhs: another"), "its lhs: another"),
        (said("a rule", where="matmul_7"), "its rhs has no quantizer"),
        (said("a rule", source="/src/net.py:8"), "its rhs has no quantizer"),
        (said("its rhs: of the line", where="elsewhere"), "of the line"),
        (said("by its key", where="matmul0_rhs", source=""), "by its key"),
    ],
    ids=[
        "once each",
        "of this operand",
        "of another operand alone",
        "of another operator",
        "of another line",
        "by line",
        "by key",
    ],
)
def test_the_plan_s_reason_for_an_operand_in_float(those: Plan, expected: str) -> None:
    """``lhs`` has a site, ``rhs`` has none."""
    net = Matmul()
    graph = sited(net.gm, those)
    quantize(graph, net.product, "lhs")
    assert only(graph, those).reason == expected
