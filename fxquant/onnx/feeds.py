"""A model's inputs and outputs as the file has them: arrays, flattened in order."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxquant.errors import InvalidArgument
from fxquant.support.require import require
from fxquant.targets.document import Feeds, ModelPath, as_declared, load_model
from fxquant.targets.session import input_names

if TYPE_CHECKING:
    import numpy as np
    import onnx


def tensors_of(*values: Any) -> list[Tensor]:
    """The tensors among nested values, flattened in order, as the exporter does."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def feeds_of(path: ModelPath, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Feeds:
    """The file's inputs by name: keywords by theirs, in whatever order they come, all else in order.

    Floats have the file's type, but bfloat16 ones are float32: numpy has no such type.

    Raises InvalidArgument where the file has another number of them, or one of another type or shape.
    """
    names = input_names(path)
    found = {name: kwargs[name] for name in names if isinstance(kwargs.get(name), Tensor)}
    others = tensors_of(args, {name: value for name, value in kwargs.items() if name not in found})
    if len(names) != len(found) + len(others):
        raise InvalidArgument(
            f"args and kwargs must hold the file's {len(names)} inputs ({', '.join(names)}): "
            f"got {len(found) + len(others)} tensors."
        )
    found |= dict(zip([name for name in names if name not in found], others, strict=True))
    feeds = {name: _array(found[name]) for name in names}
    model = load_model(path)
    for value in model.graph.input:
        if value.name in feeds and value.type.HasField("tensor_type"):
            _check_kind(path, value, feeds[value.name])
            _check_shape(path, value, feeds[value.name])
    return as_declared(model, feeds)


def _check_kind(path: ModelPath, value: onnx.ValueInfoProto, given: np.ndarray) -> None:
    """Floats are given the file's type; all else has to have it."""
    wanted = require("onnx.helper").tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    if wanted != given.dtype and not (given.dtype.kind == "f" and wanted.kind in "fV"):
        raise InvalidArgument(
            f"input {value.name!r} of {os.fspath(path)} must be {wanted}: got {given.dtype}. Give what the model was "
            "exported with, or export it again."
        )


def _check_shape(path: ModelPath, value: onnx.ValueInfoProto, given: np.ndarray) -> None:
    if not value.type.tensor_type.HasField("shape"):
        return
    sizes = value.type.tensor_type.shape.dim
    fixed = [size.dim_value if size.HasField("dim_value") else None for size in sizes]
    fits = len(fixed) == given.ndim and all(w in (None, g) for w, g in zip(fixed, given.shape, strict=True))
    if not fits:
        names = [size.dim_param or "any" if n is None else n for size, n in zip(sizes, fixed, strict=True)]
        raise InvalidArgument(
            f"input {value.name!r} of {os.fspath(path)} must have shape ({', '.join(map(str, names))}): got "
            f"{given.shape}. Give inputs of that size, or export with it left open: dynamic_shapes of export_onnx."
        )


def arrays(values: Any) -> list[np.ndarray]:
    """The tensors among a model's inputs or outputs in the order of the file's."""
    return [_array(value) for value in tensors_of(values)]


def results(outputs: Any) -> list[np.ndarray]:
    """A model's outputs in the order of the file's, which has sizes as tensors too."""
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [_array(torch.as_tensor(leaf)) for leaf in leaves if isinstance(leaf, (Tensor, int, float))]


def _array(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()  # numpy has no bfloat16
