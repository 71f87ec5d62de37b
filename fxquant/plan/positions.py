"""From a plan's edges to the operators of a graph in hand, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import fx

from fxquant.graph.bodies import execution_order
from fxquant.graph.frames import Frame, frames, normalize_path, own_line, relative, root_path
from fxquant.graph.kinds import kind_of
from fxquant.graph.lift import Operand
from fxquant.graph.views import Bind
from fxquant.plan.plan import Edge, LocalSite
from fxquant.plan.site_lists import registered
from fxquant.targets.profile import PRODUCT_KINDS

# Of an operator: (its owner's call, the module that runs it as seen from there, kind, ordinal).
Position = tuple[str, str, str, int]
Place = tuple[str, str, str]  # the same of all operators of a kind that one module runs in one call


@dataclass(frozen=True, kw_only=True)
class BoundSite:
    """A local site found in a graph: its operands there, its mode, and the nodes that hold its state.

    ``owner`` is the owner's path below the compiled frame: the plan's own where the whole model was captured.
    ``group`` and ``before`` are as in `fxquant.ops.marks.bind`, ``apart`` as in `Missing`.
    """

    site: LocalSite
    owner: str
    edges: tuple[Operand, ...]
    mode: int
    state: tuple[fx.Node, ...]
    bind: fx.Node
    group: str | None = None
    before: bool = False
    apart: bool = False

    @property
    def key(self) -> str:
        """The site's key as seen from the compiled frame."""
        return f"{self.owner}.{self.site.name}".lstrip(".")


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A bound site none of whose operators are in the graph; ``key`` as that of a `BoundSite`.

    ``apart``: operators of it are in another graph than the start of its owner's frame: in a checkpointed body.
    ``others``: whether the graph has operators in their place that were not there when the model was prepared.
    """

    site: LocalSite
    key: str
    bind: fx.Node
    apart: bool = False
    others: bool = False


def tell_calls_apart(gm: fx.GraphModule) -> None:
    """Gives every call that begins with a bind a key of its own in ``nn_module_stack``.

    Dynamo numbers calls by the expression that reached the module: two ways to it, and two calls have one key.
    """
    begun: dict[str, Bind] = {}
    current: dict[str, str] = {}
    for node in execution_order(gm):
        stack = node.meta.get("nn_module_stack")
        if not stack:
            continue
        bind = Bind.of(node)
        if bind is not None:
            key = next(reversed(stack))
            if begun.setdefault(key, bind) is not bind and begun[key].key == bind.key:
                current[key] = f"{current.get(key, key)}+"
        if not current.keys().isdisjoint(stack):
            node.meta["nn_module_stack"] = {current.get(key, key): module for key, module in stack.items()}


def enclosing(node: fx.Node, root: str) -> tuple[Frame, ...]:
    """The calls around a node with the compiled frame itself first, under the key ``""``."""
    return (Frame("", root), *frames(node))


def modules_around(
    gm: fx.GraphModule, classes: Mapping[str, type] = MappingProxyType({})
) -> Callable[[fx.Node], tuple[tuple[str, Any], ...]]:
    """Gives, for a node, path and class of each module around it, outermost first; the model itself is ``""``.

    Where `prepare` has put marks, they hold the paths; a graph that begins inside a module has no other way to know.
    ``classes`` has the class of that module, by path.
    """
    root = root_path(gm.graph)
    marked: dict[str, str] = {}
    for node in gm.graph.nodes:
        bind = Bind.of(node)
        if bind is not None:
            marked.setdefault(enclosing(node, root)[-1].key, bind.key)
    base = marked.get("", "")

    def around(node: fx.Node) -> tuple[tuple[str, Any], ...]:
        found: list[tuple[str, Any]] = [("", None)] + ([(base, classes.get(base))] if base else [])
        stack = node.meta.get("nn_module_stack") or {}
        for key, (path, kind) in stack.items():
            below = relative(normalize_path(path), root)
            if path:
                found.append((marked.get(key) or ".".join(filter(None, (base, below))), kind))
        return tuple(found)

    return around


def positions(gm: fx.GraphModule) -> dict[Position, fx.Node]:
    """Every operator that placement knows, under its position in each call around it."""
    return {(*place, ordinal): node for place, nodes in runs(gm).items() for ordinal, node in enumerate(nodes)}


def runs(gm: fx.GraphModule) -> dict[Place, list[fx.Node]]:
    """The operators of each kind that a module runs in each call around it, in order."""
    root = root_path(gm.graph)
    found: dict[Place, list[fx.Node]] = {}
    for node in execution_order(gm):
        kind = kind_of(node)
        if kind is None:
            continue
        around = enclosing(node, root)
        for frame in around:
            found.setdefault((frame.key, relative(around[-1].path, frame.path), kind.name), []).append(node)
    return found


class Positions:
    """The operators of a graph as edges of the calls around them."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.runs = runs(gm)
        self._lines = {place: tuple(map(own_line, nodes)) for place, nodes in self.runs.items()}
        self._places = {
            (p[0], node): (p, number) for p, nodes in self.runs.items() for number, node in enumerate(nodes)
        }

    def edges(self, call: str, operands: tuple[Operand, ...]) -> tuple[Edge, ...]:
        """Operands as edges of one call."""
        edges = []
        for node, operand in operands:
            place, ordinal = self._places[call, node]
            _, path, kind = place
            lines = self._lines[place]
            edges.append(Edge(path=path, kind=kind, ordinal=ordinal, operand=operand, lines=lines))
        return tuple(edges)

    def find(self, call: str, edge: Edge) -> fx.Node | None:
        """The operator of an edge in one call, None where the call does not run it."""
        place = (call, edge.path, edge.kind)
        nodes = self.runs.get(place, [])
        number = matching(edge.lines, self._lines.get(place, ())).get(edge.ordinal)
        return None if number is None else nodes[number]

    def runs_others(self, call: str, edge: Edge, planned: Set[str]) -> bool:
        """Whether a call that does not run an edge's operator runs ones in its place that were not there to plan.

        Those of its kind on other lines; and where it is a product, products of no ``planned`` kind.
        """
        if self.find(call, edge) is not None:
            return False
        there, here = _comparable(edge.lines, self._lines.get((call, edge.path, edge.kind), ()))
        others = PRODUCT_KINDS - planned if edge.kind in PRODUCT_KINDS else ()
        return any(line and line not in there for line in here) or any(
            (call, edge.path, kind) in self.runs for kind in others
        )


