"""Where quantizers go, as golden texts, for the building blocks of real networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxquant.graph import lift as lift_module
from fxquant.passes.captured.functionalize_activations import FunctionalizeActivations
from fxquant.plan.solver import Placements, place
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import CurrentTensor
from fxquant.spec.recipes import INT8, Recipe
from fxquant.targets.profiles import ONNXRUNTIME
from tests.passes.graphs import captured
from tests.processes import under_another_hash_seed

IMAGE = torch.randn(2, 4, 8, 8)
TOKENS = torch.randn(2, 5, 8)


def placements(model: Callable[..., Any], *args: Tensor, recipe: Recipe = INT8) -> Placements:
    gm = captured(model, *args, passes=(FunctionalizeActivations(),))
    before = gm.code
    found = place(gm.graph, recipe, ONNXRUNTIME)
    assert gm.code == before
    return found


def golden(model: Callable[..., Any], *args: Tensor, recipe: Recipe = INT8) -> str:
    """``role spec: operand, operand`` a site, then what was declined."""
    found = placements(model, *args, recipe=recipe)
    lines = [f"{p.role} {p.spec}: {', '.join(f'{n.name}.{name}' for n, name in p.edges)}" for p in found.placed]
    return "\n".join([*lines, *(f"declined {node.name}: {why}" for node, why in found.declined)]) + "\n"


def conv(inputs: int, outputs: int, size: int = 3, **kwargs: Any) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **kwargs)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.short, self.relu = conv(4, 4), conv(4, 4), conv(4, 4, 1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.two(self.relu(self.one(x)))
        h += self.short(x)
        return self.relu(h)


def test_residual_block() -> None:
    assert_expected_inline(
        golden(Residual(), IMAGE),
        """\
activation u8: conv2d.input, conv2d_2.input
weight s8 axis 0: conv2d.weight
activation u8: conv2d_1.input
weight s8 axis 0: conv2d_1.weight
weight s8 axis 0: conv2d_2.weight
activation u8: add__3.lhs
activation u8: add__3.rhs
output u8: add__3.output
""",
    )


class Inverted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depth, self.project = conv(4, 8, 1), conv(8, 8, groups=8), conv(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.depth(F.hardtanh(self.expand(x), 0.0, 6.0)))
        return x + self.project(h)


def test_inverted_residual_has_fixed_ranges_behind_relu6() -> None:
    assert_expected_inline(
        golden(Inverted(), IMAGE),
        """\
activation u8: conv2d.input, add.lhs
weight s8 axis 0: conv2d.weight
activation u8 [0, 6]: conv2d_1.input
weight s8 axis 0: conv2d_1.weight
activation u8 [0, 6]: conv2d_2.input
weight s8 axis 0: conv2d_2.weight
activation u8: add.rhs
output u8: add.output
""",
    )


def test_concat_of_two_convs() -> None:
    one, two, last = (nn.Conv2d(c, 4, 1) for c in (4, 4, 8))
    assert_expected_inline(
        golden(lambda x: last(torch.cat([one(x), two(x).relu()], 1)), IMAGE),
        """\
activation u8: conv2d.input, conv2d_1.input
weight s8 axis 0: conv2d.weight
weight s8 axis 0: conv2d_1.weight
activation u8: cat.operand0
activation u8: cat.operand1
activation u8: conv2d_2.input
weight s8 axis 0: conv2d_2.weight
output u8: conv2d_2.output
""",
    )


def test_squeeze_and_excitation() -> None:
    body, down, up = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def gate(x: Tensor) -> Tensor:
        h = body(x).relu()
        return h * up(down(F.adaptive_avg_pool2d(h, 1)).relu()).sigmoid()

    assert_expected_inline(
        golden(gate, IMAGE),
        """\
activation u8: conv2d.input
weight s8 axis 0: conv2d.weight
output u8: conv2d.output
activation u8: conv2d_1.input
weight s8 axis 0: conv2d_1.weight
activation u8: conv2d_2.input
weight s8 axis 0: conv2d_2.weight
output u8: conv2d_2.output
""",
    )


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.qkv, self.out, self.up, self.down = (nn.Linear(8, n) for n in (24, 8, 16, 8))
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 8)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def test_attention_block() -> None:
    assert_expected_inline(
        golden(Block(), TOKENS),
        """\
