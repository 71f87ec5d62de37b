"""State dicts through the formats and averages that people use: tensors only, and all that was there comes back."""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.prepared.quantizer import quantizers
from tests.nets import ConvNet, Mlp, prepared, ranges, step, unset

EAGER = "fxquant_eager"
X = torch.linspace(-2, 2, 2 * 3 * 6 * 6).sin().reshape(2, 3, 6, 6)
pytestmark = pytest.mark.usefixtures("cold")


def net() -> nn.Module:
    torch.manual_seed(0)
    return prepared(ConvNet(), X)


@functools.cache
def trained_once() -> nn.Module:
    model = net()
    compiled = torch.compile(model, backend=EAGER)
    step(compiled, X)
    fxquant.freeze_ranges(model)
    fxquant.freeze_batch_norm(model)
    step(compiled, 3 * X)
    return model


def trained() -> nn.Module:
    """One step, ranges and statistics frozen, another step."""
    return copy.deepcopy(trained_once())


def by_safetensors(model: nn.Module, folder: Path) -> dict[str, Any]:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(model.state_dict(), folder / "m.safetensors")
    found: dict[str, Any] = safetensors.load_file(folder / "m.safetensors")
    return found


def by_weights_only(model: nn.Module, folder: Path) -> dict[str, Any]:
    torch.save(model.state_dict(), folder / "m.pt")
    found: dict[str, Any] = torch.load(folder / "m.pt", weights_only=True)
    return found


def by_mmap(model: nn.Module, folder: Path) -> dict[str, Any]:
    torch.save(model.state_dict(), folder / "m.pt")
    found: dict[str, Any] = torch.load(folder / "m.pt", mmap=True, weights_only=True)
    return found


def by_checkpoint(model: nn.Module, folder: Path) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    dcp.save(get_model_state_dict(model), checkpoint_id=folder, no_dist=True)
    target = get_model_state_dict(net())
    dcp.load(target, checkpoint_id=folder, no_dist=True)
    return target


