"""Codes of 8-bit floats and their fake-quants against torch's own cast, eager and as C++ that goes by vectors."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import run_and_get_code

from fxquant.backend.inductor.lowerings import _traced_once, register_lowerings
from fxquant.numerics.elements import encode, fake_quantize
from fxquant.numerics.floating import copysign_by_bits
from fxquant.numerics.formats import FLOAT_FORMATS
from fxquant.ops.elements import dequantize_elements, quantize_elements
from fxquant.ops.fake_quantize import PER_TENSOR
from tests.ops.oracle import assert_same_bits

aten = torch.ops.aten
CASTS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
ONE, POINT = torch.ones(1), torch.zeros(1, dtype=torch.int32)
each_cast = pytest.mark.parametrize("name", CASTS)


def near_codes(dtype: torch.dtype) -> Tensor:
    """Every value of a type, what lies halfway between two, the floats beside both, both signs; random bits."""
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).float()
    values = values[values.isfinite()].unique()
    points = torch.cat([values, (values[1:] + values[:-1]) / 2])
    beside = [points.nextafter(torch.full_like(points, to)) for to in (-torch.inf, torch.inf)]
    hard = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 3e38, -3e38, 1e-45, -1e-45, 1e-38])
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**16,), generator=generator).to(torch.int32)
    return torch.cat([points, *beside, -points, hard, bits.view(torch.float32)])


def whole(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Inductor, which our operators reach whole."""
    register_lowerings()
    table = {op: rule for op, rule in select_decomp_table().items() if getattr(op, "namespace", "") != "fxquant"}
    return compile_fx(gm, inputs, decompositions=table)


def cast(x: Tensor, name: str) -> Tensor:
    """torch's cast, of what saturates."""
    largest = FLOAT_FORMATS[name].max
    return x.clamp(-largest, largest).to(CASTS[name])


def both(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Codes of x and values of them, the fake-quant of y and its gradient, for each format."""
    found = {}
    for name in CASTS:
        code = quantize_elements(x, ONE, name)
        found[f"{name} codes"], found[f"{name} values"] = code, dequantize_elements(code, ONE, name)
        found[f"{name} fake"] = PER_TENSOR(y, ONE, POINT, -1, 1, rounding="divide", element=name)
    return found


def run(function: Callable[..., dict[str, Tensor]], x: Tensor) -> dict[str, Tensor]:
    y = x.clone().requires_grad_()
    found = function(x, y)
    loss = [found[f"{name} fake"] for name in CASTS]
    (found["gradient"],) = torch.autograd.grad(loss, y, [torch.full_like(each, 2.0) for each in loss])
    return {name: each.detach() for name, each in found.items()}


@pytest.fixture(scope="module")
def found() -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], str]:
    """The input, what eager makes of it, what compiled code does, and that code."""
    x = torch.cat([near_codes(dtype) for dtype in CASTS.values()])
    torch._dynamo.reset()
    compiled, code = run_and_get_code(run, torch.compile(both, backend=whole), x)
    return x, run(both, x), compiled, "\n".join(code)


Found = tuple[Tensor, dict[str, Tensor], dict[str, Tensor], str]


@each_cast
@pytest.mark.parametrize("how", [1, 2], ids=["eager", "compiled"])
def test_codes_and_values_are_those_of_torch_s_cast(found: Found, name: str, how: int) -> None:
    x, ours, theirs = found[0], found[how], cast(found[0], name)
    assert isinstance(ours, dict)
    number = ~x.isnan()
    assert torch.equal(ours[f"{name} codes"][number], theirs.view(torch.uint8)[number])
    assert theirs[~number].float().isnan().all() and ours[f"{name} values"][~number].isnan().all()
    for made in ("values", "fake"):
        assert_same_bits(ours[f"{name} {made}"], theirs.float())


def test_compiled_code_gives_eager_s_bits(found: Found) -> None:
    _, eager, compiled, _ = found
    for name in eager:
        assert_same_bits(compiled[name], eager[name])
    assert torch.equal(compiled["e4m3 codes"], eager["e4m3 codes"]), "the sign of NaN too"


def test_no_loop_goes_element_by_element(found: Found) -> None:
    """Bits that are read as another type are moves; isnan, signbit and casts of integers to bytes were loops of 8."""
    code = found[3]
    by_element = set(re.findall(r"tmpbuf_out\[i\] = ([\w:]+)", code))
    assert by_element <= {"c10::bit_cast"} and "std::isnan" not in code
    assert "Vectorized<float>" in code and ".copysign(" not in code
    assert "VectorizedN<int64_t" not in code and not re.search(r"convert<uint8_t,\d,int", code)


def test_signs_are_copied_by_bits() -> None:
    x = near_codes(torch.float8_e4m3fn)
    y = torch.cat([x.flip(0).abs(), torch.tensor([torch.nan])])
    x = torch.cat([x, torch.tensor([-0.0])])
    found, expected = copysign_by_bits(y, x), torch.copysign(y, x)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize(
    ("device", "dtype", "kept"),
    [("cpu", torch.float32, False), ("cpu", torch.float64, True), ("cuda", torch.float32, True)],
)
def test_only_float32_on_a_cpu_is_rewritten(device: str, dtype: torch.dtype, kept: bool) -> None:
    tensor = ((8,), dtype, torch.device(device))
    graph = _traced_once(fake_quantize, (tensor, tensor, FLOAT_FORMATS["e4m3"], "divide"), ())
    assert (aten.copysign.Tensor in {node.target for node in graph.nodes}) == kept


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_a_code_has_the_width_of_its_format(name: str) -> None:
    format = FLOAT_FORMATS[name]
    least = format.smallest_subnormal
    code = encode(torch.tensor([format.max, -format.max, -0.0, least, -least]), format).to(torch.int32)
    sign = 2 ** (format.bits - 1)
    assert code.tolist()[2:] == [sign, 1, sign + 1]
    assert code[1] - code[0] == sign and code.max() < 2 * sign
