"""Which classes of layers are float in the fastest file: from each layer by itself, then by whole files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fxquant.onnx.tuning.measure import Compared

Set = frozenset[int]  # of classes that are float

_PASSES = 3
_CONFIRMED = 2  # how many times the rounds


class Against(Protocol):
    """Measures whole files beside one, all in the same rounds; ``times`` as many rounds as usual."""

    def __call__(self, reference: Set, others: Sequence[Set], *, times: int = 1) -> Mapping[Set, Compared]: ...


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen.

    Attributes:
        floats: the classes to leave float; none where no file was faster than the one given.
        confirmed: the file with them beside the one given; None where there was no other to confirm.
        every: the file with all classes float beside the one given.
        effects: class → the file chosen, beside which the one with that class the other way ran.
    """

    floats: Set
    confirmed: Compared | None
    every: Compared
    effects: Mapping[int, Compared]


def choose(alone: Mapping[int, Compared], against: Against, margin: float) -> Choice:
    """From the best of three starts, turns classes over while that makes the file faster, and confirms the end.

    ``alone``: each class by itself, float beside integer. The starts are no class, the classes whose layers are
    faster by themselves, and all. A class is float where its layers are faster by ``margin`` alone or the file is
    faster with it, beyond noise; where the file can tell, it decides. The file at the end must be faster than the
    given one by ``margin``, in fresh rounds, and than every other that was a candidate.
    """
    none, every = Set(), Set(alone)
    faster = Set(kind for kind, found in alone.items() if found.is_faster(margin))
    starts = against(none, _distinct([faster, every], none))
    best = _fastest(none, starts)
    effects: dict[Set, Mapping[int, Compared]] = {}
    for _ in range(_PASSES):
        effects[best] = _effects(best, alone, against)
        turned = _turned(best, effects[best], faster, against)
        if turned == best:
            break
        best = turned
    final = against(none, _distinct([best, faster, every], none), times=_CONFIRMED)
    chosen = _fastest(none, final)
    first = max(final, key=lambda each: final[each].gain)
    if first != chosen != none and against(chosen, [first], times=_CONFIRMED)[first].is_faster():
        chosen = first
    if chosen != none and not final[chosen].is_faster(margin):
        chosen = none
    if chosen not in effects:
        effects[chosen] = _effects(chosen, alone, against)
    return Choice(floats=chosen, confirmed=final.get(chosen), every=final[every], effects=effects[chosen])


def _distinct(sets: Sequence[Set], reference: Set) -> list[Set]:
    return [each for each in dict.fromkeys(sets) if each != reference]


def _fastest(reference: Set, found: Mapping[Set, Compared]) -> Set:
    """The fastest file that is faster than the reference; of equals within the noise, that with the fewest floats."""
    faster = {each: compared for each, compared in found.items() if compared.is_faster()}
    if not faster:
        return reference
    best = max(faster.values(), key=lambda compared: compared.gain)
    equal = [each for each, compared in faster.items() if best.gain - compared.gain <= max(best.noise, compared.noise)]
    return min(equal, key=lambda each: (len(each), -faster[each].gain))


def _effects(best: Set, alone: Mapping[int, Compared], against: Against) -> dict[int, Compared]:
    """Class → the file with that class the other way."""
    found = against(best, [best ^ {kind} for kind in alone])
    return {kind: found[best ^ {kind}] for kind in alone}


def _turned(best: Set, effects: Mapping[int, Compared], faster: Set, against: Against) -> Set:
    """The set after this pass: with the classes turned over that make the file faster, if it then is."""
    gaining = Set(kind for kind, found in effects.items() if found.is_faster())
    same = Set(kind for kind, found in effects.items() if not found.is_faster() and not found.is_slower)
    idle = same & (best - faster)
    if not gaining | idle:
        return best
    first = Set({max(gaining, key=lambda kind: effects[kind].gain)}) if gaining else Set()
    found = against(best, _distinct([best ^ (gaining | idle), best ^ gaining, best ^ first], best))
    turned = _fastest(best, found)
    if turned == best and not gaining and not found[best ^ idle].is_slower:
        return best ^ idle  # nothing is lost: integers
    return turned
