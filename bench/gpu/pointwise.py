"""Operators on one large tensor: which share of the card's copy bandwidth each way to run them reaches.

Ways: ``triton`` is torch.compile, ``cuda`` our own kernels, ``aten`` the same arithmetic op by op, ``torch`` the
framework's own operator and ``modelopt`` NVIDIA's. The share counts each input byte read once and each output byte
written once, so 1.0 is as good as a copy, whatever a way really moves.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from clock import Budget, Clock, Notes
from sizes import Sizes
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxquant import ops, tensor_quant
from fxquant.ops.fake_quantize import PER_TENSOR_BACKWARD
from fxquant.ops.saved import CLIP_MASK, pack_planes, unpack_planes

Row = dict[str, object]
Arguments = tuple[Tensor, ...]
Way = Callable[..., Any]

COLUMNS = 4096
QPARAMS = (-128, 127)


@dataclass(frozen=True)
class Op:
    """An operator, what it is called with, and who else has it.

    Attributes:
        name: with its direction.
        dtype: of the tensor.
        arguments: x → all tensors that it reads, on x's device; numbers are made on CPU.
        ours: the operator.
        others: way → the same by somebody else, whose results are theirs; None where that is not installed.
        wanted: whether the issue asks for a share of its own: `WANTED`.
    """

    name: str
    dtype: torch.dtype
    arguments: Callable[[Tensor], Arguments]
    ours: Way
    others: Mapping[str, Callable[[], Way | None]] = field(default_factory=dict)
    wanted: bool = True


def one(x: Tensor) -> Arguments:
    """x, a scale and a zero point."""
    return x, torch.tensor([0.02]).to(x.device), torch.tensor([3], dtype=torch.int32).to(x.device)


def rows(x: Tensor) -> Arguments:
    """x, and a scale and zero point for each of its rows."""
    count = x.shape[0]
    return x, torch.linspace(0.01, 0.1, count).to(x.device), torch.zeros(count, dtype=torch.int32).to(x.device)


def amax(x: Tensor) -> Arguments:
    return x, torch.tensor(3.0).to(x.device)


def gradient(x: Tensor) -> Arguments:
    """A gradient, and what it is of."""
    return x.flip(0), *one(x)


def packed(x: Tensor) -> Arguments:
    """A gradient and its packed mask."""
    return x.flip(0), pack_planes(CLIP_MASK(*one(x), *QPARAMS, rounding="divide"), 1, 1)


def torchs_gradient(dy: Tensor, x: Tensor, scale: Tensor, point: Tensor) -> Tensor:
    """torch's reads a mask of a byte for each element, made beforehand: here it is taken as given."""
    return torch.ops.aten.fake_quantize_per_tensor_affine_cachemask_backward(dy, _mask_of(x))


def _mask_of(x: Tensor) -> Tensor:
    key = (x.data_ptr(), x.numel())
    if key not in _MASKS:
        _MASKS.clear()
        _MASKS[key] = CLIP_MASK(*one(x), *QPARAMS)
    return _MASKS[key]


_MASKS: dict[tuple[int, int], Tensor] = {}


def modelopt(name: str) -> Callable[[], Way | None]:
    """A function of ModelOpt's tensor_quant; None where it is not installed."""

    def found() -> Way | None:
        if importlib.util.find_spec("modelopt") is None:
            return None
        from modelopt.torch.quantization import tensor_quant as theirs  # tried on 0.47

        return getattr(theirs, name)

    return found


def observed(x: Tensor, scale: Tensor, point: Tensor) -> tuple[Tensor, ...]:
    """Delayed ranges: quantized by those of before while its own are found."""
    y = ops.fake_quantize_per_tensor_affine(x, scale, point, *QPARAMS, rounding="divide")
    return y, *ops.batch_min_max(x)