def by_clones(model: nn.Module, folder: Path) -> dict[str, Any]:
    return {key: value.detach().clone().half().float() for key, value in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated", "ignore:torch.distributed")
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("way", [by_safetensors, by_weights_only, by_mmap, by_checkpoint, by_clones])
def test_all_that_was_saved_comes_back(way: Callable[..., dict[str, Any]], assign: bool, tmp_path: Path) -> None:
    source, target = trained(), net()
    assert not any(target.load_state_dict(way(source, tmp_path), assign=assign))
    rel = 1e-3 if way is by_clones else 0
    for (key, old), new in zip(source.state_dict().items(), target.state_dict().values(), strict=True):
        torch.testing.assert_close(new.to(old.dtype), old, rtol=rel, atol=rel, msg=key)
    before, statistics = ranges(target), target.bn1.running_mean.clone()
    step(torch.compile(target.train(), backend=EAGER), 9 * X)
    assert ranges(target) == before and torch.equal(target.bn1.running_mean, statistics), "both are frozen"


def test_state_dicts_hold_tensors_under_paths_of_buffers_and_parameters() -> None:
    model = trained()
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = model.state_dict()
    assert state.keys() == held.keys() and all(isinstance(value, Tensor) for value in state.values())
    assert all(state[key].shape == value.shape and state[key].dtype == value.dtype for key, value in held.items())


def test_checkpoint_s_own_functions_get_and_set() -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    source, target = trained(), net()
    assert not any(set_model_state_dict(target, get_model_state_dict(source)))
    assert ranges(target) == ranges(source) and not any(q.observing for _, q in quantizers(target))


def test_what_is_frozen_follows_the_state_that_is_loaded() -> None:
    free, frozen = net().state_dict(), trained().state_dict()
    model = net()
    for state, expected in ((frozen, True), (free, False), (frozen, True)):
        model.load_state_dict(state)
        model.train()
        assert {q.observing for _, q in quantizers(model)} == {not expected}
        assert [model.bn1.training, model.training] == [not expected, True]
    old = {key: value for key, value in free.items() if key not in ("quantizers_plan", "quantizers_frozen")}
    model.load_state_dict(old)
    assert not any(q.observing for _, q in quantizers(model)), "a float checkpoint says nothing of it"


def test_a_part_of_what_is_frozen() -> None:
    source, target = net(), net()
    dict(quantizers(source))["conv1.input"].observing = False
    fxquant.freeze_batch_norm(source.bn1)
    target.load_state_dict(source.state_dict())
    assert [key for key, q in quantizers(target) if not q.observing] == ["conv1.input"]
    assert not target.train().bn1.training


def test_the_places_in_a_wrapper_and_in_part_of_a_model() -> None:
    source, target = nn.ModuleDict({"net": trained()}), nn.ModuleDict({"net": net()})
    assert "net.quantizers_plan" in source.state_dict()
    assert not any(target.load_state_dict(source.state_dict()))
    assert ranges(target["net"]) == ranges(source["net"])


# Averages


def hand_written(average: nn.Module, model: nn.Module, decay: float) -> None:
    """As ultralytics' ModelEMA.update does."""
    state = model.state_dict()
    for key, value in average.state_dict().items():
        if value.dtype.is_floating_point:
            value *= decay
            value += (1 - decay) * state[key].detach()


def over_all_values(average: nn.Module, model: nn.Module, decay: float) -> None:
    """As timm's ModelEmaV2 does, integers too."""
    with torch.no_grad():
        for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            mine.copy_(decay * mine + (1.0 - decay) * theirs)


def over_all_tensors(average: nn.Module, model: nn.Module, decay: float) -> None:
    """As timm's ModelEmaV3 does for each parameter and buffer; ``int`` buffers are copied."""
    with torch.no_grad():
        for name in ("parameters", "buffers"):
            for mine, theirs in zip(getattr(average, name)(), getattr(model, name)(), strict=True):
                if mine.is_floating_point():
                    mine.lerp_(theirs, 1 - decay)
                else:
                    mine.copy_(decay * mine + (1 - decay) * theirs)


@pytest.mark.parametrize("update", [hand_written, over_all_values, over_all_tensors])
def test_an_average_from_the_first_step_on(update: Callable[[nn.Module, nn.Module, float], None]) -> None:
    model = net()
    average = copy.deepcopy(model).eval()
    compiled, expected = torch.compile(model, backend=EAGER), dict.fromkeys(ranges(model), (0.0, 0.0))
    for factor in (1.0, 2.0, 0.5):
        step(compiled, factor * X)
        update(average, model, 0.5)
        for key, (low, high) in ranges(model).items():
            expected[key] = (expected[key][0] + low) / 2, (expected[key][1] + high) / 2
    for key, found in ranges(average).items():
        assert found == pytest.approx(expected[key], rel=1e-6, abs=1e-30)
    assert torch.compile(average, backend=EAGER)(X).isfinite().all()
    fresh = net()
    fresh.load_state_dict(average.state_dict())
    assert not unset(fresh)
    for key, found in ranges(fresh).items():
        assert found == tuple(0.0 if abs(bound) < 1e-37 else bound for bound in ranges(average)[key])


@pytest.mark.parametrize("use_buffers", [False, True])
def test_torch_s_own_average(use_buffers: bool) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = net()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    compiled, seen = torch.compile(model, backend=EAGER), []
    for factor in (1.0, 2.0, 0.5):
        step(compiled, factor * X)
        average.update_parameters(model)
        seen.append(ranges(model)["conv1.input"])
    if use_buffers:  # else the buffers are those of the model that was copied
        halves = [((a + b) / 2 + c) / 2 for a, b, c in zip(*seen, strict=True)]
        assert ranges(average.module)["conv1.input"] == pytest.approx(halves, rel=1e-6)
    fresh = AveragedModel(net())
    assert not any(fresh.load_state_dict(average.state_dict()))
    assert torch.compile(average.eval(), backend=EAGER)(X).isfinite().all()


def by_library(name: str, model: nn.Module) -> tuple[Any, nn.Module]:
    """A library's average with the factor 0.5 from its first update on, and the copy of the model that it averages."""
    library, _, kind = name.partition(".")
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}")
    if library == "timm":
        average = getattr(importlib.import_module("timm.utils"), kind)(model, decay=0.5)
        return average, average.module
    average = getattr(importlib.import_module("ultralytics.utils.torch_utils"), kind)(model, decay=0.5, tau=1e-3)
    return average, average.ema


