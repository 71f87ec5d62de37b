"""A model's inputs and outputs as the file has them: arrays, flattened in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxquant.errors import InvalidArgument
from fxquant.targets.document import Feeds, ModelPath
from fxquant.targets.session import input_names

if TYPE_CHECKING:
    import numpy as np


def tensors_of(*values: Any) -> list[Tensor]:
    """The tensors among nested values, flattened in order, as the exporter does."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def feeds_of(path: ModelPath, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Feeds:
    """The file's inputs by name. Raises InvalidArgument where it has another number of them."""
    names, leaves = input_names(path), tensors_of(args, kwargs)
    if len(names) != len(leaves):
        raise InvalidArgument(
            f"args and kwargs must hold the file's {len(names)} inputs ({', '.join(names)}): got {len(leaves)} tensors."
        )
    return {name: leaf.detach().cpu().numpy() for name, leaf in zip(names, leaves, strict=True)}


def arrays(outputs: Any) -> list[np.ndarray]:
    """A model's outputs in the order of the file's."""
    return [_array(value) for value in tensors_of(outputs)]


def _array(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()  # numpy has no bfloat16
