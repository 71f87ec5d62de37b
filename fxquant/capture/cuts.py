"""Where Dynamo ends a graph inside of a forward, and where torch.export ends for the same reason."""

from __future__ import annotations

import linecache
import traceback
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # private; tried on 2.13

from fxquant.graph.frames import is_library

ONE_WAY = (
    "Write decisions with torch.where, which takes both ways, or torch.cond, and let numbers that are computed be "
    "tensors; or leave them to what calls the model."
)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A graph break: what follows is compiled in other graphs.

    Attributes:
        reason: Dynamo's, in a line.
        place: file and line, and the code there.
        decides: whether Python takes one way or another there, by the value of a tensor: no single graph can.
    """

    reason: str
    place: str
    decides: bool

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def cut_of(gm: fx.GraphModule) -> Cut | None:
    """Why a graph of Dynamo's ends where it does; None where its frame does.

    Private: Dynamo says it on the graph that it gives a backend; tried on 2.13.
    """
    found: Any = getattr(gm, "compile_subgraph_reason", None)
    if not getattr(found, "graph_break", False):
        return None
    reason = next(iter(str(found.reason).splitlines()), "")
    decides = reason.startswith("generic_jump")
    return Cut(
        reason="Python decides by the value of a tensor" if decides else reason.rstrip("."),
        place=_place([*found.user_stack]),
        decides=decides,
    )


def decision_of(error: BaseException) -> str | None:
    """The line that asks for a tensor's value, which ended a trace by torch.export; None for another error."""
    if not isinstance(error, GuardOnDataDependentSymNode):
        return None
    return _place(list(traceback.extract_tb(error.__traceback__)))


def _place(frames: list[traceback.FrameSummary]) -> str:
    """The innermost line of the user's: ``net.py:8, `if x.sum() > 0:```; without one, of whoever's."""
    if not frames:
        return ""
    frame = next((each for each in reversed(frames) if not is_library(each.filename)), frames[-1])
    line = frame.lineno or 0
    return f"{frame.filename}:{line}, `{linecache.getline(frame.filename, line).strip()}`"