activation u8: linear.input
weight s8 axis 0: linear.weight
activation u8: scaled_dot_product_attention.query
activation u8: scaled_dot_product_attention.key
activation u8: scaled_dot_product_attention.value
activation u8: linear_1.input
weight s8 axis 0: linear_1.weight
activation u8: linear_2.input
weight s8 axis 0: linear_2.weight
activation u8: linear_3.input
weight s8 axis 0: linear_3.weight
declined add: its operand arg2_1 is also used in float
declined add_1: its operand add is also used in float
""",
    )


def test_tied_embedding_has_one_quantizer() -> None:
    table = nn.Embedding(10, 8)
    assert_expected_inline(
        golden(lambda i: F.linear(table(i).relu(), table.weight), torch.tensor([1, 2])),
        """\
weight s8 axis 0: embedding.weight, linear.weight
activation u8: linear.input
""",
    )


def test_weight_tied_across_axes_has_one_scale() -> None:
    weight = nn.Parameter(torch.randn(8, 8))
    assert_expected_inline(
        golden(lambda x: F.linear(x, weight) @ weight, TOKENS),
        """\
activation u8: linear.input
weight s8: linear.weight, matmul.rhs
activation u8: matmul.lhs
""",
    )


def test_max_pool_between_convs() -> None:
    one, two = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    assert_expected_inline(
        golden(lambda x: two(F.max_pool2d(one(x).relu(), 2)), IMAGE),
        """\
activation u8: conv2d.input
weight s8 axis 0: conv2d.weight
activation u8: conv2d_1.input
weight s8 axis 0: conv2d_1.weight
output u8: conv2d_1.output
""",
    )


def test_dropout_in_training_is_seen_through() -> None:
    one, two = nn.Conv2d(4, 4, 3), nn.Linear(4 * 36, 3)
    assert_expected_inline(
        golden(lambda x: two(F.dropout(one(x).relu().flatten(1), 0.5)), IMAGE),
        """\
activation u8: conv2d.input
weight s8 axis 0: conv2d.weight
activation u8: linear.input
weight s8 axis 0: linear.weight
""",
    )


def test_conv_transpose_is_declined() -> None:
    assert_expected_inline(
        golden(nn.Sequential(nn.ConvTranspose2d(4, 4, 2), nn.Conv2d(4, 4, 1)), IMAGE),
        """\
activation u8: conv2d.input
weight s8 axis 0: conv2d.weight
output u8: conv2d.output
declined conv_transpose2d: onnxruntime has no integer ConvTranspose kernel
""",
    )


def test_matrix_vector_products_are_declined() -> None:
    vector = torch.ones(4)
    assert_expected_inline(
        golden(lambda x: torch.mv(x.relu(), vector), torch.ones(3, 4)),
        """\
declined mv: products of a matrix and a vector stay float
""",
    )


def test_conv_into_gelu_and_to_the_output() -> None:
    assert_expected_inline(
        golden(nn.Sequential(nn.Conv2d(4, 4, 1), nn.GELU(), nn.Conv2d(4, 4, 1)), IMAGE),
        """\
activation u8: conv2d.input
weight s8 axis 0: conv2d.weight
output u8: conv2d.output
activation u8: conv2d_1.input
weight s8 axis 0: conv2d_1.weight
output u8: conv2d_1.output
""",
    )


def test_einsum_and_matmul_of_activations() -> None:
    weight = nn.Parameter(torch.randn(8, 3))

    def model(x: Tensor) -> Tensor:
        scores = x @ x.transpose(1, 2)
        return torch.einsum("bij,bjd,dk->bik", scores, x, weight)

    assert_expected_inline(
        golden(model, TOKENS),
        """\
activation u8: matmul.lhs, matmul.rhs, einsum.operand1
activation u8: einsum.operand0
weight s8: einsum.operand2
""",
    )


def test_a_vector_has_one_scale() -> None:
    vector = nn.Parameter(torch.randn(8))
    assert_expected_inline(
        golden(lambda x: x @ vector, TOKENS),
        """\
