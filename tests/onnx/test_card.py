"""`export_onnx(..., capability=)`: what a card cannot run is an error of its own, before a file is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import ExportError, InvalidArgument
from tests.onnx.models import calibrated


def net(recipe: str, target: str = "tensorrt") -> nn.Module:
    torch.manual_seed(0)
    return calibrated(nn.Linear(64, 32), torch.randn(4, 64), target=target, recipe=recipe)


X = torch.randn(4, 64)


@pytest.mark.parametrize(
    ("recipe", "element", "older", "first"),
    [
        ("fp8", "e4m3", "8.6", "8.9"),
        ("mxfp8", "e4m3", "8.0", "8.9"),
        ("nvfp4", "e2m1", "9.0", "10.0"),
        ("w4a16_nvfp4", "e2m1", "8.9", "10.0"),
        ("int4_weight_only", "int4 groups", "7.5", "8.0"),
    ],
)
def test_a_format_that_the_card_lacks(recipe: str, element: str, older: str, first: str, tmp_path: Path) -> None:
    model = net(recipe)
    message = rf"^capability must be at least {first} for codes of {element}: got '{older}' for \w+ and \d more"
    with pytest.raises(InvalidArgument, match=message):
        fxquant.export_onnx(model, (X,), tmp_path / "net.onnx", capability=older)
    assert not list(tmp_path.iterdir())
    report = fxquant.export_onnx(model, (X,), tmp_path / "net.onnx", capability=first)
    assert report.path == str(tmp_path / "net.onnx")


def test_the_builder_says_the_same(tmp_path: Path) -> None:
    """Of the capabilities that it knows; `test_a_format_that_the_card_lacks` has the others."""
    pytest.importorskip("tensorrt_rtx")
    model = net("fp8")
    fxquant.export_onnx(model, (X,), tmp_path / "net.onnx")
    with pytest.raises(ExportError, match="sm86"):
        fxquant.verify_onnx(model, (X,), tmp_path / "net.onnx", capability="8.6", rounds=0)
    assert fxquant.verify_onnx(model, (X,), tmp_path / "net.onnx", capability="8.9", rounds=0).integer_share == 1


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.bfloat16, r"at least 8\.0 for torch\.bfloat16, in which this file computes: got '7\.5'"),
        (torch.float32, r"at least 8\.0 for matrix products in a file that computes in torch\.float32: got '7\.5'"),
    ],
)
def test_a_type_that_the_card_lacks(dtype: torch.dtype, message: str, tmp_path: Path) -> None:
    model = net("int8")
    with pytest.raises(InvalidArgument, match=message):
        fxquant.export_onnx(model, (X,), tmp_path / "net.onnx", float_dtype=dtype, capability="7.5")
    assert not list(tmp_path.iterdir())
    report = fxquant.export_onnx(model, (X,), tmp_path / "net.onnx", float_dtype=torch.float16, capability="7.5")
    assert report.float_dtype == "float16" and not any("convolutions" in note for note in report.notes)


def test_convolutions_that_the_card_runs_in_float_are_a_note(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = calibrated(nn.Conv2d(3, 4, 3), x, target="tensorrt")
    report = fxquant.export_onnx(model, (x,), tmp_path / "net.onnx", capability="7.5")
    assert report.notes == ("tensorrt runs convolutions in float on cards of compute capability 7.5",)
    assert not fxquant.export_onnx(model, (x,), tmp_path / "net.onnx", capability="8.0").notes


@pytest.mark.parametrize(
    ("target", "capability", "message"),
    [
        ("tensorrt", "8.1", r"^capability must be one of '7\.5', '8\.0', .*'12\.1' for tensorrt: got '8\.1'\.$"),
        ("onnxruntime", "8.9", r"^capability must be left out for onnxruntime: got '8\.9'\.$"),
    ],
)
def test_what_is_no_card(target: str, capability: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=message):
        fxquant.export_onnx(net("int8", target), (X,), tmp_path / "net.onnx", capability=capability)


def test_every_card_of_the_builder_is_known() -> None:
    from fxquant.targets.registry import get_target

    target = get_target("tensorrt")
    assert target.runtime is not None and target.profile.cards is not None
    assert set(target.runtime.capabilities) < set(target.profile.cards.known)
