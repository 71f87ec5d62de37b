"""Joint passes see through how a node is written: with every argument by keyword they do what they do otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.ops import fake_quantize
from fxquant.passes.base import Pass
from fxquant.passes.joint.save_quantized_activations import SaveQuantizedActivations
from fxquant.passes.joint.tag_recompute import TagRecompute
from fxquant.passes.joint.use_integer_matmul import UseIntegerMatmul
from tests.passes.graphs import by_keyword

SHAPES = ((160, 8), (8, 16), (3, 16), (160, 3))


def step(x: Tensor, v: Tensor, w: Tensor, tangents: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, ...]:
    """``fq(x @ v) @ fq(w)ᵀ`` and gradients, the weight quantized per channel and turned."""
    scales, zeros = scale.expand(3).contiguous(), torch.zeros(3, dtype=torch.int32)
    hidden = x @ v
    y = fake_quantize.PER_TENSOR(hidden, scale, zero, 0, 255, rounding="divide")
    weight = fake_quantize.PER_CHANNEL(w, scales, zeros, 0, -127, 127, rounding="divide")
    back = fake_quantize.PER_TENSOR_BACKWARD(tangents @ weight, hidden, scale, zero, 0, 255, rounding="divide")
    return y @ weight.t(), x.t() @ back, tangents.t() @ y


def inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return (*values, torch.tensor([0.02]), torch.tensor([100], dtype=torch.int32))


@dataclass(frozen=True)
class Done:
    """What a pass did, and what its graph then holds and gives."""

    rewrites: int
    declines: list[str]
    targets: list[str]
    tags: list[object]
    values: tuple[Tensor, ...]


def done(each: Pass, written: Callable[[fx.GraphModule], fx.GraphModule]) -> Done:
    gm = make_fx(step, tracing_mode="fake")(*inputs())
    result = each.run(written(gm))
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    return Done(
        result.rewrites,
        [str(decline) for decline in result.declines],
        [str(node.target) for node in calls],
        [node.meta.get("recompute") for node in calls],
        gm(*inputs()),
    )


@pytest.mark.parametrize(
    "each", [SaveQuantizedActivations(), TagRecompute(), UseIntegerMatmul(mode=True)], ids=lambda each: each.name
)
def test_alike(each: Pass) -> None:
    in_place, named = done(each, lambda gm: gm), done(each, by_keyword)
    assert in_place.rewrites > 0
    for value, expected in zip(named.values, in_place.values, strict=True):
        assert torch.equal(value, expected)
    for field in ("rewrites", "declines", "targets", "tags"):
        assert getattr(named, field) == getattr(in_place, field)