def saved(x: Tensor, scale: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """What a training step keeps: codes and a packed mask."""
    mask = CLIP_MASK(x, scale, point, *QPARAMS, rounding="divide")
    return ops.quantize_per_tensor(x, scale, point, *QPARAMS), pack_planes(mask, 1, 1)


def per_tensor(rounding: str) -> Way:
    return lambda x, s, z: ops.fake_quantize_per_tensor_affine(x, s, z, *QPARAMS, rounding=rounding)


FLOAT, HALF = torch.float32, torch.bfloat16
OPS = (
    Op(
        "per tensor, fp32",
        FLOAT,
        one,
        per_tensor("reciprocal"),
        {
            "torch": lambda: lambda x, s, z: torch.fake_quantize_per_tensor_affine(x, s, z, *QPARAMS),
            "modelopt": lambda: _int8_of(modelopt("fake_tensor_quant")()),
        },
    ),
    Op("per tensor divide, bf16", HALF, one, per_tensor("divide")),
    Op(
        "per channel divide, bf16",
        HALF,
        rows,
        lambda x, s, z: ops.fake_quantize_per_channel_affine(x, s, z, 0, *QPARAMS, rounding="divide"),
        {"torch": lambda: lambda x, s, z: torch.fake_quantize_per_channel_affine(x, s, z, 0, *QPARAMS)},
    ),
    Op("int8 codes, bf16", HALF, one, lambda x, s, z: ops.quantize_per_tensor(x, s, z, *QPARAMS)),
    Op("codes and packed mask, bf16", HALF, one, saved),
    Op("range and fake quantize, bf16", HALF, one, observed),
    Op(
        "backward from x, bf16",
        HALF,
        gradient,
        lambda dy, x, s, z: PER_TENSOR_BACKWARD(dy, x, s, z, *QPARAMS, rounding="divide"),
        {"torch": lambda: torchs_gradient},
    ),
    Op(
        "backward from packed mask, bf16",
        HALF,
        packed,
        lambda dy, mask: dy * unpack_planes(mask, 1, 1).to(dy.dtype),
    ),
    Op(
        "e4m3, bf16",
        HALF,
        amax,
        lambda x, a: tensor_quant.scaled_e4m3(x, a, 4, 3),
        {"modelopt": lambda: _e4m3_of(modelopt("scaled_e4m3")())},
        wanted=False,
    ),
    Op("mx e2m1, bf16", HALF, lambda x: (x,), lambda x: ops.fake_quantize_mx(x, {-1: 32}, "e2m1"), wanted=False),
    Op("nvfp4, bf16", HALF, amax, lambda x, a: ops.fake_quantize_nvfp4(x, a, {-1: 16}), wanted=False),
)


def _int8_of(found: Way | None) -> Way | None:
    return None if found is None else lambda x, s, z: found(x, 127 * s.view(()))


def _e4m3_of(found: Way | None) -> Way | None:
    return None if found is None else lambda x, a: found(x, a, None, 4, 3)


@contextlib.contextmanager
def path(name: str) -> Iterator[None]:
    """Eager ops on CUDA tensors take "cuda" or "aten" inside."""
    from fxquant import kernels

    with kernels.using(name):
        yield


def eager(way: Way, name: str) -> Way:
    def run(*args: Any) -> Any:
        with path(name):
            return way(*args)

    return run


def differing(got: Any, expected: Any) -> int:
    """Elements whose bits differ, NaN for NaN allowed, over all tensors of two results."""
    count = 0
    for one_, other in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        assert one_.dtype == other.dtype and one_.shape == other.shape
        other = other.to(one_.device)
        count += int(((one_ != other) & ~(one_.isnan() & other.isnan())).sum())
    return count


def copy_rate(clock: Clock, sizes: Sizes, device: str) -> float:
    """Bytes a second of a copy, read and written: what all shares are of."""
    x = torch.randn(sizes.megabytes * 2**18, device=device)
    y = torch.empty_like(x)
    seconds = clock.seconds({"copy": lambda: y.copy_(x)}, rounds=sizes.rounds, warmups=sizes.warmups)["copy"]
    return 2 * x.nbytes / seconds


def chosen(sizes: Sizes) -> list[Op]:
    return [op for op in OPS if not sizes.ops or any(part in op.name for part in sizes.ops)]


def small_differs(op: Op, device: str) -> int:
    """Elements in which the device's aten path differs from the CPU's, on a small tensor."""
    x = torch.randn(64, COLUMNS, generator=torch.Generator().manual_seed(0)).to(op.dtype)
    args = op.arguments(x)
    with path("aten"):
        return differing(op.ours(*(t.to(device) for t in args)), op.ours(*args))


def ways_of(op: Op, device: str, notes: Notes) -> dict[str, Way]:
    """How the operator can run here; what cannot is said."""
    from fxquant.errors import KernelUnavailable

    found: dict[str, Way] = {"triton": torch.compile(op.ours, fullgraph=True, dynamic=False)}
    if device == "cuda":
        try:
            with path("cuda"):
                found["cuda"] = eager(op.ours, "cuda")
        except KernelUnavailable as error:
            notes.say(f"left out: {op.name} cuda: {error}")
    found["aten"] = eager(op.ours, "aten")
    for name, make in op.others.items():
        way = make()
        if way is None:
            notes.say(f"left out: {op.name} {name}: not installed")
        else:
            found[name] = way
    return found


def op_rows(op: Op, clock: Clock, sizes: Sizes, rate: float, device: str, notes: Notes) -> list[Row]:
    """A row a way; one whose results are wrong is not timed, and its row says in how many elements."""
    torch._dynamo.reset()
    generator = torch.Generator(device).manual_seed(0)
    count = sizes.megabytes * 2**20 // (COLUMNS * op.dtype.itemsize)
    x = torch.randn(count, COLUMNS, generator=generator, device=device).to(op.dtype)
    args = op.arguments(x)
    ways = ways_of(op, device, notes)
    expected = ways["aten"](*args)
    moved = sum(t.nbytes for t in (*args, *tree_leaves(expected)))
    wrong = dict.fromkeys(ways, 0)
    for name in list(ways):
        try:
            got = ways[name](*args)
        except Exception as error:  # of somebody else's, or of a dtype that it does not take: said, not timed
            if name not in op.others:
                raise
            notes.say(f"left out: {op.name} {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            del ways[name]
            continue
        if name not in op.others:
            wrong[name] = differing(got, expected) + (small_differs(op, device) if name == "aten" else 0)
        del got
    del expected
    right = {name: lambda way=way: way(*args) for name, way in ways.items() if not wrong[name]}
    seconds = clock.seconds(right, rounds=sizes.rounds, warmups=sizes.warmups)
    return [
        {
            "op": op.name,
            "way": name,
            "microseconds": round(seconds[name] * 1e6, 1) if name in seconds else None,
            "gigabytes_per_second": round(moved / seconds[name] / 1e9, 1) if name in seconds else None,
            "share": round(moved / seconds[name] / rate, 3) if name in seconds else None,
            "differing": wrong[name],
        }
        for name in ways
    ]


def run(clock: Clock, sizes: Sizes, rate: float, device: str, budget: Budget, notes: Notes) -> Iterator[list[Row]]:
    """The rows of one operator after the other, as long as the budget lasts."""
    with torch.no_grad():
        for op in chosen(sizes):
            if budget.left <= 0:
                notes.say(f"left out: {op.name}: the time for operators is used up")
                continue
            try:
                yield op_rows(op, clock, sizes, rate, device, notes)
            except Exception as error:
                notes.fail(op.name, error)
