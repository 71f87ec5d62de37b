"""explain's coverage: FLOPs against counts by hand, what is quantized, and why the rest is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.report.coverage import Coverage
from fxquant.report.products import Product
from tests.report.nets import IMAGE, MAPS, Repeated, Residual


class Net(nn.Module):
    """Layers by name, and a forward that uses them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def covered(model: nn.Module, *args: Tensor, **options: Any) -> Coverage:
    found = fxquant.explain(fxquant.prepare(model, args, **options), args).coverage
    assert found is not None
    return found


def work(found: Coverage) -> list[tuple[str, int, bool]]:
    return [(one.kind, one.flops, one.quantized) for one in found.products]


# ---------------------------------------------------------------- counts by hand


def test_a_convolution_and_a_linear_layer() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 5))
    found = covered(net, IMAGE)  # 2×3×8×8
    conv, linear = 2 * (2 * 4 * 64) * (3 * 9), 2 * (2 * 5) * 256
    assert work(found) == [("conv", conv, True), ("linear", linear, True)]
    assert (found.flops, found.quantized, found.share, found.attention) == (conv + linear, conv + linear, 1.0, 0)
    assert [(one.module, one.reason) for one in found.products] == [("0", ""), ("3", "")]
    assert found.unseen == () and found.most_float() == []


