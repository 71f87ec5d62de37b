"""What fake-quantize refuses: torch's complaint, of torch's type, in torch's order, wherever torch complains.

The expected complaint is asked of torch itself, for each wrong argument and each pair of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.ops.fake_quantize import fake_quantize_per_channel_affine, fake_quantize_per_tensor_affine
from tests.ops.cases import FLOATS


@dataclass(frozen=True)
class Fault:
    """Arguments that replace good ones; ``static``: shapes, dtypes and numbers show it, so a compiler sees it too."""

    name: str
    arguments: dict[str, Any] = field(repr=False)
    static: bool = True

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Form:
    """One way to call: ours, torch's, good arguments in order, and what torch refuses about each."""

    name: str
    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    good: dict[str, Any]
    faults: tuple[Fault, ...]

    def call(self, function: Callable[..., Tensor], *faults: Fault) -> Exception | None:
        arguments = dict(self.good)
        for fault in faults:
            arguments.update(fault.arguments)
        try:
            function(*arguments.values())
        except Exception as error:
            return error
        return None


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


INTEGER = Fault("integer input", {"input": torch.zeros(2, 3, dtype=torch.int64)})
BOOL = Fault("bool input", {"input": torch.zeros(2, 3, dtype=torch.bool)})
INVERTED = Fault("inverted range", {"quant_min": 5, "quant_max": 4})

NUMBERS = Form(
    "numbers",
    fake_quantize_per_tensor_affine,
    torch.fake_quantize_per_tensor_affine,
    {"input": torch.zeros(2, 3), "scale": 0.1, "zero_point": 0, "quant_min": 0, "quant_max": 15},
    (
        INTEGER,
        BOOL,
        Fault("empty integer input", {"input": torch.zeros(0, dtype=torch.int8)}),
        Fault("complex input", {"input": torch.zeros(2, dtype=torch.complex64)}),
        Fault("float8 input", {"input": torch.zeros(2).to(torch.float8_e4m3fn)}),
        INVERTED,
        Fault("zero point below", {"zero_point": -1}),
        Fault("zero point above", {"zero_point": 16}),
    ),
)
TENSORS = Form(
    "tensors",
    fake_quantize_per_tensor_affine,
    torch.fake_quantize_per_tensor_affine,
    {"input": torch.zeros(2, 3), "scale": torch.ones(1), "zero_point": ints(0), "quant_min": 0, "quant_max": 15},
    (
        INTEGER,
        BOOL,
        INVERTED,
        Fault("two scales", {"scale": torch.ones(2)}),
        Fault("no scale", {"scale": torch.ones(0)}),
        Fault("two zero points", {"zero_point": ints(0, 0)}),
        Fault("no zero point", {"zero_point": ints()}),
    ),
)
CHANNELS = Form(
    "channels",
    fake_quantize_per_channel_affine,
    torch.fake_quantize_per_channel_affine,
    {
        "input": torch.zeros(2, 3),
        "scale": torch.ones(3),
        "zero_point": ints(0, 0, 0),
        "axis": 1,
        "quant_min": 0,
        "quant_max": 15,
    },
    (
        INTEGER,
        BOOL,
        Fault("0-d input", {"input": torch.zeros(())}),
        Fault("double scale", {"scale": torch.ones(3, dtype=torch.float64)}),
        Fault("half scale", {"scale": torch.ones(3, dtype=torch.float16)}),
        Fault("integer scale", {"scale": ints(1, 1, 1)}),
        Fault("double zero point", {"zero_point": torch.zeros(3, dtype=torch.float64)}),
        Fault("bfloat16 zero point", {"zero_point": torch.zeros(3, dtype=torch.bfloat16)}),
        Fault("int8 zero point", {"zero_point": torch.zeros(3, dtype=torch.int8)}),
        Fault("2-d scale", {"scale": torch.ones(1, 3)}),
        Fault("0-d scale", {"scale": torch.ones(())}),
        Fault("2-d zero point", {"zero_point": ints(0, 0, 0)[None]}),
        Fault("one scale too many", {"scale": torch.ones(4)}),
        Fault("one zero point too few", {"zero_point": ints(0, 0)}),
        Fault("two of each for three slices", {"scale": torch.ones(2), "zero_point": ints(0, 0)}),
        INVERTED,
        Fault("zero point below", {"zero_point": ints(0, -1, 0)}, static=False),
        Fault("zero point above", {"zero_point": ints(0, 16, 0)}, static=False),
        Fault("axis after the last", {"axis": 2}),
        Fault("axis far after", {"axis": 7}),
        Fault("axis from the end", {"axis": -1}),
        Fault("axis from the end, another length", {"axis": -2}),
        Fault("axis before the first", {"axis": -3}),
    ),
)
FORMS = (NUMBERS, TENSORS, CHANNELS)


def complaint(error: Exception) -> str:
    """A message without line breaks, the kernel that wrote it, and the stop at its end."""
    text = " ".join(str(error).split())
    return text.partition('type_handling" ')[2] or text.removesuffix(".")


def assert_same_complaint(form: Form, *faults: Fault) -> None:
    theirs, ours = form.call(form.torchs, *faults), form.call(form.ours, *faults)
    assert theirs is not None, "torch takes this"
    assert type(ours) is type(theirs)
    assert complaint(theirs) in complaint(ours), faults


def single(*, static: bool = False) -> list[Any]:
    return [
        pytest.param(form, fault, id=f"{form.name}-{fault}")
        for form in FORMS
        for fault in form.faults
        if fault.static or not static
    ]


