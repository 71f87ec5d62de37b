"""How much of a model's compute reads quantized operands: its products, counted on the example inputs."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
from fxquant.report.operators import Captured, Reader, declines_of, label_of
from fxquant.support.table import short, table

aten = torch.ops.aten
_SOFTMAX = frozenset({aten.softmax, aten._softmax, aten._safe_softmax})
_MOST = 5  # operators in float, or unseen modules, that are printed
_WIDTH = 120
HEADER = ("most work in float", "in", "work", "why", "source")
_UNITS = (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("kFLOP", 1e3))


@dataclass(frozen=True, kw_only=True)
class Product:
    """One operator that multiplies matrices, or one of attention's two.

    Attributes:
        name: as its graph calls it; kind: as in `fxquant.graph.KINDS`, or ATen's name; module: path; source: user line.
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


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """The products of convolutions, linear layers and matrix products that a run on the example inputs did.

    ``products`` has them all, in execution order, those of nested bodies too: of ``cond`` both branches once, of
    ``scan`` the body as often as its input is long, of ``while_loop`` the body once. ``unseen`` names what ran outside
    any graph or in one that nothing looks into; its work is in no number here. Products that a custom operator, or
    code that Dynamo left in Python, does without a module of its own, leave no trace at all.

    Attention's second product, probabilities times values, is counted apart, in ``attention``: inside
    ``scaled_dot_product_attention`` most runtimes do it in float, and no plan changes that.
    """

    products: tuple[Product, ...]
    unseen: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        """Of all products but attention's second."""
        return sum(one.flops for one in self.products if not one.second)

    @property
    def quantized(self) -> int:
        """What of `flops` reads quantized operands only."""
        return sum(one.flops for one in self.products if one.quantized and not one.second)

    @property
    def share(self) -> float:
        """``quantized / flops``, 0 to 1; 0 where there are no products."""
        return self.quantized / self.flops if self.flops else 0.0

    @property
    def attention(self) -> int:
        """Of attention's second products."""
        return sum(one.flops for one in self.products if one.second)

    @property
    def attention_quantized(self) -> int:
        """What of `attention` reads quantized operands only."""
        return sum(one.flops for one in self.products if one.second and one.quantized)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the sums, then every product."""
        names = ("flops", "quantized", "share", "attention", "attention_quantized")
        sums = {name: getattr(self, name) for name in names}
        return {**sums, "unseen": list(self.unseen), "products": [dataclasses.asdict(p) for p in self.products]}

    @property
    def summary(self) -> str:
        """A sentence, and one more where something ran unseen."""
        parts = ["no convolutions or matrix products seen"]
        if self.flops:
            count = _count(self.flops)
            parts = [f"{_percent(self.share)} of {count} in convolutions and matrix products on quantized operands"]
        if self.attention:
            parts.append(f"attention's second product ({_count(self.attention)}) {self._attention_words()}")
        line = "; ".join(parts)
        lines = [f"{line}."]
        if self.unseen:
            more = f" and {len(self.unseen) - _MOST} more" if len(self.unseen) > _MOST else ""
            lines.append(f"Not counted, since no graph shows its work: {', '.join(self.unseen[:_MOST])}{more}.")
        return "\n".join(textwrap.fill(each, _WIDTH, break_on_hyphens=False) for each in lines)

    def _attention_words(self) -> str:
        if not self.attention_quantized:
            return "in float"
        whole = self.attention == self.attention_quantized
        return "quantized too" if whole else f"quantized for {_percent(self.attention_quantized / self.attention)}"

    def __str__(self) -> str:
        return "\n".join([self.summary, table(HEADER, self.cells())] if self.most_float() else [self.summary])

    def cells(self) -> list[tuple[str, ...]]:
        """A row under `HEADER` for each of `most_float`."""
        left = self.most_float()
        return [(p.kind, p.module or "the model", _count(p.flops), p.reason, short(p.source)) for p in left]

    def most_float(self) -> list[Product]:
        """Products in float with most work, at most five, attention's second excepted."""
        left = [one for one in self.products if not one.quantized and not one.second]
        return sorted(left, key=lambda one: -one.flops)[:_MOST]


def coverage(captured: Captured, plan: Plan) -> Coverage:
    """Counts the products of the graphs that one run on example inputs showed."""
    found = [product for reader in captured.readers for product in _Counter(reader, plan).products()]
    opaque = (where for reader in captured.readers for where in _opaque(reader))
    return Coverage(products=tuple(found), unseen=tuple(dict.fromkeys((*captured.unread, *opaque))))


class _Counter:
    """The products of one graph and its nested bodies."""

    def __init__(self, reader: Reader, plan: Plan) -> None:
        self.reader, self.plan = reader, plan
        self.declined = declines_of(plan.declined)
        self.places = reader.own_places()

    def products(self) -> Iterator[Product]:
        for node, times, inside in _runs(self.reader.gm, self.reader.gm.meta["runs"], ""):
            if not is_product(node):
                continue
            kind = kind_of(node)
            if is_flex_attention(node) or (kind is not None and kind.name == "sdpa"):
                yield from self._attention(node, times, inside)
                continue
            work = times * flops(node)
            if work:
                why = self._why(node, inside, tuple(operands(node)))
                yield self._product(node, work, why, second=_is_second(node, self.reader.constants))

    def _attention(self, node: fx.Node, times: int, inside: str) -> Iterator[Product]:
        first, second = attention_flops(node)
        yield self._product(node, times * first, self._why(node, inside, ("query", "key")))
        why = "its probabilities stay inside the operator, in float"
        yield self._product(node, times * second, why, second=True)

    def _product(self, node: fx.Node, work: int, why: str, *, second: bool = False) -> Product:
        return Product(
            name=node.name,
            kind=label_of(node),
            module=self.reader.path(node),
            source=user_line(node),
            flops=work,
            quantized=not why,
            second=second,
            reason=why,
        )

    def _why(self, node: fx.Node, inside: str, names: tuple[str, ...]) -> str:
        """Why one of the operands is in float; empty where none is."""
        read = operands(node)
        left = [name for name in names if name not in read or self.reader.site(node, name, read[name]) is None]
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


def _opaque(reader: Reader) -> Iterator[str]:
    """Bodies of a custom autograd.Function, which are kept as Dynamo wrote them."""
    for node in execution_order(reader.gm):
        if _is_custom_function(node):
            yield f"an autograd.Function in {reader.path(node) or 'the model'}"


def _is_second(node: fx.Node, constants: set[fx.Node]) -> bool:
    """Whether it multiplies the result of a softmax by something that is no parameter."""
    read = list(operands(node).values())
    return any(_is_softmax(one) for one in read) and not any(one in constants for one in read)


def _is_softmax(node: fx.Node) -> bool:
    while node.op == "call_function" and (passes_values(node) or packet(node) in CASTS):
        node = node.all_input_nodes[0]
    return packet(node) in _SOFTMAX


def _percent(share: float) -> str:
    """One digit behind the point; 100 only for all of it, 0 only for none."""
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    return f"{min(max(100 * share, 0.1), 99.9):.1f} %"


def _count(flops: int) -> str:
    unit, size = next((u for u in _UNITS if flops >= u[1]), ("FLOP", 1.0))
    return f"{flops / size:.3g} {unit}"
