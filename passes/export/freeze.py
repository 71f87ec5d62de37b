"""From scales that are computed to scales that are constants: weights become integers, activations labelled Q/DQ."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxquant import numerics
from fxquant.errors import ExportError
from fxquant.graph.arguments import argument, operand
from fxquant.graph.dependence import constant_nodes
from fxquant.graph.edit import call
from fxquant.graph.kinds import bias_of, kind_of, operands
from fxquant.graph.meta import Site, site_of, sites_served
from fxquant.graph.moves import unmoved
from fxquant.graph.views import BlockQparams, FakeQuant, Item
from fxquant.numerics import elements
from fxquant.numerics.blocks import IntegerGrid, tensor_unit
from fxquant.numerics.formats import float_format
from fxquant.numerics.storage import storage
from fxquant.ops.bias import BIAS_MAX, FAKE_QUANTIZE_BIAS, bias_codes
from fxquant.ops.qdq import DEQUANTIZE, QUANTIZE_DEQUANTIZE, QUANTIZE_DEQUANTIZE_BLOCKS
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.export.constants import constant, constant_value
from fxquant.passes.export.pairs import Dequantized, Pair, named
from fxquant.passes.stages import EXPORT

_AT_ONCE = 1 << 18  # values of a weight whose codes are computed together


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """An activation that is quantized along its last axis by scales of its own, as ``quantize_dequantize_blocks``."""

    size: int
    quant_min: int
    quant_max: int
    symmetric: bool
    element: str | None
    scale_format: str | None
    tensor_amax: float | None

    @property
    def has_zero_points(self) -> bool:
        """Whether each block has a zero point beside its scale."""
        return self.quant_min >= 0 or not self.symmetric


@dataclass
class Frozen:
    """What `Freeze` made of the sites, by role, and what it had to adjust: a product of its `PassResult`."""

    weights: list[str] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    absorbed: list[str] = field(default_factory=list)  # no QuantizeLinear of their own: constants, equals of others
    labels: dict[str, str] = field(default_factory=dict)  # fake-quant of an activation, by name → its label
    blocks: dict[str, Blocks] = field(default_factory=dict)  # label → how an activation in blocks is quantized


@dataclass(frozen=True, kw_only=True)
class Freeze(Pass):
    """Replaces every fake-quant node of an inference graph::

        fake_quantize(w, s, z) of a constant  →  dequantize_affine(int8 codes, s, z)
        reshape(fake_quantize(reshape(w)))    →  the same with a block of codes for each group, in the form of w
        fake_quantize(x, s, z)                →  quantize_dequantize(x, 0.1, 128, …, "layer.input")
        reshape(fake_quantize(reshape(x)))    →  quantize_dequantize_blocks(x, 16, …, "layer.input")
        fake_quantize_bias(b, s, t)           →  dequantize_affine(int32 codes, s·t, 0)

    Everything else that depends on parameters only and feeds something that does not (a folded bias) becomes a
    constant too. Its `PassResult` holds a `Frozen`. ExportError where a scale follows the input.
    """

    stages: ClassVar = (EXPORT,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Freezes activations first, as the scale of a bias is made of theirs."""
        frozen = Frozen(absorbed=[label for node in gm.graph.nodes for label in sites_served(node)])
        result.products.append(frozen)
        with torch.no_grad():
            done = _Freezing(gm, frozen).run()
        if done:
            gm.graph.eliminate_dead_code()
        return done


