"""What a file is run on: its inputs in the sizes that were asked for, else in its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fxquant.errors import InvalidArgument
from fxquant.support.require import require
from fxquant.targets.document import Feeds

if TYPE_CHECKING:
    import onnx

Shapes = Mapping[str, Sequence[int]]


def feeds_for(model: onnx.ModelProto, shapes: Shapes | None, feeds: Feeds | None) -> tuple[dict[str, np.ndarray], str]:
    """Arrays by input, and their sizes in words.

    What ``feeds`` lacks is made up: floats from a normal distribution, the same at each call, zeros for integers,
    which index any table. An open first dimension is 1 where ``shapes`` says nothing; another open one is an error.
    """
    held = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: value for value in model.graph.input if value.name not in held}
    shapes, feeds = dict(shapes or {}), dict(feeds or {})
    for what, given in (("shapes", shapes), ("feeds", feeds)):
        for name in given:
            if name not in inputs:
                raise InvalidArgument(f"{what} must name inputs of the file, {', '.join(inputs)}: got {name!r}.")
    random, found, words = np.random.default_rng(0), {}, []
    for name, value in inputs.items():
        if name in feeds:
            found[name], note = np.asarray(feeds[name]), ""
        else:
            sizes, note = _sizes(value, shapes.get(name))
            found[name] = _made_up(value, sizes, random)
        words.append(f"{name} {text_of(found[name].shape)}{note}")
    return found, ", ".join(words)


def text_of(shape: Sequence[int]) -> str:
    """``1x3x224x224``."""
    return "x".join(map(str, shape)) or "scalar"


def _sizes(value: onnx.ValueInfoProto, given: Sequence[int] | None) -> tuple[tuple[int, ...], str]:
    """An input's sizes, and which of them nobody gave."""
    name, kind = value.name, value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        raise InvalidArgument(f"{name} must be a tensor: got another kind of input. Give it in feeds.")
    known = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
    symbols = [d.dim_param or "?" for d in kind.shape.dim]
    if given is not None:
        sizes = tuple(map(int, given))
        fits = len(sizes) == len(known) and all(want in (None, size) for want, size in zip(known, sizes, strict=False))
        if kind.HasField("shape") and (not fits or min(sizes, default=1) < 1):
            wanted = "×".join(map(_dimension, known, symbols))
            raise InvalidArgument(f"shape of {name} must fit the file's {wanted}: got {text_of(sizes)}.")
        return sizes, ""
    if not kind.HasField("shape") or None in known[1:]:
        asked = "x".join(str(size or "N") for size in known) if kind.HasField("shape") else "1x3x224x224"
        has = "×".join(map(_dimension, known, symbols)) if kind.HasField("shape") else "no shape"
        raise InvalidArgument(
            f"{name} must have known sizes to be timed: got {has}. Say them with --shape {name}={asked} "
            f"(Python: shapes={{{name!r}: (…)}})."
        )
    if known and known[0] is None:
        return (1, *(size for size in known[1:] if size is not None)), f" (its open dimension {symbols[0]!r} is 1)"
    return tuple(size for size in known if size is not None), ""


def _dimension(size: int | None, symbol: str) -> str:
    return symbol if size is None else str(size)


def _made_up(value: onnx.ValueInfoProto, sizes: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    dtype = require("onnx").helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    return made_up(dtype, sizes, random)


def made_up(dtype: np.dtype[np.generic], sizes: Sequence[int], random: np.random.Generator) -> np.ndarray:
    """Normal floats, zeros for others."""
    if np.issubdtype(dtype, np.floating):
        return random.standard_normal(sizes).astype(dtype)
    return np.zeros(sizes, dtype)
