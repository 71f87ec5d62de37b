"""The nodes that quantize one tensor: its scale as its range finds it, and the fake-quant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxquant.graph.edit import call, item
from fxquant.graph.lift import Operand
from fxquant.graph.meta import mark_observation
from fxquant.graph.nodes import packet
from fxquant.numerics.formats import FLOAT_FORMATS
from fxquant.ops import fake_quantize, qparams
from fxquant.passes.captured.across_ranks import reduced
from fxquant.plan.plan import Role
from fxquant.spec.mode import Mode
from fxquant.spec.quant_spec import TOKEN, QuantSpec
from fxquant.spec.ranges.site_graph import Qparams, of_element

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Insertion:
    """One site in one graph.

    ``state`` holds the nodes of the range's state, ``group`` the name of the process group whose ranks keep it equal:
    ``""`` for this process alone. ``before``: whether they reduce its extremes before it is quantized.
    """

    label: str
    role: Role
    spec: QuantSpec
    edges: tuple[Operand, ...]
    mode: Mode
    state: tuple[fx.Node, ...] = ()
    group: str = ""
    before: bool = False


class SiteNodes:
    """Makes the nodes of a site for one tensor, each after the one before; the first at the graph's insertion point.

    It is the `fxquant.spec.ranges.SiteGraph` that the range of the site is given.
    """

    def __init__(self, graph: fx.Graph, source: fx.Node, site: Insertion) -> None:
        self.graph, self.source, self.site = graph, source, site
        self.role, self.format, self.mode = site.role, site.spec, site.mode
        # Scales of groups are found by row; those below one scale of the tensor once that is found.
        self._under_tensor = site.spec.scale_format is not None and not site.spec.range.per_group
        grouped = None if self._under_tensor else 0
        self.axis = site.spec.axis if site.spec.group_size is None else grouped
        self.state = dict(zip(site.spec.range.names(site.spec), site.state, strict=True)) if site.state else {}
        self.across_ranks = bool(site.group)
        self._agrees_before_use = site.before and bool(site.group) and site.mode is Mode.TRAIN
        self._last: fx.Node | None = None

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an operator."""
        return self._next(lambda: call(self.graph, op, *args, like=self.source, **kwargs))

    def item(self, node: fx.Node, index: int) -> fx.Node:
        """One of several results."""
        return self._next(lambda: item(self.graph, node, index))

    def pair(self, op: Any, *args: Any, **kwargs: Any) -> tuple[fx.Node, fx.Node]:
        """A call of an operator with two results, and these."""
        both = self.call(op, *args, **kwargs)
        return self.item(both, 0), self.item(both, 1)

    def constant(self, number: float) -> fx.Node:
        """A float32 tensor of one element, on the source's device."""
        # Not new_full of the source: export takes for constant what no input reaches.
        return self.call(aten.full.default, [1], number, dtype=torch.float32, device=self.source.meta["val"].device)

    def over_ranks(self, value: fx.Node) -> fx.Node:
        """The greatest of a value over all ranks."""
        return reduced(self.call, [value], [value], self.site.group)[1][0] if self.across_ranks else value

    def store(self, **values: fx.Node) -> None:
        """Writes state, by name: into a parameter unseen by autograd, which lets no leaf be written."""
        for name, value in values.items():
            state = self.state[name]
            if state.meta["val"].requires_grad:
                state = self.call(aten.detach.default, state)
            self.call(aten.copy_.default, state, value)

    def defer(self, average: fx.Node) -> None:
        """Says that `BatchRangeUpdates` is to do this ``average_min_max`` at the end of the graph."""
        mark_observation(average, "" if self._agrees_before_use else self.site.group)

    def extremes(self, value: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Minimum and maximum of ``value``, over all ranks where these are to reduce them before use."""
        low, high = self.pair(qparams.BATCH_MIN_MAX, value)
        if not self._agrees_before_use:
            return low, high
        both = reduced(self.call, [low], [high], self.site.group)
        return both[0][0], both[1][0]

    def quantized(self) -> fx.Node | None:
        """The node that stands for the quantized tensor; None where the site only observes."""
        if self.site.spec.group_size is not None:
            return self._quantized_in_groups(self.site.spec.group_size)
        return self._fake_quantize(self.source)

    def observe(self) -> None:
        """The update of a range after use."""
        self.site.spec.range.observe(self, self.call(aten.detach.default, self.source))

    def _next(self, make: Callable[[], fx.Node]) -> fx.Node:
        if self._last is None:
            self._last = make()
        else:
            with self.graph.inserting_after(self._last):
                self._last = make()
        return self._last

    def _fake_quantize(self, value: fx.Node) -> fx.Node | None:
        spec = self.site.spec
        detached = self.call(aten.detach.default, value)
        found = spec.range.qparams(self, detached)
        if found is None:
            return None
        axis = self.axis
        options: dict[str, Any] = {"rounding": spec.rounding, **of_element(spec)}
        if self._under_tensor:
            axis, found = 0, self._of_blocks(detached, found)
        if spec.scale_format is not None or spec.family == "affine token":
            options["pass_through"] = True  # what saturates does so by the rounding of its scale, or of its zero point
        if found.scale_gradient:
            options["scale_gradient"] = found.scale_gradient
            if not found.error_gradient:
                options["error_gradient"] = False
        where = () if axis is None else (axis,)
        op = fake_quantize.PER_TENSOR if axis is None else fake_quantize.PER_CHANNEL
        qparams = (found.scale, found.zero_point)
        node = self.call(op, value, *qparams, *where, spec.quant_min, spec.quant_max, **options)
        node.meta["site"] = self.site
        return node

    def _of_blocks(self, rows: fx.Node, tensor: Qparams) -> Qparams:
        """The scales of rows, in the format that they are rounded to, below that of the tensor."""
        spec = self.site.spec
        largest = spec.quant_max if spec.element is None else FLOAT_FORMATS[spec.element].max
        amax = self.call(aten.mul.Scalar, tensor.scale, largest)
        limits = (spec.quant_max, spec.scale_format)
        return Qparams(*self.pair(qparams.BLOCK_QPARAMS, rows, amax, *limits, **of_element(spec)))

    def _quantized_in_groups(self, size: int) -> fx.Node | None:
        """``w[N, K]``  →  ``reshape(FQ(reshape(w, [N·K/G, G]), s, 0, axis 0), [N, K])``, ``wᵀ`` for ``w[K, N]``.

        A group is a row of what the quantizer sees, so that a scale per row is a scale per group. Of a contiguous
        ``[N, K]`` both reshapes are views. Activations the same, of any number of dimensions, with the axis that the
        product sums over turned to the end; a group of a whole token is as long as that.
        """
        last = self.source.meta["val"].dim() - 1
        along = block_axis(self.site, last + 1)
        rows = self.source if along == last else self.call(aten.transpose.int, self.source, along, last)
        length = rows.meta["val"].shape[last]
        node = self._fake_quantize(self.call(aten.reshape.default, rows, [-1, length if size == TOKEN else size]))
        if node is None:
            return None
        shape = list(rows.meta["val"].shape)
        if all(isinstance(each, int) for each in shape):
            whole = self.call(aten.reshape.default, node, shape)
        else:
            whole = self.call(aten.view_as.default, node, rows)
        return whole if along == last else self.call(aten.transpose.int, whole, along, last)


def block_axis(site: Insertion, dims: int) -> int:
    """The axis that groups run along in a site's tensor."""
    axis = site.spec.axis
    if site.role == "weight":
        return 1 if axis == 0 else 0
    return dims - 1 if axis is None else axis


def grouped_value(node: fx.Node) -> fx.Node | None:
    """The fake-quant node of a weight per group, given the node after it that has the weight's own form."""
    while packet(node) in (aten.transpose, aten.reshape, aten.view_as):
        node = node.all_input_nodes[0]
    site = node.meta.get("site") if node.target is fake_quantize.PER_CHANNEL else None
    return node if isinstance(site, Insertion) and site.spec.group_size is not None else None
