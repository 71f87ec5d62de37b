"""What placement does not reach, and why it stays float."""

from __future__ import annotations

from torch import fx, nn

from fxquant.graph.bodies import is_checkpoint, is_transform, nested_graphs
from fxquant.graph.frames import user_line
from fxquant.graph.kinds import kind_of
from fxquant.plan.plan import FloatPlace
from fxquant.targets.profiles import Profile


def unreached(gm: fx.GraphModule, profile: Profile) -> tuple[FloatPlace, ...]:
    """The products in branches and loops of a graph, which a prepared model leaves in float."""
    found: list[FloatPlace] = []
    for node in gm.graph.nodes:
        if node.op != "call_function" or is_checkpoint(node) or is_transform(node):
            continue
        for body in nested_graphs(gm, node):
            reason = f"the body of {node.target} cannot update a range: it stays float"
            products = [n for n in body.graph.nodes if (kind := kind_of(n)) is not None and kind.name in profile.hard]
            found += [FloatPlace(where=n.name, reason=reason, source=user_line(n)) for n in products]
            found += unreached(body, profile)
    return tuple(found)


def left_out(model: nn.Module, graphs: list[fx.GraphModule]) -> list[FloatPlace]:
    """Modules none of whose own parameters any graph reads, as recurrent layers: Dynamo ran them in Python."""
    read: set[int] = set().union(*(gm.meta["parameters"] for gm in graphs))
    reason = "Dynamo made no graph of it on the example inputs: it stays float"
    own = ((path, [id(p) for p in module.parameters(recurse=False)]) for path, module in model.named_modules())
    return [FloatPlace(where=path or "the model", reason=reason) for path, ids in own if ids and not read & set(ids)]
