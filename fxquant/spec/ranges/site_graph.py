"""What a range sees of a site while its nodes are made: the format, the mode, the state, and a way to add nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

from torch import fx

from fxquant.ops import qparams
from fxquant.spec.mode import Mode


class Format(Protocol):
    """The codes of a site, as `QuantSpec` has them."""

    @property
    def quant_min(self) -> int:
        """Lowest code."""

    @property
    def quant_max(self) -> int:
        """Highest code."""

    @property
    def signed(self) -> bool:
        """Whether codes are below 0, too."""

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is fixed."""

    @property
    def element(self) -> str | None:
        """The small float that codes are, None for integers."""

    @property
    def scale_format(self) -> str | None:
        """What scales of groups are rounded to, None for float32."""


class Qparams(NamedTuple):
    """What a tensor is quantized with.

    Attributes:
        scale: float32, one element, or one for each slice of the site's axis.
        zero_point: shaped like ``scale``: int32, or whole numbers in float32 where it is trained.
        scale_gradient: factor of the gradient that ``scale`` receives, as in LSQ, and a floating zero point; 0: none.
        error_gradient: whether rounding errors inside the range are part of that, or only what is clipped, as in PACT.
    """

    scale: fx.Node
    zero_point: fx.Node
    scale_gradient: float = 0.0
    error_gradient: bool = True


class SiteGraph(Protocol):
    """One tensor to quantize in one graph. Nodes are made each after the one before, with fake values."""

    @property
    def role(self) -> Literal["weight", "activation", "output"]:
        """Of the tensor."""

    @property
    def format(self) -> Format:
        """The codes."""

    @property
    def axis(self) -> int | None:
        """The axis of the value that has a scale for each slice; None for one scale. Groups are rows of it: 0."""

    @property
    def mode(self) -> Mode:
        """What is to be done."""

    @property
    def state(self) -> Mapping[str, fx.Node]:
        """The inputs of the graph that hold the range's state, by name; those of a parameter require a gradient."""

    @property
    def across_ranks(self) -> bool:
        """Whether several processes keep the state equal: updates are then to be `defer`\\ red."""

    def extremes(self, value: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Minimum and maximum of a tensor: over all ranks, where they are to agree before it is quantized."""

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an operator."""

    def pair(self, op: Any, *args: Any, **kwargs: Any) -> tuple[fx.Node, fx.Node]:
        """A call of an operator with two results, and these."""

    def item(self, node: fx.Node, index: int) -> fx.Node:
        """One of several results."""

    def over_ranks(self, value: fx.Node) -> fx.Node:
        """The greatest of a value of one element over all ranks that keep the state equal."""

    def constant(self, number: float) -> fx.Node:
        """A float32 tensor of one element, on the tensor's device."""

    def store(self, **values: fx.Node) -> None:
        """Writes state, by name."""

    def defer(self, average: fx.Node) -> None:
        """Says that an ``average_min_max`` is to be done at the end of the graph, over all ranks where there are more.

        Its results are to be stored; `BatchRangeUpdates` moves them.
        """


def affine_qparams(site: SiteGraph, low: fx.Node, high: fx.Node) -> Qparams:
    """Scale and zero point of a minimum and a maximum: `fxquant.ops.affine_qparams`."""
    limits = site.format.quant_min, site.format.quant_max
    symmetric, named = site.format.symmetric, of_element(site.format)
    return Qparams(*site.pair(qparams.AFFINE_QPARAMS, low, high, *limits, symmetric, **named))


def of_element(format: Format) -> dict[str, str]:
    """What operators are told of a format of small floats; nothing of integers."""
    return {} if format.element is None else {"element": format.element}
