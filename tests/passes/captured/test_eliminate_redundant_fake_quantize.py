from __future__ import annotations

from collections.abc import Callable

import torch
from expecttest import assert_expected_inline
from torch import Tensor

from fxquant.ops import (
    affine_qparams,
    fake_quantize_per_channel_affine,
    fake_quantize_per_tensor_affine,
    update_min_max,
)
from fxquant.passes.captured.eliminate_redundant_fake_quantize import EliminateRedundantFakeQuantize
from tests.passes.graphs import apply, captured, evaluate, show, untouched

PASS = EliminateRedundantFakeQuantize()
X = torch.tensor([[[-0.3, 0.14, 7.0, 0.05], [1.0, -2.0, float("nan"), 0.51]]])
LOW, HIGH = torch.tensor([-1.0]), torch.tensor([3.0])
SCALE, POINT = torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32)


def quantize(x: Tensor, scale: Tensor = SCALE, point: Tensor = POINT, rounding: str = "divide") -> Tensor:
    return fake_quantize_per_tensor_affine(x, scale, point, 0, 15, rounding=rounding)


def eliminated(model: Callable[..., Tensor], *args: Tensor) -> int:
    """How many go; the value stays the same, bit for bit."""
    gm = captured(model, *args)
    before = evaluate(gm, model, *args)
    done = apply(PASS, gm).rewrites
    torch.testing.assert_close(evaluate(gm, model, *args), before, rtol=0, atol=0, equal_nan=True)
    return done


def test_snapshot() -> None:
    gm = captured(
        lambda x, s, z: quantize(quantize(x, s, z).transpose(0, 1), s, z) + quantize(x, s, z), X, SCALE, POINT
    )
    assert apply(PASS, gm).rewrites == 2
    assert_expected_inline(
        show(gm),
        """\
fake_quantize_per_tensor_affine = fake_quantize_per_tensor(arg2_1, arg0_1, arg1_1, 0, 15)
transpose = transpose(fake_quantize_per_tensor_affine, 0, 1)
add = add(transpose, fake_quantize_per_tensor_affine)
return [add]
""",
    )


def test_through_moves() -> None:
    moves = (
        lambda y: y.view(8),
        lambda y: y.transpose(1, 2).contiguous().permute(2, 0, 1),
        lambda y: torch.nn.functional.max_pool1d(y, 2),
        lambda y: torch.nn.functional.dropout(y.unsqueeze(0), 0.5, training=False),
        lambda y: y.expand(3, 2, 4),
    )
    for move in moves:
        assert eliminated(lambda x, s, z, m=move: quantize(m(quantize(x, s, z)), s, z), X, SCALE, POINT) == 1


def test_equal_scales_are_found_through_the_ops_that_make_them() -> None:
    def model(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return quantize(x, *affine_qparams(low, high, 0, 15, False)) + quantize(
            x, *affine_qparams(low, high, 0, 15, False)
        )

    assert eliminated(lambda x, r: model(x, r, r + 3), X, LOW) == 1
    gm = captured(model, X, LOW, HIGH)
    assert apply(PASS, gm).rewrites == 1 and show(gm).count("= affine_qparams(") == 1


def test_what_stays() -> None:
    cases: tuple[Callable[..., Tensor], ...] = (
        lambda x, s, z: quantize(quantize(x, s, z) * 2, s, z),
        lambda x, s, z: quantize(quantize(x, s, z), s, z, rounding="reciprocal"),
        lambda x, s, z: quantize(quantize(x, s, z), s * 2, z),
        lambda x, s, z: quantize(torch.nn.functional.avg_pool1d(quantize(x, s, z), 2), s, z),
        lambda x, s, z: quantize(torch.nn.functional.dropout(quantize(x, s, z), 0.5, training=True), s, z),
    )
    for model in cases:
        assert untouched(PASS, captured(model, X, SCALE, POINT)).declines == []


def test_per_channel_behind_a_transpose_stays() -> None:
    scale, point = torch.tensor([0.1, 0.2]), torch.zeros(2, dtype=torch.int32)

    def model(x: Tensor, s: Tensor, z: Tensor) -> Tensor:
        once = fake_quantize_per_channel_affine(x, s, z, 0, -8, 7)
        return fake_quantize_per_channel_affine(once.t(), s, z, 0, -8, 7)

    untouched(PASS, captured(model, torch.randn(2, 2), scale, point))
    same = captured(
        lambda x, s, z: model(x, s, z) + fake_quantize_per_channel_affine(x, s, z, 0, -8, 7),
        torch.randn(2, 2),
        scale,
        point,
    )
    assert apply(PASS, same).rewrites == 1


def test_tensors_changed_in_place_are_not_equal() -> None:
    def changed(x: Tensor, s: Tensor, z: Tensor) -> Tensor:
        h = x.sin()
        first = quantize(h, s, z)
        h.view(-1).mul_(2)
        return first + quantize(h, s, z)

    untouched(PASS, captured(changed, X, SCALE, POINT))

    def updated(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        total = x * 0
        for _ in range(2):  # one quantizer, one tensor, two steps of its average
            new = update_min_max(x, low, high, 0.5)
            low.copy_(new[0])
            high.copy_(new[1])
            total = total + quantize(x, *affine_qparams(*new, 0, 15, False))
        return total

    untouched(PASS, captured(updated, X.nan_to_num(0), LOW.clone(), HIGH.clone()))
