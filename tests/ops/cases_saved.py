"""Cases of what backward keeps of a quantizer's input."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.ops.marks import MATERIALIZE, STAND_IN
from fxquant.ops.saved import CLIP_MASK, PACK_PLANES, UNPACK_PLANES
from tests.ops.cases import Case
from tests.ops.cases_affine import DIVIDE, one


def codes(x: Tensor, bits: int) -> Tensor:
    """Codes of a few bits that follow x, with 8 in the second dimension."""
    found = (torch.nan_to_num(x.float()).abs() * 3).clamp(max=2**bits - 1).to(torch.int32).to(torch.uint8)
    return found.unsqueeze(1).expand(-1, 8, *x.shape[1:]).contiguous()


CASES = [
    Case("clip mask", CLIP_MASK, lambda x: (x, *one(x), 0, 15), DIVIDE, grads=()),
    Case("pack bools", PACK_PLANES, lambda x: (codes(x, 1) > 0, 1, 1), {}, grads=(), elementwise=False, takes_x=False),
    Case("pack codes", PACK_PLANES, lambda x: (codes(x, 4), 4, 1), {}, grads=(), elementwise=False, takes_x=False),
    Case("unpack", UNPACK_PLANES, lambda x: (codes(x, 8), 2, 1), {}, grads=(), elementwise=False, takes_x=False),
    Case("materialize", MATERIALIZE, lambda x: (x,), {}, grads=()),
    Case("stand in", STAND_IN, lambda x: (x, x.detach() * 0.5), {}, grads=("computed",)),
]
