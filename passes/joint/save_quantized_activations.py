"""What backward needs of a quantized activation is kept as codes and a packed clip mask, not as floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxquant.graph.arguments import argument
from fxquant.graph.edit import call
from fxquant.graph.elementwise import is_pointwise
from fxquant.graph.meta import mark_saved_as_codes
from fxquant.graph.moves import is_moving
from fxquant.graph.nodes import packet
from fxquant.graph.views import FakeQuant, FakeQuantBackward, Item
from fxquant.numerics.formats import FLOAT_FORMATS
from fxquant.ops import fake_quantize, quantize, saved
from fxquant.ops.elements import DEQUANTIZE_ELEMENTS, QUANTIZE_ELEMENTS
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.joint.joint import Joint
from fxquant.passes.stages import JOINT

aten = torch.ops.aten
prims = torch.ops.prims

# By name: Inductor's own, which its decompositions make, is there only once Inductor is loaded.
_POOLS = frozenset(
    {
        *("aten.max_pool2d_with_indices", "aten.max_pool3d_with_indices", "aten.adaptive_max_pool2d"),
        *("aten.adaptive_max_pool3d", "prims._low_memory_max_pool_with_offsets"),
    }
)

_CODING = (quantize.QUANTIZE_TENSOR, quantize.QUANTIZE_CHANNEL, QUANTIZE_ELEMENTS)
_FEW = 1024  # elements: of fewer, kept in float, nothing is said


@dataclass(frozen=True, kw_only=True)
class SaveQuantizedActivations(Pass):
    """Joint graph of forward and backward, before it is partitioned::

        y  = fake_quantize(x)                      y  = fake_quantize(x)
        …  = op(y)                                 …  = op(y)
        dw = op'(dy, y)                      →     dw = op'(dy, dequantize(q)),   q = quantize(x), saved
        dx = fake_quantize'(dy, x)                 dx = dy · unpack(m),           m = pack(clip_mask(x)), saved

    A byte and an eighth are kept instead of a float. Codes of up to four bits are packed too, of integers and of small
    floats. The bits of every gradient stay what they were.

    Left alone is an input that backward has anyway, or computes from such values element by element: a LayerNorm's or
    BatchNorm's result, a GELU or ReLU after one, attention's output, and weights. So is what the user's own checkpoint
    regions hold, read or give. What has a scale for each token or group keeps those scales beside its codes. Masks of
    other operators, as a ReLU's, are packed where no float is kept that gives them.

    What a max pool picks of quantized values has their codes, and is kept as those too, by the scale it came with::

        p  = max_pool(fake_quantize(x))        →   p is read in backward as dequantize(q), q = quantize(p), saved

    not in half types, where a code may round to the value of the next.
    """

    stages: ClassVar = (JOINT,)

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Rewrites the graph itself; bodies of nested operators have joint graphs of their own."""
        joint = Joint(gm.graph)
        if not joint.tangents:
            return 0
        masks = [node for node in joint.only_backward() if _is_mask(node, joint)]
        wanted = joint.wanted(skip=set(masks).__contains__)
        kept = joint.kept(wanted)
        sites = [site for node in joint.forward if (site := _site(node)) is not None]
        done = sum(self._save(joint, site, site.node in wanted, result) for site in sites if site.input not in kept)
        done += sum(_save_picked(joint, node) for node in joint.forward if node in wanted and _is_pick(node))
        return done + sum(_pack_mask(mask) for mask in masks if mask not in kept)

    def _save(self, joint: Joint, site: FakeQuant, read: bool, result: PassResult) -> int:
        """Rewrites one site, whose result backward reads or not."""
        source = site.input
        readers = (FakeQuantBackward.of(user) for user in source.users)
        gradients = [each for each in readers if each is not None and _is_gradient_of(each, site)]
        value, bits = source.meta["val"], _bits(site)
        if _is_in_region(site.node) or _is_of_region(source) or not (gradients or read):
            return 0
        if bits > 16:
            self.decline(result, site.node, f"its codes have {bits} bits, which float32 does not hold")
            return 0
        if _width(bits) + 1 >= 8 * value.element_size():
            self.decline(result, site.node, f"its codes of {bits} bits and a mask are no smaller than {value.dtype}")
            return 0
        if site.axis is not None and (gradients or (site.rounding == "reciprocal" and value.dtype != torch.float32)):
            return 0  # its mask has a scale a row; a double product is not that of codes
        dim = plane_dim(value)
        if dim is None:
            if not all(isinstance(size, int) for size in value.shape) or value.numel() >= _FEW:
                reason = f"no dimension of its {list(value.shape)} is a multiple of 8: it is saved in float"
                self.decline(result, site.node, reason)
            return 0
        mark_saved_as_codes(site.node)
        nodes = _NodesAfter(joint.graph, site)
        if read:
            _read_codes(joint, site.node, nodes.codes(bits, dim))
        if gradients:
            mask = nodes.mask(dim)
            for gradient in gradients:
                _read_mask(gradient, mask, dim)
        return 1


