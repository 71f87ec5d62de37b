"""Operators of plans written by hand: which sites they have, what is known to be float, what they are to become."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import fxquant
from fxquant.plan.plan import FloatPlace, Role
from fxquant.report.forecast import Operation, Place, absolute, expected_kernel, operations, place_of, why_float
from fxquant.spec.quant_spec import QuantSpec
from fxquant.targets.expected import FLOAT_PROBABILITIES
from tests.report.plans_by_hand import S8, U8, plan, site

FC: Place = ("fc", "linear", 0)

# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("owner", "path", "whole"),
    [("", "-", ""), ("", "a.b", "a.b"), ("a", "-", "a"), ("a.b", "c", "a.b.c")],
    ids=["the model", "a module of the model", "the owner itself", "a module of the owner"],
)
def test_an_edge_as_the_whole_model_names_it(owner: str, path: str, whole: str) -> None:
    one = site(owner, "activation", f"{path} linear 2 input")
    found = absolute(one, one.local.edges[0])
    assert (found.path, found.kind, found.ordinal, found.operand) == (whole, "linear", 2, "input")
    assert place_of(found) == (whole, "linear", 2)


# ---------------------------------------------------------------- why an operand is float


@pytest.mark.parametrize("where", ["a.b.weight", "a.b.linear0_weight", "a.b_linear0_weight", "a_b_linear0_weight"])
def test_a_site_may_have_been_any_owner_s(where: str) -> None:
    one = plan(declined=(FloatPlace(where=where, reason="left out by hand"),))
    assert why_float(one, ("a.b", "linear", 0), (), "weight") == "left out by hand"
    assert why_float(one, ("a.b", "linear", 0), (), "input") == ""
    assert why_float(one, ("a.c", "linear", 0), (), "weight") == ""


def test_the_second_call_of_a_module_has_no_short_name() -> None:
    one = plan(
        declined=(FloatPlace(where="a.weight", reason="first"), FloatPlace(where="a.linear1_weight", reason="second"))
    )
    assert why_float(one, ("a", "linear", 0), (), "weight") == "first"
    assert why_float(one, ("a", "linear", 1), (), "weight") == "second"


SAID = [
    FloatPlace(where="linear", reason="its weight: a rule", source="net.py:3"),
    FloatPlace(where="linear_1", reason="its weight: a rule", source="net.py:4"),
    FloatPlace(where="linear_2", reason="its weight: another rule", source="net.py:5"),
    FloatPlace(where="linear_2", reason="its input: too wide", source="net.py:5"),
    FloatPlace(where="add", reason="used in float", source="net.py:3"),
]


@pytest.mark.parametrize(
    ("sources", "operand", "expected"),
    [
        ({"net.py:3"}, "weight", "a rule"),
        ({"net.py:3", "net.py:4"}, "weight", "a rule"),
        ({"net.py:3", "net.py:5"}, "weight", ""),
        ({"net.py:5"}, "input", "too wide"),
        ({"net.py:3"}, "input", ""),
        ({"net.py:9"}, "weight", ""),
        (set(), "weight", ""),
    ],
    ids=["a line", "lines that agree", "lines that differ", "its operand", "another's", "another line", "no line"],
)
def test_what_was_said_of_the_user_s_line(sources: set[str], operand: str, expected: str) -> None:
    assert why_float(plan(declined=tuple(SAID)), FC, sources, operand) == expected


def test_a_key_is_surer_than_a_line() -> None:
    declined = (*SAID, FloatPlace(where="fc.weight", reason="its weight: by override"))
    assert why_float(plan(declined=declined), FC, {"net.py:3"}, "weight") == "by override"


# ---------------------------------------------------------------- operators of a plan


INPUT = site("fc", "activation", "- linear 0 input")
WEIGHT = site("fc", "weight", "- linear 0 weight", spec=S8)


def test_sites_meet_at_the_operators_that_they_serve() -> None:
    shared = site("", "activation", "a linear 0 input", "b linear 0 input", name="shared")
    found = operations(plan(shared, site("b", "weight", "- linear 0 weight", spec=S8)))
    assert list(found) == [("a", "linear", 0), ("b", "linear", 0)]
    assert found["a", "linear", 0].sites == {"input": shared}
    assert [(name, one.key) for name, one in found["b", "linear", 0].sites.items()] == [
        ("input", "shared"),
        ("weight", "b.weight"),
    ]


def test_without_a_graph_an_operand_is_float_where_the_plan_says_why() -> None:
    assert operations(plan(INPUT))[FC].why_float == {}, "its weight may serve another call too"
    declined = (FloatPlace(where="fc.weight", reason="a rule"),)
    assert operations(plan(INPUT, declined=declined))[FC].why_float == {"weight": "a rule"}
    assert operations(plan(WEIGHT))[FC].why_float == {"input": ""}, "no activation has a site"


def test_a_graph_says_what_serves_an_operand_and_what_is_float() -> None:
    other = site("relu", "output", "- conv 0 output", name="output")
    served = {FC: {"input": "relu.output"}}
    found = operations(plan(other, WEIGHT), {FC: True}, served)[FC]
    assert found.sites == {"weight": WEIGHT, "input": other}
    assert (found.why_float, found.result) == ({}, True)
    bare = operations(plan(WEIGHT), {FC: False}, {})[FC]
    assert bare.why_float == {"input": "", "output": ""} and bare.result is False


def test_a_result_without_a_graph_is_float_where_the_plan_says_so() -> None:
    declined = (FloatPlace(where="fc.output", reason="a rule"),)
    assert operations(plan(INPUT, WEIGHT, declined=declined))[FC].why_float == {"output": "a rule"}
    assert operations(plan(INPUT, WEIGHT, declined=declined), {FC: True}, {})[FC].why_float == {}


# ---------------------------------------------------------------- kernels


def grouped(bits: int, size: int) -> QuantSpec:
    return QuantSpec(bits=bits, narrow=True, axis=0, group_size=size, range=fxquant.CurrentTensor())


def wide(bits: int) -> QuantSpec:
    return QuantSpec(bits=bits, signed=False, symmetric=False)


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operator: the formats of its operands, which are float and why, and what is expected of it."""

    kind: str
    specs: dict[str, QuantSpec]
    expected: str
    target: str = "onnxruntime"
    why_float: dict[str, str] | None = None
    result: bool | None = None
    operand: str = ""

    def kernel(self) -> str:
        roles: dict[str, Role] = {"weight": "weight", "rhs": "weight", "output": "output"}
        sites = {
            name: site("m", roles.get(name, "activation"), f"- {self.kind} 0 {name}", spec=spec)
            for name, spec in self.specs.items()
        }
        place = ("m", self.kind, 0)
        operation = Operation(place=place, sites=sites, result=self.result, why_float=self.why_float or {})
        return expected_kernel(operation, self.operand or next(iter(self.specs)), self.target)


