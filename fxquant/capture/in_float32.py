"""A model of half or double precision as one of float32, for files that runtimes on a CPU load."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.capture.aside import evaluating, uncompiled, untouched

OTHERS = (torch.float16, torch.bfloat16, torch.float64)


def is_other(model: nn.Module) -> bool:
    """Whether any parameter or buffer is of half or double precision."""
    return any(value.dtype in OTHERS for value in (*model.parameters(), *model.buffers()))


def widened(values: Any) -> Any:
    """Copies of nested example inputs, with tensors of half and double precision as float32.

    Of a view, torch.export guards the sizes of the whole tensor too, which nobody passes later
    (`findings/torch_export_guards_the_whole_of_a_view.sh`).
    """

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().float() if value.dtype in OTHERS else value.detach().clone()

    return torch.utils._pytree.tree_map(copied, values)


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, parameters and buffers of half and double precision are float32; halves keep their values.

    The parameters stay the objects that they are, and have their own memory and gradients again afterwards:
    torch.export puts one in the place of a recurrent layer's parameter with its gradient, which must be of its type.
    """
    parameters = [(value, value.data, value.grad) for value in model.parameters() if value.dtype in OTHERS]
    buffers = [
        (module, name, value)
        for module in model.modules()
        for name, value in module._buffers.items()
        if value is not None and value.dtype in OTHERS
    ]
    try:
        for value, own, _ in parameters:
            value.grad, value.data = None, own.float()
        for module, name, own in buffers:
            module._buffers[name] = own.float()
        yield
    finally:
        for value, own, grad in parameters:
            value.data = own
            value.grad = grad
        for module, name, own in buffers:
            module._buffers[name] = own


def output_types(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.dtype]:
    """The types of a model's outputs that are tensors, flattened in order, from a run of the float model."""
    with untouched(model), uncompiled(model), evaluating(model), torch.no_grad():
        outputs = model(*args, **kwargs)
    return [leaf.dtype for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
