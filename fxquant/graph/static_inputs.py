"""What AOTAutograd reads off a graph of Dynamo's: which inputs stay at their address, and where all come from.

Without it no input is known to be a parameter or buffer: CUDA graphs would copy each of them in every step, and refuse
a graph that updates a buffer. All of it is private to torch; tried on 2.13 and 2.15.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

_GRAPH = "dynamo_compile_id"  # in the meta of a graph that Dynamo made


def keep_sources(new: fx.Node, old: fx.Node) -> None:
    """A placeholder that takes the place of another in a graph that stands for the other's."""
    source: Any = getattr(old, "_dynamo_source", None)
    vars(new).update(_dynamo_source=source)
    new.meta["tensor_dict"] = old.meta.get("tensor_dict", {})


def without_source(new: fx.Node) -> None:
    """A placeholder that no value of the user's comes through."""
    vars(new).update(_dynamo_source=None)
    new.meta["tensor_dict"] = {}


def is_of_dynamo(gm: fx.GraphModule) -> bool:
    """Whether AOTAutograd may look there; a graph of somebody else's has nothing to keep."""
    return _GRAPH in gm.meta


def stand_for(new: fx.GraphModule, old: fx.GraphModule, sources: Mapping[str, Any]) -> None:
    """A graph that AOTAutograd is given in the place of Dynamo's; ``sources`` by the names of its attributes."""
    vars(new).update(_param_name_to_source=dict(sources))
    new.meta[_GRAPH] = old.meta[_GRAPH]


def sources_of(gm: fx.GraphModule) -> dict[str, Any]:
    """The sources of a graph's attributes, by their names."""
    return dict(getattr(gm, "_param_name_to_source", {}))