def _save_picked(joint: Joint, node: fx.Node) -> int:
    """Rewrites what a max pool made, if that has codes."""
    site = _grid_of(node)
    if site is None or _is_in_region(node) or not _is_read_behind(joint, node):
        return 0
    value, bits = node.meta["val"], _bits(site)
    dim = plane_dim(value)
    if value.element_size() < 4 or bits > 16 or (dim is None and _width(bits) < 8):
        return 0
    nodes = _NodesAfter(joint.graph, site, node)
    _read_codes(joint, node, nodes.codes(bits, 0 if dim is None else dim))
    return 1


def _is_pick(node: fx.Node) -> bool:
    """Whether a node is the result of a max pool, not its indices."""
    part = Item.of(node)
    return part is not None and part.index == 0 and _is_pool(part.source)


def _is_pool(node: fx.Node) -> bool:
    return str(packet(node)) in _POOLS


def _site(node: fx.Node) -> FakeQuant | None:
    """The view of a fake-quant whose scale is in a tensor: one, or one for each row, be it a token or a group."""
    site = FakeQuant.of(node)
    return None if site is None or site.has_numbers or site.axis not in (None, 0) else site


def _grid_of(node: fx.Node) -> FakeQuant | None:
    """The fake-quant whose codes a node's values have: picked, moved, or joined from results of one scale."""
    if node.target is fake_quantize.PER_TENSOR:
        return FakeQuant(node)
    if packet(node) is aten.cat:
        found = [_grid_of(part) for part in argument(node, "tensors")]
        alike = all(each is not None and _same_grid(each, found[0]) for each in found)
        site = found[0] if alike else None
    elif is_moving(node) or _is_pool(node):
        site = _grid_of(node.all_input_nodes[0])
    else:
        return None
    value = node.meta["val"]
    cast = site is not None and isinstance(value, Tensor) and value.dtype != site.node.meta["val"].dtype
    return None if cast else site


def _same_grid(site: FakeQuant, other: FakeQuant | None) -> bool:
    return other is not None and site.has_grid_of(other) and site.pass_through == other.pass_through


def _is_read_behind(joint: Joint, node: fx.Node) -> bool:
    """Whether backward reads a value of forward, perhaps moved, other than to make codes of it."""
    readers = [user for user in node.users if user.target not in _CODING]
    return any(user not in joint.forward or (is_moving(user) and _is_read_behind(joint, user)) for user in readers)


def _is_gradient_of(gradient: FakeQuantBackward, site: FakeQuant) -> bool:
    return gradient.input is site.input and gradient.has_grid_of(site)


def _is_of_region(node: fx.Node) -> bool:
    """Whether a node is, perhaps moved since, what a region of the user's gives: backward has that from it again."""
    while "recompute" not in node.meta and is_moving(node):
        node = node.all_input_nodes[0]
    return "recompute" in node.meta


def _is_in_region(node: fx.Node) -> bool:
    """Whether a node is the user's to recompute, or is read, perhaps moved first, by one that is."""
    if "recompute" in node.meta:
        return True
    return any("recompute" in user.meta or (is_moving(user) and _is_in_region(user)) for user in node.users)


def _bits(site: FakeQuant) -> int:
    if site.element is not None:
        return FLOAT_FORMATS[site.element].bits
    return (site.quant_max - site.quant_min).bit_length()


def _width(bits: int) -> int:
    """Bits that a code takes: 2 or 4 packed, else whole bytes."""
    return next(width for width in (2, 4, 8, 16, 32) if bits <= width)


def plane_dim(value: Tensor) -> int | None:
    """The dimension to pack along: the outermost in memory that is known to be a multiple of 8."""
    found = [d for d, size in enumerate(value.shape) if isinstance(size, int) and size and size % 8 == 0]
    return max(found, key=lambda d: (_known(value, d), -d), default=None)


def _known(value: Tensor, dim: int) -> float:
    stride: int | torch.SymInt = value.stride(dim)
    return stride if isinstance(stride, int) else float("inf")


