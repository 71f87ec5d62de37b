"""Every operator on the device against CPU eager: eager by both paths, compiled by plain Inductor; 0 bits differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from tests.gpu.harness import (
    CASES,
    FAMILIES,
    arguments,
    assert_same,
    evaluated,
    gradients,
    hard,
    kernels,
    leaves_of,
    random,
    tensors,
)
from tests.ops.cases import FLOATS, Case

TAKING_X = [case for case in CASES if case.takes_x]
ELEMENTWISE = [case for case in TAKING_X if case.elementwise]

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])

View = Callable[[Tensor], Tensor]
# A base shape as a multiple of the case's, and the view of it that x is.
LAYOUTS: dict[str, tuple[Callable[[tuple[int, ...]], tuple[int, ...]], View]] = {
    "transposed": (lambda shape: tuple(reversed(shape)), lambda t: t.permute(*reversed(range(t.dim())))),
    "sliced": (lambda shape: tuple(2 * n + 1 for n in shape), lambda t: t[1::2, 1::2, 1::2]),
    "expanded": (lambda shape: (1, *shape[1:]), lambda t: t.expand(6, -1, -1)),
    "channels last": (lambda shape: (2, *shape), lambda t: t.to(memory_format=torch.channels_last)[1]),
    "one element off": (lambda shape: (shape[0] * shape[1] * shape[2] + 1,), lambda t: t[1:].view(6, 5, 8)),
    "rows one off": (lambda shape: (*shape[:-1], shape[-1] + 1), lambda t: t[..., 1:]),
}


# ---------------------------------------------------------------- eager


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case}-{str(dtype)[6:]}")
        for case in CASES
        if case.op._schema.returns  # the one without is a mark, that computes nothing
        for dtype in case.dtypes
    ],
)
def test_eager(case: Case, dtype: torch.dtype, path: str, device: str) -> None:
    x = hard((-1, *case.shape[1:]), dtype)
    expected = evaluated(case, arguments(case, x, "cpu"))
    with kernels(path):
        got = evaluated(case, arguments(case, x, device))
    assert all(out.device.type == device for out in got)
    assert_same(case, got, expected, f"{dtype} eager, {path}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [case for case in TAKING_X if case.shape == (6, 5, 8)], ids=str)
def test_layouts(case: Case, layout: str, path: str, device: str) -> None:
    """Forward, and backward with a gradient that is contiguous."""
    base_shape, view = LAYOUTS[layout]
    base = random(base_shape(case.shape))
    x = view(base)
    assert x.shape == case.shape
    expected = evaluated(case, arguments(case, x.contiguous(), "cpu"))
    with kernels(path):
        args = arguments(case, base, device, view)
        assert args[0].stride() == x.stride() and args[0].storage_offset() == x.storage_offset()
        got = evaluated(case, args)
    assert_same(case, got, expected, f"{layout}, {path}")


@pytest.mark.parametrize("case", [case for case in ELEMENTWISE if "input" in case.grads], ids=str)
def test_gradients_come_in_any_layout(case: Case, path: str, device: str) -> None:
    """x contiguous, the gradient transposed, expanded, or one element off its 16 bytes."""
    x = random((16, 24))
    grads: dict[str, tuple[Tensor, View]] = {
        "transposed": (random((24, 16), seed=1), lambda t: t.t()),
        "expanded": (random((1, 24), seed=2), lambda t: t.expand(16, -1)),
        "one element off": (random((385,), seed=3), lambda t: t[1:].view(16, 24)),
    }
    for name, (base, view) in grads.items():

        def one(where: str, base: Tensor = base, view: View = view) -> list[Tensor]:
            args = arguments(case, x, where)
            leaves = leaves_of(case, args)
            first = tensors(case.op(*args, **case.kwargs))[0]
            return list(torch.autograd.grad(first, leaves, view(base.to(first.device))))

        with kernels(path):
            got = one(device)
        for found, expected in zip(got, one("cpu"), strict=True):
            torch.testing.assert_close(found.cpu(), expected, rtol=0 if found.numel() > 1 else 1e-5, atol=0, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_tails_of_every_length(dtype: torch.dtype, path: str, device: str) -> None:
    """1 to 33 elements, and one around each power of two: whole vectors, part of one, and more than one block."""
    lengths = (*range(34), *(n + d for n in (64, 256, 512, 1024, 4096) for d in (-1, 0, 1)))
    chosen = [case for case in ELEMENTWISE if case.name in {"per tensor", "per tensor, divide", "float e4m3, scale"}]
    chosen += [case for case in ELEMENTWISE if case.name in {"quantize", "clip mask", "scaled float"}]
    assert len(chosen) == 6
    for case in chosen:
        for length in lengths:
            for skip in (0, 1):
                base = hard((length + skip,), dtype)
                expected = evaluated(case, arguments(case, base[skip:], "cpu"))
                with kernels(path):
                    got = evaluated(case, arguments(case, base, device, lambda t, skip=skip: t[skip:]))
                assert_same(case, got, expected, f"{length} elements from {skip}")


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 8), (1,)], ids=str)
@pytest.mark.parametrize("case", ELEMENTWISE, ids=str)
def test_degenerate_shapes(case: Case, shape: tuple[int, ...], path: str, device: str) -> None:
    x = hard(shape, torch.float32) if shape else torch.tensor(0.36)
    expected = evaluated(case, arguments(case, x, "cpu"))
    with kernels(path):
        got = evaluated(case, arguments(case, x, device))
    assert_same(case, got, expected, f"{shape}, {path}")


CHANNEL_SHAPES = [(1,), (7,), (3, 5), (4, 1, 7), (2, 3, 1), (5, 4, 3, 2), (2, 33, 17), (1, 1, 1), (0, 3), (3, 0)]


@pytest.mark.parametrize("rounding", ["divide", "reciprocal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_every_axis_of_every_shape(rounding: str, dtype: torch.dtype, path: str, device: str) -> None:
    ops = torch.ops.fxquant
    for shape in CHANNEL_SHAPES:
        for axis in range(len(shape)):
            count = shape[axis]
            x, grad = hard(shape, dtype), random(shape, dtype)
            scale, point = torch.logspace(-3, 1, count), (torch.arange(count) % 7).to(torch.int32)

            def run(x: Tensor, grad: Tensor, *rest: Any) -> list[Tensor]:
                fake = ops.fake_quantize_per_channel_affine(x, *rest, 0, 15, rounding=rounding)
                back = ops.fake_quantize_per_channel_affine_backward(grad, x, *rest, 0, 15, rounding=rounding)
                return [fake, back, ops.quantize_per_channel(x, *rest, 0, 15, torch.uint8, rounding=rounding)]

            expected = run(x, grad, scale, point, axis)
            with kernels(path):
                got = run(*(t.to(device) for t in (x, grad, scale, point)), axis)
            for one, other in zip(got, expected, strict=True):
                torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------- compiled


def compiled_family(cases: Sequence[Case], inputs: Sequence[Tensor], device: str) -> tuple[list[list[Tensor]], str]:
    """Results of all cases from one graph that plain Inductor compiles, and its code."""
    prepared = []
    for case, x in zip(cases, inputs, strict=True):
        args = arguments(case, x, device)
        prepared.append((args, leaves_of(case, args)))

    @torch.compile(fullgraph=True)
    def forward(each: list[list[Any]]) -> list[Any]:
        return [case.op(*args, **case.kwargs) for case, args in zip(cases, each, strict=True)]

    def run() -> list[list[Tensor]]:
        outputs = [tensors(found) for found in forward([args for args, _ in prepared])]
        flat = [out for each in outputs for out in each]
        grads = iter(gradients(flat, [leaf for _, leaves in prepared for leaf in leaves]))
        return [
            [*(out.detach() for out in each), *(next(grads) for _ in leaves)]
            for each, (_, leaves) in zip(outputs, prepared, strict=True)
        ]

    found, code = run_and_get_code(run)
    return found, "\n".join(code)


@each_dtype
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled(family: str, dtype: torch.dtype, device: str) -> None:
    """Triton on CUDA, C++ on CPU; nothing of ours is left to call, so neither path of eager kernels is reached."""
    if device == "cpu" and dtype != torch.float32:
        pytest.skip("on CPU tests/ops/test_every_op.py compiles every dtype")
    cases = [case for case in FAMILIES[family] if case.fuses and dtype in case.dtypes]
    inputs = [hard((-1, *case.shape[1:]), dtype) for case in cases]
    got, code = compiled_family(cases, inputs, device)
    assert "torch.ops.fxquant" not in code
    assert ("triton" in code) is (device == "cuda")
    for case, x, found in zip(cases, inputs, got, strict=True):
        assert_same(case, found, evaluated(case, arguments(case, x, "cpu")), f"{dtype} compiled")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_layouts(layout: str, device: str) -> None:
    base_shape, view = LAYOUTS[layout]
    cases = [case for case in FAMILIES["affine"] if case.takes_x and case.fuses and case.op._schema.returns]
    base = random(base_shape((6, 5, 8)))
    args = [arguments(case, base, device, view) for case in cases]

    @torch.compile(fullgraph=True)
    def forward(each: list[list[Any]]) -> list[Any]:
        return [case.op(*args, **case.kwargs) for case, args in zip(cases, each, strict=True)]

    for case, found in zip(cases, forward(args), strict=True):
        expected = evaluated(case, arguments(case, view(base), "cpu"))
        got = [out.detach() for out in tensors(found)]
        assert_same(case, [*got, *expected[len(got) :]], expected, layout)


def test_compiled_with_an_open_size(device: str) -> None:
    case = next(case for case in CASES if case.name == "per channel, divide")
    compiled = torch.compile(lambda *args: case.op(*args, **case.kwargs), fullgraph=True, dynamic=True)
    for rows in (6, 9, 64, 1000):
        x = hard((rows, 5, 8), torch.float32)
        got = [compiled(*arguments(case, x, device))]
        assert_same(case, got, [case.op(*arguments(case, x, "cpu"), **case.kwargs)], f"{rows} rows")
