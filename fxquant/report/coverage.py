"""How much of a model's compute reads quantized operands: its products, counted on the example inputs."""

from __future__ import annotations

import dataclasses
import textwrap
from dataclasses import dataclass
from typing import Any

from fxquant.plan.plan import Plan
from fxquant.report.example_run import ExampleRun
from fxquant.report.products import Product, opaque_bodies, products_of
from fxquant.support.table import short, table

_MOST = 5  # operators in float, or unseen modules, that are printed
_WIDTH = 120
HEADER = ("most work in float", "in", "work", "why", "source")
_UNITS = (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("kFLOP", 1e3))


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


def coverage(run: ExampleRun, plan: Plan) -> Coverage:
    """Counts the products of the graphs that one run on example inputs showed."""
    products = tuple(product for sited in run.sited for product in products_of(sited, plan))
    opaque = (where for sited in run.sited for where in opaque_bodies(sited))
    return Coverage(products=products, unseen=tuple(dict.fromkeys((*run.unread, *opaque))))


def _percent(share: float) -> str:
    """One digit after the point; 100 only for all of it, 0 only for none."""
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    return f"{min(max(100 * share, 0.1), 99.9):.1f} %"


def _count(flops: int) -> str:
    unit, size = next((u for u in _UNITS if flops >= u[1]), ("FLOP", 1.0))
    return f"{flops / size:.3g} {unit}"
