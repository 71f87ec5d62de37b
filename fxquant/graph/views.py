"""Typed views of nodes: what an operator's node reads, by name, however the node writes it.

``FakeQuant.of(node)`` is the view of a fake-quant, and None for all else, as for what is no node at all::

    site = FakeQuant.of(node)
    if site is not None and site.axis is None:
        set_argument(site.node, "scale", shared)

A view holds nothing but its node: it reads what the node has now.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from fxquant.graph.arguments import argument, has_argument, operand
from fxquant.graph.nodes import packet
from fxquant.ops import fake_quantize, qparams
from fxquant.ops.marks import BIND

if TYPE_CHECKING:
    from typing_extensions import Self

aten = torch.ops.aten
Number = int | float


@dataclass(frozen=True)
class View:
    """A node of one of ``OPS``, or of any overload of ``PACKETS``."""

    node: fx.Node
    OPS: ClassVar[Collection[Any]] = ()
    PACKETS: ClassVar[Collection[Any]] = ()

    @classmethod
    def of(cls, value: object) -> Self | None:
        """The view of a node of these operators; None for other values."""
        if not isinstance(value, fx.Node) or value.op != "call_function":
            return None
        return cls(value) if value.target in cls.OPS or (cls.PACKETS and packet(value) in cls.PACKETS) else None

    def optional(self, name: str) -> fx.Node | None:
        """An argument that is a node or None."""
        value = argument(self.node, name)
        assert value is None or isinstance(value, fx.Node), f"{name} of {self.node.name}: got {value!r}"
        return value


@dataclass(frozen=True)
class Item(View):
    """``source[index]``: one of an operator's results."""

    OPS: ClassVar[Collection[Any]] = (operator.getitem,)

    @property
    def source(self) -> fx.Node:
        """What has several results."""
        value = self.node.args[0]
        assert isinstance(value, fx.Node)
        return value

    @property
    def index(self) -> int:
        """Which of them."""
        value = self.node.args[1]
        assert isinstance(value, int)
        return value


def items(node: fx.Node) -> list[fx.Node]:
    """The parts that are taken of a node with several results, in order."""
    found = [part for user in node.users if (part := Item.of(user)) is not None]
    return [part.node for part in sorted(found, key=lambda part: part.index)]


class _Affine(View):
    """What fake-quants and their gradients read."""

    @property
    def input(self) -> fx.Node:
        """The float tensor."""
        return operand(self.node, "input")

    @property
    def scale(self) -> fx.Node | Number:
        """A number in the form that takes numbers."""
        return argument(self.node, "scale")

    @property
    def zero_point(self) -> fx.Node | int:
        """A number in the form that takes numbers."""
        return argument(self.node, "zero_point")

    @property
    def axis(self) -> int | None:
        """The dimension that has a scale per slice; None with one scale for all."""
        return argument(self.node, "axis") if has_argument(self.node, "axis") else None

    @property
    def quant_min(self) -> int:
        """The lowest code."""
        return argument(self.node, "quant_min")

    @property
    def quant_max(self) -> int:
        """The highest code."""
        return argument(self.node, "quant_max")

    @property
    def rounding(self) -> str:
        """ "reciprocal" or "divide"."""
        return argument(self.node, "rounding")

    @property
    def element(self) -> str | None:
        """The small float that codes are; None for integers."""
        return argument(self.node, "element") if has_argument(self.node, "element") else None

    @property
    def grid(self) -> tuple[Any, ...]:
        """Scale, zero point, axis where there is one, quant_min and quant_max: what follows the input in the schema."""
        channels = () if self.axis is None else (self.axis,)
        return (self.scale, self.zero_point, *channels, self.quant_min, self.quant_max)

    def has_grid_of(self, other: _Affine) -> bool:
        """Whether both put values on the same grid, and in the same way."""
        return (self.grid, self.rounding, self.element) == (other.grid, other.rounding, other.element)


