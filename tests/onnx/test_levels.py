"""A file at every graph optimization level of onnxruntime: one that does not load, or differs, is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import ExportError
from fxquant.onnx import levels as module
from fxquant.onnx.verify_report import LevelRow, VerifyReport
from fxquant.targets.session import levels
from tests.nets import Mlp

Hook = Callable[[str, list[Any]], list[Any]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, torch.Tensor, Path]:
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    # Codes of 4 bits, which no kernel's sums of 16 bits saturate at.
    model = fxquant.prepare(Mlp(8), (x,), recipe="w4a8")
    fxquant.calibrate(model, [(x,)], progress=False)
    path = tmp_path_factory.mktemp("levels") / "m.onnx"
    fxquant.export_onnx(model.eval(), (x,), path, verify=False)
    return model, x, path


def verified(exported: tuple[nn.Module, torch.Tensor, Path]) -> VerifyReport:
    model, x, path = exported
    return fxquant.verify_onnx(model, (x,), path, rounds=0)


def hooked(monkeypatch: pytest.MonkeyPatch, hook: Hook) -> None:
    """onnxruntime whose results go through ``hook`` with their level's name; it may raise at a load, given nothing."""
    real = onnxruntime.InferenceSession

    class Session:
        def __init__(self, source: Any, options: Any, **keywords: Any) -> None:
            name = str(options.graph_optimization_level).lower()
            self.level = "disable" if "disable" in name else name.rpartition("_")[2]
            hook(self.level, [])
            self.inner = real(source, options, **keywords)

        def run(self, *args: Any) -> list[Any]:
            return hook(self.level, self.inner.run(*args))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)


def test_all_levels_hold(exported: tuple[nn.Module, torch.Tensor, Path]) -> None:
    report = verified(exported)
    assert tuple(row.level for row in report.levels) == levels()
    assert {"disable", "basic", "extended", "all"} <= {*levels()}
    for row in report.levels:
        assert row.holds and row.compared == 2 * 64 * 8, row
        assert row.outputs_within_code == 1.0
    assert f"codes are training's in onnxruntime at the levels {', '.join(levels())}" in str(report)
    assert report.to_dict()["levels"][0] == {**vars(report.levels[0]), "holds": True}


def test_a_file_that_no_optimized_level_loads_names_those_that_do(
    exported: tuple[nn.Module, torch.Tensor, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(level: str, values: list[Any]) -> list[Any]:
        if level != "disable" and not values:
            raise RuntimeError("an optimizer's error")
        return values

    hooked(monkeypatch, refuse)
    with pytest.raises(ExportError) as caught:
        verified(exported)
    assert "an optimizer's error" in str(caught.value)
    assert str(caught.value).endswith(" Of its graph optimization levels, onnxruntime loads the file at: disable.")


def test_a_level_with_other_codes_is_named(
    exported: tuple[nn.Module, torch.Tensor, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(level: str, values: list[Any]) -> list[Any]:
        return [v // 2 if level == "extended" and v.dtype.kind in "iu" else v for v in values]

    hooked(monkeypatch, off)
    report = verified(exported)
    assert [row.level for row in report.levels if not row.holds] == ["extended"]
    (row,) = (row for row in report.levels if not row.holds)
    assert row.differing is not None and row.differing > 500 and row.largest is not None and row.largest > 10
    assert f"onnxruntime, level 'extended': {row.differing} of 1024 codes differ, by {row.largest}" in str(report)
    kept = ", ".join(level for level in levels() if level != "extended")
    assert f"at the levels {kept}" in str(report), "after it, the codes are compared anew"


def test_a_level_that_does_not_load_is_named(
    exported: tuple[nn.Module, torch.Tensor, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(level: str, values: list[Any]) -> list[Any]:
        if level == "basic":
            raise RuntimeError("Type Error: not this node")
        return values

    hooked(monkeypatch, refuse)
    report = verified(exported)
    assert [row.level for row in report.levels if row.error] == ["basic"]
    assert "onnxruntime, level 'basic' does not run: " in str(report) and "not this node" in str(report)
    assert [row.holds for row in report.levels] == [level != "basic" for level in levels()]


def test_of_a_large_file_outputs_are_compared(
    exported: tuple[nn.Module, torch.Tensor, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGE", 100)
    report = verified(exported)
    assert all(row.holds and row.differing is None and row.outputs_within_code == 1.0 for row in report.levels)
    off = LevelRow(level="all", outputs_within_code=0.9)
    assert not off.holds and str(off) == "level 'all': 90 % of the outputs within an 8-bit code"


def test_weights_alone_have_no_codes_to_agree_on(tmp_path: Path) -> None:
    """Outputs are compared: onnxruntime rounds the activations of MatMulNBits, which no count of codes would say."""
    torch.manual_seed(0)
    x, path = torch.randn(64, 32), tmp_path / "m.onnx"
    model = fxquant.prepare(nn.Linear(32, 32), (x,), recipe="int4_weight_only").eval()
    fxquant.export_onnx(model, (x,), path, verify=False)
    report = fxquant.verify_onnx(model, (x,), path, rounds=0)
    assert {row.differing for row in report.levels} == {None} and "codes are training's" not in str(report)
    held = [row.level for row in report.levels if row.holds]
    assert f"outputs are those without optimizations in onnxruntime at the levels {', '.join(held)}" in str(report)
    assert {"disable", "basic"} <= {*held} and all(row.outputs_within_code is not None for row in report.levels)


def test_external_data_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = onnx.numpy_helper.from_array(torch.zeros(1000).numpy(), "w")
    value = onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [1000])
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [value], [tensor]))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    assert (tmp_path / "m.onnx").stat().st_size < 1000 and not module.is_large(tmp_path / "m.onnx")
    monkeypatch.setattr(module, "LARGE", 4000)
    assert module.is_large(tmp_path / "m.onnx")
