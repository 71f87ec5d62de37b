"""The demo's optional packages: found, or named with the line that installs them."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from fxquant.errors import MissingDependency
from fxquant.shell.demo import extras


def test_a_module_inside_a_package_is_what_comes_back() -> None:
    pytest.importorskip("matplotlib")
    assert extras.require("matplotlib.figure") is sys.modules["matplotlib.figure"]


@pytest.mark.parametrize("module", extras.PACKAGES)
def test_a_missing_package_is_named_with_its_install_line(module: str, monkeypatch: Any) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(MissingDependency) as caught:
        extras.require(f"{module}.inner")
    assert extras.PACKAGES[module] in str(caught.value)
    assert 'pip install "fxquant[demo]"' in str(caught.value)


@pytest.mark.parametrize(
    ("module", "package"), [("sklearn.datasets", "scikit-learn"), ("nowhere_at_all.inner", "nowhere_at_all")]
)
def test_the_words_of_the_error(module: str, package: str, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(MissingDependency) as caught:
        extras.require(module)
    assert str(caught.value) == (
        f"fxquant's demo needs {package}, which is not installed. Install it with: "
        'pip install "fxquant[demo]"'
    )  # fmt: skip


def test_a_package_that_is_broken_inside_is_not_called_missing(monkeypatch: Any) -> None:
    def broken(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="scipy") as caught:
        extras.require("sklearn")
    assert not isinstance(caught.value, MissingDependency)


def test_all_packages_are_asked_for(monkeypatch: Any) -> None:
    asked: list[str] = []
    monkeypatch.setattr(extras, "require", asked.append)
    extras.require_all()
    assert asked == ["sklearn", "matplotlib", "onnx", "onnxruntime"]
