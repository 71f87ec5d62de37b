"""What the amax quantizers refuse: eagerly, while compiling, and in compiled code with ``check=True``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.errors import InvalidArgument
from fxquant.ops import amax as ops
from fxquant.ops.amax import fake_tensor_quant_learnable, legacy_fake_tensor_quant, scaled_float, scaled_float_learnable
from fxquant.tensor_quant import (
    TensorQuantFunction,
    fake_affine_tensor_quant,
    fake_tensor_quant,
    scaled_e4m3,
    tensor_quant,
)
from tests.ops.oracle import assert_same_bits

NAN, INF = float("nan"), float("inf")


ERRORS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "negative input": (
        lambda x: fake_tensor_quant(x, 1.0, 8, True),
        TypeError,
        r"^Negative values encountered in unsigned quantization\.$",
    ),
    "negative amax": (lambda x: fake_tensor_quant(x, -1.0), ValueError, "^Negative values in amax: .*got -1.0"),
    "negative amax, class": (
        lambda x: TensorQuantFunction.apply(x, torch.tensor([[1.0], [-2.0]])),
        ValueError,
        "Negative values in amax.*got -2.0",
    ),
    "NaN amax": (lambda x: tensor_quant(x, NAN), ValueError, "amax must be finite: got nan"),
    "infinite amax": (lambda x: scaled_float(x, INF), ValueError, "amax must be finite: got inf"),
    "negative float amax": (lambda x: scaled_e4m3(x, -1.0), ValueError, "Negative values in amax"),
    "NaN learned amax": (
        lambda x: fake_tensor_quant_learnable(x, torch.tensor(NAN)),
        ValueError,
        "amax must be finite: got nan",
    ),
    "half scale": (lambda x: tensor_quant(x.half(), 1e-3), ValueError, "amax must be at least 0.00194 for float16"),
    "half scale, legacy": (lambda x: legacy_fake_tensor_quant(x.half(), 1e-3), ValueError, "amax must be .*float16"),
    "empty range": (lambda x: fake_affine_tensor_quant(x, 1.0, 1.0), ValueError, "max must be above min.*min=1.0"),
    "NaN range": (lambda x: fake_affine_tensor_quant(x, NAN, 1.0), ValueError, "max must be above min"),
    "infinite width": (lambda x: fake_affine_tensor_quant(x, -3e38, 3e38), ValueError, "max must be above min"),
}
STATIC: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "no bits": (lambda x: fake_tensor_quant(x, 1.0, 0), InvalidArgument, "num_bits must be from 2 to 16 for signed"),
    "many bits": (lambda x: tensor_quant(x, 1.0, 17), InvalidArgument, "num_bits must be from 2 to 16.*got 17"),
    "one signed bit": (lambda x: fake_tensor_quant(x, 1.0, 1), InvalidArgument, "num_bits must be from 2 to 16"),
    "affine bits": (lambda x: fake_affine_tensor_quant(x, 0.0, 1.0, -1), InvalidArgument, "num_bits must be from 1"),
    "shape": (
        lambda x: fake_tensor_quant(x, torch.ones(2)),
        InvalidArgument,
        r"amax must broadcast to the input's shape \(2, 3\): got \(2,\)",
    ),
    "rank": (lambda x: scaled_float(x, torch.ones(2, 1, 1)), InvalidArgument, r"amax must broadcast.*got \(2, 1, 1\)"),
    "format": (lambda x: scaled_float(x, 1.0, 9, 9), InvalidArgument, r"floating-point format: got \(9, 9\)"),
    "integer input": (lambda x: fake_tensor_quant(x.int(), 1.0), RuntimeError, "`input` must be a floating-point"),
    "integer amax": (
        lambda x: fake_tensor_quant(x, torch.ones(1, dtype=torch.int32)),
        RuntimeError,
        "`amax` must be a floating-point",
    ),
    "device": (
        lambda x: ops.FAKE_TENSOR_QUANT(x.to("meta"), torch.ones(1)),
        InvalidArgument,
        "amax must be on the input's device, meta: got cpu",
    ),
}


@pytest.mark.parametrize("name", [*ERRORS, *STATIC])
def test_errors(name: str) -> None:
    call, kind, message = {**ERRORS, **STATIC}[name]
    with pytest.raises(kind, match=message):
        call(torch.tensor([[-1.0, 0.5, 2.0]] * 2))


@pytest.mark.parametrize("name", [name for name in STATIC if name != "device"])
def test_static_errors_are_raised_while_compiling_too(name: str) -> None:
    call, _, message = STATIC[name]
    torch._dynamo.reset()
    with pytest.raises(Exception, match=message):
        torch.compile(call, fullgraph=True, backend="eager")(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, a: fake_tensor_quant(x, a, check=True), "amax must be finite and at least 0"),
        (lambda x, a: tensor_quant(x, a, check=True)[0], "amax must be finite and at least 0"),
        (lambda x, a: legacy_fake_tensor_quant(x, a, check=True), "amax must be finite and at least 0"),
        (lambda x, a: scaled_float(x, a, check=True), "amax must be finite and at least 0"),
        (lambda x, a: scaled_e4m3(x, a, check=True), "amax must be finite and at least 0"),
        (lambda x, a: fake_tensor_quant_learnable(x, a.sqrt(), check=True), "amax must be finite"),
        (lambda x, a: scaled_float_learnable(x, a.sqrt(), check=True), "amax must be finite"),
        (lambda x, a: fake_tensor_quant(x, a.abs(), 8, True, check=True), "Negative values encountered in unsigned"),
        (lambda x, a: fake_affine_tensor_quant(x, 1.0, a, check=True), "max must be above min"),
    ],
    ids=["fake", "codes", "legacy", "float", "e4m3", "learned", "learned float", "unsigned", "affine"],
)
def test_check_asserts_in_compiled_code(call: Callable[..., Tensor], message: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True)
    x, good, bad = torch.tensor([-1.0, 0.5]), torch.tensor(2.0), torch.tensor(-2.0)
    if "unsigned" in message:
        compiled(x.abs(), good)
    else:
        assert_same_bits(compiled(x, good), call(x, good))
    with pytest.raises(RuntimeError, match=message):
        compiled(x, bad)


def test_without_check_compiled_code_does_not_look() -> None:
    torch._dynamo.reset()
    x = torch.tensor([-1.0, 0.5])
    affine = torch.compile(fake_affine_tensor_quant, fullgraph=True)
    assert affine(x, torch.tensor(1.0), torch.tensor(1.0)).tolist() == [0.0, 0.0]
    compiled = torch.compile(fake_tensor_quant, fullgraph=True)
    assert compiled(x, torch.tensor(-1.0)).tolist() == [0.0, 0.0]
    assert compiled(x, torch.tensor(NAN)).isnan().all()
