"""mixed: choices against every assignment there is, predictions against the model that override makes of them."""

from __future__ import annotations

import copy
import itertools
import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import InvalidArgument, RangeNotSet
from fxquant.plan.plan import Plan
from fxquant.prepared.quantizer import quantizers
from fxquant.prepared.root import plan_of
from fxquant.search import choice, mixed
from fxquant.search import sensitivity as measured
from fxquant.search.sweep import sweep
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import CurrentTensor

W8 = QuantSpec(narrow=True, axis=0, range=CurrentTensor())


class Chain(nn.Module):
    """Three layers, 48, 16 and 6 weights; a product of two activations at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return y @ y.t()


COUNTS = {"a.weight": 48, "b.weight": 16, "c.weight": 6}
MACS = {"a.weight": 5 * 48, "b.weight": 5 * 16, "c.weight": 5 * 6}
PRODUCT = 5 * 5 * 3  # y @ yᵀ of a batch of 5
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    torch._dynamo.reset()
    return fxquant.calibrate(fxquant.prepare(Chain(), (X,)), [X])


def error(model: nn.Module, changes: dict[str, QuantSpec | None], on: set[str] | None = None) -> float:
    """The oracle: relative output error after override, all quantizers but ``on`` switched off."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        reference = model(X).double()
        fxquant.override(model, changes)
        for key, quantizer in quantizers(model):
            quantizer.enabled = on is None or key in on
        torch._dynamo.reset()
        found = torch.compile(model, backend="fxquant_eager")(X).double()
    return float((found - reference).norm() / reference.norm())


@pytest.fixture(scope="module")
def alone(model: nn.Module) -> dict[tuple[str, int | None], float]:
    """(weight, bits) → effect with only that weight quantized, by override and a compile for each."""
    found: dict[tuple[str, int | None], float] = {(key, None): 0.0 for key in COUNTS}
    for key, bits in itertools.product(COUNTS, (4, 8, 16)):
        found[key, bits] = error(model, {key: spec(bits)}, on={key})
    return found


def frugal(choices: list[tuple[float, float]], slack: float) -> tuple[float, float]:
    """The oracle of the choice: of (price, cost) within ``slack`` of the least cost, the one of least price."""
    best = min(cost for _, cost in choices)
    return min(each for each in choices if each[1] <= best + slack)


@pytest.fixture(scope="module")
def negligible(model: nn.Module) -> float:
    """What moves the effect of all quantizers together by 1 %, as a squared error."""
    every = error(model, {})
    return (1.01 * every) ** 2 - every**2


def spec(bits: int) -> QuantSpec:
    return QuantSpec(bits=bits, narrow=True, axis=0, range=CurrentTensor())


def bytes_of(key: str, bits: int | None) -> int:
    return COUNTS[key] * 4 if bits is None else math.ceil(COUNTS[key] * bits / 8)


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize("share", [0.5, 0.6, 0.75, 0.9, 1.0, 1.7, 2.5, 4.0])
def test_no_assignment_within_the_bytes_is_better_by_what_counts(
    model: nn.Module, alone: dict[tuple[str, int | None], float], negligible: float, share: float
) -> None:
    found = mixed(model, [X], weight_bytes=share)
    bits = {key: None if (s := found[key]) is None else s.bits for key in COUNTS}
    assert found.int8_bytes == 70
    assert found.weight_bytes == sum(bytes_of(*each) for each in bits.items()) <= share * 70
    choices = [
        (price, sum(alone[each] ** 2 for each in zip(COUNTS, widths, strict=True)))
        for widths in itertools.product((4, 8, 16, None), repeat=3)
        if (price := sum(bytes_of(*each) for each in zip(COUNTS, widths, strict=True))) <= share * 70
    ]
    price, cost = frugal(choices, negligible)
    assert found.weight_bytes == price
    assert math.hypot(*(alone[each] for each in bits.items())) == pytest.approx(math.sqrt(cost), rel=1e-3)
    assert found.effect == pytest.approx(math.sqrt(cost), rel=1e-3)


def test_no_wider_format_for_a_gain_that_nobody_can_measure() -> None:
    class Faint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.faint = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.loud(x) + 1e-3 * self.faint(x)

    torch.manual_seed(0)
    model = fxquant.calibrate(fxquant.prepare(Faint(), (SIX,)), [SIX])
    plenty = mixed(model, [SIX], weight_bytes=4.0)
    assert plenty["faint.weight"] == spec(4), "float would fit, for nothing"
    loud = plenty["loud.weight"]
    assert loud is not None and loud.bits >= 8, "8 or 16 bits are as good as float: its input has 8"
    share = mixed(model, [SIX], integer_share=0.0)
    assert share["faint.weight"] is not None and share["loud.weight"] is None


