"""The ``fxquant`` operator library and the one way an operator is put into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Kept alive here: a Library that is collected unregisters its operators.
LIBRARY = torch.library.Library("fxquant", "DEF")


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any] | None = None) -> Any:
    """Registers ``schema`` with one kernel for every device; returns its OpOverload.

    ``fake`` gives shapes and dtypes; without it the kernel itself serves, which is right for kernels made
    of shape-preserving torch calls only.
    """
    name = schema.split("(", 1)[0].strip()
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxquant::{name}", fake or kernel, lib=LIBRARY)
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.fxquant, packet), overload or "default")