class _Values:
    """Real values of nodes that depend on parameters and buffers only, computed at most once."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.constants = constant_nodes(gm.graph)
        self.known: dict[fx.Node, Any] = {}

    def __contains__(self, node: object) -> bool:
        return node in self.constants

    def __getitem__(self, node: fx.Node) -> Any:
        if node not in self.known:
            if node.op == "get_attr":
                self.known[node] = constant_value(self.gm, node)
            else:
                assert callable(node.target)
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.__getitem__)
                self.known[node] = node.target(*args, **kwargs)
        return self.known[node]


class _Freezing:
    """One run of `Freeze`."""

    def __init__(self, gm: fx.GraphModule, frozen: Frozen) -> None:
        self.gm, self.frozen, self.values = gm, frozen, _Values(gm)
        self.seen: dict[str, int] = {}
        inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
        self.taken = {name for node in inputs for name in (node.name, str(node.target))}  # by values of the file

    def run(self) -> int:
        """How many nodes it replaced."""
        found = [view for node in self.gm.graph.nodes if (view := FakeQuant.of(node)) is not None]
        found.sort(key=lambda view: view.input in self.values)  # activations first
        for view in found:
            self._freeze(view)
        biases = [n for n in self.gm.graph.nodes if n.op == "call_function" and n.target is FAKE_QUANTIZE_BIAS]
        return len(found) + sum(map(self._bias, biases)) + self._rest()

    def _freeze(self, view: FakeQuant) -> None:
        site = _site(view)
        if view.input not in self.values:
            number = self.seen[site.label] = self.seen.get(site.label, -1) + 1
            label = f"{site.label}@{number}" if number or site.label in self.taken else site.label
            self._activation(view, label) if site.spec.group_size is None else self._blocks(view, label)
        elif site.spec.group_size is not None:
            self._groups(view)
        else:
            self._weight(view, site.label)

    def _activation(self, view: FakeQuant, label: str) -> None:
        scale, zero_point = view.scale, view.zero_point
        if scale not in self.values:
            raise ExportError(
                f"scale of {label} must not depend on the input: its range follows each batch. Prepare the model with "
                "ranges='moving_average', or fxquant.override this site with a Fixed range. Where it follows no more "
                "than the sizes of the input, export with dynamic_batch=False."
            )
        numbers = (float(self._value(scale)), int(self._value(zero_point)))
        with self.gm.graph.inserting_before(view.node):
            grid = (*numbers, view.quant_min, view.quant_max, label)
            new = call(self.gm.graph, QUANTIZE_DEQUANTIZE, view.input, *grid, like=view.node, **named(view.element))
        self._replace(view.node, new)
        self.frozen.activations.append(label)
        self.frozen.labels[view.node.name] = label

    def _blocks(self, view: FakeQuant, label: str) -> None:
        """An activation whose quantizer sees a token or a group as a row: see `SiteNodes`."""
        spec = _site(view).spec
        amax = None
        part = Item.of(view.scale)
        made = None if part is None else BlockQparams.of(part.source)
        if made is not None and made.tensor_amax is not None:
            if made.tensor_amax not in self.values:
                raise ExportError(
                    f"scale of {label} must not depend on the input: the range of its tensor follows each batch. "
                    "Prepare the model with ranges='moving_average'."
                )
            amax = float(self.values[made.tensor_amax])
        assert spec.group_size is not None, "what is not in groups is quantized by one scale"
        found = Blocks(
            size=spec.group_size,
            quant_min=spec.quant_min,
            quant_max=spec.quant_max,
            symmetric=spec.symmetric,
            element=spec.element,
            scale_format=spec.scale_format,
            tensor_amax=amax,
        )
        source = view.input.all_input_nodes[0]
        grid = (*dataclasses.astuple(found), label)
        for end in list(view.node.users):  # the reshape back
            with self.gm.graph.inserting_before(end):
                new = call(self.gm.graph, QUANTIZE_DEQUANTIZE_BLOCKS, source, *grid, like=end)
            self._replace(end, new)
        self.frozen.blocks[label] = found
        self.frozen.activations.append(label)
        self.frozen.labels[view.node.name] = label

    def _weight(self, view: FakeQuant, label: str) -> None:
        node, axis = view.node, view.axis
        weight, scale, zero_point = (self._value(v) for v in (view.input, view.scale, view.zero_point))
        scale = self._guard_bias(view, scale, label)
        code = _codes(view, weight, scale, zero_point, axis)
        if axis is None:
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
        with self.gm.graph.inserting_before(node):
            held = self._held(label, (code, scale, zero_point), node)
            new = call(self.gm.graph, DEQUANTIZE, *held, axis, like=node, **named(view.element))
        self._replace(node, new)
        if _site(view).role == "weight":
            self.frozen.weights.append(label)
        else:  # of a learned query, as an example: stored as a weight is
            self.frozen.activations.append(label)
            self.frozen.absorbed.append(label)

    def _groups(self, view: FakeQuant) -> None:
        """A weight whose quantizer sees a group as a row: see `InsertFakeQuantize`."""
        node, site = view.node, _site(view)
        axis, size = site.spec.axis, site.spec.group_size
        assert axis is not None and size is not None
        rows, scale, zero_point = (self._value(v) for v in (view.input, view.scale, view.zero_point))
        code = _codes(view, rows, scale, zero_point, 0)
        ends = [user if axis == 0 else next(iter(user.users)) for user in node.users]
        shape = ends[0].all_input_nodes[0].meta["val"].shape if axis else ends[0].meta["val"].shape
        whole = [value.reshape(shape[0], -1) for value in (code, scale, zero_point)]
        whole = [value.t() if axis else value for value in whole]
        with self.gm.graph.inserting_before(node):
            held = self._held(site.label, whole, node)
            if site.spec.scale_format == "e4m3":
                held[1] = self._scale_codes(site, rows, whole[1], held[1])
            new = call(self.gm.graph, DEQUANTIZE, *held, 1 - axis, size, like=ends[0], **named(view.element))
        for end in ends:
            end.replace_all_uses_with(new)
        self.frozen.weights.append(site.label)

    def _scale_codes(self, site: Site, rows: Tensor, scale: Tensor, held: fx.Node) -> fx.Node:
        """The scales of groups as fp8 codes below one float32 scale of the tensor: the same numbers."""
        format = float_format("e4m3")
        element = IntegerGrid(0, site.spec.quant_max) if site.spec.element is None else float_format(site.spec.element)
        unit = tensor_unit(rows.abs().amax(), element, format)
        code = elements.encode(elements.quantize(scale, unit, format, "divide"), format)
        assert torch.equal(elements.decode(code, format) * unit, scale), "scales are multiples of the tensor's unit"
        values = (code, unit, torch.zeros_like(unit))
        codes = self._held(f"{site.label}.scale", values, held)
        return call(self.gm.graph, DEQUANTIZE, *codes, None, like=held, element="e4m3")

    def _guard_bias(self, view: FakeQuant, scale: Tensor, label: str) -> Tensor:
        """The weight's scale, raised where onnxruntime's int32 bias would overflow.

        Only channels of all but vanished weights (γ ≈ 0 under a bias) are concerned: their weights are below the
        bias by 2³¹ or more, so a coarser scale changes nothing that float32 could show.
        """
        for user in view.node.users:
            kind = kind_of(user)
            if kind is None or kind.name != "conv":
                continue
            bias, source = bias_of(user), Pair.of(unmoved(operands(user)["input"]))
            if bias is None or bias not in self.values or source is None:
                continue
            least = self.values[bias].abs().to(torch.float64) / (float(source.scale) * BIAS_MAX)
            least = least if scale.numel() == least.numel() else least.amax().reshape(1)  # one scale for all channels
            raised = torch.maximum(scale, (least * 2).to(scale.dtype))
            count = int((least > scale).sum())
            if count:
                note = f"{label}: scale of {count} vanishing channels raised, so that their bias fits int32"
                self.frozen.notes.append(note)
                scale = torch.where(least.to(scale.dtype) > scale, raised, scale)
        return scale

    def _bias(self, node: fx.Node) -> bool:
        """With the scale that the weight has by now; a bias that cannot be held so is folded to a float constant."""
        (conv,) = node.users
        weight, source = Dequantized.of(operands(conv)["weight"]), Pair.of(unmoved(operands(conv)["input"]))
        bias = operand(node, "bias")
        if weight is None or source is None or bias not in self.values:
            return False
        scale = self.values[weight.scale] * torch.tensor(source.scale, dtype=torch.float32)
        code = bias_codes(self.values[bias], scale).double().clamp(-BIAS_MAX, BIAS_MAX).to(torch.int32)
        label = str(weight.code.target).removesuffix("weight__codes")
        with self.gm.graph.inserting_before(node):
            held = self._held(f"{label}bias", (code, scale, torch.zeros_like(scale)), node)
            new = call(self.gm.graph, DEQUANTIZE, *held, 0 if scale.dim() else None, like=node)
        self._replace(node, new)
        return True

    def _rest(self) -> int:
        """Constants that are computed, where something reads them that is none."""
        done = 0
        for node in list(self.gm.graph.nodes):
            computed = node.op == "call_function" and node in self.values and node.target is not DEQUANTIZE
            if computed and any(user not in self.values for user in node.users):
                value = self.values[node]
                if isinstance(value, Tensor):
                    with self.gm.graph.inserting_before(node):
                        node.replace_all_uses_with(constant(self.gm, f"folded.{node.name}", value, node))
                    done += 1
        return done

    def _held(self, label: str, values: Sequence[Tensor], like: fx.Node) -> list[fx.Node]:
        """Codes, scale and zero point as constants."""
        code, scale, zero_point = values
        parts = (("codes", code), ("scale", scale), ("zero_point", zero_point.to(code.dtype)))
        return [constant(self.gm, f"{label}.{name}", value, like) for name, value in parts]

    def _value(self, known: Any) -> Any:
        return self.values[known] if isinstance(known, fx.Node) else known

    def _replace(self, node: fx.Node, new: fx.Node) -> None:
        node.replace_all_uses_with(new)
        self.gm.graph.erase_node(node)


def _site(view: FakeQuant) -> Site:
    site = site_of(view.node)
    assert site is not None, f"{view.node.name} must be a site's: a model's own fake-quants have no place in a file yet"
    return site


def _codes(view: FakeQuant, weight: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """The codes that a fake-quant node of a weight computes, in the type that they are stored in.

    A few rows at a time: values between, as large as the weight, leave holes in the heap among the codes that stay,
    and a gigabyte of them after BERT-base.
    """
    if axis is not None:
        scale, zero_point = (numerics.per_channel_view(v, weight.dim(), axis) for v in (scale, zero_point))
    if weight.dim() == 0 or weight.numel() <= _AT_ONCE:
        return _codes_of(view, weight, scale, zero_point)
    step, codes = max(1, _AT_ONCE * len(weight) // weight.numel()), None
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        grid = (value[rows] if value.dim() and len(value) > 1 else value for value in (scale, zero_point))
        part = _codes_of(view, weight[rows], *grid)
        codes = torch.empty_like(weight, dtype=part.dtype) if codes is None else codes
        codes[rows] = part
    assert codes is not None
    return codes


def _codes_of(view: FakeQuant, weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    low, high, rounding = view.quant_min, view.quant_max, argument(view.node, "rounding")
    if view.element is not None:
        found = float_format(view.element)
        return elements.encode(elements.quantize(weight, scale, found, rounding), found)
    code = numerics.code_before_clamp(weight, scale, zero_point, rounding)
    return numerics.clamp_code(code, low, high).to(getattr(torch, storage(low, high)[0]))