def test_override_takes_it_and_the_prediction_holds(model: nn.Module) -> None:
    found = mixed(model, [X], weight_bytes=0.6, bits=(4, 8))
    weights = {key for key in found if key.endswith("weight")}
    assert weights == set(COUNTS) and {s.bits for s in found.values() if s} == {4, 8}
    actual = error(model, found, on=weights)
    assert actual == pytest.approx(found.effect, rel=0.5)  # errors of three layers are not quite independent
    assert list(found) == [s.key for s in _plan(model).sites if s.key in found]


def _plan(model: nn.Module) -> Plan:
    plan = plan_of(model)
    assert plan is not None
    return plan


@pytest.mark.parametrize("layer", ["a", "b", "c"])
def test_the_layer_with_outliers_keeps_its_bits(layer: str) -> None:
    torch.manual_seed(0)
    net = Three()
    with torch.no_grad():
        getattr(net, layer).weight[:, 0] *= 30.0
    model = fxquant.calibrate(fxquant.prepare(net, (SIX,)), [SIX])
    found = mixed(model, [SIX], weight_bytes=2 / 3, bits=(4, 8))
    assert {key: s.bits for key, s in found.items() if s} == {
        f"{name}.weight": 8 if name == layer else 4 for name in "abc"
    }


SIX = torch.randn(32, 6, generator=torch.Generator().manual_seed(4))


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + self.c(x)


def test_a_float_weight_takes_the_activations_along_that_no_other_reads(model: nn.Module) -> None:
    found = mixed(model, [X], weight_bytes=4.0, bits=(None,))
    assert dict(found) == dict.fromkeys(("a.input", "a.weight", "b.input", "b.weight", "c.input", "c.weight"))
    assert found.effect == 0 and found.weight_bytes == 280
    torch.manual_seed(0)
    shared = fxquant.calibrate(fxquant.prepare(Three(), (SIX,)), [SIX])  # one input for all three
    one = mixed(shared, [SIX], weight_bytes=2.0, bits=(4, None))  # 18 bytes each in int4, 144 in float, of 216
    assert set(one) == {"a.weight", "b.weight", "c.weight"} and list(one.values()).count(None) == 1
    assert one.integer_share == pytest.approx(2 / 3) and one.weight_bytes == 180


@pytest.mark.parametrize(
    ("given", "words"),
    [({"weight_bytes": 4, "bits": (None,)}, "weight_bytes=4"), ({"integer_share": 0.0}, "integer_share=0")],
)
def test_a_budget_that_leaves_nothing_quantized(given: dict[str, Any], words: str) -> None:
    torch.manual_seed(0)
    shared = fxquant.calibrate(fxquant.prepare(Three(), (SIX,)), [SIX])
    message = (
        rf"budget must leave a site quantized: got {words}, under which .* Allow less, or fxquant\.strip the model"
    )
    with pytest.raises(InvalidArgument, match=message):
        mixed(shared, [SIX], **given)


def test_a_loss_decides_too(model: nn.Module) -> None:
    target = torch.zeros(5, dtype=torch.long)
    found = mixed(model, [(X, target)], F.cross_entropy, weight_bytes=0.75, bits=(4, 8))
    with torch.no_grad():
        before = F.cross_entropy(copy.deepcopy(model).eval()(X), target)
    rises = {}
    for key, bits in itertools.product(COUNTS, (4, 8)):
        candidate = fxquant.override(copy.deepcopy(model).eval(), {key: spec(bits)})
        for other, quantizer in quantizers(candidate):
            quantizer.enabled = other == key
        torch._dynamo.reset()
        with torch.no_grad():
            out = torch.compile(candidate, backend="fxquant_eager")(X)
        rises[key, bits] = float(F.cross_entropy(out, target) - before)
    torch._dynamo.reset()
    with torch.no_grad():
        every = F.cross_entropy(torch.compile(copy.deepcopy(model).eval(), backend="fxquant_eager")(X), target)
    choices = [
        (price, sum(rises[each] for each in zip(COUNTS, widths, strict=True)))
        for widths in itertools.product((4, 8), repeat=3)
        if (price := sum(bytes_of(*each) for each in zip(COUNTS, widths, strict=True))) <= 0.75 * 70
    ]
    price, cost = frugal(choices, 0.01 * abs(float(every - before)))
    assert found.measure == "loss" and found.effect == pytest.approx(cost, abs=1e-6)
    assert found.weight_bytes == price


