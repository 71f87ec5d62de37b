"""The one door to optional packages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fxquant.errors import MissingDependency
from fxquant.support.require import _refuse_older, require


def test_gives_the_module() -> None:
    assert require("onnx.reference") is sys.modules["onnx.reference"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            (),
            'onnx must be installed for ONNX export and verification: it is not. Run `pip install "fxquant[onnx]"`.',
        ),
        (("Bring {onnx} along.",), "Bring {onnx} along."),
    ],
    ids=["by itself", "as the caller says"],
)
@pytest.mark.parametrize("name", ["onnx", "onnx.reference"])
def test_says_what_is_missing(name: str, given: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [module for module in sys.modules if module.partition(".")[0] == "onnx"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependency) as caught:
        require(name, *given)
    assert str(caught.value) == said and isinstance(caught.value, ImportError)


def test_passes_on_what_an_installed_package_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("import no_such_module_at_all")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all") as caught:
        require("half_installed", "half_installed must be there.")
    assert not isinstance(caught.value, MissingDependency)


def test_an_older_package_is_named_with_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed beside a newer torch, it fails deep inside of torch's exporter or of onnx itself."""
    monkeypatch.setattr("importlib.metadata.version", {"onnx_ir": "0.1.9", "onnx": "1.19.0", "onnxscript": "0.10"}.get)
    _refuse_older.cache_clear()
    try:
        assert require("onnx") is sys.modules["onnx"] and require("onnxscript")
        with pytest.raises(MissingDependency) as caught:
            require("onnx_ir")
    finally:
        _refuse_older.cache_clear()
    assert str(caught.value) == (
        "onnx_ir must be 0.1.16 or newer for ONNX export and verification: got 0.1.9. "
        'Run `pip install --upgrade "fxquant[onnx]" "onnx_ir>=0.1.16"`.'
    )
