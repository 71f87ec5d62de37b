"""What Inductor and Triton make of our operators on a GPU, down to PTX: no operation that rounds otherwise than eager.

Without a GPU too; needs `triton`, whose wheel holds what compiles to PTX.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

pytest.importorskip("triton", reason="Triton is not installed: pip install triton, on Linux")

import fxquant
from fxquant.backend.inductor.compile import compile_quantized
from fxquant.backend.quantize import quantize_graph
from tests.triton.cases import CASES, operator
from tests.triton.harness import Recorder, exact, generated, kernels, ptx

# Approximate quotients and functions, products contracted with sums, subnormal numbers taken for 0.
INEXACT = re.compile(r"\b((?:div\.(?:full|approx)|rcp|ex2|lg2|sin|cos|tanh|fma|mad\.rn)\.\S+|\S+\.ftz\S*)")


def inexact(written: Sequence[str]) -> list[str]:
    """The instructions of all kernels that do not round as eager does."""
    return [found for source in written for kernel in kernels(source) for found in INEXACT.findall(ptx(kernel))]


DTYPES = (torch.float32, torch.bfloat16)
EACH = [(name, dtype) for name, case in CASES.items() for dtype in DTYPES if dtype in case.dtypes]


@pytest.mark.parametrize(("name", "dtype"), EACH, ids=lambda value: str(value).removeprefix("torch."))
def test_an_operator_rounds_as_eager(name: str, dtype: torch.dtype) -> None:
    case = operator(CASES[name], dtype)
    written = generated(case.function, case.inputs, exact())
    assert written and all(map(kernels, written))
    assert not inexact(written)


def rounded(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return fxquant.ops.fake_quantize_per_tensor_affine(x, scale, zero, -128, 127, rounding="divide") + x


INPUTS = (torch.randn(64), torch.tensor([0.1]), torch.zeros(1, dtype=torch.int32))


class TestWithoutOurSettings:
    """So the checks above can see what they look for."""

    def test_quotients_are_approximate_and_products_join_sums(self) -> None:
        found = inexact(generated(rounded, INPUTS, {}))
        assert {"div.full.f32", "fma.rn.f32"} <= set(found)

    def test_functions_flush_subnormal_numbers(self) -> None:
        found = inexact(generated(lambda x: x.floor(), INPUTS[:1], {}))
        assert any(".ftz" in instruction for instruction in found)

    @pytest.mark.parametrize(
        ("setting", "instruction"),
        [("eager_numerics.division_rounding", "div.full.f32"), ("emulate_precision_casts", "fma.rn.f32")],
    )
    def test_each_setting_has_its_own_effect(self, setting: str, instruction: str) -> None:
        settings = exact()
        del settings[setting]
        assert set(inexact(generated(rounded, INPUTS, settings))) == {instruction}


def test_a_scale_given_as_a_number_is_divided_by() -> None:
    def function(x: Tensor) -> Tensor:
        return fxquant.ops.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127, rounding="divide")

    (written,) = generated(function, INPUTS[:1], exact())
    (kernel,) = kernels(written)
    assert "div.rn.f32" in ptx(kernel)
    (written,) = generated(function, INPUTS[:1], {})
    (kernel,) = kernels(written)
    assert "div." not in ptx(kernel)  # a product with the reciprocal


def test_a_double_becomes_a_half_by_way_of_float32() -> None:
    scale, zero = torch.tensor([0.1, 0.2]), torch.zeros(2, dtype=torch.int32)
    x = torch.randn(2, 8, dtype=torch.bfloat16)

    def function(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return fxquant.ops.fake_quantize_per_channel_affine(x, scale, zero, 0, -128, 127)

    (written,) = generated(function, (x, scale, zero), exact())
    (kernel,) = kernels(written)
    assert "mul.f64" in ptx(kernel) or "mul.rn.f64" in ptx(kernel)
    assert "bf16.f64" not in ptx(kernel) and "bf16x2.f64" not in ptx(kernel)


class Block(nn.Module):
    """Two linear layers with an activation, a residual sum and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(self.norm(x))))


def step(model: nn.Module, x: Tensor, settings: dict[str, Any]) -> list[str]:
    """What is written for forward and backward of one training step."""
    recorder = Recorder(settings)

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return compile_quantized(quantize_graph(gm, inputs), inputs, inner_compile=recorder)

    torch._dynamo.reset()
    uncached = {"enable_autograd_cache": False, "force_non_lazy_backward_lowering": True}
    with torch._functorch.config.patch(uncached), contextlib.suppress(AssertionError):
        torch.compile(model, backend=backend, fullgraph=True)(x)
    return recorder.written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
def test_a_training_step_rounds_as_eager(dtype: torch.dtype) -> None:
    model, x = Block(), torch.randn(8, 16)
    fxquant.prepare(model, (x,))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        written = step(model, x, exact())
    assert len(written) == 2 and "div.rn.f32" in "".join(ptx(k) for k in kernels(written[0]))
    assert not inexact(written)