@dataclass(frozen=True)
class FakeQuant(_Affine):
    """``fake_quantize(input, scale, zero_point[, axis], quant_min, quant_max, rounding=…, pass_through=…)``."""

    OPS: ClassVar[Collection[Any]] = fake_quantize.FAKE_QUANTIZE

    @property
    def has_numbers(self) -> bool:
        """Whether scale and zero point are numbers and not tensors."""
        return self.node.target is fake_quantize.PER_TENSOR_SCALAR

    @property
    def pass_through(self) -> bool:
        """Whether no code lies outside the range, so that the gradient is dy itself."""
        return has_argument(self.node, "pass_through") and argument(self.node, "pass_through")

    @property
    def scale_gradient(self) -> float:
        """The factor of the gradient that scale and a floating zero point receive; 0 for none."""
        return argument(self.node, "scale_gradient") if has_argument(self.node, "scale_gradient") else 0.0


@dataclass(frozen=True)
class FakeQuantBackward(_Affine):
    """``fake_quantize'(grad, input, …)``: the gradient of a fake-quant of ``input``."""

    OPS: ClassVar[Collection[Any]] = fake_quantize.BACKWARD

    @property
    def grad(self) -> fx.Node:
        """The gradient of the result."""
        return operand(self.node, "grad")


@dataclass(frozen=True)
class AffineQparams(View):
    """``affine_qparams(min, max, …)``: scale and zero point of a range."""

    OPS: ClassVar[Collection[Any]] = (qparams.AFFINE_QPARAMS,)

    @property
    def min(self) -> fx.Node:
        """The lower end."""
        return operand(self.node, "min")

    @property
    def max(self) -> fx.Node:
        """The upper end."""
        return operand(self.node, "max")

    @property
    def quant_min(self) -> int:
        """The lowest code."""
        return argument(self.node, "quant_min")

    @property
    def quant_max(self) -> int:
        """The highest code."""
        return argument(self.node, "quant_max")

    @property
    def symmetric(self) -> bool:
        """Whether the range is widened to one around 0."""
        return argument(self.node, "symmetric")


@dataclass(frozen=True)
class SymmetricQparams(View):
    """``symmetric_qparams(input, axis, quant_max)``: scale and zero point, of 0, from the tensor itself."""

    OPS: ClassVar[Collection[Any]] = (qparams.SYMMETRIC_QPARAMS,)

    @property
    def input(self) -> fx.Node:
        """The tensor."""
        return operand(self.node, "input")

    @property
    def axis(self) -> int | None:
        """The dimension with a scale per slice, None for one scale."""
        return argument(self.node, "axis")

    @property
    def quant_max(self) -> int:
        """The highest code; the lowest is its negative, or one less."""
        return argument(self.node, "quant_max")


@dataclass(frozen=True)
class BlockQparams(View):
    """``block_qparams(rows, tensor_amax, …)``: a scale for each row, quantized in turn."""

    OPS: ClassVar[Collection[Any]] = (qparams.BLOCK_QPARAMS,)

    @property
    def tensor_amax(self) -> fx.Node | None:
        """What the scales are relative to; None for the rows' own."""
        return self.optional("tensor_amax")


Qparams = AffineQparams | SymmetricQparams


def qparams_of(value: object) -> Qparams | None:
    """What computes a scale or zero point, where it is one of the two results of such an operator."""
    part = Item.of(value)
    return None if part is None else AffineQparams.of(part.source) or SymmetricQparams.of(part.source)


@dataclass(frozen=True)
class AverageMinMax(View):
    """``average_min_max(low, high, min, max, constant)``: a range moved towards the extremes of a batch."""

    OPS: ClassVar[Collection[Any]] = (qparams.AVERAGE_MIN_MAX,)

    @property
    def extremes(self) -> tuple[fx.Node, fx.Node]:
        """Least and greatest value of the batch."""
        return operand(self.node, "low"), operand(self.node, "high")

    @property
    def state(self) -> tuple[fx.Node, fx.Node]:
        """The range so far."""
        return operand(self.node, "min"), operand(self.node, "max")

    @property
    def constant(self) -> float:
        """How far it moves."""
        return argument(self.node, "constant")


