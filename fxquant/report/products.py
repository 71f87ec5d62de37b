"""The products of a graph: every operator that multiplies matrices, and whether its operands are quantized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from fxquant.graph.bodies import execution_order, nested_graphs
from fxquant.graph.flops import attention_flops, flops, is_flex_attention, is_product
from fxquant.graph.frames import user_line
from fxquant.graph.kinds import kind_of, operands
from fxquant.graph.moves import CASTS, passes_values
from fxquant.graph.nodes import is_float, packet
from fxquant.plan.plan import Plan
from fxquant.report.forecast import why_float
from fxquant.report.operators import declines_of, label_of
from fxquant.report.sited_graph import SitedGraph

aten = torch.ops.aten
_SOFTMAX = frozenset({aten.softmax, aten._softmax, aten._safe_softmax})


@dataclass(frozen=True, kw_only=True)
class Product:
    """One operator that multiplies matrices, or one of attention's two.

    Attributes:
        name: as its graph calls it; kind: as in `fxquant.graph.kinds.KINDS`, or ATen's name.
        module: path; source: user line.
        flops: two for each multiply-add, over all runs on the example inputs.
        quantized: whether all its operands are.
        second: whether it multiplies attention's probabilities by the values.
        reason: why it is not quantized; empty where it is.
    """

    name: str
    kind: str
    module: str
    source: str
    flops: int
    quantized: bool
    second: bool
    reason: str


def products_of(sited: SitedGraph, plan: Plan) -> Iterator[Product]:
    """Every product of a graph, in execution order."""
    return _Counter(sited, plan).products()


class _Counter:
    """The products of one graph and its nested bodies."""

    def __init__(self, sited: SitedGraph, plan: Plan) -> None:
        self.sited, self.plan = sited, plan
        self.declined = declines_of(plan.declined)
        self.places = sited.own_places()

    def products(self) -> Iterator[Product]:
        for node, times, inside in _runs(self.sited.gm, self.sited.gm.meta["runs"], ""):
            if not is_product(node):
                continue
            kind = kind_of(node)
            if is_flex_attention(node) or (kind is not None and kind.name == "sdpa"):
                yield from self._attention(node, times, inside)
                continue
            work = times * flops(node)
            if work:
                why = self._why(node, inside, tuple(operands(node)))
                yield self._product(node, work, why, second=_is_second(node, self.sited.constants))

    def _attention(self, node: fx.Node, times: int, inside: str) -> Iterator[Product]:
        first, second = attention_flops(node)
        yield self._product(node, times * first, self._why(node, inside, ("query", "key")))
        why = "its probabilities stay inside the operator, in float"
        yield self._product(node, times * second, why, second=True)

    def _product(self, node: fx.Node, work: int, why: str, *, second: bool = False) -> Product:
        return Product(
            name=node.name,
            kind=label_of(node),
            module=self.sited.path(node),
            source=user_line(node),
            flops=work,
            quantized=not why,
            second=second,
            reason=why,
        )

    def _why(self, node: fx.Node, inside: str, names: tuple[str, ...]) -> str:
        """Why one of the operands is in float; empty where none is."""
        read = operands(node)
        left = [name for name in names if name not in read or self.sited.site(node, name, read[name]) is None]
        if names and not left:
            return ""
        said = self.declined.get((node.name, user_line(node)), ())
        meant = [why for why in said if not why.startswith("its ") or why.startswith(tuple(f"its {n}:" for n in left))]
        if meant or said:
            return "; ".join(dict.fromkeys(meant or said))
        if inside:
            return f"it runs in the body of {inside}, which is not looked into"
        if kind_of(node) is None:
            return f"placement does not know {label_of(node)}"
        strange = next((n for n in left if n in read and not is_float(read[n])), None)
        if strange is not None:
            return f"its {strange} holds {getattr(read[strange].meta.get('val'), 'dtype', 'no tensor')}"
        place, sources = self.places[node], {user_line(node)} - {""}
        reasons = [why_float(self.plan, place, sources, name) for name in left]
        known = dict.fromkeys(why for why in reasons if why)
        return "; ".join(known) or f"its {' and '.join(left) or 'operands'} has no quantizer"


def _runs(gm: fx.GraphModule, times: int, inside: str) -> Iterator[tuple[fx.Node, int, str]]:
    """Call nodes with how often they run and the operator whose body they are in."""
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        yield node, times, inside
        if is_flex_attention(node) or _is_custom_function(node):
            continue
        for body in nested_graphs(gm, node):
            yield from _runs(body, times * _repeats(node), inside or label_of(node))


def _repeats(node: fx.Node) -> int:
    """How often the operator runs its body: `torch.scan` once for each slice of its inputs."""
    if getattr(node.target, "__name__", "") != "scan":
        return 1
    scanned = node.args[2]
    assert isinstance(scanned, (list, tuple)), "scan(combine_fn, init, xs, additional_inputs)"
    first = scanned[0].meta["val"] if scanned and isinstance(scanned[0], fx.Node) else None
    return int(first.shape[0]) if isinstance(first, torch.Tensor) else 1


def _is_custom_function(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "autograd_function_apply"


def opaque_bodies(sited: SitedGraph) -> Iterator[str]:
    """Bodies of a custom autograd.Function, which are kept as Dynamo wrote them."""
    for node in execution_order(sited.gm):
        if _is_custom_function(node):
            yield f"an autograd.Function in {sited.path(node) or 'the model'}"


def _is_second(node: fx.Node, constants: set[fx.Node]) -> bool:
    """Whether it multiplies the result of a softmax by something that is no parameter."""
    read = list(operands(node).values())
    return any(_is_softmax(one) for one in read) and not any(one in constants for one in read)


def _is_softmax(node: fx.Node) -> bool:
    while node.op == "call_function" and (passes_values(node) or packet(node) in CASTS):
        node = node.all_input_nodes[0]
    return packet(node) in _SOFTMAX
