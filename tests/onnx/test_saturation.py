"""Sums of 8-bit products on a CPU without VNNI, where two large ones do not fit the kernels' 16 bits.

On other CPUs nothing saturates, and the setting that sums exactly changes nothing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import ExportError
from fxquant.onnx import VerifyReport
from fxquant.targets import onnxruntime as target
from fxquant.targets.cpu import sums_saturate
from tests.onnx.models import calibrated
from tests.onnx.nets import SEVEN_BITS


def verified(recipe: str | fxquant.Recipe, folder: Path) -> VerifyReport:
    """Of two layers with weights that are all large, whose zero points are equal: the report."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32)), torch.rand(16, 64)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.9, 1.0)
    calibrated(model, x, recipe=recipe)
    fxquant.export_onnx(model, (x,), folder / "m.onnx", verify=False)
    return fxquant.verify_onnx(model, (x,), folder / "m.onnx", rounds=0)


def test_exact_sums_are_measured_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "sums_saturate", lambda: True)
    report = verified("int8", tmp_path)
    assert report.max_output_difference < 1e-2 and report.exact_output_difference < 1e-2
    saturated = report.optimized_output_difference > report.output_spread
    assert saturated == sums_saturate() == ('with the session entry "session.x64quantprecision"' in str(report))


def test_weights_of_7_bits_need_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "sums_saturate", lambda: False)
    report = verified(SEVEN_BITS, tmp_path)
    assert report.optimized_output_difference < 1e-2 and math.isnan(report.exact_output_difference)


def test_a_file_that_the_setting_refuses_is_verified_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As onnxruntime 1.31 does with a weight that two products read, on such a CPU."""
    run = target.run_outputs

    def refusing(*args: Any, config: Any = None, **more: Any) -> Any:
        if config is not None:
            raise ExportError("m.onnx must load in onnxruntime: got a refusal")
        return run(*args, **more)

    monkeypatch.setattr(target, "sums_saturate", lambda: True)
    monkeypatch.setattr(target, "run_outputs", refusing)
    report = verified(SEVEN_BITS, tmp_path)
    assert math.isnan(report.exact_output_difference) and report.optimized_output_difference < 1e-2
    assert "whether sums of 8-bit products saturated is unknown: the file does not load with" in str(report)
