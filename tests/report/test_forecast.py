"""The forecast of runtime kernels, held to what onnxruntime makes of the exported file, and to the profiles."""

from __future__ import annotations

import collections
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.report.forecast import UNKNOWN
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import MovingAverage
from fxquant.targets.expected import FLOAT
from fxquant.targets.registry import TARGETS
from fxquant.targets.session import session
from tests.report.nets import FLAT, IMAGE, MAPS, TOKENS, Forked, Products, Repeated, Residual

WIDE = QuantSpec(bits=16, signed=False, symmetric=False, range=MovingAverage())


def kernels(model: nn.Module, *inputs: Tensor) -> dict[str, str]:
    """Operand → forecast."""
    rows = fxquant.explain(model, inputs or None).rows
    return {operand: kernel for row in rows for operand, kernel in zip(row.operators, row.kernels, strict=True)}


@pytest.mark.parametrize(("net", "x"), [(Residual, IMAGE), (Products, TOKENS)], ids=["convolutions", "products"])
def test_onnxruntime_makes_of_the_file_what_is_expected(net: type[nn.Module], x: Tensor, tmp_path: Path) -> None:
    model = fxquant.calibrate(fxquant.prepare(net(), (x,)), [x], progress=False)
    found = kernels(model, x)
    by_operator = {operand.rpartition(".")[0]: kernel for operand, kernel in found.items() if FLOAT not in kernel}
    expected = collections.Counter(kernel.split(" (")[0] for kernel in by_operator.values())
    fxquant.export_onnx(model, (x,), str(tmp_path / "m.onnx"))
    target = tmp_path / "optimized.onnx"
    session((tmp_path / "m.onnx").read_bytes(), optimize=True, optimized_path=target)
    ran = collections.Counter(node.op_type for node in onnx.load(str(target)).graph.node)
    assert {op: ran[op] for op in expected} == expected
    assert not {op for op in ran if op.startswith(("QLinear", "MatMulInteger", "QGemm"))} - expected.keys()


@pytest.mark.parametrize("target", TARGETS)
def test_every_kind_of_a_profile_has_a_forecast(target: str) -> None:
    profile, kernels = TARGETS[target].profile, TARGETS[target].forecast.kernels
    assert profile.hard | profile.soft <= kernels.keys()
    assert not kernels.keys() & profile.refused.keys()


SUM = "sum with u8, in the Convolution or after it"
CASES = {  # target → forecast for the convolutions' net, without a graph
    "onnxruntime": {"QLinearConv", "QLinearAdd", "QLinearConcat", "QLinearAveragePool", "MatMulIntegerToFloat"},
    "openvino": {f"{op} u8" for op in ("Convolution", "AvgPool", "Concat", "FullyConnected")} | {SUM},
    "tensorrt": {"int8 Convolution", "sum inside the int8 Convolution", "int8 Concatenation"} | {"int8 MatrixMultiply"},
    "generic": {f"{op} between Q/DQ" for op in ("Conv", "Add", "Concat", "AveragePool", "Gemm")},
}


@pytest.mark.parametrize("target", CASES)
def test_targets(target: str) -> None:
    model = fxquant.prepare(Residual(), (IMAGE,), target=target)
    assert set(kernels(model).values()) == CASES[target]


REASONS = {
    "a rule on the weight": (
        [fxquant.skip("head", operand="weight")],
        "head.linear0.input",
        "float: its weight is not quantized (Rule(path='head', operand='weight', spec=None))",
    ),
    "codes too wide": (
        [fxquant.Rule(path="head", operand="input", spec=WIDE)],
        "head.linear0.weight",
        "float: its input has 16-bit codes",
    ),
}


@pytest.mark.parametrize("inputs", [(), (IMAGE,)], ids=["without inputs", "with inputs"])
@pytest.mark.parametrize("case", REASONS)
def test_float_and_why(case: str, inputs: tuple[Tensor, ...]) -> None:
    rules, operand, expected = REASONS[case]
    model = fxquant.prepare(Residual(), (IMAGE,), rules=rules)
    assert kernels(model, *inputs)[operand] == expected


def test_whether_a_result_is_quantized_shows_in_the_graph_alone() -> None:
    rule = fxquant.skip("mix", operand="output")
    read = fxquant.prepare(Residual(), (IMAGE,), rules=[rule])
    unread = fxquant.prepare(Residual(), (IMAGE,), rules=[rule, fxquant.Rule(kind="avg_pool", spec=None)])
    operand = "mix.conv0.input"
    assert kernels(read)[operand] == kernels(unread)[operand] == "QLinearConv if all that reads its output is quantized"
    assert kernels(read, IMAGE)[operand] == "QLinearConv"
    assert kernels(unread, IMAGE)[operand] == f"float: its output is not quantized ({rule})"


def test_override_is_a_reason() -> None:
    model = fxquant.override(fxquant.prepare(Forked(), (FLAT,)), {"a.weight": None})
    assert kernels(model) == {
        "a.linear0.input": "float: its weight is not quantized (left in float by override('a.weight'))",
        "b.linear0.input": "MatMulIntegerToFloat",
        "b.linear0.weight": "MatMulIntegerToFloat",
    }


def test_an_operand_may_be_served_by_the_quantizer_of_the_result_it_reads() -> None:
    """The sum is quantized for all its readers: of ``mix`` only the weight has a site."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x) * self.c(x).relu()

    model = fxquant.prepare(Net(), (MAPS,), rules=[fxquant.skip("b")])
    assert [row.key for row in fxquant.explain(model).rows] == [
        "a.input",
        "a.weight",
        "a.output",
        "c.weight",
        "c.output",
    ]
    for inputs in ((), (MAPS,)):
        assert set(kernels(model, *inputs).values()) == {"QLinearConv"}


def test_a_weight_serves_every_call_of_its_module() -> None:
    model = fxquant.prepare(Repeated(), (MAPS,))
    assert not [kernel for kernel in kernels(model).values() if kernel.startswith(FLOAT) or kernel == UNKNOWN]


class Twice(nn.Module):
    """A convolution that is called twice, its weight quantized by one site of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.conv(x) + self.conv(x)))


def test_the_second_call_of_a_module_reads_its_weight_too() -> None:
    model = fxquant.prepare(Twice(), (IMAGE,))
    assert {row.key: row.kernels for row in fxquant.explain(model, (IMAGE,)).rows}["conv_conv0_input"] == (
        ("QLinearConv",) * 2
    )
