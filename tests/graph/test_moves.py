"""The sets of operators that move values, member by member, and the questions that are asked of nodes."""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx

from fxquant.graph import moves
from fxquant.graph.moves import MOVES, is_agnostic, is_moving, passes_values, unmoved
from fxquant.passes.captured.hoist_views import _VIEWS

aten, prims = torch.ops.aten, torch.ops.prims

# What each reader looked for when it had a list of its own.
MEMBERS: dict[str, str] = {
    "AGNOSTIC": "view reshape _unsafe_view flatten unflatten squeeze unsqueeze permute transpose t mT contiguous clone "
    "expand alias max_pool1d max_pool2d max_pool3d upsample_nearest1d upsample_nearest2d",
    "PADS": "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
    "replication_pad2d replication_pad3d",
    "DROPOUT": "dropout feature_dropout",
    "ZEROS": "zeros zeros_like new_zeros",
    "COPYING": "contiguous clone",
    "RESHAPING": "view reshape flatten unflatten _unsafe_view",
    "PERMUTING": "transpose permute t mT",
    "REPEATING": "expand upsample_nearest1d upsample_nearest2d",
    "PARTING": "split split_with_sizes chunk slice select unbind",
    "CASTS": "to _to_copy type_as",
    "KEEPING": "clone contiguous alias detach",
    "TURNING": "t transpose permute",
    "SHAPING": "view reshape _unsafe_view expand squeeze unsqueeze",
    "CASTING": "_to_copy convert_element_type",
    "ALL_ONCE": "view reshape _unsafe_view permute transpose t squeeze unsqueeze alias clone",
    "MOVING": "view reshape _unsafe_view permute transpose t expand unsqueeze squeeze alias detach clone select slice "
    "unbind split split_with_sizes flatten unflatten convert_element_type _to_copy",
}


@pytest.mark.parametrize("name", MEMBERS)
def test_members(name: str) -> None:
    found = getattr(moves, name)
    assert {op.__name__ for op in found} == set(MEMBERS[name].split())
    assert len(found) == len(MEMBERS[name].split())


def test_every_set_is_pinned() -> None:
    sets = {name for name, value in vars(moves).items() if isinstance(value, frozenset)}
    assert sets == set(MEMBERS)


def test_operators_are_those_of_the_names() -> None:
    for op in MOVES:
        namespace = prims if op is prims.convert_element_type else aten
        assert getattr(namespace, op.__name__) is op


def test_hoisted_views_are_in_the_table() -> None:
    assert {op.overloadpacket for op in _VIEWS} <= moves.RESHAPING | moves.PERMUTING | moves.moves("ones")


@pytest.mark.parametrize("op", [aten.alias, aten.clone, aten.contiguous, aten.detach, aten.t, aten.mT, aten.squeeze])
def test_moved_values_are_those_of_the_operand(op: Any) -> None:
    x = torch.randn(3, 1, 2)[:, 0]
    assert torch.equal(op(x).flatten().sort().values, x.flatten().sort().values)


@dataclass(frozen=True)
class Case:
    """A call on ``x``, and whether it is agnostic, passes values in deployment, and moves in a joint graph."""

    name: str
    op: Any
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    agnostic: bool = False
    passes: bool = False
    moving: bool = False

    def __str__(self) -> str:
        return self.name

    def node(self) -> fx.Node:
        graph = fx.Graph()
        return graph.call_function(self.op, (graph.placeholder("x"), *self.args), dict(self.kwargs))


BOTH = {"agnostic": True, "passes": True}
ALL = {**BOTH, "moving": True}
CASES = [
    Case("view", aten.view.default, ([2, 3],), **ALL),
    Case("mT", aten.mT.default, **BOTH),
    Case("max pool", aten.max_pool2d.default, ([2, 2],), **BOTH),
    Case("relu", aten.relu.default),
    Case("detach", aten.detach.default, moving=True),
    Case("item", operator.getitem, (0,), moving=True),
    Case("addition", operator.add, (1,)),
    Case("part", aten.slice.Tensor, (0, 1, 5), moving=True),
    Case("whole slice", aten.slice.Tensor, (0, 0, sys.maxsize), **ALL),
    Case("slice without ends", aten.slice.Tensor, (1,), **ALL),
    Case("slice by keyword", aten.slice.Tensor, (1,), (("start", 1),), moving=True),
    Case("every other", aten.slice.Tensor, (0, 0, sys.maxsize, 2), moving=True),
    Case("zeros around", aten.constant_pad_nd.default, ([1, 1],), **BOTH),
    Case("given zeros around", aten.constant_pad_nd.default, ([1, 1], 0.0), **BOTH),
    Case("ones around", aten.constant_pad_nd.default, ([1, 1], 1.0)),
    Case("ones around, by keyword", aten.constant_pad_nd.default, ([1, 1],), (("value", 1.0),)),
    Case("pad", aten.pad.default, ([1, 1],), **BOTH),
    Case("pad with ones", aten.pad.default, ([1, 1], "constant", 1.0)),
    Case("pad with ones, by keyword", aten.pad.default, ([1, 1],), (("value", 1.0),)),
    Case("reflected", aten.reflection_pad1d.default, ([1, 1],), **BOTH),
    Case("dropout on", aten.dropout.default, (0.5, True), passes=True),
    Case("dropout off", aten.dropout.default, (0.5, False), **BOTH),
    Case("dropout off, by keyword", aten.dropout.default, (), (("p", 0.5), ("train", False)), **BOTH),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nodes(case: Case) -> None:
    node = case.node()
    assert is_agnostic(node) == case.agnostic
    assert passes_values(node) == case.passes
    assert is_moving(node) == case.moving


def test_inputs_move_nothing() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert not (is_agnostic(x) or passes_values(x) or is_moving(x))


def test_unmoved_is_the_first_that_something_computes() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(aten.relu.default, (x,))
    dropped = graph.call_function(aten.dropout.default, (y, 0.5, True))
    turned = graph.call_function(aten.t.default, (graph.call_function(aten.view.default, (dropped, [2, 3])),))
    assert unmoved(turned) is dropped
    assert unmoved(turned, passes_values) is y
    assert unmoved(y) is y
