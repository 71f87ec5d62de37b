"""Fake-quantize against torch's CPU kernels over many formats, scales, zero points and values: how many bits differ.

A group is one format and zero point in every kind of call and every dtype; a census is a run of groups. Our side may
be transformed (compiled, say) and run on another device; torch's side is always its eager CPU kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper
from torch import Tensor

from fxquant.ops.fake_quantize import fake_quantize_per_channel_affine, fake_quantize_per_tensor_affine
from fxquant.ops.int4 import unpack_int4
from fxquant.ops.quantize import (
    dequantize_per_channel,
    dequantize_per_tensor,
    quantize_per_channel,
    quantize_per_tensor,
)
from tests.ops.oracle import SPECIALS

NUMBERS, TENSORS, CHANNELS, FLOAT_POINTS = "per tensor, numbers", "per tensor", "per channel", "per channel, float zp"
KINDS = (NUMBERS, TENSORS, CHANNELS, FLOAT_POINTS)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIDES = (8, 12, 16, 24)
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_SPECIAL_EVERY = 61

# The leaves, their scales and their zero points → one output each.
Group = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Format:
    """A range of codes, and a zero point in it."""

    low: int
    high: int
    point: int

    def points(self, count: int) -> Tensor:
        """``count`` zero points from ``point`` on and round: all of a small range, and both ends of any."""
        codes = self.high - self.low + 1
        step = max(1, codes // count)
        found = (torch.arange(count) * step + self.point - self.low) % codes + self.low
        found[-1], found[-2] = self.high, self.low
        return found.to(torch.int32)


def formats() -> list[Format]:
    """2 to 16 bits signed, unsigned and narrow; all zero points of up to 16 codes, else the ends and the middle."""
    found = []
    for bits in range(2, 17):
        half = 2 ** (bits - 1)
        for low, high in ((-half, half - 1), (0, 2 * half - 1), (1 - half, half - 1)):
            points = range(low, high + 1) if bits <= 4 else (low, (low + high + 1) // 2, high)
            found += [Format(low, high, point) for point in points]
    return found


@dataclass(frozen=True)
class Call:
    """One call of an op with all that does not change from value to value."""

    kind: str
    dtype: torch.dtype
    format: Format
    axis: int
    scale: Tensor
    point: Tensor
    number: float

    def run(
        self, per_tensor: Callable[..., Tensor], per_channel: Callable[..., Tensor], x: Tensor, *q: Tensor
    ) -> Tensor:
        low, high = self.format.low, self.format.high
        if self.kind == NUMBERS:
            return per_tensor(x, self.number, self.format.point, low, high)
        if self.kind == TENSORS:
            return per_tensor(x, *q, low, high)
        return per_channel(x, *q, self.axis, low, high)


@dataclass(frozen=True)
class Row:
    """What a census found for one kind of call and one dtype; each value is compared forward and backward."""

    kind: str
    dtype: torch.dtype
    calls: int = 0
    values: int = 0
    differing: int = 0

    def __add__(self, other: Row) -> Row:
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("calls", "values", "differing")}
        return replace(self, **sums)


def table(rows: Sequence[Row]) -> str:
    """One line a row, and the totals."""
    lines = [f"{'operator':24}{'dtype':16}{'calls':>8}{'values':>14}{'differing':>12}"]
    for row in rows:
        lines.append(f"{row.kind:24}{str(row.dtype)[6:]:16}{row.calls:8}{row.values:14,}{row.differing:12}")
    total = [sum(getattr(row, name) for row in rows) for name in ("calls", "values", "differing")]
    return "\n".join([*lines, f"{'all':40}{total[0]:8}{total[1]:14,}{total[2]:12}"])


def census(
    groups: Sequence[Format],
    *,
    size: int = 1,
    transform: Callable[[Group], Group] = lambda group: group,
    device: str = "cpu",
    seed: int = 0,
) -> list[Row]:
    """Counts of values whose output or gradient differs in any bit (NaN is NaN), by kind and dtype.

    ``size`` multiplies the 36864 values of a call. The same seed gives the same values.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: dict[tuple[str, torch.dtype], Row] = {}
    for index, form in enumerate(groups):
        calls = list(_calls(form, index, generator))
        inputs = [_values(call, index, size, generator) for call in calls]
        grads = [_gradient(x, generator) for x in inputs]
        ours = transform(_group(calls, fake_quantize_per_tensor_affine, fake_quantize_per_channel_affine))
        theirs = _group(calls, torch.fake_quantize_per_tensor_affine, _torch_per_channel)
        got = _outputs(ours, calls, inputs, grads, device)
        expected = _outputs(theirs, calls, inputs, grads, "cpu")
        for call, x, one, other in zip(calls, inputs, got, expected, strict=True):
            differs = differing(one[0], other[0]) | differing(one[1], other[1])
            row = Row(call.kind, call.dtype, 1, x.numel(), int(differs.sum()))
            rows[call.kind, call.dtype] = rows.get((call.kind, call.dtype), Row(call.kind, call.dtype)) + row
    return [rows[kind, dtype] for kind in KINDS for dtype in DTYPES]


