"""Where weights get a scale per group, and what is said where they do not, by target."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.errors import InvalidArgument
from fxquant.passes.captured.functionalize_activations import FunctionalizeActivations
from fxquant.plan.exceptions import Exceptions
from fxquant.plan.solver import Placements, place
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import CurrentTensor
from fxquant.spec.recipes import INT4_WEIGHT_ONLY, INT8, Recipe
from fxquant.spec.rules import Rule, Rulebook
from fxquant.targets.profiles import GENERIC, ONNXRUNTIME, OPENVINO, TENSORRT, Profile
from tests.passes.graphs import captured

TOKENS = torch.randn(2, 5, 8)
IMAGE = torch.randn(2, 4, 8, 8)
GROUPS = QuantSpec(bits=4, narrow=True, axis=0, group_size=4, range=CurrentTensor())
WEIGHT_ONLY = Recipe(name="weight only", activation=None, weight=GROUPS)
W4A8 = Recipe(name="w4a8 in groups", weight=GROUPS)


def placements(model: Any, *args: Tensor, recipe: Recipe, profile: Profile, rules: tuple[Rule, ...] = ()) -> Placements:
    gm = captured(model, *args, passes=(FunctionalizeActivations(),))
    exceptions = Exceptions(Rulebook(rules), lambda node: (("", None),), (None, None))
    return place(gm.graph, recipe, profile, exceptions)


def golden(
    model: Any, *args: Tensor, recipe: Recipe = WEIGHT_ONLY, profile: Profile = GENERIC, rules: tuple[Rule, ...] = ()
) -> str:
    """``role spec: operand, operand`` a site, then what was declined."""
    found = placements(model, *args, recipe=recipe, profile=profile, rules=rules)
    lines = [f"{p.role} {p.spec}: {', '.join(f'{n.name}.{name}' for n, name in p.edges)}" for p in found.placed]
    return "\n".join([*lines, *(f"declined {node.name}: {why}" for node, why in found.declined)]) + "\n"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v))


def test_weight_only_places_no_activation() -> None:
    assert_expected_inline(
        golden(Attention(), TOKENS),
        """\
weight s4 axis 0 group 4: linear.weight
weight s4 axis 0 group 4: linear_1.weight
declined scaled_dot_product_attention: recipe 'weight only' leaves activations in float
declined add: recipe 'weight only' leaves activations in float
""",
    )


def test_the_reason_of_a_site_says_weight_only() -> None:
    found = placements(Attention(), TOKENS, recipe=WEIGHT_ONLY, profile=ONNXRUNTIME)
    assert {p.reason for p in found.placed} == {
        "weight of linear; recipe 'weight only' leaves activations in float",
        "weight of linear_1; recipe 'weight only' leaves activations in float",
    }
    assert [p.matrix for p in found.placed] == [(0, 8), (0, 8)]


def test_groups_beside_quantized_activations() -> None:
    assert_expected_inline(
        golden(Attention(), TOKENS, recipe=W4A8, profile=ONNXRUNTIME),
        """\
activation u8: linear.input
weight s4 axis 0 group 4: linear.weight
activation u8: scaled_dot_product_attention.query
activation u8: scaled_dot_product_attention.key
activation u8: scaled_dot_product_attention.value
activation u8: linear_1.input
weight s4 axis 0 group 4: linear_1.weight
declined add: its result add is used in float
""",
    )


def test_a_rule_gives_an_activation_to_a_weight_only_recipe() -> None:
    rules = (Rule(spec=QuantSpec(), kind="sdpa", operand="activation"),)
    assert_expected_inline(
        golden(Attention(), TOKENS, rules=rules),
        """\
weight s4 axis 0 group 4: linear.weight
activation s8: scaled_dot_product_attention.query
activation s8: scaled_dot_product_attention.key
activation s8: scaled_dot_product_attention.value
weight s4 axis 0 group 4: linear_1.weight
declined add: recipe 'weight only' leaves activations in float
""",
    )


def test_products_with_a_parameter_and_tables() -> None:
    table, w, v = nn.Embedding(6, 8), nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(3))
    tokens = torch.tensor([[1, 2]])
    assert_expected_inline(
        golden(lambda t, e, w, v: torch.addmm(v, F.embedding(t, e)[0], w) @ w.t(), tokens, table.weight, w, v),
        """\
weight s4 axis 0 group 4: embedding.weight
weight s4 axis 1 group 4: addmm.weight
declined matmul: groups of 4 must divide the 3 values of a channel
""",
    )


def test_a_tied_table_and_head_share_their_groups() -> None:
    table = nn.Parameter(torch.randn(6, 8))
    tokens = torch.tensor([[1, 2]])
    found = golden(lambda t, e: F.linear(F.embedding(t, e), e), tokens, table)
    assert found == "weight s4 axis 0 group 4: embedding.weight, linear.weight\n"


def test_uses_with_other_channels_are_declined() -> None:
    w = nn.Parameter(torch.randn(8, 8))
    assert_expected_inline(
        golden(lambda x, w: F.linear(x, w) @ w, TOKENS, w),
        """\
