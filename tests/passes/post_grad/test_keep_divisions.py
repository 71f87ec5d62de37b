from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.passes.base import PassResult
from fxquant.passes.post_grad.keep_divisions import KeepDivisions
from tests.passes.graphs import apply, untouched

aten = torch.ops.aten


def traced(function: Callable[..., Tensor], *shapes: tuple[int, ...], elsewhere: bool = True) -> fx.GraphModule:
    """The graph of a function; ``elsewhere`` has its tensors on a device that is not a CPU, as far as they say."""
    gm = make_fx(function, tracing_mode="fake")(*(torch.randn(shape) for shape in shapes))
    for node in gm.graph.nodes if elsewhere else ():
        with node.meta["val"].fake_mode if "val" in node.meta else contextlib.nullcontext():
            if "val" in node.meta:
                node.meta["val"] = torch.empty_like(node.meta["val"], device="meta")
    return gm


def kept(gm: fx.GraphModule, result: PassResult) -> list[fx.Node]:
    """The divisions whose divisor depends on what is divided, as many as the pass says."""
    divisions = [n for n in gm.graph.nodes if n.target is aten.div.Tensor and n.args[1].target is aten.where.self]
    for node in divisions:
        unknown, dividend, _ = node.args[1].args
        assert unknown.target is aten.isnan.default and unknown.args == (dividend,) and dividend is node.args[0]
    assert len(divisions) == result.rewrites
    return divisions


def test_a_division_by_a_constant_tensor_is_kept() -> None:
    gm = traced(lambda x: x / torch.full((), 0.1), (4,))
    assert len(kept(gm, apply(KeepDivisions(), gm))) == 1


def test_a_constant_is_seen_behind_views_and_arithmetic() -> None:
    gm = traced(lambda x: x / (torch.full((1,), 0.1).expand(4) * 2).view(2, 2), (2, 2))
    assert len(kept(gm, apply(KeepDivisions(), gm))) == 1


def test_a_quotient_of_constants_is_kept_too() -> None:
    gm = traced(lambda x: x * (torch.full((), 1.0) / torch.full((), 0.1)), (4,))
    assert len(kept(gm, apply(KeepDivisions(), gm))) == 1


def test_values_are_the_same() -> None:
    x = torch.tensor([0.35, -1.0, 0.0, -0.0, float("nan"), float("inf"), 1e-45])

    def function(x: Tensor) -> Tensor:
        return x / torch.full((), 0.1)

    gm = traced(function, (7,))
    apply(KeepDivisions(), gm)
    torch.testing.assert_close(gm(x), function(x), rtol=0, atol=0, equal_nan=True)


Division = Callable[..., Any]
LEFT: dict[str, tuple[Division, tuple[tuple[int, ...], ...]]] = {
    "a divisor that varies": (lambda x, y: x / y, ((4,), ())),
    "a divisor made of one that varies": (lambda x, y: x / (y * torch.full((), 2.0)), ((4,), ())),
    "a number, by whose reciprocal eager CUDA multiplies": (lambda x: x / 3.0, ((4,),)),
    "rounded down": (lambda x: torch.div(x, torch.full((), 0.1), rounding_mode="floor"), ((4,),)),
}


@pytest.mark.parametrize("case", LEFT)
def test_other_divisions_are_left(case: str) -> None:
    function, shapes = LEFT[case]
    untouched(KeepDivisions(), traced(function, *shapes))


def test_on_a_cpu_inductor_divides_by_itself() -> None:
    untouched(KeepDivisions(), traced(lambda x: x / torch.full((), 0.1), (4,), elsewhere=False))


def test_integers_are_left() -> None:
    gm = traced(lambda x: x.to(torch.int32) / torch.full((), 2, dtype=torch.int32), (4,))
    untouched(KeepDivisions(), gm)