def test_a_block_that_owns_a_site_of_a_layer_in_it() -> None:
    """Its frame is marked around the forward that it has for its own sites."""
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), Residual())
    found = covered(net, IMAGE)
    assert [(one.module, one.quantized) for one in found.products] == [
        (name, True) for name in ("0", "2.stem", "2.body", "2.mix", "2.head")
    ]
    assert hasattr(net[2], "quantizers") and not hasattr(net, "quantizers")


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5), 2 * (2 * 6 * 25) * (2 * 9)),
    "strided": (lambda: nn.Conv1d(2, 3, 3, stride=2), (1, 2, 9), 2 * (3 * 4) * (2 * 3)),
    "dilated 3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2), (1, 2, 4, 4, 4), 2 * (3 * 8) * (2 * 8)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 2, stride=2), (2, 4, 5, 5), 2 * (2 * 4 * 25) * (3 * 4)),
    "grouped transposed": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 5), 2 * (2 * 4 * 5) * (3 * 3)),
    "linear of tokens": (lambda: nn.Linear(7, 3), (2, 5, 7), 2 * (2 * 5) * (7 * 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_single_operators(name: str) -> None:
    make, shape, flops = CASES[name]
    found = covered(nn.Sequential(make()), torch.randn(shape), target="generic")
    assert found.flops == found.quantized == flops and len(found.products) == 1


class Matrices(nn.Module):
    """Products without a weight, in every spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.pair = nn.Bilinear(4, 4, 3)

    def forward(self, x: Tensor) -> list[Tensor]:  # of 2×3×4
        x = self.head(x)
        row = x[0, 0]
        return [
            *(x @ x.transpose(1, 2), torch.bmm(x, x.transpose(1, 2)), torch.einsum("bij,bkj->bik", x, x)),
            *(x[0] @ row, torch.mv(x[0], row), torch.dot(row, row), x @ row),
            *(torch.addmv(x[0, :, 0], x[0], row), torch.addbmm(x[0, :, :3], x, x.transpose(1, 2))),
            *(torch.addmm(x[0, :, :3], x[0], x[0].t()), self.pair(x[0], x[1])),
        ]


def test_matrix_products() -> None:
    found = covered(Matrices(), torch.randn(2, 3, 4))
    counts = [one.flops for one in found.products]
    pair = 2 * 3 * 3 * (4 * 4 + 4)  # three rows, three outputs: xᵀW, then times y
    assert counts == [2 * 24 * 4, *3 * [2 * 2 * 3 * 3 * 4], 24, 24, 8, 48, 24, 144, 72, pair]
    left = next(one for one in found.products if one.kind == "addbmm")
    assert left.reason == "placement does not know addbmm"


def test_sizes_that_are_symbolic_count_as_the_example_has_them() -> None:
    x = torch.randn(6, 4)
    torch._dynamo.mark_dynamic(x, 0)
    found = covered(nn.Sequential(nn.Linear(4, 5)), x)
    assert found.flops == found.quantized == 2 * 6 * 4 * 5 and isinstance(found.flops, int)


def test_the_model_stays_as_it_was() -> None:
    model = fxquant.prepare(Residual(), (IMAGE,))
    before = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    forwards = [module.forward for module in model.modules()]
    fxquant.explain(model, (IMAGE,))
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) or value.isnan().all() for key, value in before.items())
    assert [module.forward for module in model.modules()] == forwards


# ---------------------------------------------------------------- attention


def by_sdpa(self: Any, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(self.q(x), x, x[..., :4])


def by_hand(self: Any, x: Tensor) -> Tensor:
    scores = self.q(x) @ x.transpose(-1, -2) / 8**0.5
    return F.dropout(scores.softmax(-1), 0.1) @ x[..., :4]


LINEAR, SCORES, VALUES = 2 * 2 * 5 * 64, 2 * 2 * 25 * 8, 2 * 2 * 25 * 4


def test_attention_as_one_operator() -> None:
    found = covered(Net(by_sdpa, q=nn.Linear(8, 8)), torch.randn(2, 5, 8))
    assert work(found) == [("linear", LINEAR, True), ("sdpa", SCORES, True), ("sdpa", VALUES, False)]
    assert found.flops == found.quantized == LINEAR + SCORES
    assert (found.attention, found.attention_quantized, found.most_float()) == (VALUES, 0, [])
    assert found.products[-1].reason == "its probabilities stay inside the operator, in float"
    assert found.summary == (
        "100 % of 2.08 kFLOP in convolutions and matrix products on quantized operands; attention's second product "
        "(400 FLOP) in\nfloat."
    )


def test_attention_by_hand() -> None:
    found = covered(Net(by_hand, q=nn.Linear(8, 8)), torch.randn(2, 5, 8))
    assert work(found) == [("linear", LINEAR, True), ("matmul", SCORES, True), ("matmul", VALUES, True)]
    assert [one.second for one in found.products] == [False, False, True]
    assert (found.attention, found.attention_quantized) == (VALUES, VALUES)
    assert "attention's second product (400 FLOP)" in found.summary.replace("\n", " ")
    assert found.summary.endswith("quantized too.")


def test_attention_of_grouped_queries() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        query, key = self.q(x).view(1, 6, 4, 2).transpose(1, 2), self.k(x).view(1, 6, 2, 2).transpose(1, 2)
        return F.scaled_dot_product_attention(query, key, key, enable_gqa=True)

    found = covered(Net(run, q=nn.Linear(8, 8), k=nn.Linear(8, 4)), torch.randn(1, 6, 8))
    assert [one.flops for one in found.products][2:] == [2 * 4 * 36 * 2] * 2  # four heads of queries


def test_a_classifier_after_a_softmax_is_no_attention() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.b(self.a(x).softmax(-1))

    found = covered(Net(run, a=nn.Linear(4, 4), b=nn.Linear(4, 2)), torch.randn(3, 4))
    assert [one.second for one in found.products] == [False, False] and found.share == 1.0


def test_flex_attention_is_float_and_counted() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    def run(self: Any, x: Tensor) -> Tensor:
        return self.head(flex_attention(x, x, x))

    model = Net(run, head=nn.Linear(16, 4)).requires_grad_(False)  # its backward wants a GPU
    found = covered(model, torch.randn(1, 2, 128, 16))
    product = 2 * 2 * 128 * 128 * 16
    assert work(found)[:2] == [("flex_attention", product, False)] * 2
    assert found.products[0].reason == "placement does not know flex_attention" and found.attention == product


# ---------------------------------------------------------------- why not


def reasons(found: Coverage) -> dict[str, str]:
    return {one.module: one.reason for one in found.products if not one.quantized}


def test_what_the_target_refuses() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 3, 2, stride=2))
    found = covered(net, IMAGE)
    assert reasons(found) == {"1": "onnxruntime has no integer ConvTranspose kernel"}
    assert found.quantized == 2 * (2 * 4 * 64) * 27 and found.flops - found.quantized == 2 * (2 * 4 * 64) * 12
    assert str(found).splitlines()[-1].split("  ")[0] == "conv_transpose"


def test_rules_recipes_and_overrides() -> None:
    rules = [fxquant.skip("stem"), fxquant.skip("mix", operand="weight")]
    found = covered(Residual(), IMAGE, rules=rules)
    assert reasons(found) == {"stem": str(rules[0]), "mix": f"its weight: {rules[1]}"}
    recipe = fxquant.Recipe(name="heads", kinds=frozenset({"linear"}))
    left = reasons(covered(Residual(), IMAGE, recipe=recipe))
    assert set(left.values()) == {"recipe 'heads' leaves conv out"} and set(left) == {"stem", "body", "mix"}
    model = fxquant.override(fxquant.prepare(Residual(), (IMAGE,)), {"head.*": None})
    found = fxquant.explain(model, (IMAGE,)).coverage
    assert found is not None and reasons(found) == {"head": "left in float by override('head.*')"}


def test_the_five_largest_come_first() -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) if i % 2 else nn.Linear(4, 4, bias=False) for i in range(3)))
    wide = nn.Sequential(net, nn.Linear(4, 9), *(nn.Linear(9, 9) for _ in range(4)), nn.Linear(9, 1))
    found = covered(wide, torch.randn(2, 4), rules=[fxquant.skip("[1-6]")])
    assert [one.module for one in found.most_float()] == ["2", "3", "4", "5", "1"]
    assert found.share == pytest.approx(3 * 64 / (3 * 64 + 2 * 2 * (36 + 4 * 81 + 9)))


# ---------------------------------------------------------------- what is nested, repeated or unseen


def test_graphs_count_once_for_each_run() -> None:
    model = Repeated()
    found = covered(model, MAPS)
    assert [one.module for one in found.products] == ["conv", "conv", "extra", "head"]

    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = torch.tanh(self.a(x))
                torch._dynamo.graph_break()
            return x

    assert covered(Looped(), torch.randn(2, 4)).flops == 3 * 2 * 2 * 16


def test_branches_and_checkpointed_bodies() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        x = torch.utils.checkpoint.checkpoint(lambda x: torch.tanh(self.a(x)), x, use_reentrant=False)
        return torch.cond(x.sum() > 0, lambda x: self.b(x), lambda x: self.b(torch.relu(x)), (x,))

    found = covered(Net(run, a=nn.Linear(4, 4), b=nn.Linear(4, 6)), torch.randn(3, 4))
    assert [(one.module, one.flops) for one in found.products] == [("a", 96), ("b", 144), ("b", 144)]
    assert found.products[0].quantized
    assert all(one.quantized or "body of cond" in one.reason for one in found.products)


def test_a_scan_runs_its_body_as_often_as_its_input_is_long() -> None:
    from torch._higher_order_ops.scan import scan

    class Scanned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            def step(carry: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
                carry = torch.tanh(carry @ self.w + y)
                return carry, carry + 0

            return scan(step, torch.zeros(2, 4), self.a(x), dim=0)[1]

    found = covered(Scanned(), torch.randn(5, 2, 4))
    assert [one.flops for one in found.products] == [2 * 10 * 16, 5 * 2 * 2 * 16]


def test_modules_outside_every_graph_are_named() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])

    found = covered(Net(run, rnn=nn.LSTM(4, 4, batch_first=True), head=nn.Linear(4, 4)), torch.randn(2, 3, 4))
    if found.unseen:  # Dynamo leaves recurrent layers in Python where it is not told otherwise
        assert found.unseen == ("rnn",)
        assert found.summary.endswith("\nNot counted, since no graph shows its work: rnn.")
    assert [one for one in found.products if one.module == "head"] and found.flops >= 2 * 6 * 16


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x @ x.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad @ grad


def test_a_custom_function_is_named() -> None:
    found = covered(Net(lambda self, x: self.a(Double.apply(x)), a=nn.Linear(4, 4)), torch.randn(4, 4).requires_grad_())
    assert found.unseen == ("an autograd.Function in the model",)


def test_it_is_there_only_with_inputs_and_serializes() -> None:
    model = fxquant.prepare(Residual(), (IMAGE,))
    bare = fxquant.explain(model)
    assert bare.coverage is None and bare.to_dict()["coverage"] is None and "FLOP" not in str(bare)
    found = fxquant.explain(model, (IMAGE,))
    assert found.coverage is not None and found.coverage.summary in str(found)
    plain = json.loads(json.dumps(found.to_dict()["coverage"]))
    assert plain["flops"] == found.coverage.flops and plain["share"] == found.coverage.share == 1.0
    assert [Product(**one) for one in plain["products"]] == list(found.coverage.products)
    assert max(map(len, str(found).splitlines())) <= 120


def product(flops: int, quantized: bool) -> Product:
    return Product(
        name="x", kind="conv", module="", source="", flops=flops, quantized=quantized, second=False, reason=""
    )


@pytest.mark.parametrize(
    ("quantized", "left", "words"),
    [
        (10**9, 0, "100 % of 1 GFLOP"),
        (10**9, 1, "99.9 % of 1 GFLOP"),
        (1, 10**9, "0.1 % of 1 GFLOP"),
        (0, 12_300, "0 % of 12.3 kFLOP"),
        (987, 13, "98.7 % of 1 kFLOP"),
        (3, 1, "75.0 % of 4 FLOP"),
    ],
)
def test_percentages_do_not_round_to_all_or_nothing(quantized: int, left: int, words: str) -> None:
    found = Coverage(products=tuple(product(n, q) for n, q in ((quantized, True), (left, False)) if n))
    assert found.summary.startswith(words)
    assert Coverage(products=()).summary == "no convolutions or matrix products seen."