@pytest.mark.parametrize("name", ["timm.ModelEmaV2", "timm.ModelEmaV3", "ultralytics.ModelEMA"])
def test_an_average_of_a_library_s(name: str) -> None:
    model = net()
    average, averaged = by_library(name, model)
    compiled, expected = torch.compile(model, backend=EAGER), dict.fromkeys(ranges(model), (0.0, 0.0))
    for factor in (1.0, 2.0, 0.5):
        step(compiled, factor * X)
        average.update(model)
        for key, (low, high) in ranges(model).items():
            expected[key] = (expected[key][0] + low) / 2, (expected[key][1] + high) / 2
    for key, found in ranges(averaged).items():
        assert found == pytest.approx(expected[key], rel=1e-6, abs=1e-30)
    torch.testing.assert_close(torch.compile(averaged, backend=EAGER)(X), averaged(X), atol=0.2, rtol=0)
    fresh = net()
    fresh.load_state_dict(averaged.state_dict())
    assert not unset(fresh)


# Unset


def test_a_first_batch_of_zeros_does_not_hold_the_range() -> None:
    for given in ({}, {"ranges": "delayed"}):
        model = prepared(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8), **given)
        compiled = torch.compile(model, backend=EAGER)
        step(compiled, torch.zeros(4, 8))
        quantizer = dict(quantizers(model))["0.input"]
        assert quantizer.is_set() and quantizer.range.is_degenerate(quantizer.state)
        assert "[0, 0]" in repr(quantizer)
        x = torch.randn(4, 8)
        out = step(compiled, x)
        assert ranges(model)["0.input"] == (x.min().item(), x.max().item())
        torch.testing.assert_close(out, model(x), atol=0.05, rtol=0)
        step(compiled, torch.zeros(4, 8))
        assert ranges(model)["0.input"] == pytest.approx((0.99 * x.min().item(), 0.99 * x.max().item()), rel=1e-6)


def test_calibration_on_zeros_first() -> None:
    model, x = prepared(Mlp(), torch.randn(2, 8)), torch.rand(4, 8) + 1
    fxquant.calibrate(model, [torch.zeros(4, 8)], progress=False)
    assert dict(quantizers(model))["first.input"].range.is_degenerate(dict(quantizers(model))["first.input"].state)
    fxquant.calibrate(model, [torch.zeros(4, 8), x, torch.zeros(4, 8)], progress=False)
    assert ranges(model)["first.input"] == (0.0, x.max().item())


def test_what_version_0_1_saved_as_unset_or_zeros_is_that_today() -> None:
    model = trained()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    nan, zero = torch.tensor([float("nan")]), torch.tensor([0.0])
    first, second, *_ = ranges(model)
    for key, value in ((first, nan), (second, zero)):
        path = ".".join(("quantizers." + part if part == key.split(".")[-1] else part) for part in key.split("."))
        state[f"{path}.min_val"] = state[f"{path}.max_val"] = value
    model.load_state_dict(state)
    held = dict(quantizers(model))
    assert unset(model) == [first] and "unset" in repr(held[first])
    assert held[second].range.is_degenerate(held[second].state)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_positive_constant_is_a_range() -> None:
    model = prepared(Mlp(), torch.randn(2, 8))
    fxquant.calibrate(model, [torch.full((4, 8), 5.0)], progress=False)
    held = dict(quantizers(model))["first.input"]
    assert ranges(model)["first.input"] == (5.0, 5.0) and not held.range.is_degenerate(held.state)
