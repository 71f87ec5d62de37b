"""Any model in TensorRT: every entry of a model zoo exported, then parsed and built by NVIDIA's libraries, on a CPU.

    python bench/bench_tensorrt.py path/to/zoo.py [--dtypes float32,float16,bfloat16] [--recipe nvfp4] [--only NAME,...]
                                   [--without labels] [--known ROWS.jsonl] [--out bench/results/tensorrt.jsonl]
    python bench/bench_tensorrt.py --summary bench/results/tensorrt.jsonl

A zoo is as for ``bench_zoo.py``. Each entry is prepared for tensorrt, calibrated on its own inputs (``--without`` names
keywords that are left out: a loss inside the graph is nothing that TensorRT reads) and exported with float parts of
each dtype. A JSON line per entry and dtype, each entry in a process of its own: what runs on integers, what does not
and why; the same of a plain float export, and how long both builds took. What fails is a field with the error's text.
"""

from __future__ import annotations

import argparse
import inspect
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_zoo import load_zoo, noted
from machine import emit, environment

import fxquant
from fxquant.targets.tensorrt_run import kernel_rows

Row = dict[str, Any]
# Ends of the reason of a product that the plan leaves in float.
NOT_MEANT = ("is not quantized", "TensorRT has no integer transposed convolution")
LIMIT = 1200


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call took, and its result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def plain(entry: Any, args: Any, kwargs: Any, folder: Path) -> Row:
    """The float model by torch's exporter alone, built."""
    row: Row = {}
    with noted(row, "float"):
        path = folder / "float.onnx"
        torch.onnx.export(entry.build().eval(), args, path, kwargs=kwargs, dynamo=True, opset_version=21, verbose=False)
        row["float_build_s"], rows = seconds(lambda: kernel_rows(path))
        row["float_products"] = len(rows)
    return row


def prepared(entry: Any, args: Any, kwargs: Any, recipe: str) -> torch.nn.Module:
    """The entry's model, calibrated on its own inputs."""
    torch.manual_seed(0)
    model = fxquant.prepare(entry.build(), args, kwargs=kwargs, recipe=recipe, target="tensorrt")
    bound = inspect.signature(model.forward).bind_partial(*args).arguments
    fxquant.calibrate(model, [{**bound, **kwargs} if kwargs else args], progress=False)
    return model.eval()


def quantized(model: torch.nn.Module, args: Any, kwargs: Any, dtype: str, folder: Path) -> Row:
    """The quantized file of one float type."""
    row: Row = {"dtype": dtype}
    with noted(row, "build"):
        path, kind = folder / f"{dtype}.onnx", getattr(torch, dtype)
        typed = {} if dtype == "float32" else {"float_dtype": kind}
        report = fxquant.export_onnx(model, args, path, kwargs=kwargs, **typed)
        row["notes"] = list(report.notes)
        row["build_s"], rows = seconds(lambda: kernel_rows(path))
        row["products"], row["integer"] = len(rows), sum(each.integer for each in rows)
        why = [(f"{each.op_type} {each.name}", str(each.reason)) for each in rows if not each.integer]
        row["float_by_plan"] = [f"{name}: {reason}" for name, reason in why if reason.endswith(NOT_MEANT)]
        row["lost"] = [f"{name}: {reason}" for name, reason in why if not reason.endswith(NOT_MEANT)]
    return row


def entry_rows(name: str, entry: Any, recipe: str, dtypes: list[str], without: list[str], known: Row) -> Iterator[Row]:
    """A row for each type; ``known`` is of the float export where it has been built."""
    args, kwargs = entry.inputs()
    kwargs = {key: value for key, value in kwargs.items() if key not in without}
    row: Row = {"entry": name, "recipe": recipe}
    with tempfile.TemporaryDirectory() as folder:
        of_float = known or plain(entry, args, kwargs, Path(folder))
        with noted(row, "build"):
            model = prepared(entry, args, kwargs, recipe)
        for dtype in dtypes:
            own = {"dtype": dtype} if "build_error" in row else quantized(model, args, kwargs, dtype, Path(folder))
            yield {**row, **own, **of_float, **environment()}


