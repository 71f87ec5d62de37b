"""How a compiled step runs on the device: in CUDA graphs, in half types, on other streams, without waiting, small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fxquant import ops
from fxquant.prepared.quantizer import quantizers
from tests.gpu.harness import assert_same_bits, kernels, no_sync
from tests.gpu.test_training import NETS, WIDTH, compiled, each_net, made
from tests.nets import Convs, grads, kept_bytes, prepared

Run = Callable[[Tensor], Tensor]


def train(model: nn.Module, run: Run, xs: list[Tensor], steps: int = 6, **autocast: Any) -> list[Tensor]:
    """Losses, and the gradients of the last step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found = []
    for number in range(steps):
        x = xs[number % len(xs)]
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        with torch.autocast(x.device.type, **(autocast or {"enabled": False})):
            out = run(x)
        loss = out.float().square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.detach().clone())
    return [*found, *(g.clone() for g in grads(model).values())]


# ---------------------------------------------------------------- CUDA graphs


@each_net
@pytest.mark.parametrize("ranges", [None, "delayed"])
def test_cuda_graphs_give_the_bits_of_the_plain_compiled_step(net: str, ranges: str | None, device: str) -> None:
    """mode="reduce-overhead": captured, replayed, and not skipped for the ranges that a step updates in place."""
    if device == "cpu" and (ranges, net) != (None, "block"):
        pytest.skip("CUDA only: of what a CPU cannot show, one case runs")
    keywords = {} if ranges is None else {"ranges": ranges}
    found = []
    for mode in (None, "reduce-overhead"):
        torch._dynamo.reset()
        counters.clear()
        model, xs = made(net, device, **keywords)
        found.append([*train(model, compiled(model, mode=mode), xs[:1], 8), *model.buffers()])
        assert counters["inductor"]["cudagraph_skips"] == 0 or device == "cpu", dict(counters["inductor"])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)


# ---------------------------------------------------------------- half precision


@each_net
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_autocast(net: str, low: torch.dtype, device: str) -> None:
    """Quantizer state stays float32 and finite, gradients arrive in float32 and near those of eager."""
    found = {}
    for backend in ("fxquant", "fxquant_eager"):
        torch._dynamo.reset()
        model, xs = made(net, device)
        found[backend] = train(model, compiled(model, backend), xs[:1], 3, dtype=low)
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
        stored = [t for _, q in quantizers(model) if q.stateful for t in (q.min_val, q.max_val)]
        assert stored and all(t.dtype == torch.float32 and t.isfinite().all() for t in stored)
    for one, other in zip(found["fxquant"], found["fxquant_eager"], strict=True):
        assert (one - other).norm() <= 0.2 * other.norm() + 1e-3


def test_half_inputs_of_ops_have_the_cpu_s_bits_under_autocast(path: str, device: str) -> None:
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale, point = torch.tensor([0.03]), torch.tensor([4], dtype=torch.int32)
    expected = ops.fake_quantize_per_tensor_affine(x, scale, point, 0, 255, rounding="divide")
    with kernels(path), torch.autocast(device, torch.bfloat16):
        got = ops.fake_quantize_per_tensor_affine(*(t.to(device) for t in (x, scale, point)), 0, 255, rounding="divide")
    assert_same_bits(got.cpu(), expected)


# ---------------------------------------------------------------- streams


def busy(device: str) -> None:
    """Keeps the current stream busy for some milliseconds, so that what comes on another would be seen to overtake."""
    if device == "cuda":
        torch.cuda._sleep(20_000_000)