@dataclass(frozen=True)
class Bind(View):
    """``bind(key, modes, state, group, before)``: the frame of an owner, see `fxquant.ops.marks`."""

    OPS: ClassVar[Collection[Any]] = (BIND,)

    @property
    def key(self) -> str:
        """Digest of the owner's site list, or the owner's path while a model is prepared."""
        return argument(self.node, "key")

    @property
    def modes(self) -> Sequence[int]:
        """One `fxquant.spec.mode.Mode` a site."""
        return argument(self.node, "modes")

    @property
    def state(self) -> Sequence[fx.Node]:
        """The ranges of the sites, one after the other."""
        return argument(self.node, "state")

    @property
    def group(self) -> str | None:
        """The process group whose ranks keep equal ranges; "" for none, None for all ranks."""
        return argument(self.node, "group")

    @property
    def before(self) -> bool:
        """Whether they reduce the extremes of a tensor before it is quantized."""
        return argument(self.node, "before")


@dataclass(frozen=True)
class BatchNorm(View):
    """``batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, …)``."""

    PACKETS: ClassVar[Collection[Any]] = (aten.batch_norm,)

    @property
    def input(self) -> fx.Node:
        """What is normalized; its channels are dimension 1."""
        return operand(self.node, "input")

    @property
    def weight(self) -> fx.Node | None:
        """γ."""
        return self.optional("weight")

    @property
    def bias(self) -> fx.Node | None:
        """β."""
        return self.optional("bias")

    @property
    def running_mean(self) -> fx.Node | None:
        """None where no statistics are kept; so is the variance then."""
        return self.optional("running_mean")

    @property
    def running_var(self) -> fx.Node | None:
        """The unbiased variance."""
        return self.optional("running_var")

    @property
    def training(self) -> bool:
        """Whether it normalizes with statistics of the batch."""
        return argument(self.node, "training") is True

    @property
    def momentum(self) -> float | fx.Node:
        """The weight of the batch in the running statistics; a node where the graph computes it."""
        return argument(self.node, "momentum")

    @property
    def eps(self) -> float:
        """What is added to a variance."""
        return argument(self.node, "eps")


@dataclass(frozen=True)
class Convolution(View):
    """A convolution of one to three dimensions, transposed or not."""

    PACKETS: ClassVar[Collection[Any]] = (
        *(aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution),
        *(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d),
    )

    @property
    def input(self) -> fx.Node:
        """``[N, C, …]``, or ``[C, …]`` but for ``convolution``."""
        return operand(self.node, "input")

    @property
    def weight(self) -> fx.Node:
        """``[out, in / groups, …]``; transposed ``[in, out / groups, …]``."""
        return operand(self.node, "weight")

    @property
    def bias(self) -> fx.Node | None:
        """One number a channel."""
        return self.optional("bias")

    @property
    def stride(self) -> Sequence[int | torch.SymInt]:
        """For each dimension, or one for all."""
        return argument(self.node, "stride")

    @property
    def padding(self) -> Sequence[int | torch.SymInt] | str:
        """For each dimension, or one for all; "same" or "valid" in the overloads that take words."""
        return argument(self.node, "padding")

    @property
    def dilation(self) -> Sequence[int | torch.SymInt]:
        """For each dimension, or one for all."""
        return argument(self.node, "dilation")

    @property
    def groups(self) -> int:
        """Of input channels, each of which makes channels of its own."""
        return argument(self.node, "groups")

    @property
    def transposed(self) -> bool:
        """Whether it is the gradient of a convolution by its input."""
        if has_argument(self.node, "transposed"):
            return bool(argument(self.node, "transposed"))
        return packet(self.node) not in (aten.conv1d, aten.conv2d, aten.conv3d)
