"""The user's model by its name, prepared: what goes wrong in the user's code is said in a line, with its place."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import fxquant
from fxquant.errors import FxquantError, InvalidArgument
from fxquant.shell.failures import first_line, place, torch_is_quiet

_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool")


def prepared(given: argparse.Namespace) -> tuple[Any, tuple[Any, ...]]:
    """The model that was named, prepared as asked, and its example inputs.

    Raises InvalidArgument where there is none, or the user's module or function fails; what `fxquant.prepare` does.
    """
    model, args = _model(given.model)
    if given.input:
        args = tuple(_example(text) for text in given.input)
    if args is None:
        raise InvalidArgument(
            f"{given.model} must come with example inputs: got a model alone. "
            "Add --input 1x3x32x32, once for each input, or let it give (model, args)."
        )
    rules = [fxquant.skip(path) for path in given.skip]
    with torch_is_quiet():
        fxquant.prepare(model, args, recipe=given.recipe, target=given.target, rules=rules)
    return model, args


def _model(name: str) -> tuple[Any, tuple[Any, ...] | None]:
    """The model that ``module:name`` leads to, and the example inputs that come with it."""
    from torch import nn

    found = _named(name)
    if not isinstance(found, (nn.Module, tuple)):
        if not callable(found):
            raise _no_model(name, found)
        with _running(f"{name} must make a model", "Name a function that needs no arguments, or mend what it calls."):
            found = found()
    model, args = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(model, nn.Module):
        raise _no_model(name, found)
    return model, args


def _named(name: str) -> Any:
    """What ``module:a.b`` names."""
    where, _, path = name.partition(":")
    if not where or not path:
        raise InvalidArgument(
            f"MODULE:NAME must name a module and something in it: got {name!r}. Write package.models:make_model."
        )
    found: Any = _module(where)
    for part in path.split("."):
        with _running(f"{name} must be there", "Mend what gives it."):
            missing = not hasattr(found, part)
            found = None if missing else getattr(found, part)
        if missing:
            raise InvalidArgument(
                f"MODULE:NAME must name something in the module: got {path!r}, and {where} has no such attribute."
            )
    return found


def _module(where: str) -> Any:
    """The module, found from the current folder too, as ``python -m`` finds it."""
    if not all(part.isidentifier() for part in where.split(".")):
        raise InvalidArgument(
            f"MODULE:NAME must name a module by its dotted name: got {where!r}. Run from the folder above it and "
            "write package.models:make_model, without .py."
        )
    if not getattr(sys.flags, "safe_path", False) and "" not in sys.path:
        sys.path.insert(0, "")  # a console script has its own folder there
    fix = "Mend it, or install what it lacks into this Python."
    with _running(f"{where} must import", fix):
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{where}.".startswith(f"{error.name}."):
                raise
            fix = "Write it without .py." if where.endswith(".py") else "Run from its folder, or set PYTHONPATH."
            raise InvalidArgument(f"MODULE:NAME must name a module that Python finds: got {where!r}. {fix}") from error


@contextlib.contextmanager
def _running(rule: str, fix: str) -> Iterator[None]:
    """Inside, the user's code runs: what it raises becomes InvalidArgument, and so does an end of the process."""
    try:
        yield
    except FxquantError:
        raise
    except SystemExit as error:
        raise InvalidArgument(
            f"{rule}: got an end of the process, status {error.code}{place(error)}. Put what runs as a script "
            'under `if __name__ == "__main__":`.'
        ) from error
    except Exception as error:
        whole = "--traceback before the command shows all of it."
        raise InvalidArgument(f"{rule}: got {first_line(error)}{place(error)}. {fix} {whole}") from error


def _no_model(name: str, found: Any) -> InvalidArgument:
    return InvalidArgument(f"{name} must be or return an nn.Module, or (module, args): got {type(found).__name__}.")


def _example(text: str) -> Any:
    """``1x3x32x32`` as random floats, the same at each call; ``2x7:int64`` as zeros, which index any table."""
    import torch

    shape, _, dtype = text.partition(":")
    if not re.fullmatch(r"\d+(x\d+)*", shape) or (dtype or "float32") not in _DTYPES:
        raise InvalidArgument(
            f"--input must be a shape, and maybe a type of {', '.join(_DTYPES)}: got {text!r}. Write 1x3x32x32 or "
            "1x16:int64."
        )
    sizes, kind = tuple(map(int, shape.split("x"))), getattr(torch, dtype or "float32")
    if not kind.is_floating_point:
        return torch.zeros(sizes, dtype=kind)
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(kind)
