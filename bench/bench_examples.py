"""What each script under examples/ takes and prints, with backend "fxquant", compile included: the gallery of the site.

    python bench/bench_examples.py [--only distill,generate] [--out bench/results/examples.jsonl]

Each command that docs/ shows is run once, in a process of its own with empty caches of Inductor: seconds from its start
to its end, torch's import and g++ among them. A script that lacks a package is a row that says so; one that fails
ends the run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from machine import emit, environment

ROOT = Path(__file__).resolve().parents[1]
SHOWN = re.compile(r"```console\n\$ python examples/(.*?)\n")
PACKAGES = ("transformers", "accelerate", "peft", "lightning", "timm", "torchvision", "ultralytics", "onnxruntime")


def commands() -> list[str]:
    """Scripts with their arguments, as docs/ shows them."""
    pages = sorted((ROOT / "docs").glob("*.md"))
    return sorted({found for page in pages for found in SHOWN.findall(page.read_text(encoding="utf-8"))})


def versions(script: Path) -> dict[str, str]:
    """Of the packages that a script names."""
    source = script.read_text(encoding="utf-8")
    named = [name for name in PACKAGES if re.search(rf"^(import|from) {name}\b", source, re.MULTILINE)]
    named += ["onnxruntime"] * ("verify_onnx" in source and "onnxruntime" not in named)
    found = {}
    for name in named:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def run(command: str) -> dict[str, object]:
    """The row of a command."""
    script, *arguments = command.split()
    with tempfile.TemporaryDirectory() as caches:
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": caches, "HF_HUB_OFFLINE": "1"}
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, f"examples/{script}", *arguments], cwd=ROOT, env=environ, capture_output=True, text=True
        )
        seconds = time.perf_counter() - started
    row: dict[str, object] = {"example": command, **versions(ROOT / "examples" / script), **environment()}
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    if done.returncode and not last.startswith("ModuleNotFoundError"):
        raise RuntimeError(f"examples/{command} failed: {done.stderr or last}")
    if done.returncode:
        return {**row, "unavailable": last}
    printed = re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+/", "", done.stdout.rstrip("\n"))
    return {**row, "seconds": round(seconds, 1), "printed": printed}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts of the commands that are run, all of them if empty")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for command in commands():
        if any(part in command for part in options.only.split(",")):
            emit([run(command)], options.out)


if __name__ == "__main__":
    main()
