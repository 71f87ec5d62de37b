"""Rules: exceptions to a recipe, by where an operator stands in the model and what it is."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fxquant.errors import InvalidArgument
from fxquant.spec.quant_spec import QuantSpec

ModelEnd = Literal["first", "last"]

_MATCHED = ("path", "module", "kind", "operand", "weighted", "position")


@dataclass(frozen=True, kw_only=True)
class Where:
    """What a rule looks at: one operand of one operator.

    Attributes:
        modules: path and class of every module around the operator, outermost first; "" is the model itself.
        kind: operator kind, as in `fxquant.graph.kinds.KINDS`.
        operand: ``"weight"``, ``"input"``, ``"lhs"``, …; ``"output"`` for the operator's result.
        is_weight: whether it is a weight under another name, as the ``"rhs"`` of ``x @ parameter``.
        weighted: whether the operator has a weight, under whatever name.
        position: the ends of the model that the operator stands at.
    """

    modules: tuple[tuple[str, type | str | None], ...]
    kind: str
    operand: str
    is_weight: bool = False
    weighted: bool = False
    position: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Another format for the operands that match, or none: they stay float.

    All that is given must match, what is left out matches anything. Of a list of rules the first that matches an
    operand decides; the rest of the model follows the recipe.

    Attributes:
        spec: the format; None leaves the operand in float. For a weight, axis 0 stands for the output channel.
        path: glob over the path of the operator's module or of one around it: ``"layer1"`` matches all that
            ``layer1`` runs, ``"*.attn"`` every attention, ``""`` only what the model's own forward runs.
        module: class, or name of a class, of that module or one around it (the same one, if ``path`` is given too).
        kind: operator kind: ``"conv"``, ``"linear"``, ``"matmul"``, …
        operand: ``"weight"``, ``"input"``, …; ``"output"`` for the result; ``"activation"`` for all but the weight,
            which the parameter of ``x @ parameter`` is too.
        weighted: whether the operator has a weight: False for products of two activations, as in attention.
        position: ``"first"`` or ``"last"`` operator of the model that has a weight.
        optional: whether it may match nothing, and whether its codes may have another zero point where the target needs
            that, as a recipe's have; otherwise both are errors.
    """

    spec: QuantSpec | None
    path: str | None = None
    module: type | str | None = None
    kind: str | None = None
    operand: str | None = None
    weighted: bool | None = None
    position: ModelEnd | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        if all(getattr(self, name) is None for name in _MATCHED):
            raise InvalidArgument(f"Rule must say what it matches: got none of {', '.join(_MATCHED)}.")
        if not isinstance(self.path, str | None):
            raise InvalidArgument(f"Rule.path must be a str: got {self.path!r}. For a class write module=….")
        if self.position not in (None, "first", "last"):
            raise InvalidArgument(f"Rule.position must be 'first' or 'last': got {self.position!r}.")
        if self.spec is not None and not isinstance(self.spec, QuantSpec):
            raise InvalidArgument(f"Rule.spec must be a QuantSpec, or None for float: got {self.spec!r}.")
        if self.spec is not None and self.operand is None:
            raise InvalidArgument(
                "Rule.operand must say what gets the spec: got None. Weights and activations differ in format: give a "
                "rule for 'weight' and one for 'activation'."
            )

    def matches(self, where: Where) -> bool:
        """Whether all that the rule gives is so."""
        if self.kind is not None and self.kind != where.kind:
            return False
        if self.operand is not None and not _is_operand(self.operand, where):
            return False
        if self.weighted is not None and self.weighted != where.weighted:
            return False
        if self.position is not None and self.position not in where.position:
            return False
        return any(self._matches_module(path, found, where) for path, found in where.modules)

    def _matches_module(self, path: str, found: type | str | None, where: Where) -> bool:
        if self.path == "" and len(where.modules) > 1:
            return False
        if self.path is not None and not fnmatch.fnmatchcase(path, self.path):
            return False
        return self.module is None or _is_class(found, self.module)

    def __str__(self) -> str:
        """``Rule(path='head', spec=None)``: what was given."""
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        given = [
            f"{n}={v.__name__ if isinstance(v, type) else v if isinstance(v, QuantSpec) else repr(v)}"
            for n, v in fields
            if n == "spec" or (v is not None and (n, v) != ("optional", False))
        ]
        return f"Rule({', '.join(given[1:] + given[:1])})"


