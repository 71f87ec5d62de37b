"""What `tests/quick.py` leaves out changes no setting that is read."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import sympy
import torch
import torch._functorch.config
import torch._inductor.config
from torch.utils._config_module import ConfigModule
from torch.utils._sympy.value_ranges import ValueRanges

from tests.quick import READ, TREES, setting, tighten, tree_map

CONFIGS = (torch._dynamo.config, torch._functorch.config, torch._inductor.config)


def read(config: ConfigModule, name: str, how: object) -> object:
    try:
        return how(config, name)  # type: ignore[operator]
    except AttributeError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_a_setting_is_that_of_torch(config: ConfigModule) -> None:
    names = [*config._config, "of_no_such_name"]
    assert len(names) > 30
    assert [read(config, name, setting) for name in names] == [read(config, name, READ) for name in names]


def test_a_setting_that_is_changed_is_read_so_and_as_before_afterwards() -> None:
    config = torch._inductor.config
    before = [setting(config, "max_fusion_size"), setting(config, "cpp.threads"), config.cpp.threads]
    with config.patch({"max_fusion_size": 3, "cpp.threads": 5}):
        assert [setting(config, "max_fusion_size"), setting(config, "cpp.threads"), config.cpp.threads] == [3, 5, 5]
    assert [setting(config, "max_fusion_size"), setting(config, "cpp.threads"), config.cpp.threads] == before


Pair = collections.namedtuple("Pair", "left right")
NESTED = [3, (1, 2), (1, (2, 3)), [1, 2], {"a": 1, "b": (2,)}, Pair(1, [2, 3]), (Pair(1, 2), 3), (), torch.Size([2, 3])]


@pytest.mark.parametrize("tree", NESTED, ids=repr)
def test_trees_are_mapped_as_torch_maps_them(tree: Any) -> None:
    found, expected = tree_map(str, tree), TREES(str, tree)
    assert found == expected and type(found) is type(expected)
    assert tree_map(lambda a, b: (a, b), tree, tree) == TREES(lambda a, b: (a, b), tree, tree)


@pytest.mark.parametrize(
    ("one", "other"),
    [((1, 5), (1, 5)), ((1, 5), (2, 9)), ((-sympy.oo, sympy.oo), (0.5, 2.5)), ((0, 3), (-sympy.oo, 2))],
)
def test_intervals_are_tightened_as_torch_does(one: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    a, b = (ValueRanges(*map(sympy.sympify, ends)) for ends in (one, other))
    try:
        expected = a & b
    except AssertionError:
        with pytest.raises(AssertionError):
            tighten(a, b)
    else:
        assert tighten(a, b) == expected and tighten(a, a) is a
