"""What a pass is: a frozen dataclass whose fields are its options, run over a graph and its nested bodies."""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import operator
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxquant.graph import packet
from fxquant.passes.fakes import computed, memoized
from fxquant.passes.invariants import check_invariants
from fxquant.resolve import nested_graphs

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


@functools.cache
def source_digest() -> str:
    """Digest of every source file of fxquant: compiled code made by other sources is never reused."""
    root = Path(__file__).parent.parent  # as imported, through the link fxquant/passes
    found = hashlib.sha256(torch.__version__.encode())
    for folder in (root, *(root / name for name in ("numerics", "ops", "kernels", "passes"))):
        for path in sorted(folder.glob("*.py")):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def all_graphs(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """``gm`` and the nested bodies of its operators."""
    yield gm
    for node in gm.graph.nodes:
        if node.op == "call_function":
            for body in nested_graphs(gm, node):
                yield from all_graphs(body)


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


def call(graph: fx.Graph, op: Any, *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
    """A new call_function node at the insertion point, with ``val`` computed and the origin of ``like``."""
    node = graph.call_function(op, args, kwargs)
    for key in ("nn_module_stack", "stack_trace", "region"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    mode = next((v.fake_mode for v in _tensors((values, like.meta.get("val"))) if hasattr(v, "fake_mode")), None)
    if mode is None:
        raise AssertionError(f"{op} has no fake operand to compute its value from")
    node.meta["val"] = computed(mode, op, *values)
    return node


def item(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    """``node[index]`` of an op with several results."""
    got = graph.call_function(operator.getitem, (node, index))
    got.meta.update({k: v for k, v in node.meta.items() if k != "val"}, val=node.meta["val"][index])
    return got


def _tensors(values: Any) -> list[torch.Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, torch.Tensor)]


def drop_dead_nodes(graph: fx.Graph) -> None:
    """Dead code elimination that keeps mutations."""
    graph.eliminate_dead_code(lambda node: node.is_impure() or mutates(node))


def mutates(node: fx.Node) -> bool:
    """Whether a node writes into one of its operands."""
    if packet(node) in (torch.ops.aten.batch_norm, torch.ops.aten.instance_norm):
        return True  # of the running statistics, which their schemas keep silent about
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
