"""The small floating-point formats that a quantizer rounds to, as plain data.

Sources: OCP 8-bit Floating Point Specification (OFP8) for e4m3 and e5m2, OCP Microscaling Formats (MX) v1.0 for
e3m2, e2m3 and e2m1.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxquant.errors import InvalidArgument


@dataclass(frozen=True)
class FloatFormat:
    """Sign, exponent and mantissa: ``±1.m · 2^(e − bias)``, and ``±0.m · 2^emin`` where the exponent field is 0.

    Attributes:
        name: as in ``"e4m3"``.
        exponent_bits: width of the exponent field.
        mantissa_bits: width of the stored mantissa, without the implied leading 1.
        bias: what is taken off the exponent field.
        max: the largest finite value.
        has_infinity: whether ±inf has a code.
        has_nan: whether NaN has a code.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    has_infinity: bool
    has_nan: bool

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal value; subnormals share its step."""
        return 1 - self.bias

    @property
    def emax(self) -> int:
        """Exponent of the largest value: floor(log2(max))."""
        return len(bin(int(self.max))) - 3

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive value, and the step of the grid around 0."""
        return 2.0 ** (self.emin - self.mantissa_bits)

    @property
    def overflows(self) -> bool:
        """Whether a value can round to something beyond ``max``: inf or NaN."""
        return self.has_infinity or self.has_nan

    def __str__(self) -> str:
        return self.name


FLOAT_FORMATS: dict[str, FloatFormat] = {
    found.name: found
    for found in (
        FloatFormat("e4m3", 4, 3, 7, 448.0, has_infinity=False, has_nan=True),
        FloatFormat("e5m2", 5, 2, 15, 57344.0, has_infinity=True, has_nan=True),
        FloatFormat("e3m2", 3, 2, 3, 28.0, has_infinity=False, has_nan=False),
        FloatFormat("e2m3", 2, 3, 1, 7.5, has_infinity=False, has_nan=False),
        FloatFormat("e2m1", 2, 1, 1, 6.0, has_infinity=False, has_nan=False),
    )
}
"""Every format by name. ``e4m3`` is the "fn" variant: no infinity, one NaN, largest value 448."""


def float_format(format: str | tuple[int, int] | FloatFormat) -> FloatFormat:
    """The format of a name, ``"e4m3"``, or of its widths, ``(4, 3)``; a format is itself.

    Raises:
        InvalidArgument: no such format; the message lists those that exist.
    """
    if isinstance(format, FloatFormat):
        return format
    for found in FLOAT_FORMATS.values():
        if format in (found.name, (found.exponent_bits, found.mantissa_bits)):
            return found
    known = ", ".join(f"{f.name!r} ({f.exponent_bits}, {f.mantissa_bits})" for f in FLOAT_FORMATS.values())
    raise InvalidArgument(f"`format` must name a floating-point format: got {format!r}. Known ones: {known}.")
