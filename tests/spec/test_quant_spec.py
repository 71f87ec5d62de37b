from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from fxquant.errors import InvalidArgument
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import CurrentTensor, Fixed, MovingAverage, get_range
from fxquant.spec.recipes import INT4_WEIGHT_ONLY, INT8, Recipe, get_recipe

SPECS = [
    QuantSpec(),
    QuantSpec(bits=2, signed=False, symmetric=False),
    QuantSpec(bits=4, narrow=True, axis=1, range=CurrentTensor(), rounding="reciprocal"),
    QuantSpec(signed=False, symmetric=False, range=Fixed(min=-0.1, max=6.0)),
    QuantSpec(bits=16, range=MovingAverage(constant=1 / 3)),
    QuantSpec(range=MovingAverage(delayed=True)),
    QuantSpec(bits=4, axis=1, group_size=32, range=CurrentTensor()),
    QuantSpec(element="e4m3"),
    QuantSpec(element="e2m1", group_size=16, scale_format="e4m3"),
    QuantSpec(element="e3m2", axis=0, group_size=32, scale_format="e8m0", range=CurrentTensor()),
    QuantSpec(group_size=-1, range=CurrentTensor()),
]


@pytest.mark.parametrize(
    ("fields", "codes"),
    [
        ({}, (-128, 127)),
        ({"narrow": True}, (-127, 127)),
        ({"signed": False}, (0, 255)),
        ({"bits": 2}, (-2, 1)),
        ({"bits": 2, "narrow": True}, (-1, 1)),
        ({"bits": 16, "signed": False}, (0, 65535)),
        ({"bits": 4}, (-8, 7)),
        ({"element": "e4m3"}, (-448, 448)),
        ({"element": "e2m3"}, (-7, 7)),
    ],
)
def test_codes(fields: dict[str, Any], codes: tuple[int, int]) -> None:
    spec = QuantSpec(**fields)
    assert (spec.quant_min, spec.quant_max) == codes


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_round_trip(spec: QuantSpec) -> None:
    fields = json.loads(json.dumps(spec.to_dict()))
    assert QuantSpec.from_dict(fields) == spec and fields["range"]["kind"] == spec.range.kind
    assert hash(QuantSpec.from_dict(fields)) == hash(spec)


def test_words() -> None:
    assert [str(spec) for spec in SPECS] == [
        *("s8", "u2", "s4 axis 1", "u8 [-0.1, 6]", "s16", "s8", "s4 axis 1 group 32"),
        *("e4m3", "e2m1 group 16 scale e4m3", "e3m2 axis 0 group 32 scale e8m0", "s8 token"),
    ]


def test_integers_are_written_as_before_there_were_floats() -> None:
    """So that an older version reads a plan that it knows all of."""
    assert {"element", "scale_format"}.isdisjoint(SPECS[0].to_dict())
    assert SPECS[7].to_dict()["element"] == "e4m3" and SPECS[7].bits == 8 and SPECS[8].bits == 4


@pytest.mark.parametrize(
    ("spec", "family"),
    list(zip(SPECS, [*[""] * 7, "e4m3", "e2m1 e4m3 16", "e3m2 e8m0 32", "token"], strict=True)),
    ids=str,
)
def test_families(spec: QuantSpec, family: str) -> None:
    assert spec.family == family


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 4, "signed": False, "symmetric": False}, "u4 token"),
        ({"bits": 8, "signed": True, "symmetric": False}, "s8 token"),
        ({"bits": 8, "signed": False, "symmetric": True}, "u8 token"),
    ],
    ids=str,
)
def test_tokens_may_have_zero_points(fields: dict[str, Any], words: str) -> None:
    spec = QuantSpec(group_size=-1, range=CurrentTensor(), **fields)
    assert (str(spec), spec.family) == (words, "affine token")
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_fields_of_an_older_version_have_no_groups() -> None:
    fields = SPECS[2].to_dict()
    del fields["group_size"]
    assert QuantSpec.from_dict(fields) == SPECS[2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, "QuantSpec.bits must be from 2 to 16: got 1."),
        ({"bits": 17}, "QuantSpec.bits must be from 2 to 16: got 17."),
        ({"rounding": "up"}, "QuantSpec.rounding must be one of ('reciprocal', 'divide'): got 'up'."),
        (
            {"narrow": True, "signed": False},
            "QuantSpec.narrow must go with signed=True: an unsigned code has no mirror.",
        ),
        ({"axis": -1}, "QuantSpec.axis must be counted from the front: got -1."),
        ({"axis": 0, "symmetric": False}, "QuantSpec per channel must be symmetric: runtimes take zero point 0 there."),
        (
            {"element": "e4m4"},
            "QuantSpec.element must be one of 'e4m3', 'e5m2', 'e3m2', 'e2m3', 'e2m1', or None: got 'e4m4'.",
        ),
        (
            {"element": "e2m1", "bits": 3},
            "QuantSpec.bits must be left out beside element='e2m1', which has 4: got 3.",
        ),
        (
            {"element": "e4m3", "symmetric": False},
            "QuantSpec must be signed, symmetric and not narrow with element='e4m3': floats have a sign and no zero "
            "point. Leave those fields out.",
        ),
        (
            {"scale_format": "e5m2", "group_size": 32, "range": CurrentTensor()},
            "QuantSpec.scale_format must be one of 'e8m0', 'e4m3', or None: got 'e5m2'.",
        ),
        (
            {"scale_format": "e8m0"},
            "QuantSpec.scale_format must go with a group_size: got 'e8m0' and group_size=None. "
            "MX has groups of 32, NVFP4 of 16.",
        ),
        (
            {"scale_format": "e8m0", "group_size": 32},
            "QuantSpec per group must have range=CurrentTensor() or Learned(): got MovingAverage(constant=0.01, "
            "delayed=False). A group has no history.",
        ),
        (
            {"axis": 0, "group_size": 1},
            "QuantSpec.group_size must be an integer of at least 2, or -1 for a scale per token: got 1.",
        ),
        (
            {"axis": 0, "group_size": 2.5},
            "QuantSpec.group_size must be an integer of at least 2, or -1 for a scale per token: got 2.5.",
        ),
        (
            {"axis": 0, "group_size": True},
            "QuantSpec.group_size must be an integer of at least 2, or -1 for a scale per token: got True.",
        ),
        (
            {"axis": 0, "group_size": 8, "symmetric": False},
            "QuantSpec per channel must be symmetric: runtimes take zero point 0 there.",
        ),
        (
            {"axis": 0, "group_size": 8, "signed": False},
            "QuantSpec per group must be signed and symmetric: got group_size=8, signed=False and symmetric=True. "
            "Runtimes take zero point 0 there; -1, a token, may have another.",
        ),
        (
            {"axis": 0, "group_size": 8},
            "QuantSpec per group must have range=CurrentTensor() or Learned(): got MovingAverage(constant=0.01, "
            "delayed=False). A group has no history.",
        ),
    ],
)
def test_invalid_specs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        QuantSpec(**fields)
    assert str(caught.value) == message


