"""Named recipes: which format activations and weights get."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fxquant.errors import InvalidArgument
from fxquant.spec.quant_spec import TOKEN, QuantSpec
from fxquant.spec.ranges.base import Range
from fxquant.spec.ranges.current_tensor import CurrentTensor
from fxquant.spec.ranges.learned import Learned
from fxquant.spec.ranges.named import get_range
from fxquant.spec.rules import Rule, checked


def check_spec(role: str, spec: QuantSpec, subject: str) -> None:
    """Raises InvalidArgument for a format that no site of this role can have."""
    if spec.group_size is not None and (role == "output" or (role == "weight" and spec.group_size == TOKEN)):
        raise InvalidArgument(
            f"{subject}.group_size must be {'None' if role == 'output' else 'at least 2'}: got {spec.group_size}. "
            f"{'A result has one scale.' if role == 'output' else 'A scale per token is for activations.'}"
        )
    if role != "weight":
        if spec.axis is not None:
            raise InvalidArgument(f"{subject}.axis must be None: got {spec.axis}. An activation has one scale.")
        if role not in spec.range.roles:
            raise InvalidArgument(f"{subject}.range must be one for activations: got {spec.range}.")
        if spec.group_size is not None and spec.range.per_group and spec.range.stateful:
            raise InvalidArgument(
                f"{subject}.range must be CurrentTensor() for an activation in groups: got {spec.range}. They are "
                "other values in every batch, which no kept scale stands for."
            )
        return
    if role not in spec.range.roles:
        raise InvalidArgument(
            f"{subject}.range must be CurrentTensor: got {spec.range}. "
            "Set range=fxquant.CurrentTensor(), or fxquant.Learned() to train the scale: a weight needs no history."
        )
    if not (spec.signed and spec.symmetric):
        raise InvalidArgument(f"{subject} must be signed and symmetric: got {spec}. Runtimes take zero point 0 there.")
    if spec.group_size is not None and spec.axis is None:
        raise InvalidArgument(
            f"{subject}.group_size must go with an axis: got group_size={spec.group_size} and axis=None. "
            "Set axis=0, the output channels."
        )
    if subject.startswith("Recipe") and spec.axis not in (None, 0):
        raise InvalidArgument(
            f"{subject}.axis must be 0 (per output channel) or None: got {spec.axis}. "
            "Placement finds each operator's own axis."
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Formats for a whole model.

    ``weight.axis`` 0 stands for "per output channel": placement sets the axis of each operator.
    ``kinds`` restricts quantization to some op kinds (None: all that the target supports); a kind that matches
    nothing in the model is an error at prepare. ``rules`` are exceptions, see `fxquant.Rule`.
    ``activation`` None leaves activations in float (weight only), but for those that a rule gives a format.
    """

    name: str
    activation: QuantSpec | None = field(default_factory=lambda: QuantSpec(signed=False, symmetric=False))
    weight: QuantSpec = field(default_factory=lambda: QuantSpec(narrow=True, axis=0, range=CurrentTensor()))
    kinds: frozenset[str] | None = None
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        check_spec("weight", self.weight, "Recipe.weight")
        if self.activation is not None:
            check_spec("activation", self.activation, "Recipe.activation")
        checked(self.rules)

    def with_rules(self, rules: Iterable[Rule]) -> Recipe:
        """The same recipe with more rules, which are asked before its own."""
        return dataclasses.replace(self, rules=(*checked(rules), *self.rules))

    def with_range(self, found: str | Range) -> Recipe:
        """The same recipe with another way to find activation ranges; weight-only ones have none.

        ``found`` is a name (``"moving_average"``, ``"delayed"``) or the range itself. Formats that rules give keep
        their own.
        """
        if self.activation is None:
            return self
        return dataclasses.replace(self, activation=dataclasses.replace(self.activation, range=get_range(found)))


def _weight(**fields: Any) -> QuantSpec:
    """Per output channel, or along it in groups."""
    return QuantSpec(axis=0, range=CurrentTensor(), **fields)


