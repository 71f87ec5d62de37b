"""Constants of an exported graph: their names, their nodes, and what is read back."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from fxquant.passes.export.constants import constant, constant_value, held_name
from tests.passes.export.written import Written

VALUE = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    ("name", "held"), [("fc.weight", "fc__weight"), ("a.b.c", "a__b__c"), ("in@cat_1", "in__cat_1"), ("x", "x")]
)
def test_names_are_those_of_attributes(name: str, held: str) -> None:
    assert held_name(name) == held and held.isidentifier()


def test_a_constant_and_the_node_that_reads_it() -> None:
    g = Written()
    x = g.input(2, 3)
    node = g.held("fc.weight", VALUE)
    assert node.op == "get_attr" and node.target == "fc__weight" and torch.equal(g.gm.fc__weight, VALUE)
    assert "fc__weight" in dict(g.gm.named_buffers())
    value = node.meta["val"]
    assert value.shape == (2, 3) and value.dtype == torch.float32 and value.fake_mode is x.meta["val"].fake_mode
    assert torch.equal(constant_value(g.gm, node), VALUE)


def test_a_name_that_is_taken_gets_another() -> None:
    g = Written()
    g.input(2, 3)
    nodes = [g.held("w", VALUE + index) for index in range(3)]
    assert [node.target for node in nodes] == ["w", "w_", "w__"]
    for index, node in enumerate(nodes):
        assert torch.equal(constant_value(g.gm, node), VALUE + index)
    assert g.held("graph", VALUE).target == "graph_", "what the module has itself stays"


def test_a_view_is_stored_as_it_reads() -> None:
    g = Written()
    g.input(2, 3)
    assert g.held("w", VALUE.t()).meta["val"].stride() == (2, 1)
    assert g.gm.w.is_contiguous() and torch.equal(g.gm.w, VALUE.t())


def test_the_mode_of_values_comes_from_around() -> None:
    """From the node that is named, or from what that reads."""
    g = Written()
    x = g.input(2, 3)
    plain = g.graph.call_function(torch.ops.aten.neg.default, (x,))
    assert constant(g.gm, "w", VALUE, plain).meta["val"].fake_mode is x.meta["val"].fake_mode


def test_a_constant_deep_in_a_module() -> None:
    root = nn.Module()
    root.add_module("fc", nn.Linear(3, 2))
    gm = fx.GraphModule(root, fx.Graph())
    gm.fc = root.fc
    found = constant_value(gm, gm.graph.get_attr("fc.weight"))
    assert torch.equal(found, root.fc.weight) and not found.requires_grad


def test_what_is_no_tensor_is_a_bug_of_ours() -> None:
    gm = fx.GraphModule({}, fx.Graph())
    gm.body = fx.GraphModule({}, fx.Graph())
    with pytest.raises(AssertionError, match=r"^body must be a tensor: got GraphModule"):
        constant_value(gm, gm.graph.get_attr("body"))