@pytest.mark.parametrize("limits", [(1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_invalid_fixed_ranges(limits: tuple[float, float]) -> None:
    with pytest.raises(InvalidArgument, match="Fixed range must be finite with min < max: got"):
        Fixed(min=limits[0], max=limits[1])


@pytest.mark.parametrize("constant", [0.0, -0.1, 1.1, float("nan")])
def test_invalid_constants(constant: float) -> None:
    with pytest.raises(InvalidArgument, match=r"MovingAverage.constant must be in \(0, 1\]: got"):
        MovingAverage(constant=constant)


def test_specs_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec().bits = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        QuantSpec(4)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"weight": QuantSpec(axis=0)},
            r"Recipe.weight.range must be CurrentTensor: got MovingAverage.* Set range=fxquant.Current",
        ),
        ({"weight": QuantSpec(range=Fixed(min=-1, max=1))}, r"Recipe.weight.range must be CurrentTensor: got Fixed"),
        ({"weight": QuantSpec(signed=False, range=CurrentTensor())}, "must be signed and symmetric: got u8"),
        ({"weight": QuantSpec(symmetric=False, range=CurrentTensor())}, "must be signed and symmetric: got s8"),
        ({"weight": QuantSpec(axis=1, range=CurrentTensor())}, r"Recipe.weight.axis must be 0 .* got 1"),
        ({"activation": QuantSpec(axis=1)}, "Recipe.activation.axis must be None: got 1"),
        ({"activation": INT4_WEIGHT_ONLY.weight}, "Recipe.activation.axis must be None: got 0"),
    ],
)
def test_invalid_recipes(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Recipe(name="mine", **fields)


def test_names_of_recipes() -> None:
    assert get_recipe("int8") is INT8 and get_recipe(INT8) is INT8
    with pytest.raises(
        InvalidArgument, match=r"recipe must be a Recipe or one of 'int8', 'int8_dynamic', 'w4a8', .*: got 'int7'"
    ):
        get_recipe("int7")
    with pytest.raises(InvalidArgument, match="got 8"):
        get_recipe(8)  # type: ignore[arg-type]


def test_with_range() -> None:
    found = INT8.with_range(CurrentTensor()).activation
    assert found is not None and found.range == CurrentTensor()
    assert INT4_WEIGHT_ONLY.with_range(CurrentTensor()) is INT4_WEIGHT_ONLY
    assert INT8.with_range(CurrentTensor()).weight == INT8.weight


def test_ranges_by_name() -> None:
    for name, expected in (("moving_average", MovingAverage()), ("delayed", MovingAverage(delayed=True))):
        found = INT8.with_range(name).activation
        assert found is not None and found.range == get_range(name) == get_range(expected) == expected
    for wrong in ("late", None, 0.01):
        with pytest.raises(InvalidArgument) as caught:
            get_range(wrong)  # type: ignore[arg-type]
        assert str(caught.value) == (
            "ranges must be one of 'moving_average', 'delayed', or a MovingAverage, CurrentTensor or Fixed: "
            f"got {wrong!r}."
        )