class _NodesAfter:
    """Makes nodes one after the other: of a site's input, or of other values that lie on the site's grid."""

    def __init__(self, graph: fx.Graph, site: FakeQuant, values: fx.Node | None = None) -> None:
        self.graph, self.site, self.last = graph, site, values or site.node
        self.values = values or site.input

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_after(self.last):
            self.last = call(self.graph, op, *args, like=self.site.node, **kwargs)
        return self.last

    def codes(self, bits: int, dim: int) -> fx.Node:
        """Codes that are saved, and dequantized again."""
        if self.site.element is not None:
            return self._elements(self.site.element, bits, dim)
        site, low = self.site, self.site.quant_min
        dtype, single = _dtype(low, site.quant_max), site.axis is None
        quantizing = quantize.QUANTIZE_TENSOR if single else quantize.QUANTIZE_CHANNEL
        codes = self.call(quantizing, self.values, *site.grid, dtype, rounding=site.rounding)
        if _width(bits) < 8:
            # From 0, as a plane holds them.
            shifted = self.call(aten.sub.Scalar, codes, low)
            codes = self.call(aten.add.Scalar, self._packed(shifted, bits, dim), low)
        wanted = self.values.meta["val"].dtype
        dequantizing, axis = (quantize.DEQUANTIZE_TENSOR, ()) if single else (quantize.DEQUANTIZE_CHANNEL, (site.axis,))
        return self.call(dequantizing, codes, site.scale, site.zero_point, *axis, dtype=wanted)

    def _elements(self, element: str, bits: int, dim: int) -> fx.Node:
        site, wanted = self.site, self.values.meta["val"].dtype
        codes = self.call(QUANTIZE_ELEMENTS, self.values, site.scale, site.axis, element, rounding=site.rounding)
        if _width(bits) < 8:
            codes = self.call(prims.convert_element_type.default, self._packed(codes, bits, dim), torch.uint8)
        return self.call(DEQUANTIZE_ELEMENTS, codes, site.scale, site.axis, element, dtype=wanted)

    def _packed(self, codes: fx.Node, bits: int, dim: int) -> fx.Node:
        """Codes from 0 that are saved packed, and unpacked again."""
        planes = self.call(saved.PACK_PLANES, codes, _width(bits), dim)
        return self.call(saved.UNPACK_PLANES, planes, _width(bits), dim)

    def mask(self, dim: int) -> fx.Node:
        """The packed clip mask, which is saved."""
        options = {"rounding": self.site.rounding}
        options |= {} if self.site.element is None else {"element": self.site.element}
        mask = self.call(saved.CLIP_MASK, self.values, *self.site.grid, **options)
        return self.call(saved.PACK_PLANES, mask, 1, dim)


def _dtype(low: int, high: int) -> torch.dtype:
    fitting = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32)
    return next(d for d in fitting if torch.iinfo(d).min <= low and high <= torch.iinfo(d).max)


def _read_codes(joint: Joint, node: fx.Node, replacement: fx.Node) -> None:
    """Backward reads ``replacement`` instead of ``node``, and of what forward moved from it, the like of it."""
    for user in list(node.users):
        if user not in joint.forward and user.target not in _CODING:
            user.replace_input_with(node, replacement)
        elif user in joint.forward and is_moving(user):
            with joint.graph.inserting_after(user):
                moved = joint.graph.node_copy(user, lambda n: replacement if n is node else n)
            _read_codes(joint, user, moved)
            if not moved.users:
                joint.graph.erase_node(moved)


def _read_mask(gradient: FakeQuantBackward, packed: fx.Node, dim: int) -> None:
    """``fake_quantize'(dy, x)``  →  ``dy · unpack(packed)``, a product as in `numerics.affine`."""
    node, grad = gradient.node, gradient.grad
    graph = node.graph
    with graph.inserting_before(node):
        mask = _unpacked(graph, packed, dim, like=node)
        factor = call(graph, prims.convert_element_type.default, mask, grad.meta["val"].dtype, like=node)
        result = call(graph, aten.mul.Tensor, grad, factor, like=node)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _unpacked(graph: fx.Graph, packed: fx.Node, dim: int, like: fx.Node) -> fx.Node:
    bits = call(graph, saved.UNPACK_PLANES, packed, 1, dim, like=like)
    return call(graph, aten.ne.Scalar, bits, 0, like=like)


def _is_mask(node: fx.Node, joint: Joint) -> bool:
    """Whether a node of backward is a mask that is a function of forward's values alone."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype != torch.bool or not is_pointwise(node) or "recompute" in node.meta:
        return False
    if node in joint.after_tangents or not any(user in joint.after_tangents for user in node.users):
        return False
    # Not one that this pass has unpacked.
    return not any(source.target in saved.BACKWARD for source in node.all_input_nodes)


def _pack_mask(mask: fx.Node) -> int:
    dim = plane_dim(mask.meta["val"])
    if dim is None:
        return 0
    users, graph = list(mask.users), mask.graph
    with graph.inserting_after(mask):
        packed = call(graph, saved.PACK_PLANES, mask, 1, dim, like=mask)
    with graph.inserting_after(packed):
        bits = call(graph, saved.UNPACK_PLANES, packed, 1, dim, like=mask)
    with graph.inserting_after(bits):
        unpacked = call(graph, aten.ne.Scalar, bits, 0, like=mask)
    for user in users:
        user.replace_input_with(mask, unpacked)
    return 1