def child(options: argparse.Namespace) -> list[Row]:
    """The rows of one entry."""
    warnings.simplefilter("ignore")
    entry, known = load_zoo(options.zoo).get(options.child), known_of(options.known, options.child)
    dtypes, without = options.dtypes.split(","), options.without.split(",")
    return list(entry_rows(options.child, entry, options.recipe, dtypes, without, known))


def known_of(path: Path | None, name: str) -> Row:
    """What earlier rows say of an entry's float export; its time is of another day."""
    lines = [] if path is None else path.read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, lines):
        if row["entry"] == name and ("float_error" in row or "float_build_s" in row):
            return {key: row[key] for key in ("float_products", "float_error") if key in row}
    return {}


def in_process(options: argparse.Namespace, name: str) -> list[Row]:
    """``child`` in a process of its own: what ends it is a row."""
    command = [sys.executable, __file__, str(options.zoo), "--child", name]
    command += ["--recipe", options.recipe, "--dtypes", options.dtypes, "--without", options.without]
    command += ["--known", str(options.known)] if options.known else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return [{"entry": name, "build_error": f"more than {LIMIT} s", **environment()}]
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return [{"entry": name, "build_error": said[:1000], **environment()}]
    return list(json.loads(done.stdout.splitlines()[-1]))


def _kind(row: Row) -> tuple[str, str]:
    """Recipe and type; rows of before there were recipes are of int8."""
    return row.get("recipe", "int8"), row.get("dtype", "none")


def summary(rows: list[Row]) -> str:
    """The promises, counted for each dtype."""
    lines = []
    for recipe, dtype in dict.fromkeys(map(_kind, rows)):
        own = [row for row in rows if _kind(row) == (recipe, dtype)]
        built = [row for row in own if "build_s" in row]
        meant = sum(row["integer"] + len(row["lost"]) for row in built)
        integer = sum(row["integer"] for row in built)
        both = [row for row in built if "float_build_s" in row]
        ratio = sum(row["build_s"] for row in both) / max(sum(row["float_build_s"] for row in both), 1e-9)
        others = sum(row["products"] for row in built) - meant
        lines.append(
            f"{recipe}, {dtype}: {len(built)} of {len(own)} built; {integer} of {meant} products that are meant to on "
            f"codes, {others} float by plan; builds take {ratio:.2f} of float's time"
        )
        for row in own:
            if "build_error" in row:
                as_float = "as does its float export" if "float_error" in row else "its float export builds"
                lines.append(f"  {row['entry']} fails, {as_float}: {row['build_error'][:160]}")
            lines += [f"  {row['entry']} loses {each}" for each in row.get("lost", ())]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path, nargs="?")
    parser.add_argument("--recipe", default="int8")
    parser.add_argument("--dtypes", default="float32,float16,bfloat16")
    parser.add_argument("--only", default="")
    parser.add_argument("--without", default="labels", help="keywords of forward to leave out")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--known", type=Path, help="a file that --out wrote, whose float exports are not built again")
    parser.add_argument("--summary", type=Path, help="only sum up a file that --out wrote")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.summary:
        print(summary([json.loads(line) for line in options.summary.read_text(encoding="utf-8").splitlines()]))
        return
    if options.zoo is None:
        parser.error("name a zoo, or a file to sum up with --summary")
    if options.child:
        print(json.dumps(child(options)))
        return
    names = options.only.split(",") if options.only else load_zoo(options.zoo).names()
    found: list[Row] = []
    for name in names:
        rows = in_process(options, name)
        emit(rows, options.out)
        found += rows
    print(summary(found))


if __name__ == "__main__":
    main()
