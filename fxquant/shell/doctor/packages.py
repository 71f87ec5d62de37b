"""Packages beside torch: the ONNX side, each target's runtime, what the extras install."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxquant.shell.doctor.checks import BROKEN, LEFT_OUT, MISSING, OK, Check, Finding, in_range, is_there, pip
from fxquant.support.require import OLDEST

if TYPE_CHECKING:
    from fxquant.targets.target import Target


@dataclass(frozen=True)
class Extra:
    """An extra of fxquant with the packages that it adds; ``modules``, by the names of those that fxquant imports."""

    name: str
    packages: tuple[str, ...]
    modules: tuple[str, ...] = ()


# Those for users that are no target's; the packages that pyproject.toml gives them.
EXTRAS = (
    Extra("report", ("rich", "matplotlib", "numpy"), ("rich", "matplotlib", "numpy")),
    Extra("demo", ("scikit-learn",), ("sklearn",)),
    Extra("bench", ("transformers",)),
    Extra("examples", ("transformers", "accelerate", "peft", "lightning", "safetensors")),
)
ONNX_NEWEST = "1.23"  # that were tried
ONNXSCRIPT_NEWEST = "0.7"
_EXTRA_OF_FILES = "onnx"


def checks(*, quick: bool) -> Iterator[Check]:
    """The ONNX side, then the runtimes, then the other extras."""
    mend = _again(_EXTRA_OF_FILES)
    yield Check(name="onnx", doing="importing onnx", ask=_onnx, mend=mend)
    yield Check(name="onnxscript", doing="importing onnxscript", ask=_onnxscript, mend=mend)
    for target in _targets():
        package = target.runtime.package if target.runtime else None
        if package is not None:
            yield Check(
                name=package.module,
                doing=f"running a file in {package.module}",
                ask=functools.partial(_runtime, target, quick),
                mend=_again(package.extra),
            )
    for extra in EXTRAS:
        ask = functools.partial(_extra, extra)
        yield Check(name=f"[{extra.name}]", doing=f"importing {extra.name}", ask=ask, mend=_again(extra.name))


def _targets() -> tuple[Target, ...]:
    """None where torch, which they import, does not load: that has a line already."""
    try:
        from fxquant.targets.registry import TARGETS
    except Exception:
        return ()
    return tuple(TARGETS.values())


def _again(extra: str) -> str:
    return f"pip install --force-reinstall {_extra_name(extra)}"


def _upgrade(extra: str) -> str:
    return f"pip install --upgrade {_extra_name(extra)}"


def _extra_name(extra: str) -> str:
    return f'"fxquant[{extra}]"'


def _missing(extra: str, what: str = "not installed") -> Finding:
    return Finding(status=MISSING, found=what, fix=pip(f"fxquant[{extra}]"))


def _onnx() -> Finding:
    """Its evaluator runs the tiny file."""
    if not is_there("onnx"):
        return _missing(_EXTRA_OF_FILES, "not installed: no export, no verification")
    import onnx
    from onnx.reference import ReferenceEvaluator

    from fxquant.shell.doctor.tiny_file import check, inputs, model

    told = in_range(onnx.__version__, OLDEST["onnx"], ONNX_NEWEST, _upgrade(_EXTRA_OF_FILES))
    if told is not None and told.status == BROKEN:
        return told
    outputs: Any = ReferenceEvaluator(model()).run(None, inputs())
    check(outputs)
    return told or Finding(status=OK, found=f"{onnx.__version__}; its evaluator runs a Q/DQ file right")


def _onnxscript() -> Finding:
    if not is_there("onnxscript"):
        return _missing(_EXTRA_OF_FILES, "not installed: no export")
    version = str(importlib.import_module("onnxscript").__version__)
    told = in_range(version, OLDEST["onnxscript"], ONNXSCRIPT_NEWEST, _upgrade(_EXTRA_OF_FILES))
    return told or Finding(status=OK, found=version)


def _runtime(target: Target, quick: bool) -> Finding:
    """Its version, and what it makes of the tiny file."""
    runtime = target.runtime
    assert runtime is not None and runtime.package is not None
    package = runtime.package
    if not is_there(package.module):
        return _missing(package.extra)
    version = str(importlib.import_module(package.module).__version__).partition("-")[0]
    told = in_range(version, package.oldest, package.newest, _upgrade(package.extra))
    if told is not None and told.status == BROKEN:
        return told
    runtime.require()
    known = f"{version}; tried: {' to '.join(dict.fromkeys((package.oldest, package.newest)))}"
    known = known if told is None else told.found
    if not is_there("onnx"):
        return Finding(status=LEFT_OUT, found=f"{version}; no file to run without onnx", fix=pip("onnx"))
    if quick and runtime.has_timeout:
        return Finding(status=OK, found=f"{known}; builds nothing with --quick")
    return Finding(status=told.status if told else OK, found=f"{known}; {_ran(target)}")


def _ran(target: Target) -> str:
    """What became of the tiny file; raises where its numbers are not the standard's."""
    from fxquant.shell.doctor.tiny_file import check, inputs, model

    assert target.runtime is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "doctor.onnx"
        path.write_bytes(model().SerializeToString())
        ran = target.runtime.run(path, inputs())
    if ran.outputs is not None:
        check(ran.outputs)
    integer = sum(row.integer for row in ran.rows)
    done = "builds a Q/DQ file; no kernel ran" if ran.outputs is None else "runs a Q/DQ file right"
    return f"{done}, {integer} of {len(ran.rows)} products on integers"


def _extra(extra: Extra) -> Finding:
    """Versions, after the import of what fxquant itself imports."""
    found, lacking = [], []
    for package in extra.packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lacking.append(package)
    if lacking:
        return _missing(extra.name, f"not installed: {', '.join(lacking)}")
    for module in extra.modules:
        importlib.import_module(module)
    return Finding(status=OK, found=", ".join(found))