@pytest.mark.parametrize(("form", "fault"), single())
def test_the_complaint_is_torchs(form: Form, fault: Fault) -> None:
    assert_same_complaint(form, fault)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_of_two_faults_torchs_is_named(form: Form) -> None:
    """Every pair that does not concern one argument; two in the zero points of a call count as one."""
    pairs = [(a, b) for a, b in itertools.combinations(form.faults, 2) if not a.arguments.keys() & b.arguments.keys()]
    assert len(pairs) >= 10
    for pair in pairs:
        assert_same_complaint(form, *pair)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_good_arguments_are_good(form: Form) -> None:
    assert form.call(form.ours) is None and form.call(form.torchs) is None


@pytest.mark.parametrize(("form", "fault"), single(static=True))
def test_a_compiler_says_the_same(form: Form, fault: Fault) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(form.ours, backend="aot_eager", fullgraph=True)
    eager, traced = form.call(form.ours, fault), form.call(compiled, fault)
    assert eager is not None and isinstance(traced, RuntimeError | IndexError)
    assert complaint(eager) in complaint(traced)


X, S, Z = torch.zeros(2, 3), torch.ones(1), ints(0)
SC, ZC = torch.ones(3), ints(0, 0, 0)
META = {"device": "meta"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fake_quantize_per_tensor_affine(X, 0.1, 0, 0, 15, rounding="up"), "`rounding` must be one of .*'up'"),
        (lambda: fake_quantize_per_tensor_affine(X, S, Z, 0, 15, rounding=""), "`rounding` must be one of"),
        (lambda: fake_quantize_per_channel_affine(X, SC, ZC, 1, 0, 15, rounding="up"), "`rounding` must be one of"),
        (lambda: fake_quantize_per_tensor_affine(X, S, 0, 0, 15), "must both be numbers or both be tensors"),
        (lambda: fake_quantize_per_tensor_affine(X, 0.1, Z, 0, 15), "must both be numbers or both be tensors"),
        (lambda: fake_quantize_per_tensor_affine(X, 0.1, 1.5, 0, 15), "type 'int' for argument 'zero_point'"),
        (lambda: fake_quantize_per_tensor_affine(X, S.double(), Z, 0, 15), "Scale must be Float or BFloat16"),
        (lambda: fake_quantize_per_tensor_affine(X, S, Z.double(), 0, 15), "Zero-point must be Int32, Float or Half"),
        (
            lambda: fake_quantize_per_channel_affine(X, SC.to("meta"), ZC, 1, 0, 15),
            "`scale` must be on the device of `input`: got meta and cpu. Move it with .to.'cpu'",
        ),
        (
            lambda: fake_quantize_per_channel_affine(X, SC, ZC.to("meta"), 1, 0, 15),
            "`zero_point` must be on the device of `input`: got meta and cpu",
        ),
        (lambda: fake_quantize_per_channel_affine(X.to("meta"), SC, ZC, 1, 0, 15), "got cpu and meta"),
        (
            lambda: fake_quantize_per_tensor_affine(X, S.to("meta"), Z, 0, 15),
            "`scale` must be on the device of `input`: got meta and cpu. Move it with .to.'cpu'",
        ),
        (lambda: fake_quantize_per_tensor_affine(X, S, Z.to("meta"), 0, 15), "`zero_point` must be on the device of"),
    ],
)
def test_refused_by_ours_alone(call: Callable[[], Tensor], message: str) -> None:
    """Ways to round are ours; torch's per-tensor kernel takes scales and zero points of any dtype, ours what the
    per-channel one takes; torch has no meta kernels.
    """
    with pytest.raises(RuntimeError, match=message):
        call()


def test_meta_tensors_have_shapes() -> None:
    """Where torch has no kernel at all."""
    assert fake_quantize_per_tensor_affine(X.to("meta"), 0.1, 0, 0, 15).shape == (2, 3)
    y = fake_quantize_per_channel_affine(X.to("meta"), SC.to("meta"), ZC.to("meta"), 1, 0, 15)
    assert y.shape == (2, 3) and y.device.type == "meta"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_not_refused(dtype: torch.dtype) -> None:
    """Long zero points (torch: Int only); floating ones outside the range, and all outside in a tensor (as torch)."""
    x = X.to(dtype)
    fake_quantize_per_channel_affine(x, SC, ZC.long(), 1, 0, 15)
    for function in (fake_quantize_per_channel_affine, torch.fake_quantize_per_channel_affine):
        function(x, SC, ZC.float() + 99, 1, 0, 15)
    for function in (fake_quantize_per_tensor_affine, torch.fake_quantize_per_tensor_affine):
        function(x, S, Z + 99, 0, 15)


def per_tensor(zero_point: Tensor) -> Tensor:
    return fake_quantize_per_tensor_affine(X, S, zero_point, 0, 15, check=True)


def per_channel(zero_point: Tensor) -> Tensor:
    return fake_quantize_per_channel_affine(X, SC, zero_point, 1, 0, 15, check=True)


OUTSIDE = r"`zero_point` must be between `quant_min` and `quant_max`: got"


@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
@pytest.mark.parametrize(("function", "point"), [(per_tensor, Z), (per_channel, ZC)], ids=["tensors", "channels"])
def test_check_reads_values_in_compiled_code(
    function: Callable[[Tensor], Tensor], point: Tensor, backend: str | None
) -> None:
    torch._dynamo.reset()
    call = torch.compile(function, backend=backend, fullgraph=True) if backend else function
    assert torch.equal(call(point), X)
    with pytest.raises(RuntimeError, match=OUTSIDE):
        call(point + 16)
    with pytest.raises(RuntimeError, match=OUTSIDE):
        call(point - 1)
    call(point.float() + 16)  # floating zero points are free


def test_without_check_compiled_code_reads_nothing() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fake_quantize_per_channel_affine, fullgraph=True)
    compiled(X, SC, ZC + 16, 1, 0, 15)
