"""Where quantizers go for the targets beside onnxruntime, as golden texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.errors import InvalidArgument
from fxquant.passes.captured.functionalize_activations import FunctionalizeActivations
from fxquant.plan.exceptions import Exceptions
from fxquant.plan.solver import place
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.recipes import INT8, get_recipe
from fxquant.spec.rules import Rule, Rulebook
from fxquant.targets.profiles import GENERIC, OPENVINO, TENSORRT, Profile
from tests.passes.graphs import captured

IMAGE = torch.randn(2, 4, 8, 8)
TOKENS = torch.randn(2, 5, 8)
U8 = QuantSpec(signed=False, symmetric=False)


def golden(profile: Profile, model: Callable[..., Any], *args: Tensor) -> str:
    """``role spec: operand, operand`` a site, then what was declined."""
    gm = captured(model, *args, passes=(FunctionalizeActivations(),))
    found = place(gm.graph, INT8, profile)
    lines = [f"{p.role} {p.spec}: {', '.join(f'{n.name}.{name}' for n, name in p.edges)}" for p in found.placed]
    return "\n".join([*lines, *(f"declined {node.name}: {why}" for node, why in found.declined)]) + "\n"


def conv(inputs: int, outputs: int, size: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False), nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    def __init__(self, down: bool) -> None:
        super().__init__()
        self.one, self.two, self.last = conv(4, 4), conv(4, 4), nn.Conv2d(4, 4, 1)
        self.short = conv(4, 4, 1) if down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.two(F.relu(self.one(x))) + self.short(x)))


def test_tensorrt_residual_block_shares_the_quantizer_of_its_input() -> None:
    assert_expected_inline(
        golden(TENSORRT, Residual(False), IMAGE),
        """\
activation s8: conv2d.input, add.rhs
weight s8 axis 0: conv2d.weight
activation s8: conv2d_1.input
weight s8 axis 0: conv2d_1.weight
activation s8: conv2d_2.input
weight s8 axis 0: conv2d_2.weight
""",
    )


def test_tensorrt_residual_block_with_downsample_quantizes_one_operand_of_the_add() -> None:
    assert_expected_inline(
        golden(TENSORRT, Residual(True), IMAGE),
        """\
activation s8: conv2d.input, conv2d_2.input
weight s8 axis 0: conv2d.weight
activation s8: conv2d_1.input
weight s8 axis 0: conv2d_1.weight
weight s8 axis 0: conv2d_2.weight
activation s8: add.rhs
activation s8: conv2d_3.input
weight s8 axis 0: conv2d_3.weight
""",
    )


def test_tensorrt_add_without_a_convolution_is_float() -> None:
    layer = nn.Linear(8, 8)
    assert_expected_inline(
        golden(TENSORRT, lambda x: layer(layer(x) + x), TOKENS),
        """\
activation s8: linear.input
weight s8 axis 0: linear.weight, linear_1.weight
activation s8: linear_1.input
declined add: tensorrt adds in float where no convolution ends in the add
""",
    )


@pytest.mark.parametrize("down", [False, True], ids=["same-size", "downsample"])
def test_openvino_sum_quantizes_what_the_convolution_does_not_have(down: bool) -> None:
    found = golden(OPENVINO, Residual(down), IMAGE)
    assert found.replace("u8", "s8") == golden(TENSORRT, Residual(down), IMAGE)


def test_openvino_sum_stays_float_beside_codes_of_four_bits() -> None:
    gm = captured(Residual(False), IMAGE, passes=(FunctionalizeActivations(),))
    found = place(gm.graph, get_recipe("w4a4"), OPENVINO)
    assert not [edge for p in found.placed for edge in p.edges if edge[0].name == "add"]
    why = "a sum with codes of 4 bits would lose what float keeps"
    assert [(node.name, reason) for node, reason in found.declined] == [("add", why)]


class PreActivation(nn.Module):
    """Its sums are read in float too: by their normalization, and by the next sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.one, self.two, self.three = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        x = x + self.two(F.relu(self.first(x)))
        return x + self.three(F.relu(self.second(x)))


def test_openvino_sum_that_is_read_in_float_too_stays_float() -> None:
    assert_expected_inline(
        golden(OPENVINO, PreActivation(), IMAGE),
        """\
activation u8: conv2d.input
weight s8 axis 0: conv2d.weight
activation u8: conv2d_1.input
weight s8 axis 0: conv2d_1.weight
activation u8: conv2d_2.input
weight s8 axis 0: conv2d_2.weight
declined add: its operand conv2d is also used in float
declined add_1: its operand add is also used in float
""",
    )


def test_openvino_sum_that_leaves_in_float_stays_float_though_its_operand_is_codes_anyway() -> None:
    one, two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def net(x: Tensor) -> Tensor:
        y = one(x)
        return two(y) + y

    found = golden(OPENVINO, net, IMAGE)
    assert "add." not in found and found.endswith("declined add: its result add is used in float\n")


def test_openvino_sum_of_a_chain_is_codes_for_the_next_sum() -> None:
    blocks = nn.ModuleList(Residual(False) for _ in range(2))
    found = golden(OPENVINO, lambda x: blocks[1](blocks[0](x)), IMAGE)
    assert "declined" not in found and found.count(".rhs") == 2 and ".lhs" not in found


