"""Targets by name."""

from __future__ import annotations

import pytest

import fxquant.profiles
from fxquant.errors import InvalidArgument
from fxquant.targets import profiles
from fxquant.targets.profiles import PROFILES, get_profile
from fxquant.targets.registry import TARGETS, get_target


def test_names_in_the_order_of_messages() -> None:
    assert list(TARGETS) == list(PROFILES) == ["onnxruntime", "openvino", "tensorrt", "generic"]
    for name, target in TARGETS.items():
        assert get_target(name) is target and get_profile(name) is target.profile is PROFILES[name]
        assert target.name == target.profile.name == name


@pytest.mark.parametrize("name", ["tpu", "", None, 8, ["onnxruntime"]], ids=repr)
@pytest.mark.parametrize("get", [get_target, get_profile])
def test_other_names_are_refused(get: object, name: object) -> None:
    assert callable(get)
    with pytest.raises(InvalidArgument) as caught:
        get(name)
    assert str(caught.value) == (
        f"target must be one of 'onnxruntime', 'openvino', 'tensorrt', 'generic': got {name!r}."
    )


def test_the_names_of_version_0_1_are_these() -> None:
    for name in ("GENERIC", "ONNXRUNTIME", "OPENVINO", "PROFILES", "TENSORRT", "Profile", "get_profile"):
        assert getattr(fxquant.profiles, name) is getattr(profiles, name)


def test_which_are_run_here() -> None:
    run = {name for name, target in TARGETS.items() if target.runtime is not None}
    timed = {name for name in run if TARGETS[name].runtime.latency is not None}
    assert (run, timed) == ({"onnxruntime", "openvino", "tensorrt"}, {"onnxruntime"})