def matching(planned: tuple[str, ...], found: tuple[str, ...]) -> dict[int, int]:
    """Ordinals of operators when they were planned → in a graph.

    Those that are written on one line, in order: evaluation may leave out some, and run others. The same ordinals where
    no line is known, as torch's own modules run theirs, or where there are as many and no line says otherwise: what is
    then on other lines is another branch of the same.
    """
    same = {number: number for number in range(len(found))}
    if not (any(planned) and any(found)):
        return same
    there, here = map(_numbered, _comparable(planned, found))
    by_line = {number: here[line] for number, line in enumerate(there) if line in here}
    return same if len(planned) == len(found) and by_line.items() <= same.items() else by_line


def _comparable(planned: tuple[str, ...], found: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The lines as both graphs know them: an exported one has the calls in forward, not what the callees run."""
    part = -1 if any(" " in line for line in found) else 0
    there, here = ([line.split(" ")[part] for line in lines] for lines in (planned, found))
    return tuple(there), tuple(here)


def _numbered(lines: tuple[str, ...]) -> dict[tuple[str, int], int]:
    """A line and how often it came before → its place, in order."""
    seen: Counter[str] = Counter()
    numbered: dict[tuple[str, int], int] = {}
    for place, line in enumerate(lines):
        numbered[line, seen[line]] = place
        seen[line] += 1
    return numbered


def bound_sites(gm: fx.GraphModule) -> tuple[list[BoundSite], list[Missing]]:
    """The sites that the bind nodes of a graph and its nested bodies stand for, outermost owners first."""
    index = Positions(gm)
    root = root_path(gm.graph)
    found: list[BoundSite] = []
    missing: list[Missing] = []
    binds = [bind for node in execution_order(gm) if (bind := Bind.of(node)) is not None]
    binds.sort(key=lambda bind: len(enclosing(bind.node, root)))
    taken: set[tuple[fx.Node, str]] = set()
    for bind in binds:
        frame = enclosing(bind.node, root)[-1]
        rest = list(bind.state)
        kinds = {edge.kind for site in registered(bind.key) for edge in site.edges}
        for site, mode in zip(registered(bind.key), bind.modes, strict=True):
            mine = tuple(rest.pop(0) for _ in site.spec.range.names(site.spec))
            operands, apart = [], False
            for edge in site.edges:
                node = index.find(frame.key, edge)
                if node is not None and node.graph is bind.node.graph and (node, edge.operand) not in taken:
                    operands.append((node, edge.operand))
                apart |= node is not None and node.graph is not bind.node.graph
            taken.update(operands)
            owner = relative(frame.path, root)
            if operands:
                found.append(
                    BoundSite(
                        site=site,
                        owner=owner,
                        edges=tuple(operands),
                        mode=int(mode),
                        state=mine,
                        bind=bind.node,
                        group=bind.group,
                        before=bind.before,
                        apart=apart,
                    )
                )
            else:
                others = any(index.runs_others(frame.key, edge, kinds) for edge in site.edges)
                key = f"{owner}.{site.name}".lstrip(".")
                missing.append(Missing(site=site, key=key, bind=bind.node, apart=apart, others=others))
    return found, missing
