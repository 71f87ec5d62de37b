"""The libraries, compiled once a session."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from fxquant.kernels.build import FAMILIES, SOURCES
from tests.kernels.host import COMPILER, HERE, HostLauncher, compile_library


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="session")
def math(folder: Path) -> ctypes.CDLL:
    return compile_library(HERE / "host_math.cpp", folder)


@pytest.fixture(scope="session")
def libraries(folder: Path) -> dict[str, ctypes.CDLL]:
    return {family: compile_library(SOURCES / f"{family}.cu", folder) for family in FAMILIES}


@pytest.fixture
def launcher(libraries: dict[str, ctypes.CDLL]) -> HostLauncher:
    return HostLauncher(libraries)
