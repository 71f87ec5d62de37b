"""The facts of a profile: each kind in one place, formats that fit, widths and opsets that are known."""

from __future__ import annotations

import dataclasses

import pytest

from fxquant.errors import InvalidArgument
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import CurrentTensor, MovingAverage
from fxquant.spec.recipes import INT4_WEIGHT_ONLY
from fxquant.targets.profile import Profile
from fxquant.targets.profiles import PROFILES

U8 = QuantSpec(signed=False, symmetric=False, range=MovingAverage())


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda p: p.name)
def test_a_profile_puts_each_kind_in_one_place(profile: Profile) -> None:
    assert not profile.hard & profile.soft and not (profile.hard | profile.soft) & profile.refused.keys()
    assert len(profile.group_bits) and set(profile.group_bits) <= set(range(2, 17))
    assert profile.needs_output | profile.skips <= profile.hard


@pytest.mark.parametrize(
    ("target", "operands", "positive", "fitted"),
    [
        ("onnxruntime", ("matmul.rhs",), False, "u8"),
        ("generic", ("matmul.rhs",), False, "u8"),
        ("tensorrt", (), True, "s8"),
        ("openvino", ("linear.input",), False, "u8"),
        ("openvino", ("linear.input", "matmul.rhs"), False, "s8"),
        ("openvino", ("matmul.rhs",), True, "s8"),
        ("openvino", ("matmul.lhs",), False, "s8"),
        ("openvino", ("matmul.lhs",), True, "u8"),
    ],
)
def test_formats_are_fitted_to_the_target(target: str, operands: tuple[str, ...], positive: bool, fitted: str) -> None:
    assert str(PROFILES[target].fit(U8, operands, is_positive=positive)) == fitted


U4 = dataclasses.replace(U8, bits=4)
TOKEN = QuantSpec(signed=False, symmetric=False, group_size=-1, range=CurrentTensor())


@pytest.mark.parametrize(
    ("target", "spec", "operand", "fitted"),
    [
        ("openvino", U8, "linear.input", "s8"),
        ("openvino", U4, "linear.input", "u4"),
        ("openvino", TOKEN, "linear.input", str(TOKEN)),
        ("openvino", U8, "conv.input", "u8"),
        ("onnxruntime", U8, "linear.input", "u8"),
    ],
)
def test_values_on_both_sides_of_zero_have_zero_point_0_where_that_is_faster(
    target: str, spec: QuantSpec, operand: str, fitted: str
) -> None:
    assert str(PROFILES[target].fit(spec, (operand,), is_even=True)) == fitted
    assert PROFILES[target].fit(spec, (operand,)) == spec


def test_a_format_that_fits_is_left_alone() -> None:
    signed = QuantSpec(bits=6, range=MovingAverage(constant=0.5))
    for profile in PROFILES.values():
        assert profile.fit(signed, ("matmul.rhs", "matmul.lhs"), is_positive=False) is signed


def test_activations_are_rounded_as_the_target_rounds() -> None:
    wide = dataclasses.replace(U8, rounding="divide")
    assert PROFILES["tensorrt"].rounded(wide) == dataclasses.replace(wide, rounding="reciprocal")
    for name in ("onnxruntime", "openvino", "generic"):
        assert PROFILES[name].rounded(wide) is wide


def test_only_the_codes_of_a_format_change() -> None:
    wide = dataclasses.replace(U8, bits=8, rounding="divide", range=MovingAverage(constant=0.25))
    fitted = PROFILES["tensorrt"].fit(wide)
    assert fitted == dataclasses.replace(wide, signed=True, symmetric=True)


GROUPS = INT4_WEIGHT_ONLY.weight
KNOWN: list[tuple[str, str, QuantSpec]] = [
    ("onnxruntime", "weight", QuantSpec(bits=16, axis=0, range=CurrentTensor())),
    ("onnxruntime", "activation", QuantSpec(bits=16)),
    ("onnxruntime", "weight", dataclasses.replace(GROUPS, bits=4, group_size=17)),
    ("openvino", "activation", QuantSpec(bits=2)),
    ("openvino", "weight", QuantSpec(bits=8, axis=0, range=CurrentTensor())),
    ("tensorrt", "activation", QuantSpec(bits=8)),
    ("tensorrt", "weight", QuantSpec(bits=4, axis=0, range=CurrentTensor())),
    ("tensorrt", "weight", dataclasses.replace(GROUPS, bits=4, group_size=64)),
    ("generic", "weight", dataclasses.replace(GROUPS, bits=8, group_size=3)),
]


@pytest.mark.parametrize(("target", "role", "spec"), KNOWN, ids=[f"{t}-{r}-{s}" for t, r, s in KNOWN])
def test_known_widths(target: str, role: str, spec: QuantSpec) -> None:
    PROFILES[target].check_format(role, spec, "it")


UNKNOWN: list[tuple[str, str, QuantSpec, str]] = [
    ("openvino", "activation", QuantSpec(bits=9), "2 to 8 bits for target 'openvino': got 9 for an activation."),
    ("openvino", "output", QuantSpec(bits=16), "2 to 8 bits for target 'openvino': got 16 for an activation."),
    ("tensorrt", "activation", QuantSpec(bits=7), "8 bits for target 'tensorrt': got 7 for an activation."),
    (
        "tensorrt",
        "weight",
        QuantSpec(bits=3, axis=0, range=CurrentTensor()),
        "4 to 8 bits for target 'tensorrt': got 3 for a weight.",
    ),
    (
        "tensorrt",
        "weight",
        dataclasses.replace(GROUPS, bits=8, group_size=64),
        "4 bits for target 'tensorrt': got 8 for groups.",
    ),
    (
        "tensorrt",
        "weight",
        dataclasses.replace(GROUPS, bits=4, group_size=8),
        "groups of 16, 32, 64 or 128 for target 'tensorrt': got 8. Give the weights QuantSpec(group_size=16, …).",
    ),
    (
        "onnxruntime",
        "weight",
        dataclasses.replace(GROUPS, bits=5, group_size=32),
        "2 to 4 bits for target 'onnxruntime': got 5 for groups.",
    ),
]


@pytest.mark.parametrize(("target", "role", "spec", "said"), UNKNOWN, ids=[f"{t}-{r}-{s}" for t, r, s, _ in UNKNOWN])
def test_unknown_widths(target: str, role: str, spec: QuantSpec, said: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        PROFILES[target].check_format(role, spec, "rules[0]")
    assert str(caught.value) == f"rules[0] must have {said}"


@pytest.mark.parametrize(
    ("target", "highest"), [("onnxruntime", 26), ("openvino", 26), ("tensorrt", 25), ("generic", 26)]
)
def test_opsets(target: str, highest: int) -> None:
    profile = PROFILES[target]
    assert profile.check_opset(None) == 21 and profile.check_opset(highest) == highest
    for opset in (20, highest + 1):
        with pytest.raises(InvalidArgument) as caught:
            profile.check_opset(opset)
        assert str(caught.value) == f"opset must be from 21 to {highest} for {target}: got {opset}."
