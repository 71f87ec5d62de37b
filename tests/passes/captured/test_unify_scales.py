from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from expecttest import assert_expected_inline
from torch import Tensor

from fxquant.ops import affine_qparams, fake_quantize_per_tensor_affine
from fxquant.passes.captured.unify_scales import UnifyScales
from fxquant.targets.profiles import ONNXRUNTIME
from tests.passes.graphs import apply, captured, evaluate, show, untouched

JOINING = UnifyScales(profile=dataclasses.replace(ONNXRUNTIME, name="joining", joins_scale=True))
A, B, LOW, HIGH = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([-1.0]), torch.tensor([3.0])


def quantize(x: Tensor, low: Tensor, high: Tensor, codes: tuple[int, int] = (0, 255)) -> Tensor:
    scale, point = affine_qparams(low, high, *codes, False)
    return fake_quantize_per_tensor_affine(x, scale, point, *codes, rounding="divide")


def concat(a: Tensor, b: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return quantize(torch.cat([quantize(a, low, high), quantize(b, low * 2, high / 2)]), low / 2, high)


def test_snapshot() -> None:
    gm = captured(concat, A, B, LOW, HIGH)
    assert apply(JOINING, gm).rewrites == 1
    assert_expected_inline(
        show(gm),
        """\
mul = mul(arg0_1, 2)
div = div(arg1_1, 2)
minimum_default = minimum(arg0_1, mul)
maximum_default = maximum(arg1_1, div)
affine_qparams_default = affine_qparams(minimum_default, maximum_default, 0, 255, False)
getitem_6 = getitem(affine_qparams_default, 0)
getitem_7 = getitem(affine_qparams_default, 1)
fake_quantize_per_tensor_affine_1 = fake_quantize_per_tensor(arg3_1, getitem_6, getitem_7, 0, 255)
fake_quantize_per_tensor_affine = fake_quantize_per_tensor(arg2_1, getitem_6, getitem_7, 0, 255)
cat = cat([fake_quantize_per_tensor_affine, fake_quantize_per_tensor_affine_1])
fake_quantize_per_tensor_affine_2 = fake_quantize_per_tensor(cat, getitem_6, getitem_7, 0, 255)
return [fake_quantize_per_tensor_affine_2]
""",
    )


def test_all_members_get_the_widest_range_of_the_operands() -> None:
    gm = captured(concat, A * 9, B * 9, LOW, HIGH)
    apply(JOINING, gm)
    got = evaluate(gm, concat, A * 9, B * 9, LOW, HIGH)
    scale, point = affine_qparams(LOW * 2, HIGH, 0, 255, False)
    expected = fake_quantize_per_tensor_affine(torch.cat([A, B]) * 9, scale, point, 0, 255, rounding="divide")
    assert torch.equal(got, expected)


def test_the_same_operand_twice() -> None:
    gm = captured(
        lambda a, low, high: quantize(torch.cat([q := quantize(a, low, high), q]), low * 2, high), A, LOW, HIGH
    )
    assert apply(JOINING, gm).rewrites == 1


def test_untouched() -> None:
    gm = captured(concat, A, B, LOW, HIGH)
    assert untouched(UnifyScales(profile=ONNXRUNTIME), gm).declines == []
    equal = captured(
        lambda a, b, s, z: torch.cat([_by(a, s, z), _by(b, s, z)]), A, B, *affine_qparams(LOW, HIGH, 0, 255, False)
    )
    assert [d.reason for d in untouched(JOINING, equal).declines] == [
        "not every operand has a scale of its own to share"
    ]
    assert untouched(JOINING, captured(lambda a: a + 1, A)).declines == []


def _by(x: Tensor, scale: Tensor, point: Tensor) -> Tensor:
    return fake_quantize_per_tensor_affine(x, scale, point, 0, 255)


def test_declines() -> None:
    def reason(model: Callable[..., Tensor]) -> str:
        (decline,) = untouched(JOINING, captured(model, A, B, LOW, HIGH)).declines
        assert decline.node == "cat"
        return decline.reason

    assert (
        reason(lambda a, b, low, high: torch.cat([quantize(a, low, high), b]))
        == "not every operand has a scale of its own to share"
    )
    assert reason(lambda a, b, low, high: torch.cat([quantize(a, low, high), quantize(b, low, high, (-128, 127))])) == (
        "its operands have different formats"
    )

    def dense(a: Tensor, b: Tensor, low: Tensor, high: Tensor) -> Tensor:
        first = quantize(a, low, high)
        second = first.sin() + b
        return torch.cat([first, quantize(second, second.amin().view(1), second.amax().view(1))])

    assert reason(dense) == "an operand is used quantized before the others' ranges are known"
