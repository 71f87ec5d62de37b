"""Which devices a runtime compiles for, and from which of them on it has a format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fxquant.errors import InvalidArgument


@dataclass(frozen=True, kw_only=True)
class Cards:
    """Devices by their compute capability.

    Attributes:
        known: capabilities, the least first.
        least: what a file holds → the first capability that has it: the element of codes (``"e4m3"``), groups of
            integers (``"int4 groups"``), the type of float parts (``"bfloat16"``), matrix products beside float parts
            of a type (``"float32 matrices"``).
        float_convolutions: those that run every convolution in float.
    """

    known: tuple[str, ...]
    least: Mapping[str, str] = field(default_factory=dict)
    float_convolutions: tuple[str, ...] = ()

    def check(self, capability: str, target: str) -> None:
        """Raises InvalidArgument for a capability that is none of these."""
        if capability not in self.known:
            known = ", ".join(map(repr, self.known))
            raise InvalidArgument(f"capability must be one of {known} for {target}: got {capability!r}.")

    def too_old(self, capability: str, what: str) -> str | None:
        """The least capability for something, where that of this card is below it."""
        least = self.least.get(what)
        return least if least is not None and _number(capability) < _number(least) else None


def _number(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))
