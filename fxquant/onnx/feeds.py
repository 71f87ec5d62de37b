"""A model's inputs and outputs as the file has them: arrays, flattened in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxquant.errors import InvalidArgument
from fxquant.targets.document import Feeds, ModelPath, as_declared, load_model
from fxquant.targets.session import input_names

if TYPE_CHECKING:
    import numpy as np


def tensors_of(*values: Any) -> list[Tensor]:
    """The tensors among nested values, flattened in order, as the exporter does."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def feeds_of(path: ModelPath, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Feeds:
    """The file's inputs by name: keywords by theirs, in whatever order they come, all else in order.

    Floats have the file's type, but bfloat16 ones are float32: numpy has no such type.

    Raises InvalidArgument where the file has another number of them.
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
    return as_declared(load_model(path), {name: _array(found[name]) for name in names})


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
