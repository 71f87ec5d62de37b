"""Plans written by hand, for what reads plans."""

from __future__ import annotations

import fxquant
from fxquant.plan.plan import Edge, FloatPlace, LocalSite, Plan, Role, Site
from fxquant.spec.quant_spec import QuantSpec

U8 = QuantSpec(bits=8, signed=False, symmetric=False)
S8 = QuantSpec(bits=8, narrow=True, axis=0, range=fxquant.CurrentTensor())


def edge(text: str) -> Edge:
    """``a.b linear 0 input`` → the edge; ``- add 0 lhs`` for an operator of the owner itself."""
    path, kind, ordinal, operand = text.split()
    return Edge(path="" if path == "-" else path, kind=kind, ordinal=int(ordinal), operand=operand)


def site(owner: str, role: Role, *edges: str, spec: QuantSpec = U8, name: str = "", source: str = "") -> Site:
    """A site that is called as its first edge's operand where it has no other name."""
    found = tuple(map(edge, edges))
    local = LocalSite(name=name or found[0].operand, role=role, spec=spec, edges=found)
    return Site(owner=owner, local=local, reason="asked for", source=source)


def plan(*sites: Site, declined: tuple[FloatPlace, ...] = (), target: str = "onnxruntime") -> Plan:
    return Plan(recipe="int8", target=target, sites=sites, declined=declined)
