"""Weights with a scale per group: against arithmetic written by hand, in both backends, through every pass."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor import metrics

import fxquant
from fxquant.errors import InvalidArgument, PlanMismatch, UnsupportedModel
from fxquant.graph.nodes import packet
from fxquant.ops import fake_quantize
from fxquant.passes.captured.eliminate_redundant_fake_quantize import EliminateRedundantFakeQuantize
from fxquant.passes.captured.fold_batch_norm import FoldBatchNorm
from fxquant.passes.captured.fold_training_batch_norm import FoldTrainingBatchNorm
from fxquant.passes.captured.insert_fake_quantize import InsertFakeQuantize
from fxquant.plan.plan import Plan
from fxquant.prepared.quantizer import quantizers
from fxquant.prepared.root import plan_of
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import CurrentTensor
from fxquant.spec.recipes import INT4_WEIGHT_ONLY, Recipe
from fxquant.spec.rules import Rule
from fxquant.targets.profiles import GENERIC
from tests.backend import oracle
from tests.nets import Mlp, grads
from tests.passes.graphs import apply, captured, evaluate, untouched

pytestmark = pytest.mark.usefixtures("cold")

GROUPS = QuantSpec(bits=4, narrow=True, axis=0, group_size=8, range=CurrentTensor())
CHANNELS = QuantSpec(bits=4, narrow=True, axis=0, range=CurrentTensor())
WEIGHT_ONLY = Recipe(name="weight only", activation=None, weight=GROUPS)
W4A8 = Recipe(name="w4a8 in groups", weight=GROUPS)
INSERT = InsertFakeQuantize(recipe=WEIGHT_ONLY, profile=GENERIC, stateless=True)
BACKENDS = ["fxquant_eager", "fxquant"]


def in_groups(w: Tensor, axis: int = 0, size: int = 8) -> Tensor:
    """The oracle: each group is a channel of a tensor of its own."""
    rows = w if axis == 0 else w.t()
    found = oracle.weight(rows.reshape(-1, size), 4).reshape(rows.shape)
    return found if axis == 0 else found.t()


class Mixer(nn.Module):
    """A table, a linear of it, a product with a parameter ``[K, N]``, and a head that is tied to the table."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.up = nn.Embedding(7, 16), nn.Linear(16, 24)
        self.down, self.head = nn.Parameter(torch.randn(24, 16) / 4), nn.Linear(16, 7, bias=False)
        self.head.weight = self.table.weight
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.up(self.table(tokens))) @ self.down)

    def by_hand(self, tokens: Tensor) -> Tensor:
        table = in_groups(self.table.weight)
        x = F.linear(F.embedding(tokens, table), in_groups(self.up.weight), self.up.bias)
        return F.linear(torch.relu(x) @ in_groups(self.down, axis=1), table)


TOKENS = torch.tensor([[0, 1, 2, 3], [6, 5, 4, 0]])
X = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def stepped(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    y = run(x)
    (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), grads(model)


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_are_those_by_hand(backend: str) -> None:
    model = Mixer()
    wanted, gradients = stepped(model.by_hand, model, TOKENS)
    fxquant.prepare(model, (TOKENS,), recipe=WEIGHT_ONLY, target="generic")
    found, ours = stepped(torch.compile(model, backend=backend), model, TOKENS)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-12, atol=1e-12, msg=name)


def test_the_backends_agree() -> None:
    found = []
    for backend in BACKENDS:
        torch._dynamo.reset()
        model = fxquant.prepare(Mixer(torch.float32), (TOKENS,), recipe=WEIGHT_ONLY, target="generic")
        found.append(stepped(torch.compile(model, backend=backend), model, TOKENS))
    (eager, first), (compiled, second) = found
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)  # sums, and functions of vectors, differ by CPU
    assert len(first) == 4
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, rtol=1e-5, atol=1e-4, msg=name)


