"""Rules: what they match, which decides, what they do to a plan, and what is said of those that matched nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import CurrentTensor, QuantSpec, Recipe, Rule, first_layer, last_layer, skip
from fxquant.errors import InvalidArgument
from fxquant.plan.plan import Plan
from fxquant.prepared.root import plan_of
from fxquant.spec.recipes import RECIPES
from fxquant.spec.rules import Where, some

W4 = QuantSpec(bits=4, narrow=True, axis=0, range=CurrentTensor())
A16 = QuantSpec(bits=16, signed=False, symmetric=False)
X = torch.randn(2, 1, 12, 12)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.scale = nn.Parameter(torch.ones(4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(torch.relu(self.stem(x))).mean((2, 3))
        return self.head(x @ self.scale)


def plan(*rules: Rule, recipe: str | Recipe = "int8") -> Plan:
    found = plan_of(fxquant.prepare(Net(), (X,), rules=rules, recipe=recipe))
    assert found is not None
    return found


def formats(found: Plan) -> dict[str, str]:
    return {site.key: str(site.local.spec) for site in found.sites}


PLAIN = formats(plan())
WHERE = Where(
    modules=(("", None), ("encoder", nn.TransformerEncoder), ("encoder.layers.0", nn.TransformerEncoderLayer)),
    kind="linear",
    operand="weight",
    weighted=True,
    position=frozenset({"first"}),
)


@pytest.mark.parametrize(
    ("given", "matches"),
    [
        ({"path": "encoder"}, True),
        ({"path": "encoder.layers.0"}, True),
        ({"path": "encoder.layers.?"}, True),
        ({"path": "*.0"}, True),
        ({"path": "*"}, True),
        ({"path": "encode"}, False),
        ({"path": "layers.0"}, False),
        ({"path": ""}, False),
        ({"module": nn.TransformerEncoderLayer}, True),
        ({"module": "TransformerEncoder"}, True),
        ({"module": nn.Module}, True),
        ({"module": nn.Linear}, False),
        ({"path": "encoder", "module": nn.TransformerEncoder}, True),
        ({"path": "encoder", "module": nn.TransformerEncoderLayer}, False),
        ({"kind": "linear"}, True),
        ({"kind": "conv"}, False),
        ({"operand": "weight"}, True),
        ({"operand": "input"}, False),
        ({"operand": "activation"}, False),
        ({"weighted": True}, True),
        ({"weighted": False}, False),
        ({"weighted": True, "kind": "conv"}, False),
        ({"position": "first"}, True),
        ({"position": "last"}, False),
        ({"path": "encoder", "kind": "conv"}, False),
    ],
    ids=str,
)
def test_matching(given: dict[str, Any], matches: bool) -> None:
    assert Rule(spec=None, **given).matches(WHERE) is matches


def test_the_empty_path_is_the_models_own_forward() -> None:
    own = Where(modules=(("", None),), kind="matmul", operand="lhs")
    assert skip("").matches(own) and skip("*").matches(own)
    without = formats(plan(skip("")))
    assert without == {key: spec for key, spec in PLAIN.items() if "matmul" not in key}


def test_skip_leaves_operators_and_their_results_float() -> None:
    found = plan(skip("layer1"))
    rest = {key: spec for key, spec in PLAIN.items() if not key.startswith("layer1")}
    assert formats(found) == {**rest, "stem.output": "u8"}  # which was layer1's input
    reasons = [d.reason for d in found.declined if "Rule" in d.reason]
    assert reasons == ["Rule(path='layer1', spec=None)"] * 2


def test_formats_of_operands() -> None:
    found = plan(Rule(path="layer1", operand="weight", spec=W4), Rule(path="head", operand="activation", spec=A16))
    changed = {key: spec for key, spec in formats(found).items() if PLAIN[key] != spec}
    assert changed == {"layer1.0.weight": "s4 axis 0", "layer1.2.weight": "s4 axis 0", "head.input": "u16"}
    (reason,) = {site.reason for site in found.sites if site.key == "layer1.0.weight"}
    assert reason == "weight of conv2d_1; format by Rule(path='layer1', operand='weight', spec=s4 axis 0)"


def test_the_first_that_matches_decides() -> None:
    rules = (Rule(path="layer1.0", operand="weight", spec=W4), skip(path="layer1", operand="weight"))
    assert {"layer1.0.weight", "layer1.2.weight"} & formats(plan(*rules)).keys() == {"layer1.0.weight"}


def test_first_and_last_layer() -> None:
    first = formats(plan(first_layer()))
    assert PLAIN.keys() - first.keys() == {"stem.input", "stem.weight"}
    last = formats(plan(last_layer(W4, operand="weight")))
    assert {key for key in PLAIN if last[key] != PLAIN[key]} == {"head.weight"}


def test_one_tensor_read_in_two_formats_has_two_quantizers() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    x = torch.randn(2, 4)
    together, apart = (
        plan_of(fxquant.prepare(Twice(), (x,), rules=rules))
        for rules in ([], [Rule(path="b", operand="input", spec=A16)])
    )
    assert [len([s for s in p.sites if s.local.role == "activation"]) for p in (together, apart)] == [1, 2]


def test_rules_of_a_recipe_come_after_those_of_the_call() -> None:
    recipe = Recipe(name="mine", rules=(skip("layer1"), skip("head")))
    kept = formats(plan(Rule(path="layer1", operand="weight", spec=W4), recipe=recipe))
    assert "layer1.0.weight" in kept and "layer1.0.input" not in kept and "head.weight" not in kept


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([skip("haed")], r"rules must each match an operand: got none for Rule\(path='haed', spec=None\)\. .*: head\."),
        ([skip(module=nn.LSTM)], r"got none for Rule\(module=LSTM, spec=None\)\. Mark it optional=True"),
        ([skip("xyzzy")], r"Modules with operators: stem, layer1, layer1\.\*, head\. Mark it optional=True"),
        ([skip(kind="lin")], r"got none for Rule\(kind='lin', spec=None\)\. Kinds: linear\. Mark it"),
        ([skip(kind="xyzzy")], r"Kinds: conv, matmul, linear\. Mark it"),
        ([skip(operand="weights")], r"Operands: weight\. Mark it"),
        (skip("head"), r"rules must be a list: got Rule\(path='head', spec=None\)\. Write rules=\[…\] around it"),
        ([skip("head"), skip("head")], None),
        ([skip("head"), skip("head", kind="linear")], r"got none for Rule\(path='head', kind='linear', spec=None\)"),
        (["head"], r"rules must be fxquant\.Rule objects: got 'head'\. Write fxquant\.skip\('path'\)"),
        ([Rule(path="head", operand="weight", spec=QuantSpec())], r"range must be CurrentTensor"),
        ([Rule(path="head", operand="input", spec=W4)], r"axis must be None: got 0"),
    ],
)
def test_errors(rules: Any, message: str | None) -> None:
    model = Net()
    if message is None:
        fxquant.prepare(model, (X,), rules=rules)
        return
    with pytest.raises(InvalidArgument, match=message):
        fxquant.prepare(model, (X,), rules=rules)
    assert plan_of(model) is None and not any("quantizers" in name for name, _ in model.named_modules())


def test_many_names_are_shortened() -> None:
    numbered = [f"blocks.{n}.attn" for n in range(12)]
    assert some(["embed", *numbered, "head"]) == "embed, blocks.*.attn, head"
    assert some(map(str, "abcdefghijklmn")) == "a, b, c, d, e, f, g, h, i, j, k, l and 2 more"


def test_an_optional_rule_may_match_nothing() -> None:
    assert formats(plan(skip("nowhere", optional=True))) == PLAIN


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"spec": None}, "Rule must say what it matches"),
        ({"spec": W4, "path": "head"}, "Rule.operand must say what gets the spec"),
        ({"spec": "int4", "path": "head"}, "Rule.spec must be a QuantSpec, or None for float: got 'int4'"),
        ({"spec": None, "path": nn.Conv2d}, r"Rule.path must be a str: got <class .*>. For a class write module=…"),
        ({"spec": None, "position": "middle"}, "Rule.position must be 'first' or 'last': got 'middle'"),
    ],
)
def test_what_a_rule_must_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Rule(**given)


def test_a_model_that_was_not_prepared_follows_the_rules_of_its_recipe() -> None:
    torch._dynamo.reset()
    model = Net()
    recipe = Recipe(name="mine", rules=(skip("layer1"), skip("nowhere")))
    torch.compile(model, backend="fxquant_eager", options={"recipe": recipe})(X)
    report = fxquant.backend.compile_reports()[-1]
    assert report.quantized == len(formats(plan(skip("layer1"))))
    assert "Rule(path='nowhere', spec=None) matches nothing in this graph" in [d.reason for d in report.declines]


def test_the_parameter_of_a_matrix_product_is_a_weight_to_rules():
    """Which the rule for activations took for one, and refused as a weight's format."""
    for operand, spec in (("activation", A16), ("weight", W4)):
        found = formats(plan(Rule(kind="matmul", operand=operand, spec=spec), recipe="int8"))
        changed = {"matmul0_lhs": "u16"} if operand == "activation" else {"matmul0_rhs": "s4 axis 1"}
        assert found == PLAIN | changed


