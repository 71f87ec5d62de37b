"""Runs the tests of this folder on a CUDA device, or leaves them out module by module before anything is imported.

pytest tests/gpu                 on CUDA; where there is none, each module says why and how many tests it holds
pytest tests/gpu --device cpu    the same bodies on CPU: every line runs, and what needs no GPU is held too
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Of what the other modules are made: it runs everywhere.
EVERYWHERE = {"test_harness.py"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cuda", "cpu"), default="cuda", help="where tests/gpu runs; default cuda")


def device_of(config: pytest.Config) -> str:
    """The option; its default where pytest was started above this folder and read the command line without us."""
    return str(config.getoption("--device", default="cuda"))


@functools.cache
def missing() -> str:
    """Why no CUDA device can be used, found without torch where there is no driver; empty where one can."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            return "no CUDA driver is installed"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "" if torch.cuda.is_available() else "torch finds no CUDA device"


class LeftOut(pytest.Module):
    """A module whose tests cannot run here: one skip, with the reason and their number."""

    def collect(self) -> list[pytest.Item]:
        count = len(re.findall(r"^def test_", self.path.read_text(encoding="utf-8"), re.MULTILINE))
        pytest.skip(f"{missing()}: {count} tests of {self.path.name} left out", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if module_path.parent != HERE or module_path.name in EVERYWHERE or device_of(parent.config) == "cpu":
        return None
    return LeftOut.from_parent(parent, path=module_path) if missing() else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE and item.path.name not in EVERYWHERE and device_of(config) == "cuda":
            item.add_marker(pytest.mark.gpu)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``path``: which kernels eager ops on CUDA tensors take. CPU tensors have one, and it stands for "aten"."""
    if "path" in metafunc.fixturenames:
        metafunc.parametrize("path", ["cuda", "aten"] if device_of(metafunc.config) == "cuda" else ["aten"])


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where the test runs."""
    return device_of(request.config)


@pytest.fixture
def cuda(device: str) -> str:
    """The device, for tests of what no CPU has."""
    if device != "cuda":
        pytest.skip("CUDA only")
    return device


@pytest.fixture(autouse=True)
def cold(request: pytest.FixtureRequest) -> Iterator[None]:
    """No compiled graph from before, float32 products in float32, the same algorithms every time; memory given back."""
    if request.path.name in EVERYWHERE:
        yield
        return
    import torch

    from tests.gpu.harness import exact_products

    torch._dynamo.reset()
    torch.manual_seed(0)
    with exact_products():
        yield
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