# ---------------------------------------------------------------- integers


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 0.95, 1.0])
def test_no_set_of_float_layers_within_the_share_is_better_by_what_counts(
    model: nn.Module, negligible: float, share: float
) -> None:
    found = mixed(model, [X], integer_share=share)
    total = sum(MACS.values()) + PRODUCT
    kept = {key for key in COUNTS if found.get(key, W8) is not None}
    assert found.integer_share == pytest.approx((sum(MACS[key] for key in kept) + PRODUCT) / total)
    assert found.integer_share >= share - 1e-9
    effects = {key: error(model, {}, on={key, key.replace("weight", "input")}) for key in COUNTS}
    choices = [
        (-integer, sum(effects[key] ** 2 for key in those))
        for size in range(4)
        for those in itertools.combinations(COUNTS, size)
        if (integer := sum(MACS[key] for key in those) + PRODUCT) >= share * total
    ]
    integer, cost = frugal(choices, negligible)
    assert sum(MACS[key] for key in kept) + PRODUCT == -integer
    assert found.effect == pytest.approx(math.sqrt(cost), rel=1e-3)
    for key in COUNTS:
        assert (found[key] is None) == (found.get(key.replace("weight", "input"), W8) is None)


@pytest.mark.parametrize(
    ("net", "shape", "macs"),
    [
        (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2)), (2, 4, 5, 5), 2 * 6 * 25 * 2 * 9),
        (lambda: nn.Sequential(nn.Conv1d(2, 3, 3, stride=2)), (1, 2, 9), 3 * 4 * 2 * 3),
        (lambda: nn.Sequential(nn.Linear(7, 3)), (2, 5, 7), 2 * 5 * 7 * 3),
    ],
    ids=["grouped conv", "strided conv", "linear"],
)
def test_multiply_adds(net: Any, shape: tuple[int, ...], macs: int) -> None:
    x = torch.randn(shape)
    model = fxquant.calibrate(fxquant.prepare(net(), (x,)), [x])
    runs = sweep(model, "mixed", [x, x], None, {}, progress=False).operator_runs
    assert sum(one.macs for one in runs) == 2 * macs and all(one.is_integer for one in runs if one.macs)


def test_attention_multiplies_its_probabilities_in_float() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.q(x), x, x[..., :4])

    x = torch.randn(2, 5, 8)
    model = fxquant.calibrate(fxquant.prepare(Attend(), (x,)), [x])
    found = mixed(model, [x], integer_share=0.5)
    linear, scores, values = 2 * 5 * 64, 2 * 25 * 8, 2 * 25 * 4
    assert found.integer_share == pytest.approx((linear + scores) / (linear + scores + values))
    with pytest.raises(InvalidArgument, match=r"integer_share must be at most 0\.8\d+, where every quantized"):
        mixed(model, [x], integer_share=0.9)


# ---------------------------------------------------------------- the choice itself


def options(seed: int, sites: int) -> list[list[Any]]:
    chance = random.Random(seed)
    return [
        [choice.Option(None, chance.choice([0.0, chance.random(), -0.1]), chance.randrange(12)) for _ in range(3)]
        for _ in range(sites)
    ]


def least(those: list[list[Any]], budget: int) -> float | None:
    sums = [sum(o.cost for o in each) for each in itertools.product(*those) if sum(o.price for o in each) <= budget]
    return min(sums, default=None)


@pytest.mark.parametrize("seed", range(20))
def test_cheapest_is_the_least_of_all_sums(seed: int) -> None:
    those = options(seed, 5)
    for budget in (0, 5, 15, 25, 35, 60):
        found, wanted = choice.cheapest(those, budget), least(those, budget)
        if wanted is None:
            assert found is None
        else:
            assert sum(o.cost for o in found) == pytest.approx(wanted, abs=1e-12)
            assert sum(o.price for o in found) <= budget
            assert all(o in each for o, each in zip(found, those, strict=True))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("slack", [0.05, 0.5, math.inf])
