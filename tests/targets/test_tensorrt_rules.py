"""TensorRT's rules and its builder on the same small graphs: what one finds, the other shows."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from fxquant.errors import ExportError
from fxquant.onnx import lint_onnx
from fxquant.onnx.lint import rules
from fxquant.targets.lint_common import COMMON
from fxquant.targets.target import KernelRow
from fxquant.targets.tensorrt_run import kernel_rows
from tests.targets.tensorrt_formats import forms, fp4, weights
from tests.targets.tensorrt_graphs import Case, between, places

CASES = [*between(), *places(), *weights(), *forms(), *fp4()]
built = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
each = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def on_codes(row: KernelRow) -> bool:
    return row.integer or re.search(r"(fp8|fp4)\w*·(fp8|fp4)", row.kernel) is not None


def seen(path: Path) -> set[str]:
    """Outcomes that the builder's result fits: of numbers it tells nothing."""
    try:
        rows = kernel_rows(path)
    except ExportError:
        return {"error"}
    return {"codes", "wrong"} if all(map(on_codes, rows)) else {"float", "as meant"}


@each
def test_the_rule_speaks(case: Case, tmp_path: Path) -> None:
    report = lint_onnx(case.save(tmp_path), "tensorrt")
    assert {finding.rule for finding in report.findings} == ({case.rule} if case.rule else set()), str(report)
    assert case.clean or re.search(case.said, report.findings[0].message), str(report)


@built
@each
def test_the_builder_agrees(case: Case, tmp_path: Path) -> None:
    assert case.outcome in seen(case.save(tmp_path))
    assert case.clean == (case.outcome in ("codes", "as meant"))


@built
@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("attention-half", "fused attention half·half·half"),
        ("attention-half-fp8-whole", "fused attention fp8_e4m3·fp8_e4m3·fp8_e4m3"),
        ("attention-half-int8-whole-and-its-result", "fused attention int8·int8·int8"),
        ("attention-int8-whole-and-its-result", "fused attention int8·int8·int8"),
        ("attention-int8-whole", "matrix product int8·int8"),
        ("attention-fp8-whole", "matrix product fp8_e4m3·fp8_e4m3"),
    ],
)
def test_which_attention_is_one_kernel(name: str, kernel: str, tmp_path: Path) -> None:
    (case,) = (case for case in CASES if case.name == name)
    assert {row.kernel for row in kernel_rows(case.save(tmp_path))} == {kernel}


def test_there_are_enough() -> None:
    assert len(CASES) >= 80 and len({case.name for case in CASES}) == len(CASES)
    assert sum(case.clean for case in CASES) >= 40 and sum(not case.clean for case in CASES) >= 30


def test_every_rule_is_broken_by_one() -> None:
    own = rules("tensorrt").keys() - COMMON.keys()
    assert own <= {case.rule for case in CASES}
    assert all(text.endswith(".") or text.endswith(").") for text in rules("tensorrt").values())
    assert not {"axis-is-given", "one-quantizer-per-tensor", "batch-norm-is-folded"} & rules("tensorrt").keys()


def test_the_report_says_where_the_rules_come_from(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.rule == "products-run-on-codes")
    assert str(lint_onnx(case.save(tmp_path), "tensorrt")).endswith(
        "rules measured on TensorRT for RTX 1.7.1, ONNX parser 2.0.0"
    )


def test_scales_of_its_own_quantizer_are_computed_for_another_target(tmp_path: Path) -> None:
    path = next(case for case in CASES if case.name == "nvfp4").save(tmp_path)
    assert lint_onnx(path, "tensorrt")
    found = lint_onnx(path, "openvino")
    assert {finding.message for finding in found.findings} >= {"its scale is computed at run time"}