BOTH = {"input": U8, "weight": S8}
ATTENTION = {"query": U8, "key": U8, "value": U8}
CASES = {
    "a product": Case(kind="linear", specs=BOTH, expected="MatMulIntegerToFloat"),
    "a product into codes": Case(kind="linear", specs=BOTH, result=True, expected="QLinearMatMul"),
    "a product into float": Case(kind="linear", specs=BOTH, result=False, expected="MatMulIntegerToFloat"),
    "a convolution": Case(kind="conv", specs=BOTH, expected="QLinearConv"),
    "a convolution whose readers decide": Case(
        kind="conv",
        specs=BOTH,
        why_float={"output": "a rule"},
        expected="QLinearConv if all that reads its output is quantized",
    ),
    "a convolution into float, and why": Case(
        kind="conv",
        specs=BOTH,
        why_float={"output": "a rule"},
        result=False,
        expected="float: its output is not quantized (a rule)",
    ),
    "a convolution into float": Case(
        kind="conv", specs=BOTH, why_float={"output": ""}, result=False, expected="float: its output is not quantized"
    ),
    "a product needs no result": Case(
        kind="linear", specs=BOTH, why_float={"output": "a rule"}, result=False, expected="MatMulIntegerToFloat"
    ),
    "codes too wide": Case(
        kind="linear", specs={"input": wide(9), "weight": S8}, expected="float: its input has 9-bit codes"
    ),
    "the widest codes": Case(kind="linear", specs={"input": wide(8), "weight": S8}, expected="MatMulIntegerToFloat"),
    "a wide result that is not needed": Case(
        kind="linear", specs={**BOTH, "output": wide(16)}, expected="MatMulIntegerToFloat"
    ),
    "a wide result that is needed": Case(
        kind="conv", specs={**BOTH, "output": wide(16)}, expected="float: its output has 16-bit codes"
    ),
    "an operator that never is": Case(
        kind="einsum", specs={"operand0": U8}, expected="float: onnxruntime has no integer Einsum"
    ),
    "an operator nobody looked at": Case(kind="made_up", specs={"input": U8}, expected="not known"),
    "an operator that is quantized no more": Case(
        kind="conv_transpose",
        specs=BOTH,
        target="tensorrt",
        expected="float: TensorRT has no integer transposed convolution",
    ),
    "query": Case(
        kind="sdpa", specs=ATTENTION, why_float={"value": "a rule"}, expected="MatMulIntegerToFloat (query·key)"
    ),
    "value": Case(kind="sdpa", specs=ATTENTION, operand="value", expected=f"float: {FLOAT_PROBABILITIES}"),
    "query without key": Case(
        kind="sdpa", specs={"query": U8}, why_float={"key": ""}, expected="float: its key is not quantized"
    ),
    "unsigned codes": Case(kind="linear", specs=BOTH, target="openvino", expected="FullyConnected u8"),
    "signed codes": Case(
        kind="conv", specs={"weight": S8, "input": QuantSpec(bits=6)}, target="openvino", expected="Convolution i6"
    ),
    "no activation at all": Case(kind="conv", specs={"weight": S8}, target="openvino", expected="Convolution i8"),
}
ALONE = {
    "channels": (S8, {"onnxruntime": "MatMulNBits", "openvino": "FullyConnected, i8 weight on float"}),
    "four bits by channel": (
        QuantSpec(bits=4, narrow=True, axis=0, range=fxquant.CurrentTensor()),
        {"openvino": "FullyConnected, i8 weight on float", "tensorrt": "float: its input is not quantized"},
    ),
    "groups of four bits": (
        grouped(4, 32),
        {
            "onnxruntime": "MatMulNBits",
            "openvino": "FullyConnected, i4 weight on float",
            "tensorrt": "MatrixMultiply with an int4 weight",
        },
    ),
    "groups of five bits": (grouped(5, 32), {"openvino": "FullyConnected, i8 weight on float"}),
    "groups of a strange size": (grouped(4, 48), {"onnxruntime": "float: MatMulNBits has no groups of 48"}),
}
BESIDE = {
    "onnxruntime": "float: onnxruntime's integer products have no scales per group",
    "openvino": "FullyConnected, i4 weight on float",
    "tensorrt": "float: TensorRT multiplies an int4 weight by float activations",
}


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_of_an_operator(case: str) -> None:
    assert CASES[case].kernel() == CASES[case].expected


@pytest.mark.parametrize("kind", ["linear", "matmul"])
@pytest.mark.parametrize("case", ALONE)
def test_a_weight_alone(case: str, kind: str) -> None:
    spec, expected = ALONE[case]
    activation, weight = ("input", "weight") if kind == "linear" else ("lhs", "rhs")
    for target, kernel in expected.items():
        one = Case(kind=kind, specs={weight: spec}, why_float={activation: ""}, target=target, expected=kernel)
        assert one.kernel() == kernel.replace("its input", f"its {activation}"), target


@pytest.mark.parametrize("target", BESIDE)
def test_a_weight_in_groups_beside_codes(target: str) -> None:
    one = Case(kind="linear", specs={"weight": grouped(4, 32), "input": U8}, target=target, expected=BESIDE[target])
    assert one.kernel() == BESIDE[target]
