"""What a report adds up and how it prints, from numbers that nothing had to be run for."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from fxquant.onnx.lint import Finding, LintReport
from fxquant.onnx.verify_report import CodeRow, VerifyReport
from fxquant.targets.target import KernelRow

ROWS = (
    KernelRow(name="conv", op_type="Conv", kernel="QLinearConv", integer=True, reason=None),
    KernelRow(name="head", op_type="MatMul", kernel="MatMul", integer=False, reason="operand 0 'x' is a graph input"),
)
CODES = (
    CodeRow(key="conv.input", differing=0, compared=90, largest=0),
    CodeRow(key="head.input", differing=3, compared=10, largest=2),
)
HERE = VerifyReport(
    path="net.onnx",
    target="onnxruntime",
    runtime="onnxruntime",
    rows=ROWS,
    lint=None,
    codes=CODES,
    input_differing_codes=1,
    cascaded_codes=5,
    max_output_difference=0.125,
    optimized_output_difference=0.25,
    outputs_within_code=0.99875,
    output_spread=1.5,
    latency=0.002,
    float_latency=0.008,
    integer_dot=None,
)
ELSEWHERE = dataclasses.replace(
    HERE, target="openvino", runtime="OpenVINO 2026.1", latency=math.nan, float_latency=math.nan, integer_dot="No dots."
)
FINDINGS = (Finding(rule="axis-is-given", node="dq", message="it has 4 scales and no axis"),)
NOWHERE = dataclasses.replace(
    ELSEWHERE,
    target="tensorrt",
    runtime=None,
    rows=(),
    lint=LintReport(path="net.onnx", target="tensorrt", findings=FINDINGS, checked=7),
    optimized_output_difference=math.nan,
    outputs_within_code=math.nan,
    integer_dot=None,
    roundings=("reciprocal",),
)


def test_sums() -> None:
    assert (HERE.differing_codes, HERE.compared_codes, HERE.largest_code_difference) == (3, 100, 2)
    assert HERE.integer_share == 0.5 and HERE.latency_ratio == 0.25
    empty = dataclasses.replace(HERE, rows=(), codes=())
    assert empty.integer_share == 1.0 and (empty.differing_codes, empty.largest_code_difference) == (0, 0)
    assert math.isnan(NOWHERE.integer_share) and math.isnan(NOWHERE.latency_ratio)


def test_in_the_reference_runtime() -> None:
    assert (
        str(HERE)
        == """\
net.onnx in onnxruntime
node  op      kernel       integer  why not
────  ──────  ───────────  ───────  ──────────────────────────────
conv  Conv    QLinearConv  yes
head  MatMul  MatMul       no       operand 0 'x' is a graph input
1 of 2 conv/gemm/matmul nodes run on integers (50.0 %)
3 of 100 codes differ from fxquant_eager (1 at inputs, by 2 at most); 5 when differences run on through the net
site        differ  of  largest
──────────  ──────  ──  ───────
head.input  3       10  2
outputs differ by 0.125 unoptimized, 0.25 optimized (spread 1.5); 99.88 % of them by an 8-bit code at most
latency 2.000 ms, float 8.000 ms: ratio 0.25 (below 1 is faster)"""
    )


def test_sums_that_saturated_are_said() -> None:
    exact = dataclasses.replace(HERE, exact_output_difference=0.125, exact_by="a setting")
    said = "sums of 8-bit products saturated on this CPU: with a setting, outputs differ by 0.125"
    assert said in str(exact).splitlines() and exact.to_dict()["exact_output_difference"] == 0.125
    alike = dataclasses.replace(exact, exact_output_difference=HERE.optimized_output_difference)
    assert str(alike) == str(HERE) and HERE.to_dict()["exact_output_difference"] is None


def test_in_another_runtime() -> None:
    assert (
        str(ELSEWHERE)
        == """\
net.onnx in OpenVINO 2026.1
node  op      kernel       integer  why not
────  ──────  ───────────  ───────  ──────────────────────────────
conv  Conv    QLinearConv  yes
head  MatMul  MatMul       no       operand 0 'x' is a graph input
1 of 2 conv/gemm/matmul nodes run on integers (50.0 %)
in onnxruntime without optimizations, 3 of 100 codes differ from fxquant_eager (1 at inputs, by 2 at most); 5 when \
differences run on through the net
site        differ  of  largest
──────────  ──────  ──  ───────
head.input  3       10  2
outputs differ by 0.125 in onnxruntime without optimizations, OpenVINO 2026.1's from those by 0.25 (spread 1.5); \
99.88 % of them by an 8-bit code at most
No dots."""
    )


@pytest.mark.parametrize(
    ("roundings", "said"),
    [
        (("reciprocal",), "tensorrt multiplies by 1 / scale, and so does training, where onnxruntime divides"),
        (
            ("divide",),
            "tensorrt multiplies by 1 / scale, where training and onnxruntime divide: it may differ by a code",
        ),
        ((), ""),
    ],
)
def test_how_training_rounds_is_the_plan_s(roundings: tuple[str, ...], said: str) -> None:
    """A plan of an older version divides; one without activations does neither."""
    text = str(dataclasses.replace(NOWHERE, roundings=roundings))
    assert said in text and ("1 / scale" in text) == bool(said)


def test_where_it_is_not_compared() -> None:
    assert (
        str(NOWHERE)
        == """\
net.onnx for tensorrt, which is not run here: its kernels are not known without `pip install "fxquant[tensorrt]"`
net.onnx for tensorrt: 1 findings in 7 nodes
node  finding                      rule
────  ───────────────────────────  ─────────────
dq    it has 4 scales and no axis  axis-is-given
in onnxruntime without optimizations, 3 of 100 codes differ from fxquant_eager (1 at inputs, by 2 at most); 5 when \
differences run on through the net; tensorrt multiplies by 1 / scale, and so does training, where onnxruntime divides
site        differ  of  largest
──────────  ──────  ──  ───────
head.input  3       10  2
outputs differ by 0.125 in onnxruntime without optimizations (spread 1.5)"""
    )


def test_what_was_not_compared_is_said() -> None:
    text = str(dataclasses.replace(HERE, not_compared=("tail.input",)))
    assert "\n1 sites of the file were not compared, as the model runs them in another form: tail.input\n" in text
    weights_only = str(dataclasses.replace(HERE, codes=()))
    assert (
        "\nno activation is quantized: there are no codes to compare\n" in weights_only and " of 0 " not in weights_only
    )


@pytest.mark.parametrize("report", [HERE, ELSEWHERE, NOWHERE], ids=lambda report: report.target)
def test_plain_values(report: VerifyReport) -> None:
    fields = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert list(fields)[: len(vars(report))] == list(vars(report))
    assert fields["codes"][1] == {"key": "head.input", "differing": 3, "compared": 10, "largest": 2}
    assert fields["compared_codes"] == 100 and len(fields["rows"]) == len(report.rows)
    for name in ("latency", "latency_ratio", "integer_share", "outputs_within_code"):
        value = getattr(report, name)
        assert fields[name] == (None if math.isnan(value) else value)
    assert (fields["lint"] is None) is (report.lint is None)


def test_a_file_of_another_model_is_told_by_its_outputs() -> None:
    """Its codes can all be right: each is compared from the file's own before it."""
    said = "the outputs are further from the model's than they vary: was the file exported from it, as it is now?"
    assert said not in str(HERE)
    assert said in str(dataclasses.replace(HERE, max_output_difference=1.6))
    assert said not in str(dataclasses.replace(HERE, output_spread=0.0)), "of one number nothing is known"
