"""compute-sanitizer over every kernel of ours: no access out of bounds, no race, nothing read before it is written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("sanitized.py")
FOUND = shutil.which("compute-sanitizer") or next(
    (str(p) for p in Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
)


def test_the_script_itself_runs(device: str) -> None:
    found = subprocess.run([sys.executable, SCRIPT, device], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("240 calls on ") and found.stdout.split()[-1] == (
        "cuda" if device == "cuda" else "aten"
    )


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_clean(tool: str, cuda: str) -> None:
    if FOUND is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [FOUND, "--tool", tool, "--error-exitcode", "77"]
    found = subprocess.run([*command, sys.executable, str(SCRIPT), cuda], capture_output=True, text=True, timeout=500)
    text = found.stdout + found.stderr
    if "Device not supported" in text:
        pytest.skip("compute-sanitizer does not support this device or its runtime")
    assert found.returncode == 0, text[-4000:]
    assert "0 errors" in text
