"""The kernels that Inductor writes for a GPU mean what the operators mean: run in Triton's interpreter, on CPU tensors.

The interpreter must be chosen before Triton is imported, so a process of its own runs all operators.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton, on Linux")

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("float32", "bfloat16", "float16", "float64")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bit_differs(dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton.interpreted", dtype],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) > 80
    assert {name: why for name, why in found.items() if why} == {}
