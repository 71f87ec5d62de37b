"""Small files in versions of each runtime: whether they load at every level, their codes, integer kernels and speed.

    python bench/bench_versions.py [--versions onnxruntime==1.20.0,npm:onnxruntime-web@1.30.0,chromium:…,…]
                                   [--rounds 15] [--out bench/results/versions.jsonl]

Files and inputs are made in this environment; each version is installed apart in a temporary folder and runs them
there (`bench/runtimes/run.py`, and its like in JavaScript, which say what a row holds). What an output must be is what
this environment's onnxruntime gives without optimizations. A version whose program is not here has one row that says
so, ``declined``.

Exit status 1 where a file is not what is claimed of it: `JUDGED`, `BEST` and `KNOWN` below. Two things of a CPU are
let pass: without VNNI, 8-bit weights make sums saturate in native kernels, of all versions alike; with bfloat16,
OpenVINO computes in it by default.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from machine import emit, environment
from versions_files import make
from versions_install import Row, package_of, rows

from fxquant.targets.cpu import sums_saturate

VERSIONS = (
    # The oldest that pyproject.toml allows, or that runs the files, and the newest when this was written.
    *("onnxruntime==1.20.0", "onnxruntime==1.32.0"),
    *("openvino==2024.6.0", "openvino==2025.2.0", "openvino==2025.3.0", "openvino==2026.4.1"),
    *("npm:onnxruntime-node@1.30.0", "npm:onnxruntime-web@1.30.0", "chromium:onnxruntime-web@1.30.0"),
    *("opencv-python-headless==5.0.0.93", "tract==0.23.9"),
)

# Package → targets whose files must load and be right in it.
JUDGED = {
    "onnxruntime": ("onnxruntime", "openvino", "generic"),
    "onnxruntime-node": ("onnxruntime", "openvino", "generic"),
    "onnxruntime-web": ("onnxruntime", "openvino", "generic"),
    "openvino": ("openvino", "generic"),
    "opencv-python-headless": ("onnxruntime", "openvino", "generic"),
    "tract": ("onnxruntime", "openvino", "generic"),
}

# Package → the target to export for, and whether its int8 files run on integers and faster than float ones: where not,
# nothing is known to run on integers.
BEST = {
    "onnxruntime": ("onnxruntime", True),
    "onnxruntime-node": ("onnxruntime", True),
    "onnxruntime-web": ("onnxruntime", True),
    "openvino": ("openvino", True),
    "opencv-python-headless": ("generic", False),
    "tract": ("generic", False),
}


class Known(NamedTuple):
    """What is wrong with files in some versions and is known, all as regular expressions: a change of it is told."""

    version: str
    file: str
    reason: str
    level: str = ""


SEEN = ("version", "file", "level")
KNOWN = (
    Known("^opencv", r"\.w4a4_dynamic\.", r"Can't create layer .* of type \"MatMulInteger\""),
    # findings/opencv_refuses_an_add_of_codes_whose_operand_is_read_twice.sh
    Known("^opencv", r"^stage\.onnxruntime\.", r"bufidx >= 0"),
    Known("^tract", r"\.w4a4_dynamic\.", r"y_scale must be a const"),
    # findings/onnxruntime_takes_moved_int8_without_zero_point_for_uint8.sh
    Known(r"^onnxruntime==1\.2[0-6]\.", r"^(attention|block)\.openvino\.", "values are off", "^(?!disable)"),
)


def why_wrong(row: Row, *, saturates: bool, bfloat16: bool = False) -> str | None:
    """What is wrong with a row; None where nothing is, or the file is for another runtime."""
    package = package_of(str(row["version"]))
    if "file" not in row:
        return f"{row['version']}: {row['error']}" if "error" in row else None
    _, target, recipe, _ = str(row["file"]).split(".")
    if target not in JUDGED[package]:
        return None
    where, error = f"{row['file']} in {row['version']}, {row['level']}", row["error"]
    told = str(error) if error is not None else f"{row['off']} of {row['of']} values are off" if row["off"] else None
    known = next((k for k in KNOWN if all(re.search(getattr(k, key), str(row[key])) for key in SEEN)), None)
    if known is not None:
        same = told is not None and re.search(known.reason, told)
        return None if same else f"{where}: known for {known.reason!r}, and {told or 'it is right'}"
    if error is not None:
        return f"{where}: {told}"
    native = package in ("onnxruntime", "onnxruntime-node", "openvino")
    expected = saturates and native and recipe == "int8" and row["level"] not in ("disable", "basic")
    expected = expected or (bfloat16 and package == "openvino" and row["level"] == "default")
    if told is None or expected:
        told = not_as_fast(row, package, target, saturates) if "ratio" in row else None
    return told and f"{where}: {told}"


def not_as_fast(row: Row, package: str, target: str, saturates: bool) -> str | None:
    """What of integers and speed is not as claimed; products of a softmax stay float."""
    whole, products, ratio = (float(str(row[key])) for key in ("integer", "products", "ratio"))
    counted = f"{whole:.0f} of {products:.0f} products are integers: {row['kernels']}"
    best, fast = BEST[package]
    if not fast:
        return f"known to be float, and {counted}" if whole else None
    if target != best:
        return None
    if whole < products - 1 or not whole:
        return counted
    return f"{ratio} of the float file's time" if ratio >= 1 and not saturates else None


def table(found: Iterable[Row]) -> str:
    """A line per version: files that are judged there, and those that are timed of the target to export for."""
    versions: dict[str, list[Row]] = {}
    for row in found:
        versions.setdefault(str(row["version"]), []).append(row)
    lines = ["| runtime | loads | values off | furthest | integer products | int8 / float |", "| --- " * 6 + "|"]
    for version, each in versions.items():
        package = package_of(version)
        files = [row for row in each if "file" in row and str(row["file"]).split(".")[1] in JUDGED[package]]
        if not files:
            lines.append(f"| {version} | {each[0].get('declined') or each[0].get('error')} |" + " |" * 4)
            continue
        ran = [row for row in files if row["error"] is None]
        off = sum(row["off"] != 0 for row in ran)
        furthest = max((float(str(row["furthest"])) for row in ran), default=0.0)
        told = [(str(row["file"]).split("."), row) for row in ran if "ratio" in row]
        timed = [(name, row) for (name, target, *_), row in told if target == BEST[package][0]]
        whole = ", ".join(f"{name} {row['integer']} of {row['products']}" for name, row in timed)
        ratios = ", ".join(f"{name} {row['ratio']} ({row['int8_ms']} / {row['float_ms']} ms)" for name, row in timed)
        lines.append(f"| {version} | {len(ran)} of {len(files)} | {off} | {furthest:.2g} | {whole} | {ratios} |")
    return "\n".join(lines)


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16, which OpenVINO then does by default."""
    path = Path("/proc/cpuinfo")
    return path.exists() and bool({"avx512_bf16", "amx_bf16"} & set(path.read_text(encoding="utf-8").split()))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", default=",".join(VERSIONS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        files, home = Path(name) / "files", Path(name) / "home"
        files.mkdir()
        home.mkdir()
        make(files, rounds=chosen.rounds)
        for version in chosen.versions.split(","):
            more = [{**row, **environment(), "threads": 1} for row in rows(version, files, home)]
            emit(more, chosen.out)
            found += more
    saturates, bfloat16 = sums_saturate(), has_bfloat16()
    wrong = [told for row in found if (told := why_wrong(row, saturates=saturates, bfloat16=bfloat16))]
    print(table(found), *wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