def test_eager_kernels_run_on_the_current_stream(path: str, device: str) -> None:
    """x is written on the same stream after a wait: a kernel on another stream would read what was there before."""
    module = torch.get_device_module(device)
    values = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    scale, point = torch.tensor([0.03]), torch.tensor([4], dtype=torch.int32)
    expected = ops.fake_quantize_per_tensor_affine(values, scale, point, 0, 255)
    there, scale, point = (t.to(device) for t in (values, scale, point))
    with kernels(path):
        ops.fake_quantize_per_tensor_affine(there, scale, point, 0, 255)  # built before the race begins
        for _ in range(4):
            x = torch.full_like(there, float("nan")).requires_grad_()
            module.synchronize()
            side = module.Stream()
            with module.stream(side):
                busy(device)
                with torch.no_grad():
                    x.copy_(there)
                y = ops.fake_quantize_per_tensor_affine(x, scale, point, 0, 255)
                (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
            module.current_stream().wait_stream(side)
            module.synchronize()
            assert_same_bits(y.detach().cpu(), expected)
            assert dx.isfinite().all()


def test_two_streams_train_two_models(device: str) -> None:
    module = torch.get_device_module(device)
    alone = []
    for spread in (1.0, 3.0):
        model, xs = made("block", device)
        alone.append(train(model, compiled(model), [xs[0] * spread]))
    module.synchronize()
    torch._dynamo.reset()
    pair = [(*made("block", device), module.Stream()) for _ in range(2)]
    module.synchronize()
    found = []
    for spread, (model, xs, stream) in zip((1.0, 3.0), pair, strict=True):
        stream.wait_stream(module.current_stream())
        with module.stream(stream):
            busy(device)
            found.append(train(model, compiled(model), [xs[0] * spread]))
    module.synchronize()
    for together, apart in zip(found, alone, strict=True):
        for one, other in zip(together, apart, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- waiting


@each_net
@pytest.mark.parametrize("ranges", [None, "delayed"])
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_compiled_training_step_never_waits_for_the_device(
    net: str, ranges: str | None, mode: str | None, device: str
) -> None:
    if device == "cpu" and (net, mode) != ("block", None):
        pytest.skip("CUDA only: of what a CPU cannot show, one case runs")
    model, xs = made(net, device, **({} if ranges is None else {"ranges": ranges}))
    run = compiled(model, mode=mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def one() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        loss = run(xs[0]).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach().clone()

    for _ in range(5):  # compiles, sets delayed ranges, records CUDA graphs
        one()
    with no_sync(device):
        losses = [one() for _ in range(3)]
    assert all(loss.isfinite() for loss in losses)


def test_an_eager_op_with_tensor_qparams_never_waits(path: str, device: str) -> None:
    x = torch.randn(8, 16).to(device).requires_grad_()
    scale, point = torch.tensor([0.1]).to(device), torch.tensor([3], dtype=torch.int32).to(device)
    scales, points = scale.expand(8).contiguous(), point.expand(8).contiguous()

    def one() -> Tensor:
        y = ops.fake_quantize_per_tensor_affine(x, scale, point, 0, 15)
        y = y + ops.fake_quantize_per_channel_affine(x, scales, points, 0, 0, 15)
        y = y + ops.fake_quantize_float(x, scale.view(()), "e4m3")
        (dx,) = torch.autograd.grad(y.sum(), x)
        return dx

    with kernels(path):
        expected = one()
        with no_sync(device):
            got = one()
    assert torch.equal(got, expected)


# ---------------------------------------------------------------- what is kept for backward


def two_linears() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 32, bias=False), nn.Linear(32, WIDTH, bias=False))


SAVING: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    # a chain of products: to the byte; where libraries keep statistics of their own, to a hundredth
    "linears": (two_linears, (64, WIDTH), 0.0),
    "convs": (Convs, (8, 3, 8, 8), 0.01),
}


@pytest.mark.parametrize("net", SAVING)
def test_as_much_is_kept_as_on_cpu(net: str, device: str) -> None:
    make, shape, within = SAVING[net]
    found = {}
    for where in (device, "cpu"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = make(), torch.randn(shape)
        model = prepared(model, x).to(where)
        found[where] = kept_bytes(model, compiled(model), x.to(where))
    assert found[device] == pytest.approx(found["cpu"], rel=within, abs=0)
    if net == "linears":  # codes and a packed mask of 64 × 32 values, and qparams
        assert 64 * 32 * 9 // 8 <= found[device] < 64 * 32 * 4


@each_net
def test_less_is_kept_than_of_plain_training(net: str, device: str) -> None:
    model, xs = made(net, device)
    x = torch.cat([xs[0]] * 8)
    of_ours = kept_bytes(model, compiled(model), x)
    torch._dynamo.reset()
    plain = NETS[net][0]().to(device)
    of_plain = kept_bytes(plain, torch.compile(plain), x)
    assert of_ours < 0.8 * of_plain
