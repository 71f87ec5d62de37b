from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.ops.saved import CLIP_MASK, pack_planes, unpack_planes
from tests.ops.oracle import hard_values


@given(
    bits=st.sampled_from([1, 2, 4]),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    data=st.data(),
)
def test_planes_come_back(bits: int, shape: list[int], data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    shape[dim] *= 8 // bits
    values = torch.randint(0, 2**bits, shape)
    packed = pack_planes(values.bool() if bits == 1 else values.to(torch.uint8), bits, dim)
    assert packed.dtype == torch.uint8 and packed.numel() * 8 == values.numel() * bits
    assert torch.equal(unpack_planes(packed, bits, dim), values.to(torch.int32))


def test_bits_lie_where_the_docstring_says() -> None:
    values = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=torch.uint8)
    assert pack_planes(values, 4, 0).tolist() == [[1 + 16 * 5, 2 + 16 * 6, 3 + 16 * 7, 4 + 16 * 8]]
    assert pack_planes(values, 4, 1).tolist() == [[1 + 16 * 3, 2 + 16 * 4], [5 + 16 * 7, 6 + 16 * 8]]


def test_uneven_dimensions_are_refused() -> None:
    with pytest.raises(RuntimeError, match="`dim` must have a multiple of 8 elements for 1 bits: got 12"):
        pack_planes(torch.ones(12, dtype=torch.bool), 1, 0)
    with pytest.raises(RuntimeError, match="`bits` must be 1, 2 or 4: got 3"):
        unpack_planes(torch.ones(12, dtype=torch.uint8), 3, 0)


@pytest.mark.parametrize("rounding", ["divide", "reciprocal"])
def test_the_mask_is_where_torch_passes_gradients(rounding: str) -> None:
    """torch rounds by the reciprocal; division is held to float64."""
    x = hard_values(0.1, -8, 7, torch.float32).requires_grad_()
    scale, zero = torch.tensor([0.1]), torch.tensor([1], dtype=torch.int32)
    mask = CLIP_MASK(x.detach(), scale, zero, -8, 7, rounding=rounding)
    if rounding == "reciprocal":
        y = torch.fake_quantize_per_tensor_affine(x, scale, zero, -8, 7)
        (expected,) = torch.autograd.grad(y, x, torch.ones_like(y))
    else:
        quotient = (x.detach() / scale).double().round() + 1
        expected = ((quotient >= -8) & (quotient <= 7)).float()
    assert torch.equal(mask.float(), expected)
