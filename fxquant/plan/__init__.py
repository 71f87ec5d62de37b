"""Which tensors of a model are quantized: the solver, the plan that it makes, and where its sites are in a graph."""

from fxquant.plan.plan import Declined, Edge, LocalSite, Plan, Role, Site
from fxquant.spec.mode import Mode

__all__ = ["Declined", "Edge", "LocalSite", "Mode", "Plan", "Role", "Site"]
