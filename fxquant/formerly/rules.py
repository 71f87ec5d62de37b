"""Now `fxquant.spec.rules`."""

from fxquant.spec.rules import Rule, Rulebook, Where, first_layer, last_layer, skip

__all__ = ["Rule", "Rulebook", "Where", "first_layer", "last_layer", "skip"]