@pytest.mark.parametrize("axis", [0, 1])
def test_codes_against_float64(axis: int) -> None:
    """``code = round(w / s)`` with ``s = max |w| / 7`` of the group, and the value is ``code · s``."""
    weight = torch.randn(5, 16) * torch.logspace(-3, 3, 16)
    weight[0, :8] = 0.0
    model = (lambda x, w: F.linear(x, w)) if axis == 0 else (lambda x, w: x @ w)
    w = nn.Parameter(weight if axis == 0 else weight.t().contiguous())
    gm = captured(model, X, w, passes=(INSERT,))
    node = next(n for n in gm.graph.nodes if n.target is fake_quantize.PER_CHANNEL)
    gm.graph.output_node().args = (([*node.args[:2], node],),)
    gm.recompile()
    groups, scale, quantized = gm(
        *(w if "w" in n.meta["source"] else X for n in gm.graph.nodes if n.op == "placeholder")
    )[0]
    rows = weight.reshape(-1, 8)
    assert torch.equal(groups, rows)
    exact = rows.double().abs().amax(1) / 7
    torch.testing.assert_close(scale.double(), exact.clamp(min=2.0**-60), rtol=1e-7, atol=0)
    code = torch.round(rows.double() / scale.double()[:, None])
    assert code.abs().max() == 7 and torch.equal(quantized, (code * scale.double()[:, None]).float())


def test_activations_are_quantized_beside_groups_too() -> None:
    model = Mlp(16).double()
    hand = copy.deepcopy(model)
    inputs = [oracle.Activation(), oracle.Activation()]
    x = X.double()
    wanted = F.linear(inputs[0](x), in_groups(hand.first.weight), hand.first.bias)
    wanted = F.linear(inputs[1](torch.relu(wanted)), in_groups(hand.second.weight), hand.second.bias)
    fxquant.prepare(model, (x,), recipe=W4A8)
    found = torch.compile(model, backend="fxquant_eager")(x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- cost


def test_groups_of_a_linear_weight_are_views_of_it() -> None:
    w = nn.Parameter(torch.randn(4, 16))
    gm = captured(lambda x, w: F.linear(x, w), X, w, passes=(INSERT,))
    before, after = (n for n in gm.graph.nodes if packet(n) is torch.ops.aten.reshape)
    seen: dict[fx.Node, Any] = {}

    class Noting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            seen[n] = super().run_node(n)
            return seen[n]

    Noting(gm).run(*(w if "w" in n.meta["source"] else X for n in gm.graph.nodes if n.op == "placeholder"))
    assert seen[before].data_ptr() == w.data_ptr() and after.args[0].target is fake_quantize.PER_CHANNEL
    assert seen[after].data_ptr() == seen[after.args[0]].data_ptr()


def kernels(recipe: Recipe) -> int:
    """Inductor's kernels of a forward and backward."""
    torch._dynamo.reset()
    metrics.reset()
    model = fxquant.prepare(Mlp(16), (X,), recipe=recipe, target="generic")
    with torch._inductor.config.patch(force_disable_caches=True):
        stepped(torch.compile(model, backend="fxquant"), model, X)
    return metrics.generated_kernel_count


def test_groups_take_no_more_kernels_than_channels() -> None:
    channels = Recipe(name="channels", activation=None, weight=CHANNELS)
    assert kernels(WEIGHT_ONLY) <= kernels(channels)


@pytest.mark.parametrize("transposed", [False, True])
def test_backward_keeps_the_scales_and_no_second_weight(transposed: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.w if transposed else F.linear(x, self.w)).square()

    def kept(model: nn.Module, backend: str) -> int:
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x, run = torch.randn(2, 64, requires_grad=True), torch.compile(model, backend=backend)
        run(x)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run(x)
        return sum(sizes.values())

    plain = kept(Net(), "inductor")
    model = fxquant.prepare(Net(), (torch.randn(2, 64),), recipe=WEIGHT_ONLY, target="generic")
    groups = 64 * 64 // 8
    assert kept(model, "fxquant") <= plain + groups * 2 * 4 + 1024  # scales, zero points


# ---------------------------------------------------------------- passes


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_is_not_folded_into_groups(training: bool) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8)).train(training)
    gm = captured(model, X, passes=(INSERT,))
    each = FoldTrainingBatchNorm() if training else FoldBatchNorm()
    result = untouched(each, gm)
    assert [d.reason for d in result.declines] == ["the weight before it has a scale per group: it is not folded into"]


def test_equal_quantizers_of_one_weight_become_one() -> None:
    w = nn.Parameter(torch.randn(16, 16))

    def model(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.linear(x, w), w)

    gm = captured(model, X, w, passes=(INSERT,))
    node = next(n for n in gm.graph.nodes if n.target is fake_quantize.PER_CHANNEL)
    chain = [*gm.graph.find_nodes(op="call_function", target=torch.ops.aten.reshape.default)]
    second = [n for n in gm.graph.nodes if packet(n) is torch.ops.aten.linear][1]
    twin = _repeated(gm, node, chain, second)
    assert sum(n.target is fake_quantize.PER_CHANNEL for n in gm.graph.nodes) == 2
    before = evaluate(gm, model, X, w)
    assert apply(EliminateRedundantFakeQuantize(), gm).rewrites == 1
    assert twin not in gm.graph.nodes and sum(n.target is fake_quantize.PER_CHANNEL for n in gm.graph.nodes) == 1
    assert torch.equal(evaluate(gm, model, X, w), before)