@pytest.mark.parametrize("profile", [OPENVINO, TENSORRT], ids=lambda p: p.name)
def test_rule_leaves_the_sum_that_a_convolution_takes_in_float(profile: Profile) -> None:
    gm = captured(Residual(False), IMAGE, passes=(FunctionalizeActivations(),))
    book = Rulebook((Rule(kind="add", spec=None),))
    found = place(gm.graph, INT8, profile, Exceptions(book, lambda node: (("", None),), (None, None)))
    assert not [edge for p in found.placed for edge in p.edges if edge[0].name == "add"]
    assert [(node.name, why) for node, why in found.declined] == [("add", "Rule(kind='add', spec=None)")]


def test_openvino_layers_after_a_norm_have_zero_point_0_and_those_after_gelu_have_not() -> None:
    norm, one, two = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
    assert_expected_inline(
        golden(OPENVINO, lambda x: two(F.gelu(one(norm(x)))), TOKENS),
        """\
activation s8: linear.input
weight s8 axis 0: linear.weight
activation u8: linear_1.input
weight s8 axis 0: linear_1.weight
""",
    )


class Attention(nn.Module):
    """Self-attention, written out or by the operator."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.whole = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), whole

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.whole:
            return F.scaled_dot_product_attention(q, k, v)
        return F.dropout(torch.softmax(q @ k.transpose(1, 2), -1), 0.5) @ v


def test_openvino_attention_has_zero_point_0_and_a_signed_right_operand() -> None:
    assert_expected_inline(
        golden(OPENVINO, Attention(False), TOKENS),
        """\
activation u8: linear.input, linear_1.input, linear_2.input
weight s8 axis 0: linear.weight
weight s8 axis 0: linear_1.weight
weight s8 axis 0: linear_2.weight
activation s8: matmul.lhs
activation s8: matmul.rhs
activation u8: matmul_1.lhs
activation s8: matmul_1.rhs
""",
    )


def test_openvino_attention_by_the_operator_keeps_its_value_in_float() -> None:
    assert_expected_inline(
        golden(OPENVINO, Attention(True), TOKENS),
        """\
activation u8: linear.input, linear_1.input, linear_2.input
weight s8 axis 0: linear.weight
weight s8 axis 0: linear_1.weight
weight s8 axis 0: linear_2.weight
activation s8: scaled_dot_product_attention.query
activation s8: scaled_dot_product_attention.key
declined scaled_dot_product_attention: its value: it is multiplied by probabilities in float
""",
    )


def test_openvino_transposed_convolution_has_zero_point_0_which_a_relu_gives() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(4, 4, 2), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2), nn.Conv2d(4, 4, 1))
    assert_expected_inline(
        golden(OPENVINO, net, IMAGE),
        """\
activation s8: conv_transpose2d.input
weight s8 axis 1: conv_transpose2d.weight
activation u8: conv_transpose2d_1.input
weight s8 axis 1: conv_transpose2d_1.weight
activation u8: conv2d.input
weight s8 axis 0: conv2d.weight
""",
    )


def test_openvino_product_with_a_weight_takes_any_zero_point() -> None:
    weight = nn.Parameter(torch.randn(8, 8))
    assert_expected_inline(
        golden(OPENVINO, lambda x: x @ weight, TOKENS),
        """\
activation u8: matmul.lhs
weight s8 axis 1: matmul.rhs
""",
    )


def test_generic_transposed_convolution() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(4, 4, 1))
    assert_expected_inline(
        golden(GENERIC, net, IMAGE),
        """\
activation u8: conv2d.input
weight s8 axis 0: conv2d.weight
activation u8: conv_transpose2d.input
weight s8 axis 1: conv_transpose2d.weight
activation u8: conv2d_1.input
weight s8 axis 0: conv2d_1.weight
""",
    )


def test_tensorrt_transposed_convolution_is_float() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(4, 4, 1))
    assert_expected_inline(
        golden(TENSORRT, net, IMAGE),
        """\
activation s8: conv2d.input
weight s8 axis 0: conv2d.weight
activation s8: conv2d_1.input
weight s8 axis 0: conv2d_1.weight
declined conv_transpose2d: TensorRT has no integer transposed convolution
""",
    )


def test_a_rule_cannot_give_what_the_target_refuses() -> None:
    gm = captured(lambda x: x @ x.transpose(1, 2), TOKENS)
    book = Rulebook((Rule(kind="matmul", operand="rhs", spec=U8),))
    exceptions = Exceptions(book, lambda node: (("", None),), (None, None))
    with pytest.raises(InvalidArgument, match="must have signed and symmetric codes for target 'openvino': got u8"):
        place(gm.graph, INT8, OPENVINO, exceptions)


@pytest.mark.parametrize("profile", [GENERIC, OPENVINO, TENSORRT], ids=lambda p: p.name)
def test_a_weight_that_is_a_batch_of_matrices_has_one_scale(profile: Profile) -> None:
    """Its columns would want a scale for each column of each matrix."""
    weight = nn.Parameter(torch.randn(2, 8, 8))
    assert "weight s8: matmul.rhs\n" in golden(profile, lambda x: x @ weight, TOKENS)
