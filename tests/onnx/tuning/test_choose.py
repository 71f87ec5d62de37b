"""What is float in the end, with made-up times: a file costs what its layers cost, and more where codes change."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

import pytest

from fxquant.onnx.tuning.choose import Choice, Set, choose
from fxquant.onnx.tuning.measure import Compared

Cost = Callable[[Set], float]


class Machine:
    """Files by their cost, with as much noise as asked for; remembers what it ran."""

    def __init__(self, cost: Cost, noise: float = 0.0, seed: int = 0) -> None:
        self.cost, self.noise, self.random = cost, noise, random.Random(seed)
        self.ran: list[tuple[Set, tuple[Set, ...], int]] = []

    def against(self, reference: Set, others: Sequence[Set], *, times: int = 1) -> Mapping[Set, Compared]:
        self.ran.append((reference, tuple(others), times))
        assert reference not in others and len(set(others)) == len(others), "nothing runs twice in a round"
        before = self._samples(self.cost(reference))
        return {each: Compared.of(before, self._samples(self.cost(each))) for each in others}

    def _samples(self, seconds: float) -> list[float]:
        return [seconds * (1 + self.noise * self.random.gauss(0, 1)) for _ in range(20)]


def alone(*costs: tuple[float, float]) -> dict[int, Compared]:
    """Of each class, its cost as integers and in float."""
    return {number: Compared.of([integer] * 5, [plain] * 5) for number, (integer, plain) in enumerate(costs)}


def chain(costs: Sequence[tuple[float, float]], change: float = 0.0) -> Cost:
    """Layers one after the other; each change between integers and float costs."""

    def cost(floats: Set) -> float:
        kinds = [True, *(number in floats for number in range(len(costs))), True]
        changes = sum(a != b for a, b in itertools.pairwise(kinds))
        return 10 + sum(pair[number in floats] for number, pair in enumerate(costs)) + change * changes

    return cost


def chosen(costs: Sequence[tuple[float, float]], change: float = 0.0, margin: float = 1.02) -> Choice:
    return choose(alone(*costs), Machine(chain(costs, change)).against, margin)


def test_what_is_slower_as_integers_is_float() -> None:
    found = chosen([(2, 1), (1, 2), (4, 1), (1, 1.5)])
    assert found.floats == {0, 2}
    assert found.confirmed is not None
    assert (found.confirmed.reference, found.confirmed.seconds) == (18, 14)
    assert found.every.seconds == 15.5
    # Beside the chosen file: each layer turned over makes it slower, by what it costs.
    assert {kind: -effect.gain for kind, effect in found.effects.items()} == {0: 1, 1: 1, 2: 3, 3: 0.5}


def test_integers_everywhere_recommend_nothing() -> None:
    found = chosen([(1, 2), (1, 3)])
    assert found.floats == frozenset() and found.confirmed is None
    assert found.every.reference == 12 and found.every.seconds == 15


def test_float_everywhere() -> None:
    assert chosen([(2, 1), (3, 1)], change=0.25).floats == {0, 1}


def test_a_float_layer_that_does_not_pay_for_its_edges_stays_integer() -> None:
    """Faster alone, but codes have to be made before and after it."""
    assert chosen([(1, 3), (2, 1.5), (1, 3)], change=1.0).floats == frozenset()


def test_an_integer_layer_between_float_ones_does_not_pay() -> None:
    """A little faster alone: not worth two changes."""
    assert chosen([(4, 1), (1, 1.5), (4, 1)], change=1.0).floats == {0, 1, 2}


def test_equal_ones_stay_integers() -> None:
    assert chosen([(4, 1), (2, 2), (1, 3)]).floats == {0}


def test_a_gain_below_the_margin_recommends_nothing() -> None:
    costs = [(1.2, 1.0), (5, 8)]  # 16.2 against 16.0: 1.0125 times as fast
    assert chosen(costs).floats == frozenset()
    assert chosen(costs, margin=1.01).floats == {0}


def test_the_end_is_confirmed_in_rounds_of_its_own() -> None:
    costs = [(2, 1), (1, 2)]
    machine = Machine(chain(costs))
    choose(alone(*costs), machine.against, 1.02)
    reference, others, times = machine.ran[-1]
    assert reference == frozenset() and set(others) == {frozenset({0}), frozenset({0, 1})} and times == 2


def test_a_gain_that_is_not_confirmed_recommends_nothing() -> None:
    machine, promised = Machine(lambda floats: 10 + len(floats)), Machine(chain([(2, 1), (1, 2)]))

    def against(reference: Set, others: Sequence[Set], *, times: int = 1) -> Mapping[Set, Compared]:
        return (machine if times > 1 else promised).against(reference, others, times=times)

    found = choose(alone((2, 1), (1, 2)), against, 1.02)
    assert found.floats == frozenset() and len(machine.ran) == 1


def test_the_best_of_the_candidates_wins_in_the_end() -> None:
    """Classes that are good one by one and bad together: the file is what counts."""

    def cost(floats: Set) -> float:
        return {frozenset(): 10.0, Set({0}): 8.0, Set({1}): 8.5, Set({0, 1}): 12.0}[floats]

    found = choose(alone((2, 1), (2, 1)), Machine(cost).against, 1.02)
    assert found.floats == {0}


def test_two_candidates_that_noise_makes_equal_run_beside_each_other() -> None:
    """Beside the given file, whose times are rough, they are not told apart; beside each other they are."""
    costs = [(4.0, 1.0), (1.3, 1.29)]  # the second gains in the file alone
    smooth = Machine(lambda floats: 10 - 3 * (0 in floats) - 0.5 * (1 in floats))
    rough = random.Random(0)

    def against(reference: Set, others: Sequence[Set], *, times: int = 1) -> Mapping[Set, Compared]:
        found = smooth.against(reference, others, times=times)
        if reference:
            return found
        given = [10 + rough.gauss(0, 2) for _ in range(20)]
        return {each: Compared.of(given, [smooth.cost(each)] * 20) for each in others}

    found = choose(alone(*costs), against, 1.02)
    assert found.floats == {0, 1}
    assert (frozenset({0}), (frozenset({0, 1}),), 2) in smooth.ran


@pytest.mark.parametrize("seed", range(5))
def test_noise_recommends_nothing_where_there_is_nothing(seed: int) -> None:
    costs = [(1.0, 1.0)] * 6
    found = choose(alone(*costs), Machine(chain(costs), noise=0.05, seed=seed).against, 1.02)
    assert found.floats == frozenset()


@pytest.mark.parametrize("seed", range(5))
def test_large_gains_are_seen_through_noise(seed: int) -> None:
    costs = [(4.0, 1.0), (1.0, 4.0), (6.0, 2.0), (1.0, 5.0)]
    found = choose(alone(*costs), Machine(chain(costs), noise=0.05, seed=seed).against, 1.02)
    assert found.floats == {0, 2}


@pytest.mark.parametrize("change", [0.0, 0.5])
def test_never_slower_than_the_file_given_or_all_float(change: float) -> None:
    numbers = random.Random(3)
    for _ in range(50):
        costs = [(numbers.uniform(0.1, 2), numbers.uniform(0.1, 2)) for _ in range(5)]
        cost, found = chain(costs, change), chosen(costs, change)
        assert cost(found.floats) * (1.02 if found.floats else 1) <= cost(frozenset()) + 1e-9
        if found.floats:
            assert cost(found.floats) <= cost(frozenset(range(5))) + 1e-9


# ---------------------------------------------------------------- two files


def test_noise_is_that_of_the_differences_in_the_same_rounds() -> None:
    """A machine that is busy in one round is so for both."""
    busy = [1.0, 5.0, 1.0, 9.0, 2.0, 1.0]
    found = Compared.of(busy, [each - 0.1 for each in busy])
    assert found.gain == pytest.approx(0.1) and found.noise == pytest.approx(0.0, abs=1e-12)
    assert found.is_faster() and not found.is_slower


def test_two_standard_errors_of_a_median() -> None:
    gains = [-3.0, -1.0, 0.0, 1.0, 3.0, 1.0, -1.0, 0.0, 2.0]
    found = Compared.of([10 + gain for gain in gains], [10.0] * 9)
    assert found.gain == 0 and found.noise == pytest.approx(2 * 1.2533 * 1.4826 / 3)
    assert not found.is_faster() and not found.is_slower


def test_the_margin_is_a_factor() -> None:
    found = Compared.of([1.02] * 3, [1.0] * 3)
    assert found.is_faster(1.0199) and not found.is_faster(1.0201) and found.reference == 1.02
    assert Compared.of([1.0] * 3, [1.02] * 3).is_slower


def test_the_medians_must_agree_with_the_differences() -> None:
    """Three rounds of a busy machine: faster in each of two, and slower by the medians."""
    found = Compared.of([1.0, 2.0, 9.0], [0.9, 2.1, 8.0])
    assert found.gain > 0 and found.seconds > found.reference and not found.is_faster()
