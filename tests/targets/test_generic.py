"""No runtime in mind: the common rules are all there is to hold a file to."""

from __future__ import annotations

from pathlib import Path

import fxquant
from tests.onnx.agreement import assert_codes_agree
from tests.onnx.nets import exported


def test_generic_is_checked_by_the_common_rules(tmp_path: Path, plain_only: None) -> None:
    model, x, path = exported("decoder", "generic", tmp_path)
    report = fxquant.verify_onnx(model, (x,), path)
    assert report.lint and report.target == "generic" and report.runtime is None
    assert_codes_agree(report)
