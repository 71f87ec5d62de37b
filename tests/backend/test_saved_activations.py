"""What a compiled step keeps for backward: how many bytes, with which gradients, in which kernels."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

import fxquant
from fxquant.errors import InvalidArgument
from tests.nets import Block, Convs, kept_bytes

WIDTH, ROWS = 16, 8


class Pooled(nn.Module):
    """A max pool of a concat of quantized tensors, in front of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(16, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = torch.cat([self.first(x).relu(), self.second(x).relu()], 1)
        return self.last(F.max_pool2d(x, 2)).relu()


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "convs": (Convs, lambda: torch.randn(ROWS, 3, 8, 8)),
    "pooled": (Pooled, lambda: torch.randn(ROWS, 3, 10, 10)),
    "block": (Block, lambda: torch.randn(ROWS, 16, WIDTH)),
}
each_net = pytest.mark.parametrize("net", NETS)


def made(net: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = NETS[net]
    return model(), x()


def two_steps(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Gradients of two steps and the state after them: ranges that backward read wrongly would show in the second."""
    found = []
    for number in range(2):
        run(x * (1 + number)).square().mean().backward()
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
    return [*found, *(buffer.clone() for buffer in model.buffers())]


@each_net
@pytest.mark.parametrize("backend", ["fxquant_eager", "fxquant"])
def test_gradients_keep_their_bits(net: str, backend: str) -> None:
    model, x = made(net)
    prepared = fxquant.prepare(model, (x,))
    found = []
    for save in (True, False):
        torch._dynamo.reset()
        own = copy.deepcopy(prepared)
        found.append(two_steps(own, torch.compile(own, backend=backend, options={"save_quantized": save}), x))
    for compressed, floats in zip(*found, strict=True):
        # Eager runs the same kernels. Inductor may sum in another order where another loop is fused.
        tolerance = {"rtol": 0, "atol": 0} if backend == "fxquant_eager" else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(compressed, floats, **tolerance, equal_nan=True)


@functools.cache
def statically(net: str) -> int:
    """Bytes that a step of static sizes keeps."""
    torch._dynamo.reset()
    model, x = made(net)
    prepared = fxquant.prepare(model, (x,))
    return kept_bytes(prepared, torch.compile(prepared, backend="fxquant", dynamic=False), x)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("net", "most"), [("convs", 0.70), ("block", 0.66)])
def test_less_is_kept_than_by_plain_training(net: str, most: float) -> None:
    model, x = made(net)
    plain = copy.deepcopy(model)
    prepared = fxquant.prepare(model, (x,))
    of_plain = kept_bytes(plain, torch.compile(plain), x)
    of_floats = kept_bytes(prepared, torch.compile(prepared, backend="fxquant", options={"save_quantized": False}), x)
    of_codes = statically(net)
    assert of_codes < of_floats
    assert of_codes <= most * of_plain


def test_what_a_max_pool_picked_is_kept_in_a_byte() -> None:
    model, x = made("pooled")
    prepared = fxquant.prepare(model, (x,))
    found: dict[bool, list[torch.dtype]] = {}
    for save in (True, False):
        torch._dynamo.reset()
        run = torch.compile(prepared, backend="fxquant_eager", options={"save_quantized": save})
        run(x).sum().backward()
        dtypes: list[torch.dtype] = []

        def keep(t: Tensor, dtypes: list[torch.dtype] = dtypes) -> Tensor:
            if t.shape == (ROWS, 16, 4, 4) and t.dtype != torch.int64:  # not the indices
                dtypes.append(t.dtype)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            run(x)
        found[save] = dtypes
    assert found == {True: [torch.uint8], False: [torch.float32]}


@pytest.mark.usefixtures("uncompiled")
def test_bytes_kept_of_one_product_are_counted_exactly() -> None:
    """linear → linear: x and the parameters are there, so the codes and the mask of what lies between are all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 32, bias=False), nn.Linear(32, WIDTH, bias=False))
    x = torch.randn(64, WIDTH)
    prepared = fxquant.prepare(model, (x,))
    qparams = 2 * (4 + 4)  # scale and zero point of two activations
    weights = (32 + WIDTH) * 4  # a scale per channel; zero points are constants
    kept = kept_bytes(prepared, torch.compile(prepared, backend="fxquant"), x)
    assert kept - 64 * 32 - 64 * 32 // 8 <= qparams + weights * 2
    assert kept >= 64 * 32 + 64 * 32 // 8


@pytest.mark.usefixtures("uncompiled")
def test_checkpoint_regions_keep_no_more() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    torch.manual_seed(0)
    model, x = Checkpointed(), torch.randn(ROWS, 64, WIDTH)
    of_plain = kept_bytes(model, torch.compile(model), x)
    prepared = fxquant.prepare(model, (x,))
    of_ours = kept_bytes(prepared, torch.compile(prepared, backend="fxquant"), x)
    scales = sum(math.prod(q.shape) for q in prepared.buffers() if q.is_floating_point()) * 8
    assert of_ours <= of_plain * 1.01 + scales + 8 * sum(p.shape[0] for p in prepared.parameters())


@pytest.mark.usefixtures("uncompiled")
def test_open_sizes_keep_codes_too() -> None:
    model, x = made("block")
    prepared = fxquant.prepare(model, (x,))
    run = torch.compile(prepared, backend="fxquant", dynamic=True)
    kept_bytes(prepared, run, x)
    of_two = kept_bytes(prepared, run, torch.cat([x, x]))
    assert of_two == pytest.approx(2 * statically("block"), rel=0.01), "scales are kept once"


@pytest.mark.usefixtures("uncompiled")
@each_net
def test_an_open_batch_keeps_just_what_a_static_one_does(net: str) -> None:
    """Of layers, too, that take a batch's positions as rows: ``16·s0`` of them."""
    model, x = made(net)
    prepared = fxquant.prepare(model, (x,))
    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(x, 0)
    assert kept_bytes(prepared, torch.compile(prepared, backend="fxquant"), x) == statically(net)


@pytest.mark.usefixtures("uncompiled")
def test_generated_code_calls_no_op_of_ours_and_computes_a_gelu_once() -> None:
    model, x = Block(), made("block")[1]
    prepared = fxquant.prepare(model, (x,))
    run = torch.compile(prepared, backend="fxquant")
    _, code = run_and_get_code(lambda: run(x).sum().backward())
    assert len(code) == 2
    assert not any("torch.ops.fxquant" in each for each in code)
    assert code[0].count(".erf()") == 1, "in one loop of one block"


def test_the_option_is_checked() -> None:
    model, x = made("block")
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(model, backend="fxquant", options={"save_quantized": "yes"})(x)
    assert isinstance(caught.value.inner_exception, InvalidArgument)
    assert "options['save_quantized'] must be True or False: got 'yes'" in str(caught.value)


def test_pictures_of_any_size_keep_the_same_gradients(cold: None) -> None:
    """What is kept of them has open strides, which Inductor orders only where it is no view."""
    model, _ = made("convs")
    sizes = (16, 24, 20)
    pictures = [torch.randn(2, 3, size, size) for size in sizes]
    fxquant.prepare(model, (pictures[0],))
    fxquant.calibrate(model, pictures, progress=False)
    fxquant.freeze_ranges(model)
    found = []
    for save in (True, False):
        torch._dynamo.reset()
        own = copy.deepcopy(model)
        run = torch.compile(own, backend="fxquant", options={"save_quantized": save})
        found.append([gradient for x in pictures for gradient in two_steps(own, run, x)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
