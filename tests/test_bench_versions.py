"""Files in other versions of the runtimes: what runs in the other environment, and what of its rows is wrong."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

BENCH = Path(__file__).parent.parent / "bench"
MODEL = '<ir_version: 10, opset_import: ["" : 21]> net (float[4] x) => (float[4] y) { y = Mul(x, x) }'


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Imported as the script is, and forgotten afterwards, with what it imports of its folder."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    yield importlib.import_module("bench_versions")
    for name in {"bench_versions", "machine"} - before:
        sys.modules.pop(name, None)


def row(**given: Any) -> dict[str, Any]:
    usual = {"version": "onnxruntime==1.20.0", "file": "net.onnxruntime.int8.onnx", "level": "all"}
    return {**usual, "off": 0, "of": 4, "error": None, **given}


@pytest.mark.parametrize(
    ("given", "saturates", "told"),
    [
        ({}, False, None),
        ({"off": 2}, False, "net.onnxruntime.int8.onnx in onnxruntime==1.20.0, all: 2 of 4 values are off"),
        ({"off": 2}, True, None),
        ({"off": 2, "level": "disable"}, True, "2 of 4 values are off"),
        ({"off": 2, "file": "net.onnxruntime.w4a8.onnx"}, True, "2 of 4 values are off"),
        ({"off": None, "error": "no kernel"}, True, "net.onnxruntime.int8.onnx in onnxruntime==1.20.0, all: no kernel"),
        ({"off": 2, "file": "net.openvino.int8.onnx"}, False, None),
    ],
    ids=["right", "off", "saturated", "without kernels", "of 4 bits", "refused", "for another runtime"],
)
def test_what_is_wrong(bench: ModuleType, given: dict[str, Any], saturates: bool, told: str | None) -> None:
    found = bench.why_wrong(row(**given), saturates=saturates)
    assert found is None if told is None else told in found


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_other_environment_tells_each_level(bench: ModuleType, runtime: str, tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(MODEL), tmp_path / "net.onnxruntime.int8.onnx")
    (tmp_path / "none.onnxruntime.int8.onnx").write_bytes(b"no model")
    x = np.arange(4, dtype=np.float32)
    for name, y in (("net", np.array([0, 1, 5, 9])), ("none", x)):
        np.savez(tmp_path / f"{name}.onnxruntime.int8.npz", x=x, y=y)
    files = sorted(map(str, tmp_path.glob("*.onnx")))
    ran = subprocess.run([sys.executable, "-c", bench.CHILD, runtime, *files], check=True, stdout=subprocess.PIPE)
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    levels = {"onnxruntime": 5, "openvino": 2}[runtime]
    assert [(each["file"].partition(".")[0], each["off"]) for each in found] == [
        *[("net", 1)] * levels,
        *[("none", None)] * levels,
    ]
    assert all((each["error"] is None) == (each["off"] is not None) for each in found)