weight s4 axis 0 group 4: linear.weight
declined matmul: it is tied to that of linear, whose channels are its other axis
""",
    )


@pytest.mark.parametrize("recipe", [WEIGHT_ONLY, W4A8], ids=lambda r: r.name)
def test_sizes_that_no_group_divides(recipe: Recipe) -> None:
    """Neither operand is quantized then: the other one would be for nothing."""
    w = nn.Parameter(torch.randn(4, 10))
    found = golden(lambda x, w: F.linear(x, w), torch.randn(2, 10), w, recipe=recipe)
    assert found == "declined linear: groups of 4 must divide the 10 values of a channel\n"


CONV = (
    "groups of 4 run along the one axis of a matrix that a product sums over, and the weight of {kind} has another "
    "form: give it a format per channel, fxquant.Rule(kind='{kind}', operand='{operand}', "
    "spec=QuantSpec(bits=4, narrow=True, axis=0, range=CurrentTensor()))"
)


def test_convolutions_and_batches_of_matrices() -> None:
    conv, up = nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 1)
    batch = nn.Parameter(torch.randn(2, 8, 8))
    found = placements(conv, IMAGE, recipe=W4A8, profile=ONNXRUNTIME)
    assert not found.placed and [why for _, why in found.declined] == [CONV.format(kind="conv", operand="weight")]
    found = placements(up, IMAGE, recipe=W4A8, profile=GENERIC)
    assert [why for _, why in found.declined] == [CONV.format(kind="conv_transpose", operand="weight")]
    found = placements(lambda x, w: x @ w, TOKENS, batch, recipe=W4A8, profile=GENERIC)
    assert [why for _, why in found.declined] == ["groups of 4 are for matrices, and this weight has 3 dimensions"]
    w = nn.Parameter(torch.randn(8, 8))
    found = placements(lambda x, w: torch.einsum("bik,kj->bij", x, w), TOKENS, w, recipe=W4A8, profile=GENERIC)
    assert [why for _, why in found.declined] == [CONV.format(kind="einsum", operand="operand1")]


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))


def test_the_rule_that_the_reason_names() -> None:
    spec = QuantSpec(bits=4, narrow=True, axis=0, range=CurrentTensor())
    assert_expected_inline(
        golden(ConvNet(), IMAGE, rules=(Rule(kind="conv", operand="weight", spec=spec),), profile=ONNXRUNTIME),
        """\
weight s4 axis 0: conv2d.weight
weight s4 axis 0 group 4: linear.weight
""",
    )


def test_groups_for_some_weights_of_int8() -> None:
    assert_expected_inline(
        golden(
            ConvNet(), IMAGE, recipe=INT8, rules=(Rule(kind="linear", operand="weight", spec=GROUPS),), profile=GENERIC
        ),
        """\
activation u8: conv2d.input
weight s8 axis 0: conv2d.weight
activation u8: linear.input
weight s4 axis 0 group 4: linear.weight
""",
    )


def test_floats_beside_groups_where_the_target_multiplies_no_codes_by_them() -> None:
    """The other readers of the tensor have its codes."""
    narrow, wide = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(5, 8))
    rules = (Rule(kind="linear", operand="weight", spec=QuantSpec(axis=0, range=CurrentTensor())),)
    beside = dataclasses.replace(GENERIC, float_beside_groups=True)

    def net(x: Tensor, narrow: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
        return x @ narrow.t(), F.linear(x, wide)

    assert_expected_inline(
        golden(net, TOKENS, narrow, wide, recipe=W4A8, profile=beside, rules=rules),
        """\
weight s4 axis 1 group 4: matmul.rhs
activation u8: linear.input
weight s8 axis 0: linear.weight
declined matmul: its lhs: the runtime multiplies a weight with scales per group by floats
""",
    )


@pytest.mark.parametrize(
    ("profile", "fields", "message"),
    [
        (
            TENSORRT,
            {"group_size": 8},
            "must have groups of 16, 32, 64 or 128 for target 'tensorrt': got 8. Give the weights QuantSpec(group_s",
        ),
        (TENSORRT, {"group_size": 64, "bits": 8}, "must have 4 bits for target 'tensorrt': got 8 for groups."),
        (ONNXRUNTIME, {"bits": 8}, "must have 2 to 4 bits for target 'onnxruntime': got 8 for groups."),
        (OPENVINO, {"bits": 16}, "must have 2 to 8 bits for target 'openvino': got 16 for groups."),
    ],
)
def test_formats_that_a_target_has_not(profile: Profile, fields: dict[str, Any], message: str) -> None:
    weight = dataclasses.replace(INT4_WEIGHT_ONLY.weight, **fields)
    recipe = Recipe(name="mine", activation=None, weight=weight)
    with pytest.raises(InvalidArgument, match=re.escape(f"recipe 'mine' {message}")):
        placements(nn.Linear(128, 8), torch.randn(2, 128), recipe=recipe, profile=profile)


@pytest.mark.parametrize("size", [16, 128])
def test_the_groups_of_tensorrt(size: int) -> None:
    recipe = dataclasses.replace(WEIGHT_ONLY, weight=dataclasses.replace(GROUPS, group_size=size))
    found = golden(nn.Linear(128, 8), torch.randn(2, 128), recipe=recipe, profile=TENSORRT)
    assert found == f"weight s4 axis 0 group {size}: linear.weight\n"


def test_an_activation_has_no_groups() -> None:
    rules = (Rule(spec=GROUPS, kind="linear", operand="input"),)
    with pytest.raises(InvalidArgument, match=r"Rule\(.*\)\.axis must be None: got 0. An activation has one scale"):
        placements(nn.Linear(8, 8), TOKENS, recipe=INT8, profile=GENERIC, rules=rules)
