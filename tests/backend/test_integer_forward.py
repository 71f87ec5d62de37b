"""Training with products of codes: option ``integer_matmul`` of both backends, on whole models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxquant
from fxquant.backend.reports import compile_reports
from fxquant.errors import InvalidArgument
from fxquant.ops.integer_matmul import multiplies_exactly
from fxquant.passes.joint import use_integer_matmul
from fxquant.passes.joint.product_times import Problem, Times
from tests.nets import Attention, ConvNet, Convs, Mlp, grads, kept_bytes, step

pytestmark = [
    pytest.mark.usefixtures("cold"),
    pytest.mark.skipif(bool(multiplies_exactly("conv", "cpu", False)), reason="no exact integer kernels here"),
]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Mlp(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (lambda: Mlp(16), (4, 6, 16), 2),
    "convnet": (lambda: ConvNet(8), (2, 3, 8, 8), 3),
    "attention": (lambda: Attention(16), (2, 5, 16), 3),
    "checkpointed": (Checkpointed, (4, 16), 3),
}


def made(make: Callable[[], nn.Module], shape: tuple[int, ...], **keywords: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    return fxquant.prepare(model, (x,), **keywords), x


class Ran(NamedTuple):
    """The result, the gradients, how many products are of codes, what is kept for backward."""

    out: Tensor
    grads: dict[str, Tensor]
    integer: int
    kept: int


@functools.cache
def run(net: str, backend: str, integers: bool, recipe: str = "int8") -> Ran:
    """A training step of its own compile."""
    torch._dynamo.reset()
    model, x = made(*NETS[net][:2], recipe=recipe)
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(model, backend=backend, options={"integer_matmul": integers})
        out = step(compiled, x)
    gradients, integer = grads(model), compile_reports()[-1].integer
    return Ran(out, gradients, integer, kept_bytes(model, compiled, x))


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=rtol * value.abs().max().item())


@pytest.mark.parametrize("net", ["mlp", "convnet", "attention"])
def test_compiled_eager_and_float(net: str) -> None:
    eager, compiled, floating = run(net, "fxquant_eager", True), run(net, "fxquant", True), run(net, "fxquant", False)
    assert (eager.integer, compiled.integer, floating.integer) == (NETS[net][2], NETS[net][2], 0)
    # What lies between products (softmax, batch statistics) is summed in another order.
    torch.testing.assert_close(compiled.out, eager.out, rtol=1e-5, atol=1e-6)
    assert_near(compiled.grads, eager.grads)
    torch.testing.assert_close(compiled.out, floating.out, rtol=1e-5, atol=1e-5)
    assert_near(compiled.grads, floating.grads)


def test_an_exact_chain_has_the_same_bits_compiled() -> None:
    """Linear, ReLU, linear: nothing but exact sums and single roundings."""
    assert torch.equal(run("mlp", "fxquant_eager", True).out, run("mlp", "fxquant", True).out)


def test_gradients_are_those_of_the_same_values() -> None:
    """One linear and a loss whose gradient is given: backward sees nothing of how forward multiplied."""
    found = []
    for integers in (True, False):
        torch._dynamo.reset()
        model, x = made(lambda: nn.Linear(32, 8), (16, 32))
        compiled = torch.compile(model, backend="fxquant", options={"integer_matmul": integers})
        x.requires_grad_()
        compiled(x).backward(torch.linspace(-1, 1, 128).reshape(16, 8))
        assert x.grad is not None
        found.append({**grads(model), "x": x.grad})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_evaluation_multiplies_codes_too() -> None:
    for backend in ("fxquant_eager", "fxquant"):
        torch._dynamo.reset()
        model, x = made(*NETS["mlp"][:2])
        compiled = torch.compile(model, backend=backend, options={"integer_matmul": True})
        trained = step(compiled, x)
        model.eval()
        with torch.no_grad():
            assert torch.equal(compiled(x), trained)


@pytest.fixture
def uncached() -> Iterator[None]:
    """Passes run, and count: of a graph that Inductor's cache has from an earlier run, they would not."""
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


@pytest.mark.usefixtures("uncached")
def test_a_dynamic_batch_compiles_once() -> None:
    model, _ = made(*NETS["mlp"][:2])
    reference, _ = made(*NETS["mlp"][:2])
    compiled = torch.compile(model, backend="fxquant", options={"integer_matmul": True}, dynamic=True)
    eager = torch.compile(reference, backend="fxquant_eager", options={"integer_matmul": True}, dynamic=True)
    made_by: list[object] = []
    for batch in (4, 7, 19):
        value = torch.randn(batch, 6, 16)
        assert torch.equal(step(compiled, value), step(eager, value))
        made_by.append(compile_reports()[-2:])
    assert made_by[0] == made_by[1] == made_by[2], "the first batch compiled for all"
    assert [report.integer for report in compile_reports()[-2:]] == [2, 2]
    torch._dynamo.reset()
    images, _ = made(*NETS["convnet"][:2])
    compiled = torch.compile(images, backend="fxquant", options={"integer_matmul": True}, dynamic=True)
    for batch in (2, 5):
        assert step(compiled, torch.randn(batch, 3, 8, 8)).shape == (batch, 5)
    assert compile_reports()[-1].integer == 3