def _mx(element: str) -> tuple[QuantSpec, QuantSpec]:
    """Activations and weights of an MX format, which has groups of 32: OCP Microscaling Formats v1.0."""
    fields: dict[str, Any] = {"element": element, "group_size": 32, "scale_format": "e8m0"}
    return QuantSpec(range=CurrentTensor(), **fields), _weight(**fields)


_MXFP8, _MXFP4 = _mx("e4m3"), _mx("e2m1")
_NVFP4: dict[str, Any] = {"element": "e2m1", "group_size": 16, "scale_format": "e4m3"}
_U8 = QuantSpec(signed=False, symmetric=False)
# Of few codes the extremes are a bad range: bench/results/accuracy.jsonl has both.
_LEARNED_U8, _LEARNED_U4 = (QuantSpec(bits=bits, signed=False, symmetric=False, range=Learned()) for bits in (8, 4))
_LEARNED_S4, _LEARNED_S2 = (QuantSpec(bits=bits, narrow=True, axis=0, range=Learned()) for bits in (4, 2))

# Of codes from 0 on, a token's own zero point wastes none: see bench/results/accuracy.jsonl for signed ones.
_TOKEN_U4 = QuantSpec(bits=4, signed=False, symmetric=False, group_size=TOKEN, range=CurrentTensor())
# Queries, keys and probabilities in four bits cost a language model 0.006 nats, and no kernel has fewer bits than 8.
_ATTENTION = tuple(
    Rule(kind=kind, weighted=False, operand="activation", spec=_LEARNED_U8, optional=True)
    for kind in ("sdpa", "matmul", "einsum")
)

# No product makes up for the error of a table: in four bits those of a small language model cost more than all its
# layers' weights (bench/results/accuracy.jsonl). They are looked up, not multiplied: 8 bits take memory, no time.
_TABLES = Rule(kind="embedding", operand="weight", spec=_weight(narrow=True), optional=True)
_FLOAT_TABLES = Rule(kind="embedding", operand="weight", spec=_weight(element="e4m3"), optional=True)

INT8 = Recipe(name="int8")
INT8_DYNAMIC = Recipe(
    name="int8_dynamic",
    activation=QuantSpec(narrow=True, group_size=TOKEN, range=CurrentTensor()),
    weight=_weight(narrow=True),
)
W4A8 = Recipe(name="w4a8", activation=_U8, weight=_weight(bits=4, narrow=True), rules=(_TABLES,))
W4A4 = Recipe(name="w4a4", activation=_LEARNED_U4, weight=_LEARNED_S4, rules=(_TABLES, *_ATTENTION))
W4A4_DYNAMIC = Recipe(name="w4a4_dynamic", activation=_TOKEN_U4, weight=_LEARNED_S4, rules=(_TABLES, *_ATTENTION))
W2A8 = Recipe(name="w2a8", activation=_LEARNED_U8, weight=_LEARNED_S2, rules=(_TABLES,))
INT4_WEIGHT_ONLY = Recipe(name="int4_weight_only", activation=None, weight=_weight(bits=4, narrow=True, group_size=32))
FP8 = Recipe(name="fp8", activation=QuantSpec(element="e4m3"), weight=_weight(element="e4m3"))
MXFP8 = Recipe(name="mxfp8", activation=_MXFP8[0], weight=_MXFP8[1])
MXFP4 = Recipe(name="mxfp4", activation=_MXFP4[0], weight=_MXFP4[1], rules=(_FLOAT_TABLES,))
NVFP4 = Recipe(name="nvfp4", activation=QuantSpec(**_NVFP4), weight=_weight(**_NVFP4), rules=(_FLOAT_TABLES,))
W4A16_NVFP4 = Recipe(name="w4a16_nvfp4", activation=None, weight=_weight(**_NVFP4))

_EVERY = (INT8, INT8_DYNAMIC, W4A8, W4A4, W4A4_DYNAMIC, W2A8, INT4_WEIGHT_ONLY, FP8, MXFP8, MXFP4, NVFP4, W4A16_NVFP4)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _EVERY}


def get_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe of a name, or the recipe itself; InvalidArgument names the known ones."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str) or recipe not in RECIPES:
        known = ", ".join(repr(name) for name in RECIPES)
        raise InvalidArgument(f"recipe must be a Recipe or one of {known}: got {recipe!r}.")
    return RECIPES[recipe]