def test_cheapest_takes_the_least_price_within_the_slack(seed: int, slack: float) -> None:
    those = options(seed, 5)
    for budget in (15, 25, 60):
        sums = [(sum(o.price for o in each), sum(o.cost for o in each)) for each in itertools.product(*those)]
        within = [each for each in sums if each[0] <= budget]
        found = choice.cheapest(those, budget, slack)
        if not within:
            assert found is None
            continue
        price, cost = frugal(within, slack)
        assert sum(o.price for o in found) == price
        assert sum(o.cost for o in found) == pytest.approx(cost, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_a_thinned_frontier_keeps_the_budget_and_finds_what_fits(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "MOST_POINTS", 4)
    those = options(seed, 6)
    lowest = sum(min(o.price for o in each) for each in those)
    for budget in (lowest, lowest + 6, lowest + 20):
        found, wanted = choice.cheapest(those, budget), least(those, budget)
        assert found is not None and wanted is not None
        assert sum(o.price for o in found) <= budget
        assert sum(o.cost for o in found) >= wanted - 1e-12
    assert choice.cheapest(those, lowest - 1) is None


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "must be given one budget, weight_bytes or integer_share: got none"),
        ({"weight_bytes": 1.0, "integer_share": 1.0}, "weight_bytes or integer_share: got both"),
        ({"weight_bytes": 0.0}, "weight_bytes must be a positive share of the int8 bytes: got 0.0"),
        ({"weight_bytes": math.nan}, "weight_bytes must be a positive share of the int8 bytes: got nan"),
        ({"integer_share": 1.5}, "integer_share must be from 0 to 1: got 1.5"),
        ({"weight_bytes": 1.0, "bits": (1, 8)}, r"bits must hold widths from 2 to 16, or None .* got \[1, 8\]"),
        ({"weight_bytes": 1.0, "bits": ()}, r"bits must hold widths from 2 to 16, or None for float: got \[\]"),
        (
            {"weight_bytes": 0.49},
            r"weight_bytes must be at least 0\.5, .* narrowest of bits=\[4, 8, 16, None\].* 0\.49",
        ),
        ({"weight_bytes": 0.8, "bits": (7,)}, r"weight_bytes must be at least 0\.8858, what .* got 0\.8"),
        ({"weight_bytes": 3, "bits": (None,)}, r"weight_bytes must be at least 4, what the narrowest"),
    ],
    ids=["none", "both", "zero", "nan", "share", "one bit", "no bits", "too few bytes", "rounded up", "float only"],
)
def test_messages(model: nn.Module, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        mixed(model, [X], **given)


def test_the_smallest_share_that_a_message_names_is_reachable(model: nn.Module) -> None:
    found = mixed(model, [X], weight_bytes=0.8858, bits=(7,))
    assert found.weight_bytes == 42 + 14 + 6  # each rounded up to whole bytes
    assert mixed(model, [X], weight_bytes=0.5).weight_bytes == 35


def test_widths_that_the_target_lacks_are_left_out() -> None:
    model = fxquant.calibrate(fxquant.prepare(Three(), (SIX,), target="openvino"), [SIX])
    found = mixed(model, [SIX], weight_bytes=2.0, bits=(4, 16))
    assert {s.bits for s in found.values() if s} == {4}
    with pytest.raises(InvalidArgument, match=r"bits must hold a width of target 'openvino', 2 to 8: got \[16\]"):
        mixed(model, [SIX], weight_bytes=2.0, bits=(16,))


def test_models_without_plan_ranges_or_weights(model: nn.Module) -> None:
    with pytest.raises(InvalidArgument, match="mixed must be given a prepared model: got Three"):
        mixed(Three(), [SIX], weight_bytes=1.0)
    with pytest.raises(RangeNotSet, match="mixed must be given a model whose ranges are set"):
        mixed(fxquant.prepare(Three(), (SIX,)), [SIX], weight_bytes=1.0)
    bare = fxquant.override(copy.deepcopy(model), {"*.weight": None})
    with pytest.raises(InvalidArgument, match="a model with quantized weights: got none that are switched on"):
        mixed(bare, [X], weight_bytes=1.0)


def test_weights_of_small_floats_have_no_bits_to_choose() -> None:
    x = torch.randn(8, 16)
    model = fxquant.prepare(nn.Sequential(nn.Linear(16, 4)), (x,), recipe="fp8", target="generic")
    fxquant.calibrate(model, [x], progress=False)
    with pytest.raises(InvalidArgument, match=r"whose weights are integers, .*: got e4m3 axis 0 for 0.weight"):
        mixed(model, [x], weight_bytes=1.0)


def test_it_prints_what_it_chose(model: nn.Module) -> None:
    found = mixed(model, [X], weight_bytes=0.6, bits=(4, 8))
    lines = str(found).splitlines()
    assert lines[0].startswith("38 bytes of weights, 0.543 of int8's; 100.0 % of multiply-adds on integers; predicted")
    assert [line.split()[0] for line in lines[3:]] == list(COUNTS)


def test_the_model_stays_as_it_was(model: nn.Module) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    specs = {key: quantizer.spec for key, quantizer in quantizers(model)}
    mixed(model, [X], weight_bytes=0.6)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert {key: quantizer.spec for key, quantizer in quantizers(model)} == specs
    assert measured(model, [X]).unmeasured == ()