def _repeated(gm: fx.GraphModule, node: fx.Node, chain: list[fx.Node], reader: fx.Node) -> fx.Node:
    """The quantizer once more, with its reshapes, for one of its readers."""
    copies: dict[fx.Node, fx.Node] = {}
    wanted = [n for n in gm.graph.nodes if n.name in {c.name for c in (*chain, node)} or "qparams" in n.name]
    nodes = list(gm.graph.nodes)
    wanted = nodes[nodes.index(chain[0]) : nodes.index(chain[1]) + 1]
    with gm.graph.inserting_before(reader):
        for each in wanted:
            copies[each] = gm.graph.node_copy(each, lambda n: copies.get(n, n))
    reader.replace_input_with(chain[1], copies[chain[1]])
    gm.recompile()
    return copies[node]


def test_stateless_compile_places_groups_and_lowers_them() -> None:
    model, options = Mlp(32), {"recipe": "int4_weight_only"}
    found = torch.compile(model, backend="fxquant", options=options)(X.repeat(1, 2))
    first, second = model.first, model.second
    hidden = torch.relu(F.linear(X.repeat(1, 2), in_groups(first.weight, size=32), first.bias))
    torch.testing.assert_close(found, F.linear(hidden, in_groups(second.weight, size=32), second.bias))


# ---------------------------------------------------------------- prepare, rules, override


def specs(model: nn.Module) -> dict[str, str]:
    return {key: str(quantizer.spec) for key, quantizer in quantizers(model)}


def test_weight_only_places_weights_alone_and_says_so() -> None:
    recipe = Recipe(name="weight only", activation=None, weight=dataclasses.replace(GROUPS, group_size=4))
    model = fxquant.prepare(Mixer(torch.float32), (TOKENS,), recipe=recipe)
    assert specs(model) == {
        "table_embedding0_weight": "s4 axis 0 group 4",
        "up.weight": "s4 axis 0 group 4",
        "matmul0_rhs": "s4 axis 1 group 4",
    }
    said = fxquant.explain(model)
    assert {row.status for row in said.rows} == {"not yet run"}
    assert said.rows[1].reason == "weight of linear; recipe 'weight only' leaves activations in float"
    assert said.rows[1].kernels == ("float: MatMulNBits has no groups of 4",)
    torch.compile(model, backend="fxquant_eager")(TOKENS)
    assert not fxquant.explain(model).unbound


@pytest.mark.parametrize(
    ("target", "kernel"),
    [
        ("onnxruntime", "MatMulNBits"),
        ("openvino", "FullyConnected, i4 weight on float"),
        ("generic", "MatMul with a DQ weight"),
    ],
)
def test_expected_kernels_of_the_named_recipe(target: str, kernel: str) -> None:
    model = fxquant.prepare(Mlp(64), (torch.randn(2, 64),), recipe="int4_weight_only", target=target)
    assert [row.kernels for row in fxquant.explain(model).rows] == [(kernel,), (kernel,)]
    assert set(specs(model).values()) == {"s4 axis 0 group 32"}


def test_expected_kernel_beside_quantized_activations() -> None:
    model = fxquant.prepare(Mlp(16), (X,), recipe=W4A8)
    kernels = dict(zip(specs(model), (row.kernels for row in fxquant.explain(model).rows), strict=True))
    reason = "float: onnxruntime's integer products have no scales per group"
    assert kernels["first.weight"] == kernels["first.input"] == (reason,)


def test_calibration_of_a_weight_only_model_has_nothing_to_do() -> None:
    model = fxquant.prepare(Mlp(32), (torch.randn(2, 32),), recipe="int4_weight_only")
    assert fxquant.calibrate(model, [torch.randn(2, 32)], progress=False) is model


def test_a_rule_gives_groups_to_some_weights_of_int8() -> None:
    rules = [Rule(spec=GROUPS, path="second", operand="weight")]
    model = fxquant.prepare(Mlp(16), (X,), rules=rules)
    assert specs(model) == {
        "first.input": "u8",
        "first.weight": "s8 axis 0",
        "second.input": "u8",
        "second.weight": "s4 axis 0 group 8",
    }