activation u8: matmul.lhs
weight s8: matmul.rhs
""",
    )


def test_clamp_by_tensors_is_no_relu6() -> None:
    layer = nn.Conv2d(4, 4, 1)
    assert_expected_inline(
        golden(lambda x, low: layer(x.clamp(min=low)), IMAGE, torch.zeros(1)),
        """\
activation u8: conv2d.input
weight s8 axis 0: conv2d.weight
output u8: conv2d.output
""",
    )


LINEAR = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda x: LINEAR(LINEAR(x) + LINEAR.bias), "one operand is a parameter or constant"),
        (lambda x: LINEAR(LINEAR(x) + x[:, :1]), "operands are broadcast"),
        (lambda x: LINEAR(torch.add(LINEAR(x), x, alpha=2)), "its second operand is scaled by alpha"),
        (lambda x: LINEAR(x + (x > 0)), "one operand holds integers"),
        (lambda x: LINEAR((h := x.sin()) + x) * h, "its operand sin is also used in float"),
        (lambda x: (x + LINEAR(x)).sin(), "its result add is used in float"),
    ],
)
def test_reasons_for_soft_operators(model: Callable[..., Any], reason: str) -> None:
    assert [why for _, why in placements(model, TOKENS).declined] == [reason]


def test_recipe_narrows_the_kinds() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    only = Recipe(name="only", kinds=frozenset({"linear"}))
    assert_expected_inline(
        golden(model, IMAGE, recipe=only),
        """\
activation u8: linear.input
weight s8 axis 0: linear.weight
declined conv2d: recipe 'only' leaves conv out
""",
    )


def test_per_tensor_weights_and_symmetric_activations() -> None:
    recipe = Recipe(name="plain", activation=QuantSpec(), weight=QuantSpec(range=CurrentTensor()))
    assert_expected_inline(
        golden(nn.Sequential(nn.ReLU6(), nn.Linear(8, 8)), TOKENS, recipe=recipe),
        """\
activation s8: linear.input
weight s8: linear.weight
""",
    )


def test_declines_are_described_with_the_users_line() -> None:
    (declined,) = placements(lambda x: (x + LINEAR(x)).sin(), TOKENS).described_declines()
    assert (declined.where, declined.reason) == ("add", "its result add is used in float")
    assert declined.source.partition(":")[0].endswith("test_solver.py")


def residual_chain(layers: int) -> fx.Graph:
    """h ← h + linear(relu(h)), ended by an op that needs floats: every add falls, from the last to the first."""
    graph = fx.Graph()

    def node(op: Any, *args: fx.Node) -> fx.Node:
        made = graph.call_function(op, args)
        made.meta["val"] = torch.empty(4, 4, device="meta")
        return made

    h = graph.placeholder("x")
    h.meta["val"] = torch.empty(4, 4, device="meta")
    weights = [graph.placeholder(f"w{i}") for i in range(layers)]
    for weight in weights:
        weight.meta.update(val=torch.empty(4, 4, device="meta"), state=True)
        inner = node(torch.ops.aten.relu.default, node(torch.ops.aten.view.default, h))
        h = node(torch.ops.aten.add.Tensor, h, node(torch.ops.aten.linear.default, inner, weight))
    graph.output(node(torch.ops.aten.sin.default, h))
    return graph


def operations(layers: int) -> int:
    """Uses looked at while placing."""
    count = 0
    covers_use = lift_module.Lifting._covers_use

    def counted(self: lift_module.Lifting, node: fx.Node, user: fx.Node) -> bool:
        nonlocal count
        count += 1
        return covers_use(self, node, user)

    graph = residual_chain(layers)
    with patch.object(lift_module.Lifting, "_covers_use", counted):
        found = place(graph, INT8, ONNXRUNTIME)
    assert len(found.placed) == 2 * layers and len(found.declined) == layers
    return count


def test_work_grows_with_the_graph() -> None:
    small, large = operations(50), operations(400)  # 2,000 nodes
    assert large < 10 * small, f"{small} → {large} for a graph 8 times as large"


def places_of_three() -> str:
    return golden(Residual(), IMAGE) + golden(Block(), TOKENS) + golden(Inverted(), IMAGE)


def test_same_places_in_every_process() -> None:
    found = under_another_hash_seed("from tests.plan.test_solver import *; print(places_of_three(), end='')")
    assert found == places_of_three() and "output" in found
