"""Nodes written by hand in each way in which a pass may write them: in place, by keyword, with defaults left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

Op = torch._ops.OpOverload

# A value of each type of the schemas at hand, other than every default.
_VALUES: dict[str, Any] = {
    "float": 0.25,
    "bool": True,
    "str": "divide",
    "number": 3,
    "Optional[number]": 3,
    "Optional[int]": 7,
    "Optional[float]": 0.25,
    "Optional[str]": "world",
    "Optional[bool]": True,
    "List[int]": [5, 6],
    "Optional[List[int]]": [5, 6],
    "int": 11,
}


class Written:
    """A graph with one operator's node, whose tensors are placeholders named like the arguments."""

    def __init__(self, op: Op) -> None:
        self.op, self.graph = op, fx.Graph()
        self.given = {each.name: self._value(each) for each in op._schema.arguments}

    def _value(self, each: torch.Argument) -> Any:
        text = str(each.type)
        if text in ("Tensor", "Optional[Tensor]"):
            return self.graph.placeholder(each.name)
        if text == "List[Tensor]":
            return [self.graph.placeholder(f"{each.name}{i}") for i in range(2)]
        return _VALUES[text]

    def in_place(self) -> fx.Node:
        """All arguments where they stand in the schema."""
        only = [each.name for each in self.op._schema.arguments if each.kwarg_only]
        args = tuple(value for name, value in self.given.items() if name not in only)
        return self.graph.call_function(self.op, args, {name: self.given[name] for name in only})

    def by_keyword(self) -> fx.Node:
        """All arguments by keyword."""
        return self.graph.call_function(self.op, (), dict(self.given))

    def required(self) -> fx.Node:
        """Only what has no default, in place."""
        optional = [each.name for each in self.op._schema.arguments if each.has_default_value()]
        return self.graph.call_function(self.op, tuple(v for k, v in self.given.items() if k not in optional))

    def defaults(self) -> dict[str, Any]:
        """What a node of `required` means."""
        arguments = self.op._schema.arguments
        return {a.name: a.default_value if a.has_default_value() else self.given[a.name] for a in arguments}
