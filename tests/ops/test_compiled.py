"""Lowered and compiled by Inductor, fake-quantize gives eager's bits, specials included, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import run_and_get_code

import fxquant
from fxquant.backend.inductor.compile import _with_passes
from fxquant.backend.reports import Log as _Log
from fxquant.ops import (
    affine_qparams,
    fake_quantize_per_channel_affine,
    fake_quantize_per_tensor_affine,
    plain_inductor,
    symmetric_qparams,
    update_min_max,
)
from fxquant.ops.library import DECOMPOSITIONS
from fxquant.ops.marks import BIND
from fxquant.passes.pipelines import post_grad_passes
from tests import forked
from tests.ops.oracle import assert_same_bits, hard_values

POINT = torch.tensor([7], dtype=torch.int32)
ZERO = torch.tensor([0], dtype=torch.int32)
SCALE = torch.tensor([0.3])


def lowering(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Inductor with our lowering, and nothing else of ours."""
    table = {**select_decomp_table(), **DECOMPOSITIONS}
    patches = _with_passes({}, _Log(), post_grad_custom_pre_pass=post_grad_passes(select_decomp_table))
    return compile_fx(gm, inputs, config_patches=patches, decompositions=table)


def forward(x: Tensor, half: Tensor, rows: Tensor, scales: Tensor, points: Tensor) -> dict[str, Tensor]:
    """One of each kind; ``rows`` has a channel per row."""
    found = {}
    for rounding in ("divide", "reciprocal"):
        found[f"number {rounding}"] = fake_quantize_per_tensor_affine(x, 0.3, 0, -8, 7, rounding=rounding)
        found[f"tensor {rounding}"] = fake_quantize_per_tensor_affine(x, SCALE, POINT, 0, 15, rounding=rounding)
        found[f"signed {rounding}"] = fake_quantize_per_tensor_affine(x, SCALE, ZERO, -8, 7, rounding=rounding)
        found[f"half {rounding}"] = fake_quantize_per_tensor_affine(half, SCALE, POINT, 0, 15, rounding=rounding)
        found[f"channel {rounding}"] = fake_quantize_per_channel_affine(
            rows, scales, points, 0, -8, 7, rounding=rounding
        )
    fractional = points.float() + 0.375
    found["channel, float point"] = fake_quantize_per_channel_affine(rows, scales, fractional, 0, -8, 7)
    return found


Results = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def results() -> tuple[Results, Results, str]:
    """Values and gradients by case, eager and compiled, and the compiled code."""
    x = hard_values(0.3, -8, 7)
    scales = torch.tensor([0.3, 1e-8, 1e8, 1.0])
    rows = torch.stack([hard_values(float(s), -8, 7) for s in scales])
    points = torch.tensor([0, 1, -8, 7], dtype=torch.int32)
    inputs = [x, hard_values(0.3, 0, 15, torch.bfloat16), rows]

    def run(function: Callable[..., dict[str, Tensor]]) -> Results:
        leaves = [t.clone().requires_grad_() for t in inputs]
        outputs = function(*leaves, scales, points)
        return {
            name: (y.detach(), torch.autograd.grad(y, leaf_of(name, leaves), torch.ones_like(y), retain_graph=True)[0])
            for name, y in outputs.items()
        }

    def leaf_of(name: str, leaves: list[Tensor]) -> Tensor:
        return leaves[1 if name.startswith("half") else 2 if name.startswith("channel") else 0]

    torch._dynamo.reset()
    compiled, code = run_and_get_code(run, torch.compile(forward, backend=lowering))
    return run(forward), compiled, "\n".join(code)


CASES = [f"{kind} {r}" for r in ("divide", "reciprocal") for kind in ("number", "tensor", "signed", "half", "channel")]


@pytest.mark.parametrize("name", [*CASES, "channel, float point"])
def test_same_bits(results: tuple[Results, Results, str], name: str) -> None:
    eager, compiled, _ = results
    for got, expected in zip(compiled[name], eager[name], strict=True):
        assert_same_bits(got, expected)


def test_nothing_is_left_to_call(results: tuple[Results, Results, str]) -> None:
    code = results[2]
    assert "cpp_fused" in code and "torch.ops.fxquant" not in code
    assert "Vectorized<float>" in code


def test_qparams_with_dynamic_shapes() -> None:
    def step(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        low, high = update_min_max(x, low, high, 0.25)
        scale, point = affine_qparams(low, high, 0, 255, False)
        weight_scale, weight_point = symmetric_qparams(x, 1, 127)
        y = fake_quantize_per_tensor_affine(x, scale, point, 0, 255, rounding="divide")
        return low, high, scale, point, weight_scale, weight_point, y

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, backend=lowering, dynamic=True)
    nan, inf = float("nan"), float("inf")
    unset, known = torch.tensor([nan]), torch.tensor([-1.0])
    for rows in (3, 5, 8):
        x = torch.randn(rows, 4)
        for batch in (x, torch.cat([x, torch.full((1, 4), inf)]), torch.cat([x, torch.full((1, 4), nan)])):
            for low, high in ((unset, unset), (known, known + 2)):
                for got, expected in zip(compiled(batch, low, high), step(batch, low, high), strict=True):
                    # An int32 made from NaN has no meaning to agree on.
                    if got.dtype != torch.int32 or not torch.isnan(low).any():
                        assert_same_bits(got, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


class OwnOps(torch.nn.Module):
    """A model that places its quantizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(fake_quantize_per_tensor_affine(x, 0.3, 0, -8, 7))


def test_recipe_none_places_nothing_and_fuses_what_is_there() -> None:
    torch._dynamo.reset()
    model, x = OwnOps(), torch.randn(3, 4)
    compiled = torch.compile(model, backend="fxquant", options={"recipe": None}, fullgraph=True)

    def step() -> Tensor:
        y = compiled(x)
        y.sum().backward()
        return y.detach()

    got, code = run_and_get_code(step)
    torch.testing.assert_close(got, model(x).detach())
    assert "torch.ops.fxquant" not in "".join(code)
    report = fxquant.backend.compile_reports()[-1]
    assert report.quantized == 0
    assert [d.reason for d in report.declines] == ["recipe=None places nothing"]


def test_recipe_none_is_refused_for_a_prepared_model() -> None:
    torch._dynamo.reset()
    model = fxquant.prepare(torch.nn.Sequential(torch.nn.Linear(4, 4)), (torch.randn(3, 4),))
    with pytest.raises(Exception, match="options must not set 'recipe' for a prepared model"):
        torch.compile(model, backend="fxquant", options={"recipe": None})(torch.randn(3, 4))


def test_plain_inductor_keeps_the_mark_of_a_prepared_model() -> None:
    """Decomposed, `bind` would vanish."""
    from torch._inductor.decomposition import decompositions

    plain_inductor.fuse_in_inductor()
    assert BIND not in decompositions and set(DECOMPOSITIONS) <= set(decompositions)


LATER = """
import torch
from fxquant import ops
torch.compile(lambda x: ops.fake_quantize_per_tensor_affine(x, 0.3, 0, -8, 7))(torch.randn(3))
from fxquant.ops import amax
from torch._inductor.utils import run_and_get_code
_, code = run_and_get_code(torch.compile(lambda x: amax.fake_tensor_quant(x, torch.tensor(1.0))), torch.randn(64))
assert "torch.ops.fxquant" not in "".join(code), "a call is left"
"""


def test_a_family_imported_after_the_first_compile_fuses_too() -> None:
    found = forked.run(["-c", LATER])
    assert found.returncode == 0, found.stderr
