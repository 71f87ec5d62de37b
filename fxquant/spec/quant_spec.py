"""`QuantSpec`: an integer format, as plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fxquant.errors import InvalidArgument
from fxquant.numerics.division import ROUNDINGS, Rounding
from fxquant.spec.ranges.base import Range
from fxquant.spec.ranges.moving_average import MovingAverage


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """An affine integer format: ``q = clamp(round(x / scale) + zero_point, quant_min, quant_max)``.

    Attributes:
        bits: width of the code, 2…16.
        signed: codes from −2^(bits−1), else from 0.
        symmetric: the zero point is fixed (0 when signed, the middle code otherwise).
        narrow: leave out the lowest code of a signed format, so that codes mirror at 0.
        axis: channel axis of a per-channel scale, None for one scale per tensor.
        group_size: number of consecutive values of a channel that share a scale, for matrices of weights; None for
            one scale per channel. Groups run along the axis that is not ``axis``.
        rounding: ``"divide"`` is ONNX QuantizeLinear's ``x / scale``, ``"reciprocal"`` torch's ``x · (1/scale)``.
        range: how scale and zero point are found.
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    narrow: bool = False
    axis: int | None = None
    group_size: int | None = None
    rounding: Rounding = "divide"
    range: Range = dataclasses.field(default_factory=MovingAverage)

    def __post_init__(self) -> None:
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
            self._check_groups()

    def _check_groups(self) -> None:
        if type(self.group_size) is not int or self.group_size < 2:
            raise InvalidArgument(f"QuantSpec.group_size must be an integer of at least 2: got {self.group_size!r}.")
        if self.axis is None:
            raise InvalidArgument(
                f"QuantSpec.group_size must go with an axis: got group_size={self.group_size} and axis=None. "
                "Set axis=0, the output channels."
            )
        if not self.signed:
            raise InvalidArgument("QuantSpec per group must be signed: runtimes take zero point 0 there.")
        if not self.range.per_group:
            raise InvalidArgument(
                f"QuantSpec per group must have range=CurrentTensor(): got {self.range}. Only weights have groups."
            )

    @property
    def quant_min(self) -> int:
        """Lowest code."""
        return -(2 ** (self.bits - 1)) + self.narrow if self.signed else 0

    @property
    def quant_max(self) -> int:
        """Highest code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    def __str__(self) -> str:
        """``u8``, ``s8 axis 0``, ``s4 axis 0 group 32``: short enough for a table cell."""
        words = [f"{'s' if self.signed else 'u'}{self.bits}"]
        if self.axis is not None:
            words.append(f"axis {self.axis}")
        if self.group_size is not None:
            words.append(f"group {self.group_size}")
        return " ".join(filter(None, (*words, self.range.suffix())))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the plan in a checkpoint; `from_dict` reads them back."""
        fields: dict[str, Any] = dataclasses.asdict(self)
        fields["range"] = self.range.to_dict()
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> QuantSpec:
        """Inverse of `to_dict`; what older plans lack has its default."""
        fields = dict(fields)
        return cls(range=Range.from_dict(fields.pop("range")), **fields)
