"""What a pass is: a frozen dataclass whose fields are its options, run over a graph and its nested bodies."""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import fx

from fxquant.errors import InvariantViolated
from fxquant.graph.fakes import memoized
from fxquant.passes.changes import Snapshot
from fxquant.passes.invariants import check_invariants, check_made, check_values
from fxquant.passes.stages import Stage, enter, misfit, operators, stage_of
from fxquant.support.digest import source_digest

T = TypeVar("T")

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
    """What a pass did. ``modified`` is true exactly when the graph changed.

    ``products``: what a pass made beside its edits, as the list of what it froze; `product` finds one by its class.
    """

    modified: bool = False
    rewrites: int = 0
    declines: list[Decline] = field(default_factory=list)
    seconds: float = 0.0
    products: list[object] = field(default_factory=list)

    def __iadd__(self, other: PassResult) -> PassResult:
        self.modified |= other.modified
        self.rewrites += other.rewrites
        self.declines += other.declines
        self.seconds += other.seconds
        self.products += other.products
        return self

    def product(self, kind: type[T]) -> T:
        """The one product of a class; an AssertionError where no pass made one, or several did."""
        (found,) = (each for each in self.products if isinstance(each, kind))
        return found


@dataclass(frozen=True, kw_only=True)
class Pass(abc.ABC):
    """One transform. Subclasses write `rewrite`, which edits a graph and its nested bodies, and name their ``stages``.

    A pass that finds nothing leaves the graph untouched, and a second run finds nothing.
    """

    stages: ClassVar[tuple[Stage, ...]]

    def run(self, gm: fx.GraphModule, stage: Stage | None = None) -> PassResult:
        """Rewrites ``gm`` in place, see `run_all`."""
        return run_all((self,), gm, stage)

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


def run_all(passes: Iterable[Pass], gm: fx.GraphModule, stage: Stage | None = None) -> PassResult:
    """Runs passes in order; the sum of what they did.

    ``stage`` is that of ``gm`` from here on, for graphs whose maker did not say it (`fxquant.passes.stages`).
    Between two passes only the graphs are right: Python code is written after the last one, once.

    Raises:
        InvariantViolated: a pass was given a graph of another stage, left one that breaks the rules of its own, or
            reported another thing than it did.
    """
    started = time.perf_counter()
    if stage is not None:
        enter(gm, stage)
    total = PassResult()
    checked: _Checked | None = None
    with memoized():
        for each in passes:
            result, checked = _edit(each, gm, checked)
            total += result
    if total.modified and checked is not None:
        for module in checked.snapshot.graphs:
            module.recompile()
    total.seconds = time.perf_counter() - started
    return total


@dataclass(frozen=True)
class _Checked:
    """A graph that satisfies a stage, and the operators of fxquant in it."""

    stage: Stage
    snapshot: Snapshot
    operators: frozenset[Any]


def _edit(each: Pass, gm: fx.GraphModule, checked: _Checked | None) -> tuple[PassResult, _Checked]:
    """Runs one pass and checks its work; the code of what it changed is not written yet."""
    before = _admit(each, gm, checked)
    result = PassResult()
    result.rewrites = each.rewrite(gm, result)
    snapshot = Snapshot(gm, before.stage.owns)
    change = before.snapshot.difference(snapshot)
    result.modified = change is not None
    if result.modified != (result.rewrites > 0):
        done = f"changed {change}" if change else "changed nothing"
        raise InvariantViolated(f"{each.name} must report its rewrites: got {result.rewrites}, and it {done}.")
    if not result.modified:
        return result, before
    when, known = f"after {each.name}", frozenset(before.snapshot.nodes)
    for module in snapshot.graphs:
        module.graph.lint()
    check_invariants(snapshot.nodes, when)
    check_values(gm, known, when)
    found = operators(snapshot.nodes)
    check_made(found, before.operators, before.stage, when)
    return result, _Checked(before.stage, snapshot, found)


def _admit(each: Pass, gm: fx.GraphModule, checked: _Checked | None) -> _Checked:
    """The graph as the pass finds it, which must be of one of its stages; ``checked`` as the pass before left it."""
    wanted = {stage.name: stage for stage in each.stages}
    if checked is not None and checked.stage.name in wanted:
        return checked
    known = stage_of(gm)
    stage = wanted.get(known.name, each.stages[0]) if known else each.stages[0]
    snapshot = Snapshot(gm, stage.owns)
    found = operators(snapshot.nodes)
    why = misfit(gm, found, stage)
    if why is not None:
        raise InvariantViolated(f"{each.name} must run on the {' or '.join(wanted)} graph: got {why}.")
    when = f"before {each.name}"
    check_invariants(snapshot.nodes, when)
    if stage.is_ours:
        check_values(gm, (), when)
    return _Checked(stage, snapshot, found)