def test_a_rule_gives_activations_to_a_weight_only_recipe() -> None:
    rules = [Rule(spec=QuantSpec(), path="second", operand="activation")]
    model = fxquant.prepare(Mlp(16), (X,), recipe=WEIGHT_ONLY, rules=rules)
    assert specs(model) == {
        "first.weight": "s4 axis 0 group 8",
        "second.input": "s8",
        "second.weight": "s4 axis 0 group 8",
    }


def test_a_net_without_matrices_is_refused_with_the_reason() -> None:
    said = (
        "groups of 32 run along the one axis of a matrix that a product sums over, and the weight of conv has another"
    )
    with pytest.raises(UnsupportedModel, match=f"found none to quantize .*{said}"):
        fxquant.prepare(nn.Conv2d(3, 4, 3), (torch.randn(1, 3, 8, 8),), recipe=INT4_WEIGHT_ONLY)


def test_plan_and_checkpoint_keep_groups() -> None:
    model = fxquant.prepare(Mlp(16), (X,), recipe=WEIGHT_ONLY)
    plan = plan_of(model)
    assert plan is not None and Plan.from_json(plan.to_json()) == plan
    assert [site.matrix for site in plan.sites] == [(0, 16), (0, 16)]
    other = fxquant.prepare(Mlp(16), (X,), recipe=Recipe(name="mine", activation=None, weight=CHANNELS))
    with pytest.raises(
        PlanMismatch, match=r"first\.weight: s4 axis 0 in the model, s4 axis 0 group 8 in the checkpoint"
    ):
        other.load_state_dict(model.state_dict())
    fields = json.loads(plan_of(other).to_json())  # type: ignore[union-attr]
    fields["version"] = 1
    for site in fields["sites"]:
        del site["matrix"], site["local"]["spec"]["group_size"]
    older = Plan.from_json(json.dumps(fields))
    assert not older.difference(plan_of(other)) and older.sites[0].matrix is None  # type: ignore[arg-type]


def test_override_gives_and_takes_groups() -> None:
    model = fxquant.prepare(Mixer(torch.float32), (TOKENS,), target="generic")
    fxquant.override(model, {"matmul0_rhs": GROUPS, "up.weight": GROUPS, "table*": GROUPS})
    assert {key: spec for key, spec in specs(model).items() if "group" in spec} == {
        "table_embedding0_weight": "s4 axis 0 group 8",
        "up.weight": "s4 axis 0 group 8",
        "matmul0_rhs": "s4 axis 1 group 8",
    }
    run = torch.compile(model, backend="fxquant_eager")
    run(TOKENS)
    fxquant.override(model, {"*_rhs": CHANNELS})
    assert specs(model)["matmul0_rhs"] == "s4 axis 1"
    run(TOKENS)


class ConvAndHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 12, 3), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("pattern", "spec", "message"),
    [
        ("conv.weight", GROUPS, "must not be per group for conv.weight: got groups of 8 for the weight of conv, and"),
        ("head.weight", GROUPS, "must have groups that divide the 12 values of a channel of head.weight: got 8."),
        (
            "head.weight",
            QuantSpec(bits=8, axis=0, group_size=4, range=CurrentTensor()),
            "must have 2 to 4 bits for target 'onnxruntime': got 8 for groups.",
        ),
    ],
)
def test_override_refuses(pattern: str, spec: QuantSpec, message: str) -> None:
    model = fxquant.prepare(ConvAndHead(), (torch.randn(2, 3, 8, 8),))
    before = specs(model)
    with pytest.raises(InvalidArgument, match=re.escape(f"changes['{pattern}'] {message}")):
        fxquant.override(model, {pattern: spec})
    assert specs(model) == before


# ---------------------------------------------------------------- measurements


def test_sensitivity_and_mixed_take_groups() -> None:
    model = fxquant.prepare(Mlp(16), (X,), recipe=W4A8)
    fxquant.calibrate(model, [X], progress=False)
    rows = {row.key: row for row in fxquant.sensitivity(model, [X], progress=False).rows}
    assert rows["first.weight"].alone > 0
    found = fxquant.report.mixed(model, [X], weight_bytes=0.75, progress=False)
    assert found.int8_bytes == 2 * 256 and found.weight_bytes == 128 + 256
    assert sorted(map(str, found.values())) == ["s4 axis 0 group 8", "s8 axis 0"]
    fxquant.override(model, found)
    torch.compile(model, backend="fxquant_eager")(X)