class Attends(nn.Module):
    """A layer, a product with a parameter, and attention's two of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.last = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return (torch.softmax(y @ y.mT, -1) @ y) @ self.last


@pytest.mark.parametrize(("recipe", "layers"), [("w4a4", "u4 lsq"), ("w4a4_dynamic", "u4 token")])
def test_attention_has_8_bits_beside_4_bit_layers(recipe: str, layers: str) -> None:
    """A product with a parameter is a layer, whatever operator it is written with."""
    found = formats(plan_of(fxquant.prepare(Attends(), (torch.randn(2, 5, 8),), recipe=recipe, target="generic")))
    attention = {"matmul0_lhs", "matmul0_rhs", "matmul1_lhs", "matmul1_rhs"}
    assert {key for key, spec in found.items() if spec == "u8 lsq"} == attention & found.keys() != set()
    assert found["up.input"] == found["matmul2_lhs"] == layers


@pytest.mark.parametrize(("target", "found"), [("onnxruntime", "u8 lsq"), ("openvino", "s8 lsq, u8 lsq")])
def test_attention_has_the_zero_points_that_a_target_needs(target: str, found: str) -> None:
    """A rule for any model is fitted to the target as a recipe's format is, where probabilities are positive anyway.

    One that is for this model says that it does not fit.
    """
    args = (torch.randn(2, 5, 8),)
    held = formats(plan_of(fxquant.prepare(Attends(), args, recipe="w4a4", target=target)))
    assert ", ".join(sorted({spec for spec in held.values() if spec.endswith("8 lsq")})) == found
    own = Rule(kind="matmul", weighted=False, operand="activation", spec=RECIPES["w2a8"].activation)
    if target == "openvino":
        with pytest.raises(InvalidArgument, match="must have signed and symmetric codes for target 'openvino': got u8"):
            fxquant.prepare(Attends(), args, recipe="w4a4", target=target, rules=[own])


def test_products_of_activations_alone_are_left_in_float() -> None:
    args = (torch.randn(2, 5, 8),)
    found = formats(plan_of(fxquant.prepare(Attends(), args, target="generic", rules=[skip(weighted=False)])))
    assert {"up.input", "up.weight", "matmul2_lhs", "matmul2_rhs"} == found.keys()


class Reader(nn.Module):
    """A table and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(5, 32), nn.Linear(32, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.up(self.embed(tokens))
        return out


@pytest.mark.parametrize(
    ("recipe", "table", "product"),
    [
        ("w4a8", "s8", "s4 axis 0"),
        ("w4a4", "s8", "s4 axis 0 lsq"),
        ("w2a8", "s8", "s2 axis 0 lsq"),
        ("nvfp4", "e4m3", "e2m1 axis 0 group 16 scale e4m3"),
        ("w4a16_nvfp4", "e2m1 axis 0 group 16 scale e4m3", "e2m1 axis 0 group 16 scale e4m3"),
    ],
)
def test_tables_of_recipes_of_few_bits(recipe, table, product):
    found = plan_of(fxquant.prepare(Reader(), (torch.zeros(2, 3, dtype=torch.int64),), recipe=recipe, target="generic"))
    held = formats(found)
    assert (held["embed.weight"], held["up.weight"]) == (table, product)
    own = Rule(kind="embedding", operand="weight", spec=None)
    model = fxquant.prepare(
        Reader(), (torch.zeros(2, 3, dtype=torch.int64),), recipe=recipe, target="generic", rules=[own]
    )
    assert "embed.weight" not in formats(plan_of(model))
