"""Tables with ``max_norm``, whose rows a lookup scales in place, as constants."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def scaled_tables(model: nn.Module) -> Iterator[None]:
    """Inside, each such table is a copy that is as after a lookup of every row, and no lookup writes.

    A lookup in it gives what one in the model's own gives, and a file can hold it. Other modules that share the
    parameter have the copy, too.
    """
    tables: list[Any] = [
        module
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
    ]
    limits = [(module, module.max_norm) for module in tables]
    copies = {id(module.weight): _scaled(module) for module in tables}
    shared = [
        (module, name, value)
        for module in (model.modules() if copies else ())
        for name, value in module._parameters.items()
        if id(value) in copies
    ]
    try:
        for module, name, value in shared:
            module._parameters[name] = copies[id(value)]
        for module in tables:
            module.max_norm = None
        yield
    finally:
        for module, name, value in shared:
            module._parameters[name] = value
        for module, limit in limits:
            module.max_norm = limit


def _scaled(module: Any) -> nn.Parameter:
    table: Tensor = module.weight.detach().clone()
    rows = torch.arange(len(table), device=table.device)
    torch.embedding_renorm_(table, rows, module.max_norm, module.norm_type)
    return nn.Parameter(table, requires_grad=module.weight.requires_grad)
