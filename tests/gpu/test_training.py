"""The main job on the device: prepared, compiled, trained for some steps, against the eager oracle and the CPU's.

A matrix product sums in an order that depends on device, shape and library, so a value may fall on the other side of
the border between two codes. Float64 nets keep that away, and are held tightly; float32 nets are held as a whole; what
no product comes before is held bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.backend.reports import compile_reports
from fxquant.prepared.quantizer import quantizers
from tests.gpu.harness import bits
from tests.nets import Block, ConvNet, Mlp, grads, prepared

WIDTH = 16


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cnn": (lambda: ConvNet(8), (4, 3, 10, 10)),
    "block": (Block, (4, 12, WIDTH)),
}
each_net = pytest.mark.parametrize("net", NETS)


def made(net: str, device: str, dtype: torch.dtype = torch.float32, **keywords: Any) -> tuple[nn.Module, list[Tensor]]:
    """A prepared net on the device, and four batches: the second wider than the first, the third and last clip."""
    torch.manual_seed(0)
    make, shape = NETS[net]
    model = make().to(dtype)
    xs = [torch.randn(shape, dtype=dtype) * spread for spread in (1.0, 20.0, 0.3, 3.0)]
    model = prepared(model, xs[0], **keywords)
    return model.to(device), [x.to(device) for x in xs]


@dataclass
class Course:
    """What some steps without an optimizer gave, on CPU."""

    outputs: list[Tensor]
    gradients: list[dict[str, Tensor]]
    inputs: list[Tensor]
    ranges: dict[str, tuple[Tensor, Tensor]]


def course(model: nn.Module, run: Callable[[Tensor], Tensor], xs: list[Tensor]) -> Course:
    found = Course([], [], [], {})
    for x in xs:
        model.zero_grad()
        x = x.detach().clone().requires_grad_()
        out = run(x)
        weights = torch.linspace(-1, 1, out.numel()).to(out.dtype).to(out.device)
        (out * weights.view_as(out)).sum().backward()
        assert x.grad is not None
        found.outputs.append(out.detach().cpu())
        found.gradients.append({name: g.cpu() for name, g in grads(model).items()})
        found.inputs.append(x.grad.cpu())
    found.ranges = {key: (q.min_val.cpu(), q.max_val.cpu()) for key, q in quantizers(model) if q.stateful}
    return found


def compiled(model: nn.Module, backend: str = "fxquant", **keywords: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend=backend, **keywords)


# ---------------------------------------------------------------- float64: nothing moves a code


def assert_close(got: Course, expected: Course) -> None:
    """To float32's accuracy, in which scales are kept; a code that differed would show as a step of its range."""
    pairs = ((got.outputs, expected.outputs), (got.inputs, expected.inputs), (got.gradients, expected.gradients))
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert got.ranges.keys() == expected.ranges.keys() and got.ranges
    for key, pair in got.ranges.items():
        torch.testing.assert_close(pair, expected.ranges[key], rtol=1e-6, atol=1e-7)


@each_net
@pytest.mark.parametrize("recipe", ["int8", "w4a8"])
def test_compiled_steps_are_the_eager_ones_of_device_and_cpu(net: str, recipe: str, device: str) -> None:
    found = {}
    for name, where, backend in (
        ("compiled", device, "fxquant"),
        ("eager", device, "fxquant_eager"),
        ("cpu", "cpu", "fxquant_eager"),
    ):
        torch._dynamo.reset()
        model, xs = made(net, where, torch.float64, recipe=recipe)
        found[name] = course(model, compiled(model, backend), xs)
        assert compile_reports()[-1].quantized > 0
    assert_close(found["compiled"], found["eager"])
    assert_close(found["eager"], found["cpu"])


@each_net
def test_delayed_ranges(net: str, device: str) -> None:
    found = []
    for where, backend in ((device, "fxquant"), ("cpu", "fxquant_eager")):
        torch._dynamo.reset()
        model, xs = made(net, where, torch.float64, ranges="delayed")
        found.append(course(model, compiled(model, backend), xs))
    assert_close(*found)


def test_floats_saved_and_codes_saved_give_the_same_bits(device: str) -> None:
    """By the eager backend, whose products are the same calls either way."""
    found = []
    for save in (True, False):
        torch._dynamo.reset()
        model, xs = made("block", device)
        found.append(course(model, compiled(model, "fxquant_eager", options={"save_quantized": save}), xs))
    for one, other in zip(*(f.gradients for f in found), strict=True):
        for name in one:
            assert torch.equal(bits(one[name]), bits(other[name])), name


# ---------------------------------------------------------------- bit for bit, where no sum is rounded