@pytest.mark.usefixtures("uncached")
def test_bfloat16_autocast() -> None:
    found = {}
    for integers in (True, False):
        torch._dynamo.reset()
        model, x = made(*NETS["mlp"][:2])
        compiled = torch.compile(model, backend="fxquant", options={"integer_matmul": integers})
        with torch.autocast("cpu", torch.bfloat16):
            out = compiled(x)
        assert out.dtype == torch.bfloat16
        out.float().square().mean().backward()
        found[integers] = out.detach(), grads(model)
        assert compile_reports()[-1].integer == (2 if integers else 0)
    torch.testing.assert_close(found[True][0], found[False][0], rtol=0.05, atol=0.02)
    assert_near(found[True][1], found[False][1], rtol=0.05)


def test_bfloat16_gradients_are_as_near_to_float64_as_those_of_float_products() -> None:
    """BatchNorm over four images lifts the rounding of bfloat16: the ways are as far apart as each is from exact."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))

    def gradients(dtype: torch.dtype, integers: bool) -> Tensor:
        torch._dynamo.reset()
        torch.manual_seed(0)
        value = x.double() if dtype == torch.float64 else x
        model = fxquant.prepare(Convs().to(value.dtype), (value,))
        run = torch.compile(model, backend="fxquant_eager", options={"integer_matmul": integers})
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = run(value)
        (out.double() - torch.linspace(-1, 1, out.numel()).view_as(out)).square().mean().backward()
        return torch.cat([gradient.double().flatten() for gradient in grads(model).values()])

    exact = gradients(torch.float64, False)
    codes, floats = ((gradients(torch.bfloat16, integers) - exact).norm() for integers in (True, False))
    assert 0.01 * exact.norm() < codes < 1.25 * floats
    for integers in (True, False):
        assert (gradients(torch.float32, integers) - exact).norm() < 1e-5 * exact.norm()


def test_four_bit_weights() -> None:
    found, expected = (run("mlp", "fxquant", integers, recipe="w4a8") for integers in (True, False))
    assert (found.integer, expected.integer) == (NETS["mlp"][2], 0)
    torch.testing.assert_close(found.out, expected.out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("net", NETS)
def test_no_more_is_saved_for_backward(net: str) -> None:
    # In a region the scales of weights are: what computes their codes is not recomputed.
    scales = 4 * sum(p.shape[0] for p in NETS[net][0]().parameters() if p.dim() > 1) if net == "checkpointed" else 0
    assert run(net, "fxquant", True).kept <= run(net, "fxquant", False).kept + scales


def test_a_checkpointed_region() -> None:
    found, expected = (run("checkpointed", "fxquant", integers) for integers in (True, False))
    assert (found.integer, expected.integer) == (3, 0)
    torch.testing.assert_close(found.out, expected.out, rtol=1e-5, atol=1e-5)
    assert_near(found.grads, expected.grads)


def test_training_takes_the_same_course() -> None:
    curves = []
    for integers in (True, False):
        torch._dynamo.reset()
        model, x = made(*NETS["mlp"][:2])
        target = torch.sin(x.sum(-1, keepdim=True)).expand_as(x)
        compiled = torch.compile(model, backend="fxquant", options={"integer_matmul": integers})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        losses = []
        for _ in range(50):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(compiled(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < 0.8 * curves[0][0]
    torch.testing.assert_close(curves[0], curves[1], rtol=0.02, atol=0)


def test_auto_follows_the_measurement_and_explain_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def decided(problem: Problem) -> Times:
        return Times(1.0, 0.5 if problem.convolution else 1.2)

    monkeypatch.setattr(use_integer_matmul, "never_faster", lambda device: "")
    monkeypatch.setattr(use_integer_matmul, "times", decided)
    model, x = made(*NETS["convnet"][:2])
    step(torch.compile(model, backend="fxquant_eager", options={"integer_matmul": "auto"}), x)
    report = compile_reports()[-1]
    assert report.integer == 2
    wanted = "float product: integers take 1.20 of its time here, as measured"
    assert [d.reason for d in report.declines if d.pass_name == "UseIntegerMatmul"] == [wanted]
    assert wanted in str(fxquant.explain(model))


class Products(nn.Module):
    """Attention without its kernel: both products are of activations, in batches."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(x)
        return torch.softmax(y @ y.transpose(1, 2), -1) @ y


def test_products_of_batches_stay_float() -> None:
    model, x = made(Products, (2, 5, 16))
    step(torch.compile(model, backend="fxquant_eager", options={"integer_matmul": True}), x)
    report = compile_reports()[-1]
    reasons = [d.reason for d in report.declines if d.pass_name == "UseIntegerMatmul"]
    assert reasons == ["float product: torch has no product of batches of integer matrices"] * 2
    assert report.integer == 1


def test_other_values_of_the_option() -> None:
    for value in ("always", None, 2):
        torch._dynamo.reset()
        model, x = made(*NETS["mlp"][:2])
        compiled = torch.compile(model, backend="fxquant_eager", options={"integer_matmul": value})
        wanted = rf"options\['integer_matmul'\] must be True, False or 'auto': got {value!r}\."
        with pytest.raises((InvalidArgument, torch._dynamo.exc.BackendCompilerFailed), match=wanted):
            compiled(x)
