"""Which sites of a plan a compiled graph runs: known at run time only, since instances of a class share graphs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxquant.graph.meta import site_of, sites_served
from fxquant.passes.captured.site_nodes import Insertion
from fxquant.plan.plan import Role
from fxquant.prepared.quantizer import quantizers
from fxquant.prepared.root import require_plan


@dataclass(frozen=True, kw_only=True)
class GraphSite:
    """The sites of one fake-quant node as its graph names them, the quantizer's own first.

    ``state`` is the graph input that holds the first one's minimum, None for a range that is not kept.
    """

    labels: tuple[str, ...]
    role: Role
    state: int | None

    @classmethod
    def of(cls, node: fx.Node, placeholders: Sequence[fx.Node]) -> GraphSite | None:
        """The sites of a fake-quant node, also those that it stands for; None where the model calls it itself."""
        site = site_of(node)
        if not isinstance(site, Insertion):
            return None
        state = placeholders.index(site.state[0]) if site.state and site.state[0] in placeholders else None
        return cls(labels=(site.label, *sites_served(node)), role=site.role, state=state)


class SiteKeys:
    """The keys of a prepared model's plan, and what tells of each that a graph runs it.

    That is an input of every graph that binds the site: its stored minimum or, where none is kept, a parameter of its
    owner. A graph names its sites from its own frame down, so that one label may be the end of several keys.
    """

    def __init__(self, model: nn.Module, caller: str) -> None:
        held = dict(quantizers(model))
        self._by_state = {id(q.evidence): key for key, q in held.items() if q.stateful}
        self._evidence: dict[str, set[int]] = {
            site.key: {id(held[site.key].evidence)}
            if held[site.key].stateful
            else set(map(id, model.get_submodule(site.owner).parameters()))
            for site in require_plan(model, caller).sites
        }
        self._ending = functools.cache(self._keys_that_end)

    def resolve(self, site: GraphSite, inputs: Sequence[Any]) -> tuple[str, ...]:
        """The plan's keys of a graph's site in a run on ``inputs``; the label of one that nothing tells apart."""
        given = set(map(id, inputs))
        keys = [self._of_label(label, given) for label in site.labels]
        if site.state is not None:
            keys[0] = self._by_state.get(id(inputs[site.state]), keys[0])
        return tuple(dict.fromkeys(keys))

    def _of_label(self, label: str, given: set[int]) -> str:
        ending = self._ending(label)
        # Of two with evidence the longer lies in a module of the same frame further down.
        shown = min((key for key in ending if self._evidence[key] & given), key=len, default=None)
        return shown or (ending[0] if len(ending) == 1 else label)

    def _keys_that_end(self, label: str) -> tuple[str, ...]:
        return tuple(key for key in self._evidence if key == label or key.endswith(f".{label}"))