def differing(got: Tensor, expected: Tensor) -> Tensor:
    """Where the bits differ and not both are NaN."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    got, kind = got.cpu(), _BITS[got.element_size()]
    unequal = got.view(kind) != expected.view(kind)
    if not unequal.any():
        return unequal
    return unequal & ~(got.isnan() & expected.isnan())


def _calls(form: Format, index: int, generator: torch.Generator) -> Iterator[Call]:
    """Every kind in every dtype; scale dtype, axis and zero point dtype alternate from group to group."""
    axis = index % 4
    count = _shape(index)[axis]
    for kind in KINDS:
        for place, dtype in enumerate(DTYPES):
            per_tensor = kind in (NUMBERS, TENSORS)
            scale = _scales(1 if per_tensor else count, dtype, generator)
            point = torch.tensor([form.point], dtype=torch.int32) if per_tensor else form.points(count)
            if kind == FLOAT_POINTS:
                fraction = torch.rand(count, generator=generator) - 0.5
                fraction[::3] = 0.0
                point = (point + fraction).to(torch.float16 if (index + place) % 4 == 3 else torch.float32)
            if kind != NUMBERS and (index // 4 + place) % 2:
                scale = scale.to(torch.bfloat16)
            yield Call(kind, dtype, form, axis, scale, point, scale[0].item())


def _scales(count: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Log-uniform from 1e-8 to 1e8 (what float16 values can still tell apart), some of them powers of two."""
    low, high = (-6.0, 2.0) if dtype == torch.float16 else (-8.0, 8.0)
    exponent = torch.rand(count, generator=generator, dtype=torch.float64) * (high - low) + low
    scale = 10.0**exponent
    power = torch.rand(count, generator=generator) < 0.25
    return torch.where(power, torch.exp2(torch.log2(scale).round()), scale).to(torch.float32)


