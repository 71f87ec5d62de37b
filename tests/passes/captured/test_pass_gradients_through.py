from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxquant.ops import fake_quantize, qparams
from fxquant.passes.captured.pass_gradients_through import PassGradientsThrough
from tests.passes.graphs import QUANTIZE, apply, captured, untouched


def weights(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target is fake_quantize.PER_CHANNEL]


def activations(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target is fake_quantize.PER_TENSOR]


def test_weights_scaled_by_themselves_pass_gradients_through() -> None:
    gm = captured(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4), passes=QUANTIZE)
    assert len(weights(gm)) == 2 and activations(gm)
    assert apply(PassGradientsThrough(), gm).rewrites == 2
    assert all(node.kwargs["pass_through"] for node in weights(gm))
    assert not any(node.kwargs.get("pass_through") for node in activations(gm))


def test_without_weights_nothing_changes() -> None:
    untouched(PassGradientsThrough(), captured(lambda x: x @ x, torch.randn(4, 4), passes=QUANTIZE))


@given(
    bits=st.integers(2, 16),
    axis=st.sampled_from([None, 0, 1]),
    magnitude=st.floats(1e-30, 1e30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    rounding=st.sampled_from(["divide", "reciprocal"]),
    seed=st.integers(0, 2**20),
)
def test_no_code_of_a_tensor_scaled_by_itself_is_clipped(
    bits: int, axis: int | None, magnitude: float, dtype: torch.dtype, rounding: str, seed: int
) -> None:
    """The claim that the pass rests on, against the mask itself."""
    w = (torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)) * magnitude).to(dtype)
    if not torch.isfinite(w).all():
        w = torch.nan_to_num(w)
    high = 2 ** (bits - 1) - 1
    scale, zero = qparams.SYMMETRIC_QPARAMS(w, axis, high)
    ones = torch.ones_like(w)
    if axis is None:
        grad = fake_quantize.PER_TENSOR_BACKWARD(ones, w, scale, zero, -high, high, rounding=rounding)
    else:
        grad = fake_quantize.PER_CHANNEL_BACKWARD(ones, w, scale, zero, axis, -high, high, rounding=rounding)
    assert torch.equal(grad, ones)


@pytest.mark.parametrize("axis", [None, 0])
def test_gradients_are_handed_on_as_they_are(axis: int | None) -> None:
    w = torch.randn(4, 3, requires_grad=True)
    scale, zero = (v.detach() for v in qparams.SYMMETRIC_QPARAMS(w.detach(), axis, 7))
    scale = scale / 4  # most codes are clipped

    def run(pass_through: bool) -> Tensor:
        args = (w, scale, zero) if axis is None else (w, scale, zero, axis)
        op = fake_quantize.PER_TENSOR if axis is None else fake_quantize.PER_CHANNEL
        y = op(*args, -7, 7, rounding="divide", pass_through=pass_through)
        return torch.autograd.grad(y, w, torch.full_like(y, 3.0))[0]

    assert torch.equal(run(True), torch.full_like(w, 3.0))
    assert (run(False) == 0).any()