def _is_operand(wanted: str, where: Where) -> bool:
    if wanted == "activation":
        return where.operand not in ("weight", "output") and not where.is_weight
    return wanted == where.operand or (wanted == "weight" and where.is_weight)


def _is_class(found: type | str | None, wanted: type | str) -> bool:
    if found is None:
        return False
    names = [c.__name__ for c in found.__mro__] if isinstance(found, type) else [found.rsplit(".", 1)[-1]]
    return (wanted if isinstance(wanted, str) else wanted.__name__) in names


def skip(
    path: str | None = None,
    *,
    module: type | str | None = None,
    kind: str | None = None,
    operand: str | None = None,
    weighted: bool | None = None,
    position: ModelEnd | None = None,
    optional: bool = False,
) -> Rule:
    """A rule that leaves what it matches in float: ``skip("head")``, ``skip(module=nn.LSTM)``."""
    return Rule(
        spec=None,
        path=path,
        module=module,
        kind=kind,
        operand=operand,
        weighted=weighted,
        position=position,
        optional=optional,
    )


def first_layer(spec: QuantSpec | None = None, *, operand: str | None = None) -> Rule:
    """The first operator that has a weight, in another format; in float by default."""
    return Rule(spec=spec, position="first", operand=operand)


def last_layer(spec: QuantSpec | None = None, *, operand: str | None = None) -> Rule:
    """The last operator that has a weight, in another format; in float by default."""
    return Rule(spec=spec, position="last", operand=operand)


class Rulebook:
    """A recipe's rules while a model is placed: says which decides, and remembers which were of use."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self.used: set[Rule] = set()
        # What there is, for the message about a rule that matched nothing.
        self.seen: dict[str, dict[str, None]] = {"path": {}, "kind": {}, "operand": {"activation": None}}

    def decide(self, where: Where) -> Rule | None:
        """The first rule that matches."""
        self.seen["path"].update((path, None) for path, _ in where.modules if path)
        self.seen["kind"][where.kind] = self.seen["operand"][where.operand] = None
        for rule in self.rules:
            if rule.matches(where):
                self.used.add(rule)
                return rule
        return None

    def unused(self) -> list[Rule]:
        """Rules that no operand met, or that earlier ones always forestalled; optional ones are no concern."""
        return [rule for rule in self.rules if rule not in self.used and not rule.optional]

    def check(self) -> None:
        """Raises InvalidArgument for the first unused rule, with what comes near it."""
        for rule in self.unused():
            raise InvalidArgument(
                f"rules must each match an operand: got none for {rule}.{self._hint(rule)} "
                "Mark it optional=True if that is meant."
            )

    def _hint(self, rule: Rule) -> str:
        hints = []
        for field, label in (("path", "Modules with operators"), ("kind", "Kinds"), ("operand", "Operands")):
            given, seen = getattr(rule, field), self.seen[field]
            if given is not None and given not in seen:
                near = difflib.get_close_matches(given, seen, n=3, cutoff=0.5)
                hints.append(f" {label}: {', '.join(near) if near else some(seen)}.")
        return "".join(hints)


def some(names: Iterable[str], most: int = 12) -> str:
    """Names for a message, numbered ones as one (``layers.*``), and how many are left out."""
    found = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def checked(rules: Iterable[Rule] | None) -> tuple[Rule, ...]:
    """A user's list of rules; InvalidArgument for anything else, in it or in its place."""
    if isinstance(rules, Rule):
        raise InvalidArgument(f"rules must be a list: got {rules}. Write rules=[…] around it.")
    found = tuple(rules or ())
    for rule in found:
        if not isinstance(rule, Rule):
            raise InvalidArgument(f"rules must be fxquant.Rule objects: got {rule!r}. Write fxquant.skip('path').")
    return found
