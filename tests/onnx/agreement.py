"""What "the file's codes are training's" means for a test on any CPU."""

from __future__ import annotations

import math

from fxquant.onnx import VerifyReport


def assert_codes_agree(report: VerifyReport) -> None:
    """Inputs exactly, and elsewhere at most 2 codes or 1 in 10,000, each a neighbour.

    PyTorch and onnxruntime add up a convolution or a mean in an order that depends on the CPU: a value within a last
    bit of the border between two codes may get either. Which values lie there differs from machine to machine.
    """
    assert report.compared_codes > 0
    assert report.input_differing_codes == 0
    assert report.largest_code_difference <= 1
    assert report.differing_codes <= max(2, report.compared_codes // 10_000)
    # A code that differs runs on to the output as a step of its range.
    alike = report.differing_codes == report.cascaded_codes == 0
    assert report.max_output_difference < (1e-5 if alike else 0.05) * max(1.0, report.output_spread)


def deployed_difference(report: VerifyReport) -> float:
    """How far outputs are off in onnxruntime with every optimization, its sums exact on CPUs where they saturate."""
    exact = report.exact_output_difference
    return report.optimized_output_difference if math.isnan(exact) else exact