@pytest.mark.parametrize("recipe", ["int8", "w4a8"])
@pytest.mark.parametrize("backend", ["fxquant", "fxquant_eager"])
def test_weights_and_ranges_have_the_cpu_s_bits(recipe: str, backend: str, device: str) -> None:
    """Rows of the identity: each output is one product, so the output is the fake-quantized weight times one value."""
    found = []
    for where, chosen in ((device, backend), ("cpu", "fxquant_eager")):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Linear(32, 24, bias=False)
        x = torch.eye(32)
        model = prepared(model, x, recipe=recipe).to(where)
        run = compiled(model, chosen)
        outs = [run(x.to(where) * spread).detach() for spread in (1.0, 7.3, 0.31, 2.9)]
        found.append([*outs, *(t for _, q in quantizers(model) if q.stateful for t in (q.min_val, q.max_val))])
    assert len(found[0]) == 6
    for one, other in zip(*found, strict=True):
        assert torch.equal(bits(one), bits(other))


def test_moving_averages_keep_their_bits_over_many_batches(device: str) -> None:
    """``old + constant · (batch − old)`` contracted to a fused multiply-add would show within a few steps."""
    found = []
    for where, backend in ((device, "fxquant"), ("cpu", "fxquant_eager")):
        torch._dynamo.reset()
        model = prepared(nn.Linear(16, 8), torch.randn(4, 16, generator=torch.Generator().manual_seed(1))).to(where)
        run = compiled(model, backend)
        generator = torch.Generator().manual_seed(2)
        for _ in range(40):
            run(torch.randn(4, 16, generator=generator).to(where))
        found.append([t for _, q in quantizers(model) if q.stateful for t in (q.min_val, q.max_val)])
    assert found[0]
    for one, other in zip(*found, strict=True):
        assert torch.equal(bits(one), bits(other))


# ---------------------------------------------------------------- float32, with an optimizer


def losses(net: str, device: str, backend: str, dtype: torch.dtype | None, **keywords: Any) -> list[Tensor]:
    torch._dynamo.reset()
    model, xs = made(net, device)
    run = compiled(model, backend, **keywords)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    x = xs[0]
    found = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast(torch.device(device).type, dtype or torch.bfloat16, enabled=dtype is not None):
            out = run(x)
        assert out.dtype == (dtype or torch.float32) or net == "block"
        loss = (out.float() - 2.0).square().mean()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        found.append(loss.detach().cpu())
    return found


@each_net
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bf16 autocast"])
def test_training_takes_the_eager_course(net: str, dtype: torch.dtype | None, device: str) -> None:
    """bf16 autocast: compiled code rounds at the end of a kernel, eager after each operator."""
    ours = torch.stack(losses(net, device, "fxquant", dtype))
    eager = torch.stack(losses(net, device, "fxquant_eager", dtype))
    assert ours[-1] < 0.9 * ours[0]
    torch.testing.assert_close(ours, eager, rtol=0.01 if dtype is None else 0.1, atol=0.002 if dtype is None else 0.02)


def test_a_checkpointed_prepared_model_moves_between_devices(device: str) -> None:
    """State trained on one device loads on the other, and evaluates to the same codes."""
    model, xs = made("cnn", device, torch.float64)
    course(model, compiled(model), xs)
    other, _ = made("cnn", "cpu", torch.float64)
    other.load_state_dict({k: v.cpu() if isinstance(v, Tensor) else v for k, v in model.state_dict().items()})
    with torch.no_grad():
        model.eval(), other.eval()
        got, expected = compiled(model)(xs[0]), compiled(other, "fxquant_eager")(xs[0].cpu())
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-6, atol=1e-7)


def test_a_copy_on_the_device_is_independent(device: str) -> None:
    model, xs = made("cnn", device)
    twin = copy.deepcopy(model)
    run = compiled(model)
    run(xs[0])
    both = zip(quantizers(model), quantizers(twin), strict=True)
    assert all(q.is_set() and not other.is_set() for (_, q), (_, other) in both if q.stateful)


def test_an_unprepared_model_trains_too(device: str) -> None:
    torch.manual_seed(0)
    model = Mlp(WIDTH).to(device)
    x = torch.randn(32, WIDTH).to(device)
    out = {}
    for backend in ("fxquant", "fxquant_eager"):
        torch._dynamo.reset()
        out[backend] = compiled(model, backend)(x).detach()
    torch.testing.assert_close(out["fxquant"], out["fxquant_eager"], rtol=1e-4, atol=0.02)
    assert not torch.equal(out["fxquant"], model(x))


def test_explain_names_the_path_on_cuda(cuda: str) -> None:
    model, xs = made("cnn", cuda)
    compiled(model)(xs[0])
    assert "cuda" in str(fxquant.explain(model)).lower()
