"""Which tensors of a model are quantized: the solver, the plan that it makes, and where its sites are in a graph."""

from fxquant.plan.plan import Edge, FloatPlace, LocalSite, Plan, Role, Site
from fxquant.spec.mode import Mode

Declined = FloatPlace  # as version 0.1 called it, and pickled it

__all__ = ["Declined", "Edge", "FloatPlace", "LocalSite", "Mode", "Plan", "Role", "Site"]
