"""`ScaledQuantDescriptor`: fields, validation, `dict()` and back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fxquant.errors import InvalidArgument
from fxquant.tensor_quant import QuantDescriptor, ScaledQuantDescriptor

DEFAULTS = {
    "num_bits": 8,
    "name": None,
    "fake_quant": True,
    "axis": None,
    "block_sizes": None,
    "amax": None,
    "learn_amax": False,
    "scale_amax": None,
    "calib_method": "max",
    "unsigned": False,
    "narrow_range": False,
    "dynamic": False,
}


def test_alias_defaults_and_positions() -> None:
    assert QuantDescriptor is ScaledQuantDescriptor
    plain = QuantDescriptor()
    assert {key: getattr(plain, key) for key in DEFAULTS} == DEFAULTS and plain.dict() == {}
    values = (4, "w", False, 0, None, 2.0, False, 0.5, "histogram", True, True, True)
    descriptor = QuantDescriptor(*values)
    assert tuple(getattr(descriptor, key) for key in DEFAULTS) == values
    assert repr(QuantDescriptor(num_bits=4, axis=0)) == "ScaledQuantDescriptor(num_bits=4, axis=0)"


@pytest.mark.parametrize("field", DEFAULTS)
def test_fields_are_read_only(field: str) -> None:
    with pytest.raises(AttributeError):
        setattr(QuantDescriptor(), field, 1)


def test_what_is_read_is_a_copy() -> None:
    descriptor = QuantDescriptor(block_sizes={-1: 16, "scale_bits": 8, "scale_block_sizes": {-1: 4}})
    descriptor.block_sizes["scale_block_sizes"][-1] = 5
    descriptor.block_sizes[-1] = 5
    assert descriptor.block_sizes == {-1: 16, "scale_bits": 8, "scale_block_sizes": {-1: 4}}
    amax = [1.0, 2.0]
    listed = QuantDescriptor(amax=amax)
    listed.amax[0] = amax[0] = 7.0
    assert listed.amax == [1.0, 2.0]


EXAMPLES: list[dict[str, Any]] = [
    {},
    {"num_bits": (4, 3)},
    {"num_bits": [2, 1], "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
    {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
    {"block_sizes": {-1: 16, 0: 2, "scale_bits": 8, "scale_block_sizes": {-1: 4}}},
    {"axis": (0, -1), "name": "w"},
    {"amax": np.array([[1.0], [2.5]], dtype=np.float32), "learn_amax": True},
    {"amax": [1, 2.5]},
    {"amax": np.float32(0.1)},
    {"amax": 0.0, "scale_amax": 2},
    {"unsigned": True, "num_bits": 1},
    {"calib_method": "histogram", "dynamic": True, "narrow_range": True},
]


@pytest.mark.parametrize("fields", EXAMPLES, ids=str)
def test_round_trips(fields: dict[str, Any]) -> None:
    descriptor = QuantDescriptor(**fields)
    assert set(descriptor.dict()) == set(fields)
    for other in (
        QuantDescriptor(**descriptor.dict()),
        copy.deepcopy(descriptor),
        pickle.loads(pickle.dumps(descriptor)),
        eval(repr(descriptor)),
    ):
        assert other == descriptor and other.dict() == descriptor.dict()
    assert descriptor != QuantDescriptor(num_bits=7) and descriptor != "other"


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "num_bits": st.integers(2, 16),
            "name": st.text(max_size=3),
            "fake_quant": st.booleans(),
            "axis": st.one_of(st.none(), st.integers(-4, 3), st.sampled_from([(0, 1), (2,)])),
            "amax": st.one_of(st.floats(0, 1e30), st.lists(st.floats(0, 1e30), min_size=1, max_size=3)),
            "learn_amax": st.booleans(),
            "scale_amax": st.floats(1e-3, 10),
            "calib_method": st.sampled_from(["max", "histogram"]),
            "unsigned": st.booleans(),
            "narrow_range": st.booleans(),
            "dynamic": st.booleans(),
        },
    )
)
def test_any_dict_gives_the_same_descriptor(fields: dict[str, Any]) -> None:
    assume(not (fields.get("learn_amax") and (fields.get("dynamic") or not fields.get("fake_quant", True))))
    descriptor = QuantDescriptor(**fields)
    again = QuantDescriptor(**descriptor.dict())
    assert again == descriptor and repr(again) == repr(descriptor)
    assert {key: value for key, value in fields.items() if value != DEFAULTS[key]} == descriptor.dict()


def test_block_axes_and_sizes() -> None:
    blocks = {-1: 16, 0: 2, "type": "dynamic", "scale_bits": 8, "scale_block_sizes": {-1: 4}}
    assert QuantDescriptor.get_block_quant_axes_and_sizes(blocks) == {-1: 16, 0: 2}


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"num_bits": 0}, ValueError, "num_bits must be from 1 to 16: got 0"),
        ({"num_bits": -3}, ValueError, "num_bits must be from 1 to 16: got -3"),
        ({"num_bits": 17}, ValueError, "num_bits must be from 1 to 16: got 17"),
        ({"num_bits": 1}, ValueError, "num_bits must be at least 2 for signed"),
        ({"num_bits": 8.0}, TypeError, "num_bits must be an integer or two"),
        ({"num_bits": True}, TypeError, "num_bits must be an integer or two"),
        ({"num_bits": (4, 3, 1)}, TypeError, "num_bits must be an integer or two"),
        ({"num_bits": (6, 6)}, ValueError, "floating-point format"),
        ({"name": 3}, TypeError, "name must be a string"),
        ({"fake_quant": 1}, TypeError, "fake_quant must be a bool"),
        ({"axis": 0.5}, TypeError, "axis must be None, an integer or"),
        ({"axis": True}, TypeError, "axis must be None, an integer or"),
        ({"axis": (0, 0)}, ValueError, "axis must name each dimension once"),
        ({"axis": ()}, ValueError, "axis must name each dimension once"),
        ({"axis": 0, "block_sizes": {-1: 4}}, ValueError, "axis must be None when block_sizes is set"),
        ({"block_sizes": 16}, TypeError, "block_sizes must be None or a dict"),
        ({"block_sizes": {}}, ValueError, "block_sizes must name an axis"),
        ({"block_sizes": {-1: 0}}, ValueError, r"block_sizes\[-1\] must be a positive integer: got 0"),
        ({"block_sizes": {"last": 4}}, ValueError, "block_sizes must have integers"),
        ({"block_sizes": {-1: 4, "type": "lazy"}}, ValueError, "'static' or 'dynamic': got 'lazy'"),
        ({"block_sizes": {-1: 4, "scale_bits": 0}}, ValueError, "scale_bits.* must be from 1 to 16"),
        ({"block_sizes": {-1: 4, "scale_block_sizes": {-1: 2}}}, ValueError, "must go with 'scale_bits'"),
        ({"amax": "oops"}, TypeError, "amax must be a float, a list or an ndarray"),
        ({"amax": 1}, TypeError, "amax must be a float, a list or an ndarray"),
        ({"amax": torch.ones(1)}, TypeError, "amax must be a float, a list or an ndarray"),
        ({"amax": ["a"]}, TypeError, "amax must hold floats"),
        ({"amax": -1.0}, ValueError, "amax must be finite and at least 0: got -1.0"),
        ({"amax": [1.0, float("nan")]}, ValueError, "amax must be finite"),
        ({"scale_amax": "2"}, TypeError, "scale_amax must be a float"),
        ({"scale_amax": 0.0}, ValueError, "scale_amax must be finite and above 0"),
        ({"calib_method": "best"}, ValueError, "calib_method must be one of"),
        ({"unsigned": True, "num_bits": (4, 3)}, ValueError, "unsigned must be False for a float format"),
        ({"fake_quant": False, "num_bits": (4, 3)}, ValueError, "fake_quant must be True for a float format"),
        ({"learn_amax": True, "dynamic": True}, ValueError, "learn_amax must be False with dynamic"),
        ({"learn_amax": True, "block_sizes": {-1: 4}}, ValueError, "learn_amax must be False with block_sizes"),
        ({"learn_amax": True, "fake_quant": False}, ValueError, "learn_amax must be False without fake_quant"),
    ],
    ids=str,
)
def test_errors(fields: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        QuantDescriptor(**fields)
    assert kind is TypeError or isinstance(caught.value, InvalidArgument)


def test_it_is_not_hashable_as_it_compares_by_value() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(QuantDescriptor())