def _shape(index: int) -> tuple[int, ...]:
    """The four sides in an order that changes with the axis, so that each axis is short and long in turn."""
    turn = (index // 4) % 4
    return SIDES[turn:] + SIDES[:turn]


def _values(call: Call, index: int, size: int, generator: torch.Generator) -> Tensor:
    shape = list(_shape(index))
    shape[3 if call.axis == 0 else 0] *= size
    per_tensor = call.kind in (NUMBERS, TENSORS)
    view = [1] * 4 if per_tensor else [-1 if d == call.axis else 1 for d in range(4)]
    return _spread(call.format, call.scale.view(view), call.point.view(view), shape, call.dtype, generator)


def _spread(
    form: Format, scale: Tensor, point: Tensor, shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """In and around the range: any value, codes, halves between codes with both neighbours, and specials."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    pad = (form.high - form.low) * 0.15 + 1.5
    code = torch.rand(shape, generator=generator, dtype=wide) * (form.high - form.low + 2 * pad) + (form.low - pad)
    code -= point.to(wide)
    code[..., 3::8] = code[..., 3::8].floor()
    for place in (4, 5, 6):
        code[..., place::8] = code[..., place::8].floor() + 0.5
    x = (code * scale.to(wide)).to(dtype)
    integers = x.view(_BITS[x.element_size()])
    integers[..., 5::8] += 1
    integers[..., 6::8] -= 1
    flat = x.view(-1)
    places = flat[int(torch.randint(_SPECIAL_EVERY, (), generator=generator)) :: _SPECIAL_EVERY]
    specials = torch.tensor(SPECIALS, dtype=torch.float64).to(dtype)
    places.copy_(specials.repeat(len(places) // len(specials) + 1)[: len(places)])
    return x


def _gradient(x: Tensor, generator: torch.Generator) -> Tensor:
    grad = torch.rand(x.shape, generator=generator).to(x.dtype) - 0.5
    grad.view(-1)[::97] = float("inf")
    grad.view(-1)[::89] = float("nan")
    return grad


def _torch_per_channel(x: Tensor, scale: Tensor, *rest: object) -> Tensor:
    """torch 2.13 admits bfloat16 scales per channel, then fails an internal assertion: it gets them as float32."""
    return torch.fake_quantize_per_channel_affine(x, scale.float(), *rest)


def _group(calls: Sequence[Call], per_tensor: Callable[..., Tensor], per_channel: Callable[..., Tensor]) -> Group:
    def run(leaves: Sequence[Tensor], scales: Sequence[Tensor], points: Sequence[Tensor]) -> list[Tensor]:
        each = zip(calls, leaves, scales, points, strict=True)
        return [call.run(per_tensor, per_channel, x, scale, point) for call, x, scale, point in each]

    return run


def _outputs(
    group: Group, calls: Sequence[Call], inputs: Sequence[Tensor], grads: Sequence[Tensor], device: str
) -> list[tuple[Tensor, Tensor]]:
    leaves = [x.to(device).detach().requires_grad_() for x in inputs]
    outputs = group(leaves, [call.scale.to(device) for call in calls], [call.point.to(device) for call in calls])
    found = torch.autograd.grad(outputs, leaves, [grad.to(device) for grad in grads])
    return [(y.detach(), dx) for y, dx in zip(outputs, found, strict=True)]


@dataclass(frozen=True)
class CodeType:
    """An integer type of ONNX: what onnxruntime and we call it, and its range."""

    onnx: int
    torch: torch.dtype
    low: int
    high: int

    @property
    def held(self) -> torch.dtype:
        """The dtype in which its codes are compared: 4 bits have none of their own."""
        if self.high > 15:
            return self.torch
        return torch.int8 if self.low < 0 else torch.uint8


CODE_TYPES = {
    "int8": CodeType(onnx.TensorProto.INT8, torch.int8, -128, 127),
    "uint8": CodeType(onnx.TensorProto.UINT8, torch.uint8, 0, 255),
    "int16": CodeType(onnx.TensorProto.INT16, torch.int16, -32768, 32767),
    "uint16": CodeType(onnx.TensorProto.UINT16, torch.uint16, 0, 65535),
    "int4": CodeType(onnx.TensorProto.INT4, torch.int4, -8, 7),
    "uint4": CodeType(onnx.TensorProto.UINT4, torch.uint4, 0, 15),
}


def onnx_pair(kind: CodeType, axis: int | None) -> onnx.ModelProto:
    """QuantizeLinear, and DequantizeLinear of its codes; codes go in and out as 8 or 16 bits."""
    held = helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=kind.held).numpy().dtype)
    attributes = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("Cast", ["z"], ["z_code"], to=kind.onnx),
        helper.make_node("QuantizeLinear", ["x", "s", "z_code"], ["code"], **attributes),
        helper.make_node("DequantizeLinear", ["code", "s", "z_code"], ["y"], **attributes),
        helper.make_node("Cast", ["code"], ["q"], to=held),
    ]
    qparam = [] if axis is None else [None]
    any_shape = [None, None]
    inputs = [("x", onnx.TensorProto.FLOAT, any_shape), ("s", onnx.TensorProto.FLOAT, qparam), ("z", held, qparam)]
    outputs = [("q", held, any_shape), ("y", onnx.TensorProto.FLOAT, any_shape)]
    infos = [[helper.make_tensor_value_info(*each) for each in side] for side in (inputs, outputs)]
    graph = helper.make_graph(nodes, "pair", *infos)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


Runtime = Callable[[onnx.ModelProto], Callable[[dict[str, Any]], Sequence[Any]]]


def onnxruntime_session(model: onnx.ModelProto) -> Callable[[dict[str, Any]], Sequence[Any]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)


def onnx_census(
    kind: CodeType, runtime: Runtime, *, calls: int, size: int, reach: float = float("inf"), seed: int = 0
) -> tuple[int, int, int]:
    """Values compared, and how many codes and dequantized values differ, per tensor and per channel in turn.

    Values beyond ``reach`` codes, and NaN (which the standard leaves open), are replaced by 0.
    """
    generator = torch.Generator().manual_seed(seed)
    sessions = {axis: runtime(onnx_pair(kind, axis)) for axis in (None, 0, 1)}
    found = [0, 0, 0]
    for index in range(calls):
        axis = (None, 0, 1)[index % 3]
        shape = [(SIDES[index % 4], size), (size, SIDES[index % 4])][axis or 0]
        count = 1 if axis is None else shape[axis]
        scale = _scales(count, torch.float32, generator)
        form = Format(kind.low, kind.high, kind.low + index * 7 % (kind.high - kind.low + 1))
        point = torch.tensor([form.point], dtype=torch.int32) if axis is None else form.points(count)
        view = [1, 1] if axis is None else [-1 if d == axis else 1 for d in range(2)]
        x = _spread(form, scale.view(view), point.view(view), shape, torch.float32, generator)
        x = torch.where((x / scale.view(view)).abs() <= reach, x, 0.0)
        feeds = {"x": x.numpy(), "s": scale.numpy(), "z": point.to(kind.held).numpy()}
        if axis is None:
            feeds = {"x": feeds["x"], "s": feeds["s"].reshape(()), "z": feeds["z"].reshape(())}
            code = quantize_per_tensor(x, scale, point, kind.low, kind.high, kind.torch)
        else:
            code = quantize_per_channel(x, scale, point, axis, kind.low, kind.high, kind.torch)
        if kind.torch != kind.held:
            code = unpack_int4(code, shape[1], kind.low < 0)
        expected, values = (torch.from_numpy(np.asarray(each)) for each in sessions[axis](feeds))
        back = (
            dequantize_per_tensor(code, scale, point)
            if axis is None
            else dequantize_per_channel(code, scale, point, axis)
        )
        found[0] += x.numel()
        found[1] += int((code.to(torch.int32) != expected.to(torch.int32)).sum())
        found[2] += int(differing(back, values).sum())
    return found[0], found[1], found[2]
