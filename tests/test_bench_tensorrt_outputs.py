"""bench/gpu/tensorrt_outputs.py as far as no card is needed: it builds, its rows say what failed, its API is there."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

trt = pytest.importorskip("tensorrt_rtx")
BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setattr(sys, "path", [str(BENCH / "gpu"), str(BENCH), *sys.path])
    for name in ("machine", "tensorrt_outputs"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("tensorrt_outputs")
    for name in ("machine", "tensorrt_outputs"):
        del sys.modules[name]


def test_a_plan_is_built(bench: ModuleType) -> None:
    row = bench.measure(nn.Linear(16, 16), torch.randn(4, 16), "int8", "float16", None)
    assert row["plan_bytes"] > 1000 and "error" not in row and "difference" not in row


def test_what_the_card_lacks_is_in_the_row(bench: ModuleType) -> None:
    row = bench.measure(nn.Linear(16, 16), torch.randn(4, 16), "fp8", "float32", "8.0")
    assert row["error"].startswith("InvalidArgument: capability must be at least 8.9 for codes of e4m3")


def test_a_distance_is_a_part_of_the_spread(bench: ModuleType) -> None:
    expected = {"y": np.array([0.0, 4.0], np.float16), "z": np.array([0.0, 1.0], np.float32)}
    found = {"y": np.array([1.0, 4.0], np.float32), "z": np.array([0.0, 1.1], np.float32)}
    assert bench.compared(found, expected) == 0.25


def test_what_a_run_calls_is_there() -> None:
    """No card is here to run it."""
    names = ("deserialize_cuda_engine",), ("create_execution_context", "num_io_tensors", "get_tensor_name")
    context = "set_input_shape", "get_tensor_shape", "set_tensor_address", "execute_async_v3"
    for owner, wanted in zip((trt.Runtime, trt.ICudaEngine, trt.IExecutionContext), (*names, context), strict=True):
        assert all(hasattr(owner, name) for name in wanted)
    kinds = [str(kind).rpartition(".")[2].lower() for kind in (trt.float32, trt.float16, trt.bfloat16)]
    assert kinds == ["float", "half", "bf16"]
