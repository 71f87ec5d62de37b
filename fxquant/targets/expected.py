"""Which kernel a target is expected to make of a quantized operator, as data: what `fxquant.explain` forecasts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

FLOAT = "float: "  # begins the forecast for what stays float
FLOAT_PROBABILITIES = "the probabilities it multiplies are not quantized"  # of attention's second product

FLOAT_RECURRENT = "recurrent layers multiply in float, with the weights that their codes stand for"


@dataclass(frozen=True, kw_only=True)
class ExpectedKernel:
    """What a runtime makes of an operator.

    Attributes:
        name: the kernel; ``{code}`` in it is the code type of the first operand, as OpenVINO names it, ``{kind}``
            what its operands are, ``int8``, ``fp8`` or ``fp4``.
        joined: its name where the operator's own result is quantized too; empty if that changes nothing.
        needs: operands without which it stays float; None for all of them.
        never: why it runs in float though its operands are quantized; empty where it does not.
    """

    name: str = ""
    joined: str = ""
    needs: tuple[str, ...] | None = None
    never: str = ""


@dataclass(frozen=True, kw_only=True)
class WeightOnly:
    """What a runtime makes of a product with a quantized weight and a float activation.

    Attributes:
        name: the kernel; ``{bits}`` in it is the width of the weight's codes in the file, ``{kind}`` what they are.
        beside: what it makes of a weight per group beside a quantized activation.
        groups: the group sizes that it knows there; None: any.
        channels: whether a scale per channel will do.
    """

    name: str
    beside: str
    groups: Collection[int] | None = None
    channels: bool = True


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a target is expected to make of a plan.

    Attributes:
        kernels: op kind, or ``kind.operand`` where the operands of one operator go different ways → kernel. What is
            not in it is "not known".
        codes: widths of code that its integer kernels read; others are exported, and computed with in float.
        families: what becomes of operands of a family (`QuantSpec.family`), where that is another kernel or none;
            ``{name}`` in it is the kernel that others become.
        weight_only: of products whose weight alone is quantized; None: nothing is known about them.
    """

    kernels: Mapping[str, ExpectedKernel] = field(default_factory=dict)
    codes: range = range(2, 17)
    families: Mapping[str, str] = field(default_factory=dict)
    weight_only: WeightOnly | None = None
