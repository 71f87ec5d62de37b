"""Parameters and buffers that were made under ``torch.inference_mode``, made such that they can be trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.inference_mode(False)
def make_trainable(model: nn.Module) -> None:
    """Puts copies in the places of inference tensors, which no operator with a gradient takes; tied ones stay tied.

    Other tensors stay the same objects. An optimizer that holds inference tensors could not have stepped them.
    """
    copies: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if value.is_inference():
                if value not in copies:
                    copies[value] = _copied(value)
                setattr(module, name, copies[value])


def _copied(value: Tensor) -> Tensor:
    copy = value.detach().clone()
    return nn.Parameter(copy, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else copy
