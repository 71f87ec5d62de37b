"""An operator's arguments by their names in its schema, wherever a node has them: in place, by keyword, left out."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class _Place:
    """Where one argument stands: its index (None: keyword only), whether it may be left out, and what it then is."""

    index: int | None
    optional: bool
    default: object


@functools.cache
def _places(op: torch._ops.OpOverload) -> dict[str, _Place]:
    found = {}
    for index, each in enumerate(op._schema.arguments):
        is_dtype = str(each.real_type) == "ScalarType" and each.default_value is not None  # a schema has its number
        optional = each.has_default_value() and not is_dtype
        found[each.name] = _Place(None if each.kwarg_only else index, optional, each.default_value)
    return found


def _place(node: fx.Node, name: str) -> _Place:
    if not isinstance(node.target, torch._ops.OpOverload):
        raise AssertionError(f"{node.name} calls {node.target}, which has no schema to read {name!r} by")
    place = _places(node.target).get(name)
    if place is None:
        raise AssertionError(f"{node.target} has no argument {name!r}: it has {', '.join(_places(node.target))}")
    return place


def argument(node: fx.Node, name: str) -> Any:
    """The argument of an operator's node that its schema calls ``name``, its default where the node leaves it out.

    A pass may write an operand in its place or by keyword, and both mean the same. AssertionError where the operator
    has no such argument, or the node lacks one that has no default, or a dtype for one.

    ``conv2d(x, w, bias=b)`` → ``argument(node, "bias")`` is ``b``, ``argument(node, "groups")`` is 1.
    """
    place = _place(node, name)
    if place.index is not None and place.index < len(node.args):
        return node.args[place.index]
    if name in node.kwargs:
        return node.kwargs[name]
    if not place.optional:
        raise AssertionError(f"{node.name} must have the argument {name!r} of {node.target}: it is not written")
    return place.default


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Gives a node another value of one argument, where the old one stands, else by keyword.

    What is left out and is to have its default stays left out.
    """
    place = _place(node, name)
    if place.index is not None and place.index < len(node.args):
        node.update_arg(place.index, value)
    elif name in node.kwargs or not (place.optional and _is_same(value, place.default)):
        node.update_kwarg(name, value)


def argument_at(node: fx.Node, index: int) -> Any:
    """`argument` by where it stands in the schema: operators of one kind call alike arguments differently."""
    return node.args[index] if index < len(node.args) else argument(node, name_at(node, index))


def name_at(node: fx.Node, index: int) -> str:
    """What the schema calls its argument number ``index``."""
    assert isinstance(node.target, torch._ops.OpOverload), f"{node.name} calls {node.target}, which has no schema"
    return list(_places(node.target))[index]


def operand(node: fx.Node, name: str) -> fx.Node:
    """An argument that is a node."""
    value = argument(node, name)
    assert isinstance(value, fx.Node), f"{name} of {node.name} must be a node: got {value!r}"
    return value


def has_argument(node: fx.Node, name: str) -> bool:
    """Whether the node is an operator's whose schema has an argument of this name."""
    return isinstance(node.target, torch._ops.OpOverload) and name in _places(node.target)


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments that a node writes, by name."""
    assert isinstance(node.target, torch._ops.OpOverload), f"{node.name} calls {node.target}, which has no schema"
    return {**dict(zip(_places(node.target), node.args, strict=False)), **node.kwargs}


def in_places(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A node's arguments with those in their places that are written by keyword and may stand there: args and kwargs.

    ``fake_quantize(x, scale=s, zero_point=z, quant_min=0, rounding="divide")`` → ``(x, s, z, 0), {"rounding": …}``.
    """
    assert isinstance(node.target, torch._ops.OpOverload), f"{node.name} calls {node.target}, which has no schema"
    args, kwargs = list(node.args), dict(node.kwargs)
    for name, place in list(_places(node.target).items())[len(args) :]:
        if place.index is None or name not in kwargs:
            break
        args.append(kwargs.pop(name))
    return tuple(args), kwargs


def _is_same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)
