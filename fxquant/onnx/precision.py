"""The type of a file's float parts: what was asked, or what the model was trained in where its target takes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxquant.errors import InvalidArgument
from fxquant.onnx.element_types import least_opset
from fxquant.prepared.root import trained_autocast
from fxquant.targets.profiles import Profile

HALVES = (torch.float16, torch.bfloat16)
# From where on the standard's operators take a type: convolutions of bfloat16 came with 22.
_LOWEST = {torch.float16: 19, torch.bfloat16: 22}
# DequantizeLinear says the type of its result from here on; before, a Cast stands after it.
_TYPED_OPSET = 23


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What float parts are, the edges (None: as the model's are), and the opset."""

    compute: torch.dtype
    io: torch.dtype | None
    opset: int

    @property
    def name(self) -> str:
        """``"float16"``."""
        return str(self.compute).removeprefix("torch.")

    @property
    def is_half(self) -> bool:
        """Whether the file is a typed one."""
        return self.compute in HALVES


def choose_precision(
    model: nn.Module, profile: Profile, float_dtype: Any, io_dtype: Any, opset: Any, elements: Collection[str] = ()
) -> Precision:
    """The precision of a file. Raises InvalidArgument for a type that is none, or not the target's, or the opset's.

    ``elements`` are the small floats that codes are.
    """
    for name, given in (("float_dtype", float_dtype), ("io_dtype", io_dtype)):
        if given is not None and given not in (*HALVES, torch.float32):
            raise InvalidArgument(
                f"{name} must be torch.float32, torch.float16, torch.bfloat16 or None: got {given!r}."
            )
    known = [each for each in HALVES if str(each).removeprefix("torch.") in profile.half_types]
    if float_dtype in HALVES and float_dtype not in known:
        takes = " or ".join(map(str, [*known, torch.float32]))
        raise InvalidArgument(
            f"float_dtype must be {takes} for target {profile.name!r}: got {float_dtype}, beside which "
            f"{profile.name} does not multiply integers. Leave it out; io_dtype sets the type of inputs and outputs."
        )
    trained = trained_in(model, autocast=profile.strongly_typed)
    compute = float_dtype or (trained if trained in known else torch.float32)
    if compute in HALVES and opset is None:
        opset = min(_TYPED_OPSET, profile.highest_opset)
    least = {element: least_opset(element) for element in sorted(elements)}
    if opset is None:
        opset = max((profile.opset, *least.values()))
    opset = profile.check_opset(opset)
    for element, lowest in least.items():
        if opset < lowest:
            raise InvalidArgument(f"opset must be at least {lowest} for codes of {element}: got {opset}. Leave it out.")
    if opset < _LOWEST.get(compute, 0):
        raise InvalidArgument(
            f"opset must be at least {_LOWEST[compute]} for {compute}, in which this file computes: got {opset}. Leave "
            "it out, or give float_dtype=torch.float32."
        )
    return Precision(compute=compute, io=io_dtype, opset=opset)


def trained_in(model: nn.Module, *, autocast: bool) -> torch.dtype:
    """The type of most parameters; float32 ones may have been trained in that of autocast."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    own = sizes.most_common(1)[0][0] if sizes else torch.float32
    found = trained_autocast(model) if autocast and own == torch.float32 else None
    return own if found is None else found
