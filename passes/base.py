"""What a pass is: a frozen dataclass whose fields are its options, run over a graph and its nested bodies."""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxquant.graph.bodies import all_graphs
from fxquant.graph.fakes import memoized
from fxquant.passes.invariants import check_invariants
from fxquant.support.digest import source_digest

VERSION = "1"


@dataclass(frozen=True, kw_only=True)
class Decline:
    """A place where a pass matched but could not act, and why."""

    pass_name: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.pass_name} declined {self.node}: {self.reason}"


@dataclass
class PassResult:
    """What a pass did. ``modified`` is true exactly when the graph changed."""

    modified: bool = False
    rewrites: int = 0
    declines: list[Decline] = field(default_factory=list)
    seconds: float = 0.0

    def __iadd__(self, other: PassResult) -> PassResult:
        self.modified |= other.modified
        self.rewrites += other.rewrites
        self.declines += other.declines
        self.seconds += other.seconds
        return self


@dataclass(frozen=True, kw_only=True)
class Pass(abc.ABC):
    """One transform. Subclasses write `rewrite`, which edits a graph and its nested bodies.

    A pass that finds nothing leaves the graph untouched, and a second run finds nothing.
    """

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Rewrites ``gm`` in place, invariants checked before and after."""
        return run_all((self,), gm)

    @abc.abstractmethod
    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Edits the graphs and returns in how many places; declines go to ``result``."""

    @property
    def name(self) -> str:
        """The class name: what reports call the pass."""
        return type(self).__name__

    def decline(self, result: PassResult, node: fx.Node, reason: str) -> None:
        """Records that ``node`` was left alone."""
        result.declines.append(Decline(pass_name=self.name, node=node.name, reason=reason))

    def uuid(self) -> str:
        """Cache key of what the pass would do: its name, options, and the sources of the package."""
        fields = {f.name: _stable(getattr(self, f.name)) for f in dataclasses.fields(self) if f.repr}
        return f"{self.name}({fields})-{VERSION}-{source_digest()}"


def _stable(value: Any) -> str:
    """``repr`` with the members of sets in order: theirs changes from process to process."""
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(map(_stable, value)))}}}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f"{f.name}={_stable(getattr(value, f.name))}" for f in dataclasses.fields(value)]
        return f"{type(value).__name__}({', '.join(fields)})"
    return repr(value)


def run_all(passes: Iterable[Pass], gm: fx.GraphModule) -> PassResult:
    """Runs passes in order; the sum of what they did.

    Between two passes only the graphs are right: Python code is written behind the last one, once.
    """
    started = time.perf_counter()
    total = PassResult()
    with memoized():
        for each in passes:
            total += _edit(each, gm)
    if total.modified:
        for module in all_graphs(gm):
            module.recompile()
    total.seconds = time.perf_counter() - started
    return total


def _edit(each: Pass, gm: fx.GraphModule) -> PassResult:
    """Runs one pass and checks its work; the code of what it changed is not written yet."""
    for module in all_graphs(gm):
        check_invariants(module, f"before {each.name}")
    result = PassResult()
    result.rewrites = each.rewrite(gm, result)
    result.modified = result.rewrites > 0
    if result.modified:
        for module in all_graphs(gm):
            module.graph.lint()
            check_invariants(module, f"after {each.name}")
    return result
