"""`QuantSpec`: the format of a tensor's codes and of their scales, as plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fxquant.errors import InvalidArgument
from fxquant.numerics.blocks import SCALE_FORMATS
from fxquant.numerics.division import ROUNDINGS, Rounding
from fxquant.numerics.formats import FLOAT_FORMATS
from fxquant.spec.ranges.base import Range
from fxquant.spec.ranges.moving_average import MovingAverage

TOKEN = -1
"""The group size of a scale per token: all values along the axis that a product sums over."""

_OF_FLOATS = ("element", "scale_format")


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Codes and their scale: ``q = clamp(round(x / scale) + zero_point, quant_min, quant_max)``, or small floats.

    Attributes:
        bits: width of an integer code, 2…16; that of ``element``, where one is given.
        signed: codes from −2^(bits−1), else from 0.
        symmetric: the zero point is fixed (0 when signed, the middle code otherwise).
        narrow: leave out the lowest code of a signed format, so that codes mirror at 0.
        axis: channel axis of a per-channel scale, None for one scale per tensor.
        group_size: number of consecutive values that share a scale. Of a matrix of weights they run along the axis
            that is not ``axis``; of an activation along the one that its product sums over, −1 for all of it: a scale
            per token, and a zero point where the codes have one. None for one scale per channel, or tensor.
        element: a small float that takes the place of integers: ``"e4m3"``, ``"e5m2"``, ``"e3m2"``, ``"e2m3"`` or
            ``"e2m1"``, rounded half to even and saturating. None: integers.
        scale_format: what the scales of groups are rounded to: ``"e8m0"``, powers of two as in MX; ``"e4m3"`` times one
            float32 scale of the tensor as in NVFP4, found by ``range``; None for float32.
        rounding: ``"divide"`` is ONNX QuantizeLinear's ``x / scale``, ``"reciprocal"`` torch's ``x · (1/scale)``.
        range: how scale and zero point are found.

    >>> str(QuantSpec(element="e2m1", group_size=16, scale_format="e4m3"))
    'e2m1 group 16 scale e4m3'
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    narrow: bool = False
    axis: int | None = None
    group_size: int | None = None
    element: str | None = None
    scale_format: str | None = None
    rounding: Rounding = "divide"
    range: Range = dataclasses.field(default_factory=MovingAverage)

    def __post_init__(self) -> None:
        if self.element is not None:
            self._check_element(self.element)
        if not 2 <= self.bits <= 16:
            raise InvalidArgument(f"QuantSpec.bits must be from 2 to 16: got {self.bits}.")
        if self.rounding not in ROUNDINGS:
            raise InvalidArgument(f"QuantSpec.rounding must be one of {ROUNDINGS}: got {self.rounding!r}.")
        if self.narrow and not self.signed:
            raise InvalidArgument("QuantSpec.narrow must go with signed=True: an unsigned code has no mirror.")
        if self.axis is not None and self.axis < 0:
            raise InvalidArgument(f"QuantSpec.axis must be counted from the front: got {self.axis}.")
        if self.axis is not None and not self.symmetric:
            raise InvalidArgument("QuantSpec per channel must be symmetric: runtimes take zero point 0 there.")
        if self.group_size is not None:
            self._check_groups(self.group_size)
        if self.scale_format is not None:
            self._check_scale_format()
        self.range.check(self)

    def _check_element(self, element: str) -> None:
        if element not in FLOAT_FORMATS:
            known = ", ".join(map(repr, FLOAT_FORMATS))
            raise InvalidArgument(f"QuantSpec.element must be one of {known}, or None: got {element!r}.")
        width = FLOAT_FORMATS[element].bits
        if self.bits not in (8, width):
            raise InvalidArgument(
                f"QuantSpec.bits must be left out beside element={element!r}, which has {width}: got {self.bits}."
            )
        if not (self.signed and self.symmetric) or self.narrow:
            raise InvalidArgument(
                f"QuantSpec must be signed, symmetric and not narrow with element={element!r}: floats have a sign and "
                "no zero point. Leave those fields out."
            )
        object.__setattr__(self, "bits", width)

    def _check_groups(self, size: int) -> None:
        if type(size) is not int or (size < 2 and size != TOKEN):
            raise InvalidArgument(
                f"QuantSpec.group_size must be an integer of at least 2, or {TOKEN} for a scale per token: "
                f"got {size!r}."
            )
        if size != TOKEN and not (self.signed and self.symmetric):
            raise InvalidArgument(
                f"QuantSpec per group must be signed and symmetric: got group_size={size}, signed={self.signed} and "
                f"symmetric={self.symmetric}. Runtimes take zero point 0 there; {TOKEN}, a token, may have another."
            )
        of_tensor = self.scale_format == "e4m3" and "activation" in self.range.roles
        if not self.range.per_group and not of_tensor:
            raise InvalidArgument(
                f"QuantSpec per group must have range=CurrentTensor() or Learned(): got {self.range}. "
                "A group has no history."
            )

    def _check_scale_format(self) -> None:
        if self.scale_format not in SCALE_FORMATS:
            known = ", ".join(map(repr, SCALE_FORMATS))
            raise InvalidArgument(f"QuantSpec.scale_format must be one of {known}, or None: got {self.scale_format!r}.")
        if self.group_size is None or self.group_size == TOKEN:
            raise InvalidArgument(
                f"QuantSpec.scale_format must go with a group_size: got {self.scale_format!r} and "
                f"group_size={self.group_size}. MX has groups of 32, NVFP4 of 16."
            )
        if self.range.per_group and self.range.stateful:
            raise InvalidArgument(
                f"QuantSpec.scale_format must be None beside a range with a scale of its own for each group: got "
                f"{self.scale_format!r} and {self.range}."
            )

    @property
    def quant_min(self) -> int:
        """Lowest code; of a small float the least value, without its fraction."""
        return -self.quant_max if self.element is not None else self._lowest()

    def _lowest(self) -> int:
        return -(2 ** (self.bits - 1)) + self.narrow if self.signed else 0

    @property
    def quant_max(self) -> int:
        """Highest code; of a small float the greatest value, without its fraction."""
        if self.element is not None:
            return int(FLOAT_FORMATS[self.element].max)
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def family(self) -> str:
        """What a runtime must know beyond integers with a scale, a channel's or a group's; empty if nothing.

        ``"e4m3"``, ``"e2m1 e4m3 16"``, ``"token"``: element, format of scales, size of a group; ``"affine token"``
        where its zero point is not 0.
        """
        words = [self.element]
        if self.scale_format is not None:
            words += [self.scale_format, str(self.group_size)]
        elif self.group_size == TOKEN:
            words.append("token" if self.signed and self.symmetric else "affine token")
        elif self.group_size is not None and (self.element is not None):
            words.append(f"float32 {self.group_size}")
        return " ".join(filter(None, words))

    def __str__(self) -> str:
        """``u8``, ``s8 axis 0``, ``s4 axis 0 group 32``, ``e4m3``, ``s8 token``: short enough for a table cell."""
        words = [self.element or f"{'s' if self.signed else 'u'}{self.bits}"]
        if self.axis is not None:
            words.append(f"axis {self.axis}")
        if self.group_size is not None:
            words.append("token" if self.group_size == TOKEN else f"group {self.group_size}")
        if self.scale_format is not None:
            words.append(f"scale {self.scale_format}")
        return " ".join(filter(None, (*words, self.range.suffix())))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the plan in a checkpoint; `from_dict` reads them back."""
        fields: dict[str, Any] = dataclasses.asdict(self)
        fields["range"] = self.range.to_dict()
        # What integers have not is left out, so that versions without it read plans without it.
        return {name: value for name, value in fields.items() if value is not None or name not in _OF_FLOATS}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> QuantSpec:
        """Inverse of `to_dict`; what older plans lack has its default."""
        fields = dict(fields)
        return cls(range=Range.from_dict(fields.pop("range")), **fields)
