"""From placements on nodes to sites on owners."""

from __future__ import annotations

import dataclasses

from torch import fx

from fxquant.graph.frames import is_outside, user_line
from fxquant.graph.lift import Operand
from fxquant.graph.meta import region_of
from fxquant.graph.views import Bind
from fxquant.plan.placements import Placement
from fxquant.plan.plan import Edge, FloatPlace, LocalSite, Site
from fxquant.plan.positions import Positions, enclosing

_MODEL = "the model's forward"


class Naming:
    """Turns placements on nodes into sites on owners; ``may_own``: whether the model itself can be one."""

    def __init__(self, gm: fx.GraphModule, sites: dict[tuple[str, tuple[Edge, ...]], Site], may_own: bool) -> None:
        self.sites, self.may_own = sites, may_own
        self.positions = Positions(gm)
        self.root = next((enclosing(node, "")[0].path for node in gm.graph.nodes), "")
        self.taken: dict[str, set[str]] = {}  # names, by owner
        for site in sites.values():
            self.taken.setdefault(site.owner, set()).add(site.local.name)
        self.starts: dict[tuple[str, str | None], str] = {}
        for node in gm.graph.nodes:
            bind = Bind.of(node)
            if bind is not None:
                frame = enclosing(node, self.root)[-1]
                # Later binds in a frame are of modules whose forward was called by name, which begins no frame.
                self.starts.setdefault((frame.key, region_of(node)), bind.key)

    def add(self, placed: Placement, declined: list[FloatPlace]) -> None:
        first = placed.edges[0][0]
        owner = self._owner(placed.edges)
        if owner is None or self._is_of_repeated_module(placed):
            parts = self._parts(placed)
            for part in parts if len(parts) > 1 else ():
                self.add(part, declined)
            if len(parts) > 1:
                return
        if owner is None:
            declined.append(FloatPlace(where=first.name, reason=self._without_owner(first), source=user_line(first)))
            return
        key, path = owner
        edges = self.positions.edges(key, placed.edges)
        if any(is_outside(edge.path) for edge in edges):
            reason = f"its module is reached by another path than through {path or 'the model'}, which runs it"
            declined.append(FloatPlace(where=first.name, reason=reason, source=user_line(first)))
            return
        if (path, edges) in self.sites:
            return  # another call of the same module: one quantizer serves both
        taken = self.taken.setdefault(path, set())
        local = LocalSite(name=_name(edges[0], taken), role=placed.role, spec=placed.spec, edges=edges)
        taken.add(local.name)
        self.sites[path, edges] = Site(
            owner=path,
            local=local,
            reason=placed.reason,
            source=user_line(first),
            matrix=placed.matrix,
            shape=placed.shape,
        )

    def _without_owner(self, node: fx.Node) -> str:
        where = " → ".join(frame.path for frame in enclosing(node, self.root)[1:])
        if not where and not self.may_own:
            return (
                "the model is a ModuleDict or ModuleList, which may run all that it holds: put it into another module"
            )
        return f"a graph break or checkpoint lies between it and the start of {where or _MODEL}"

    def _is_of_repeated_module(self, placed: Placement) -> bool:
        """Whether calls of one module read the weight, maybe as many as its input is long: each has its own site."""
        owners = [self._owner((edge,)) for edge in placed.edges]
        return placed.role == "weight" and len({owner and owner[1] for owner in owners}) == 1 < len(set(owners))

    def _parts(self, placed: Placement) -> list[Placement]:
        """One placement for each owner: quantizers of their own, which see the same tensor and find the same range."""
        groups: dict[tuple[object, object], list[Operand]] = {}
        for edge in placed.edges:
            groups.setdefault((self._owner((edge,)), region_of(edge[0])), []).append(edge)
        return [dataclasses.replace(placed, edges=tuple(edges)) for edges in groups.values()]

    def _owner(self, operands: tuple[Operand, ...]) -> tuple[str, str] | None:
        """Call key and path of the innermost module whose frame starts in this graph and runs all the operators."""
        nodes = [node for node, _ in operands]
        regions = {region_of(node) for node in nodes}
        if len(regions) > 1:
            return None
        region = next(iter(regions))
        shared = set.intersection(*({frame.key for frame in enclosing(node, self.root)} for node in nodes))
        for frame in reversed(enclosing(nodes[0], self.root)):
            if frame.key in shared and (frame.key, region) in self.starts:
                return frame.key, self.starts[frame.key, region]
        return None


def _name(edge: Edge, taken: set[str]) -> str:
    """``weight`` where the owner itself runs the operator, else with the operator's place in it."""
    own = not edge.path and edge.ordinal == 0 and edge.kind in ("conv", "linear", "embedding", "lstm", "gru")
    if own and edge.operand not in taken:
        return edge.operand
    prefix = edge.path.replace(".", "_") + "_" if edge.path else ""
    name = f"{prefix}{edge.kind}{edge.ordinal}_{edge.operand}"
    while name in taken:
        name += "_"
    return name
