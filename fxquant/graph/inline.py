"""One engine that traces arithmetic to a graph, once for each form of operands, and pastes such graphs into others.

::

    y = op(x, s)           →           a = div(x, s);  y = round(a)

`traced` gives a body, `Bodies` remembers those of one graph, `paste` writes one at the insertion point.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx  # private; tried on 2.11, 2.13 and 2.15

Table = Mapping[Any, Callable[..., Any]]

# What nodes take over from the one whose place they take: where it comes from, and what the partitioner reads, by whose
# tags a node is recomputed or stands in a checkpoint region.
KEPT = ("stack_trace", "nn_module_stack", "original_aten", "partitioner_tag", "recompute", "ac_graph_id")


def traced(arithmetic: Callable[..., Any], operands: Sequence[Tensor], table: Table | None = None) -> fx.Graph:
    """The ATen graph of ``arithmetic`` on fake tensors, under their mode.

    Args:
        arithmetic: of tensors, by position.
        operands: at least one is fake.
        table: operator → what is traced instead of it.
    """
    mode = next((each.fake_mode for each in operands if hasattr(each, "fake_mode")), None)
    assert mode is not None, f"{arithmetic} reads no fake tensor"
    with mode:
        return make_fx(arithmetic, decomposition_table=None if table is None else dict(table))(*operands).graph


def of_operands(
    function: Callable[..., Any],
    args: Sequence[Any],
    named: Mapping[str, Any],
    is_operand: Callable[[Any], bool],
) -> Callable[..., Any]:
    """``function(*args, **named)`` as a function of the operands among ``args``; the others stay what they are."""

    def on_operands(*operands: Tensor) -> Any:
        given = iter(operands)
        return function(*(next(given) if is_operand(each) else each for each in args), **named)

    return on_operands


class Bodies:
    """Traced graphs by their form. Tracing is what costs, so calls of one form share one: layers of one shape do."""

    def __init__(self, table: Table | None = None) -> None:
        self.table = table
        self._known: dict[tuple[object, ...], fx.Graph] = {}

    def of(self, key: Hashable, arithmetic: Callable[..., Any], operands: Sequence[fx.Node]) -> fx.Graph:
        """The graph of ``arithmetic`` on the values of ``operands``; ``key`` holds all else that it depends on."""
        values = [node.meta["val"] for node in operands]
        form = key, *map(_form, values)
        if form not in self._known:
            self._known[form] = traced(arithmetic, values, self.table)
        return self._known[form]


def _form(value: Tensor) -> tuple[object, ...]:
    # As text, by which symbols of one name are equal: a SymInt cannot be hashed.
    return value.dtype, value.device, str(tuple(value.shape)), str(value.stride())


def paste(
    graph: fx.Graph,
    body: fx.Graph,
    operands: Sequence[Any],
    *,
    origin: fx.Node | None = None,
    copied: Callable[[fx.Node, fx.Node], None] | None = None,
) -> Any:
    """Writes a body's nodes at the insertion point; returns what its output holds, in their terms.

    Args:
        graph: that they are written into.
        body: with a placeholder for each operand.
        operands: nodes of ``graph``, or constants.
        origin: whose tags the new nodes take over (`KEPT`).
        copied: told of each node of the body, and of its copy.
    """
    names: dict[fx.Node, Any] = dict(zip(body.find_nodes(op="placeholder"), operands, strict=True))
    for old in body.nodes:
        if old.op == "output":
            return fx.map_arg(old.args[0], names.__getitem__)
        if old.op == "placeholder":
            continue
        names[old] = graph.node_copy(old, names.__getitem__)
        if origin is not None:
            keep_tags(names[old], origin)
        if copied is not None:
            copied(old, names[old])
    raise AssertionError("a body ends in its output")


def keep_tags(node: fx.Node, origin: fx.Node) -> None:
    """Tags a node as the one in whose place it stands."""
    node.meta.update({key: origin.meta[key] for key in KEPT if key in origin.meta})
