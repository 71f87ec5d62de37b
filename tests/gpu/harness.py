"""What the tests of this folder share: the same arguments on two devices, results held to each other bit for bit.

Arguments are made on CPU and moved, because `linspace`, `logspace` and random numbers differ between devices.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import fxquant
from tests.ops.cases import Case
from tests.ops.oracle import assert_same_bits, hard_values

OPS = Path(__file__).parent.parent / "ops"
FAMILIES = {
    path.stem.removeprefix("cases_"): list(importlib.import_module(f"tests.ops.{path.stem}").CASES)
    for path in sorted(OPS.glob("cases_*.py"))
}
CASES: list[Case] = [case for cases in FAMILIES.values() for case in cases]

if not importlib.metadata.entry_points(group="torch_dynamo_backends", name="fxquant"):  # a checkout, not installed
    for _name in ("fxquant", "fxquant_eager"):
        torch._dynamo.register_backend(getattr(fxquant.backend, _name), name=_name)


# ---------------------------------------------------------------- values


def random(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normally distributed, on CPU, the same every time."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(dtype)


def hard(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """On CPU: NaN, ±inf, ±0, subnormals, ties with their neighbours, plain values; all of them where they fit.

    A ``shape`` whose first size is -1 grows until they fit.
    """
    pool = torch.cat([hard_values(0.1, 0, 15, dtype), hard_values(0.1, -8, 7, dtype), random((300,), dtype)])
    inner = math.prod(shape[1:])
    rows = -(-len(pool) // inner) if shape and shape[0] == -1 else shape[0] if shape else 1
    order = torch.randperm(max(rows * inner, 1), generator=torch.Generator().manual_seed(1)) % len(pool)
    return pool[order[: rows * inner]].reshape((rows, *shape[1:]) if shape else ())


def moved(values: Any, device: str) -> Any:
    """The same numbers on ``device``, in nested lists and tuples too."""
    return tree_map_only(Tensor, lambda t: t.to(device), values)


def tensors(found: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def cotangent(out: Tensor) -> Tensor:
    """A gradient for ``out``: from -1 to 1, made on CPU."""
    return torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype).to(out.device)


# ---------------------------------------------------------------- calls


def arguments(case: Case, x: Tensor, device: str, view: Callable[[Tensor], Tensor] | None = None) -> list[Any]:
    """The case's arguments for ``x``, a CPU tensor, on ``device``.

    With ``view``, x is that view of a tensor on the device: a layout, which a move would not keep.
    """
    seen = x if view is None else view(x)
    found = list(moved(list(case.args(seen)), device))
    if case.takes_x and view is not None:
        found[0] = view(x.to(device))
    return found


def leaves_of(case: Case, args: list[Any]) -> list[Tensor]:
    """Makes leaves of what receives a gradient, in place of it in ``args`` and with its strides; the leaves."""
    names = [argument.name for argument in case.op._schema.arguments]
    found = []
    for name in case.grads:
        index = names.index(name)
        args[index] = args[index].detach().requires_grad_()
        found.append(args[index])
    return found


def gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    differentiable = [out for out in outputs if out.requires_grad]
    if not leaves:
        return []
    return list(torch.autograd.grad(differentiable, leaves, [cotangent(out) for out in differentiable]))


def evaluated(case: Case, args: Sequence[Any]) -> list[Tensor]:
    """All outputs, then the gradient of everything that receives one."""
    own = list(args)
    leaves = leaves_of(case, own)
    outputs = tensors(case.op(*own, **case.kwargs))
    return [*(out.detach() for out in outputs), *gradients(outputs, leaves)]


def assert_same(case: Case, got: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    """Bit for bit, NaN where NaN is; gradients that are sums over many elements within 1e-5.

    Such a sum is taken in another order by every device and compiler. All others read one element.
    """
    assert len(got) == len(expected) > 0
    sums = sum(name not in ("input", "grad", "bias") for name in case.grads)
    exact = len(expected) - sums
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        try:
            if index < exact:
                assert_same_bits(one.cpu(), other.cpu())
            else:
                torch.testing.assert_close(one.cpu(), other.cpu(), rtol=1e-5, atol=1e-5, equal_nan=True)
        except AssertionError as error:
            raise AssertionError(f"{case}, {what}, result {index} of {len(expected)}: {error}") from error


def bits(t: Tensor) -> Tensor:
    """The integers that a tensor's bits are."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.detach().contiguous().cpu().view(kinds[t.element_size()])


# ---------------------------------------------------------------- devices


@contextlib.contextmanager
def kernels(path: str) -> Iterator[None]:
    """Eager ops on CUDA tensors take ``path``, "cuda" or "aten", inside."""
    from fxquant import kernels as ours

    with ours.using(path):
        yield


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """No TF32, no reduced sums in half types, deterministic cuDNN."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    wanted: list[tuple[Any, str, bool]] = [
        (matmul, "allow_tf32", False),
        (matmul, "allow_bf16_reduced_precision_reduction", False),
        (matmul, "allow_fp16_reduced_precision_reduction", False),
        (cudnn, "allow_tf32", False),
        (cudnn, "deterministic", True),
        (cudnn, "benchmark", False),
    ]
    before = [getattr(where, name) for where, name, _ in wanted]
    try:
        for where, name, value in wanted:
            setattr(where, name, value)
        yield
    finally:
        for (where, name, _), value in zip(wanted, before, strict=True):
            setattr(where, name, value)


@contextlib.contextmanager
def no_sync(device: str) -> Iterator[None]:
    """A wait of the host for the device inside is an error."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def free_bytes(device: str) -> int:
    """What can be allocated."""
    if device == "cpu":
        return 2**30
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def needs_bytes(wanted: int, device: str) -> None:
    """Skips where the device has less free."""
    free = free_bytes(device)
    if free < wanted:
        pytest.skip(f"needs {wanted / 2**30:.0f} GiB of device memory: {free / 2**30:.1f} GiB are free")
