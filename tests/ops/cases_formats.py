"""Cases of the low-precision formats: small floats, blocks, stochastic rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.ops.blocks import FAKE_QUANTIZE_BLOCKS, FAKE_QUANTIZE_BLOCKS_AMAX, FAKE_QUANTIZE_MX
from fxquant.ops.floating import DEQUANTIZE_FLOAT, FAKE_QUANTIZE_FLOAT, QUANTIZE_FLOAT
from fxquant.ops.stochastic import STOCHASTIC, UNIFORM
from tests.ops.cases import FLOATS, Case

FLOAT_NAMES = ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1")


def seed(x: Tensor, offset: int = 5) -> Tensor:
    return torch.tensor([2**40 + 17, offset], device=x.device)


def scalar(x: Tensor, value: float = 0.1) -> Tensor:
    return torch.tensor(value, device=x.device)


def row(x: Tensor) -> Tensor:
    """One scale for each place of the last dimension but one, as it broadcasts."""
    return torch.logspace(-3, 1, x.shape[-2], device=x.device).reshape(-1, 1)


def point(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tensor([0.1], device=x.device), torch.tensor([3], dtype=torch.int32, device=x.device)


def points(x: Tensor) -> tuple[Tensor, Tensor]:
    count = x.shape[1]
    return torch.logspace(-3, 1, count, device=x.device), torch.arange(count, device=x.device) % 7


def codes(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().float().nan_to_num().clamp(-400, 400).to(dtype)


def mx(name: str, element: str, *, axes: Any = (-1,), sizes: Any = (4,), rounding: str = "floor") -> Case:
    kwargs = {"axes": list(axes), "sizes": list(sizes), "element": element, "scale_rounding": rounding}
    args = noisy if "stochastic" in name else plain
    return Case(
        f"mx {name}", FAKE_QUANTIZE_MX, args, kwargs, elementwise=False, dtypes=ONE if args is noisy else FLOATS
    )


def int4(axes: list[int], sizes: list[int], **more: Any) -> dict[str, Any]:
    return {"axes": axes, "sizes": sizes, "element": None, "quant_min": -8, "quant_max": 7, **more}


def plain(x: Tensor) -> tuple[Tensor]:
    return (x,)


def finite(x: Tensor) -> tuple[Tensor]:
    """One scale per tensor is worth little where the tensor holds NaN."""
    return (x.detach().nan_to_num().clamp(-9, 9),)


def noisy(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, seed(x)


# Random numbers are a hundred instructions in each: not every dtype needs to compile them.
FEW = (torch.float32, torch.float64)
ONE = (torch.float32,)
NVFP4 = int4([-1], [4], element="e2m1", scale_format="e4m3")
BEYOND = {"saturate": False}

CASES = [
    *(Case(f"float {name}", FAKE_QUANTIZE_FLOAT, lambda x, name=name: (x, None, name)) for name in FLOAT_NAMES),
    Case("float e4m3, scale", FAKE_QUANTIZE_FLOAT, lambda x: (x, scalar(x), "e4m3")),
    Case("float e2m1, scales", FAKE_QUANTIZE_FLOAT, lambda x: (x, row(x), "e2m1"), elementwise=False),
    Case("float e4m3, NaN beyond", FAKE_QUANTIZE_FLOAT, lambda x: (x, scalar(x), "e4m3"), BEYOND),
    Case("float e5m2, inf beyond", FAKE_QUANTIZE_FLOAT, lambda x: (x, scalar(x, 1e-4), "e5m2"), BEYOND),
    Case("float e3m2, stochastic", FAKE_QUANTIZE_FLOAT, lambda x: (x, scalar(x), "e3m2", seed(x)), dtypes=FEW),
    Case("to e4m3", QUANTIZE_FLOAT, lambda x: (x, scalar(x), torch.float8_e4m3fn), grads=()),
    Case("to e5m2", QUANTIZE_FLOAT, lambda x: (x, row(x), torch.float8_e5m2), BEYOND, grads=(), elementwise=False),
    Case(
        "from e4m3",
        DEQUANTIZE_FLOAT,
        lambda x: (codes(x, torch.float8_e4m3fn), row(x)),
        grads=(),
        elementwise=False,
        takes_x=False,
    ),
    Case(
        "from e5m2, half",
        DEQUANTIZE_FLOAT,
        lambda x: (codes(x, torch.float8_e5m2), None, torch.float16),
        grads=(),
        takes_x=False,
    ),
    *(mx(name, name) for name in (*FLOAT_NAMES, "int8")),
    mx("e2m1, ceil", "e2m1", rounding="ceil"),
    mx("e4m3, sizes that leave a rest", "e4m3", axes=(1, -1), sizes=(2, 3)),
    mx("int8, stochastic", "int8", rounding="ceil", sizes=(3,)),
    Case("nvfp4", FAKE_QUANTIZE_BLOCKS, plain, NVFP4, elementwise=False),
    Case("nvfp4, finite", FAKE_QUANTIZE_BLOCKS, finite, NVFP4, elementwise=False, takes_x=False),
    Case("nvfp4, amax", FAKE_QUANTIZE_BLOCKS_AMAX, lambda x: (x, None, scalar(x, 2.5)), NVFP4, elementwise=False),
    Case("blocks", FAKE_QUANTIZE_BLOCKS, plain, int4([-1], [4]), elementwise=False),
    Case(
        "blocks, a rest, stochastic",
        FAKE_QUANTIZE_BLOCKS,
        noisy,
        int4([0, 2], [2, 3], quant_min=0),
        dtypes=ONE,
        elementwise=False,
    ),
    Case(
        "blocks, scales in blocks",
        FAKE_QUANTIZE_BLOCKS,
        plain,
        int4([-1], [2], scale_bits=8, scale_axes=[1, 2], scale_sizes=[5, 4]),
        elementwise=False,
    ),
    Case(
        "blocks, amax",
        FAKE_QUANTIZE_BLOCKS_AMAX,
        lambda x: (x, row(x)[:3, :1] + 0.5, None),
        int4([1, 2], [2, 4]),
        elementwise=False,
    ),
    Case("stochastic", STOCHASTIC, lambda x: (x, *point(x), 0, 15, seed(x))),
    Case(
        "stochastic, axis",
        STOCHASTIC,
        lambda x: (x, *points(x), -8, 7, seed(x)),
        {"axis": 1},
        dtypes=ONE,
        elementwise=False,
    ),
    Case("uniform", UNIFORM, lambda x: (seed(x), x), grads=(), dtypes=ONE, takes_x=False),
]
