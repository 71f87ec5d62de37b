"""Products of codes on the device: exact where torch's integer product takes the sizes, declined with a reason else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.backend.reports import compile_reports
from fxquant.numerics import integer
from fxquant.ops.integer_matmul import multiplies_exactly
from tests.gpu.harness import bits
from tests.nets import Mlp, grads, prepared, step

TOO_SMALL = "CUDA multiplies integers of more than 16 rows and sizes that are multiples of 8 only"


@pytest.fixture(autouse=True)
def exact(device: str) -> None:
    why_not = multiplies_exactly("matmul", device, True)
    if why_not:
        pytest.skip(f"no exact integer product here: {why_not}")


def ran(
    make: Callable[[], nn.Module], shape: tuple[int, ...], device: str, backend: str, integers: Any
) -> tuple[Tensor, dict[str, Tensor], int, list[str]]:
    """Result, gradients, products of codes and reasons against others, of one step."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    model = prepared(model, x).to(device)
    with torch._inductor.config.patch(force_disable_caches=True):
        out = step(torch.compile(model, backend=backend, options={"integer_matmul": integers}), x.to(device))
    report = compile_reports()[-1]
    reasons = [d.reason for d in report.declines if d.pass_name == "UseIntegerMatmul"]
    return out.cpu(), {name: g.cpu() for name, g in grads(model).items()}, report.integer, reasons


@pytest.mark.parametrize("rows", [24, 501])
def test_an_exact_chain_has_the_bits_of_eager_and_of_the_cpu(rows: int, device: str) -> None:
    """Linear, ReLU, linear: nothing but exact sums and single roundings."""
    shape = (rows, 16)
    compiled, _, count, _ = ran(lambda: Mlp(16), shape, device, "fxquant", True)
    assert count == 2
    eager, _, count, _ = ran(lambda: Mlp(16), shape, device, "fxquant_eager", True)
    assert count == 2
    there, _, count, _ = ran(lambda: Mlp(16), shape, "cpu", "fxquant_eager", True)
    assert count == 2
    assert torch.equal(bits(compiled), bits(eager)) and torch.equal(bits(eager), bits(there))


def test_float_and_integer_products_train_alike(device: str) -> None:
    out, gradients, count, _ = ran(lambda: Mlp(16), (32, 16), device, "fxquant", True)
    floating, float_gradients, none, _ = ran(lambda: Mlp(16), (32, 16), device, "fxquant", False)
    assert (count, none) == (2, 0)
    torch.testing.assert_close(out, floating, rtol=1e-5, atol=1e-5)
    for name, expected in float_gradients.items():
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(("width", "rows"), [(16, 16), (12, 32)], ids=["16 rows", "12 columns"])
def test_sizes_that_cuda_does_not_take_stay_float_and_say_so(width: int, rows: int, cuda: str) -> None:
    out, _, count, reasons = ran(lambda: Mlp(width), (rows, width), cuda, "fxquant", True)
    assert count == 0 and reasons == [TOO_SMALL] * 2
    floating, _, _, _ = ran(lambda: Mlp(width), (rows, width), cuda, "fxquant", False)
    assert torch.equal(out, floating)


def test_auto_measures_on_the_device(device: str) -> None:
    _, _, count, reasons = ran(lambda: Mlp(64), (256, 64), device, "fxquant_eager", "auto")
    assert count + len(reasons) == 2
    assert all("of its time here, as measured" in reason for reason in reasons)


def test_convolutions_stay_float_on_cuda(cuda: str) -> None:
    _, _, count, reasons = ran(lambda: nn.Conv2d(8, 16, 3), (4, 8, 9, 9), cuda, "fxquant_eager", True)
    assert count == 0 and reasons == ["torch convolves integers on CPU only"]


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
def test_the_product_itself(zeros: bool, device: str) -> None:
    """Against int64 on CPU: largest codes, sums up to the end of int32, zero points on both sides."""
    generator = torch.Generator().manual_seed(0)
    lhs = torch.randint(-128, 128, (48, 1024), generator=generator).to(torch.int8)
    rhs = torch.randint(-128, 128, (1024, 40), generator=generator).to(torch.int8)
    lhs[0], rhs[:, 0] = -128, -128
    scales = torch.tensor([2.0**-7]), torch.linspace(0.25, 0.5, 40)
    points = {"lhs_zero": torch.tensor([-5], dtype=torch.int32)} if zeros else {}
    wide = (lhs.long() - (-5 if zeros else 0)) @ rhs.long()
    expected = wide.float() * (scales[0] * scales[1])
    there = [t.to(device) for t in (lhs, rhs.t().contiguous())]
    got = integer.matmul(
        there[0], there[1].t(), *(t.to(device) for t in scales), **{k: v.to(device) for k, v in points.items()}
    )
    assert torch.equal(bits(got), bits(expected))
