"""Any model: every entry of a model zoo prepared, trained, exported and held to the promises of the README.

    python bench/bench_zoo.py path/to/zoo.py [--targets onnxruntime,openvino] [--only NAME,...] [--steps 20]
                              [--backend fxquant_eager] [--only-training | --brief] [--jobs 1]
                              [--out bench/results/zoo.jsonl [--resume]]
    python bench/bench_zoo.py --summary bench/results/zoo.jsonl

A zoo is a Python file with ``names()`` and ``get(name)``; an entry has ``build()`` → nn.Module, ``inputs()`` →
(args, kwargs), ``loss(output)``, and may have ``more_inputs()``, further inputs of other sizes.

A JSON line per entry and target, each from its own process: graph breaks and compiles against plain torch.compile, the
loss over the steps against float's, the share of convolution and linear FLOPs on quantized operands, the export, and
what `fxquant.verify_onnx` says of it; with ``--backend fxquant``, how far a step is from ``fxquant_eager``'s. What
fails is a field with the error's text, never a missing row. The summary counts each promise over the zoo. Times are
not measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import math
import statistics
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from machine import emit, environment
from torch import nn

import fxquant
from fxquant.errors import NotQuantizedWarning

Row = dict[str, Any]
GRADIENTS = 1e-5  # of all, from those of fxquant_eager: rounding that moved no code
LIMIT = 1200  # seconds of an entry: its compiles take minutes on a small machine


def load_zoo(path: Path) -> Any:
    """The zoo's module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- one entry


def train(entry: Any, model: nn.Module, backend: str, steps: int) -> Row:
    """Losses of some steps of Adam on one batch; what Dynamo made of the frames, other sizes included."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)  # the same dropout, as far as graphs draw in the same order
    args, kwargs = entry.inputs()
    step = torch.compile(model, backend=backend)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = entry.loss(step(*args, **kwargs))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
    for more_args, more_kwargs in entry.more_inputs():
        step(*more_args, **more_kwargs)
    part = max(1, steps // 5)
    return {
        "graph_breaks": breaks,
        "graphs": graphs,
        "graphs_other_sizes": counters["stats"]["unique_graphs"] - graphs,
        "loss_first": statistics.fmean(losses[:part]),
        "loss_last": statistics.fmean(losses[-part:]),
        "finite": all(map(math.isfinite, losses)),
        "no_gradient": sorted(n for n, p in model.named_parameters() if p.grad is None),
    }


def first_step(entry: Any, target: str, backend: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first step, without dropout: compiled code draws other numbers than eager."""
    model, (args, kwargs) = entry.build(), entry.inputs()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fxquant.prepare(model, args, kwargs, target=target)
    torch._dynamo.reset()
    loss = entry.loss(torch.compile(model, backend=backend)(*args, **kwargs))
    loss.backward()
    return loss.item(), {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def against_eager(entry: Any, target: str, backend: str) -> Row:
    """The first step beside backend "fxquant_eager"; gradients differ by codes that rounding noise moved, and by that.

    ``gradients``: the norm of all differences by the norm of all; ``worst``: the largest such ratio of one parameter,
    of those with at least a millionth of the largest norm.
    """
    (loss, found), (expected_loss, expected) = (first_step(entry, target, b) for b in (backend, "fxquant_eager"))
    if found.keys() != expected.keys():
        raise AssertionError(f"gradients must be of the same parameters: {sorted(found.keys() ^ expected.keys())}")
    norms = {name: expected[name].norm() for name in expected}
    apart = {name: (found[name] - expected[name]).norm() for name in expected}
    least = 1e-6 * max(norms.values())
    return {
        "loss": abs(loss - expected_loss),
        "gradients": float(torch.stack([*apart.values()]).norm() / torch.stack([*norms.values()]).norm()),
        "worst": max(float(apart[name] / norm) for name, norm in norms.items() if norm > least),
    }


def named(model: nn.Module, args: tuple[Any, ...], kwargs: Row) -> Any:
    """One batch as `fxquant.calibrate` takes it: positional, or by name."""
    if not (args and kwargs):
        return kwargs or args
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def signal_to_noise(entry: Any, model: nn.Module) -> list[float]:
    """dB of each output of the evaluated model against itself without quantizers; a plain run is the float model."""
    args, kwargs = entry.inputs()
    torch._dynamo.reset()
    with torch.no_grad():
        quantized, plain = torch.compile(model, backend="fxquant_eager")(*args, **kwargs), model(*args, **kwargs)
    found = []
    for q, f in zip(*(torch.utils._pytree.tree_leaves(o) for o in (quantized, plain)), strict=True):
        if isinstance(f, torch.Tensor) and f.is_floating_point() and f.numel() > 1:
            mask = torch.isfinite(f)
            noise = (q - f)[mask].double().square().mean()
            found.append(round(float(10 * torch.log10(f[mask].double().var(correction=0) / noise)), 1))
    return found


def export(entry: Any, model: nn.Module, folder: Path, dynamic: bool) -> Row:
    """Export and verify."""
    args, kwargs = entry.inputs()
    path = folder / "model.onnx"
    torch._dynamo.reset()
    report = fxquant.export_onnx(model, args, path, kwargs=kwargs, dynamic_batch=dynamic)
    verified = fxquant.verify_onnx(model, args, path, kwargs=kwargs, rounds=0)
    return {
        "dynamic_batch": report.dynamic_batch,
        "notes": list(report.notes),
        "codes_differ": verified.differing_codes,
        "codes": verified.compared_codes,
        "codes_differ_at_inputs": verified.input_differing_codes,
        "largest_code_difference": verified.largest_code_difference,
        "integer_nodes": sum(row.integer for row in verified.rows),
        "nodes": len(verified.rows),
        "float_nodes": [f"{row.op_type} {row.name}: {row.reason}"[:300] for row in verified.rows if not row.integer],
        "outputs_within_code": verified.outputs_within_code if verified.runtime else None,
        "lint": [str(f) for f in verified.lint.findings] if verified.lint else None,
    }


@contextmanager
def noted(row: Row, name: str) -> Iterator[None]:
    """An error becomes a field: a row that says what failed is the result."""
    try:
        yield
    except Exception as error:
        where = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)][-3:]
        row[f"{name}_error"] = f"{type(error).__name__}: {error}"[:1500] + f" ({' > '.join(where)})"


def plain_where_needed(entry: Any, ours: Row | None, steps: int) -> Row:
    """What plain torch.compile counts; not run where ours is one graph for every parameter: none is better."""
    best = {"graph_breaks": 0, "graphs": 1, "graphs_other_sizes": 0, "finite": True, "no_gradient": []}
    if ours is not None and all(ours[name] == value for name, value in best.items()):
        return {**best, "not_run": True}
    return train(entry, entry.build(), "eager", steps)


def examine(zoo: Any, name: str, target: str, backend: str, steps: int, depth: str) -> Row:
    """The row of one entry; ``depth`` is "training", "brief" (no coverage; one export, with an open batch) or "all"."""
    entry, row = zoo.get(name), {"entry": name, "target": target, "backend": backend}
    if depth != "brief":
        with noted(row, "plain"):
            row["plain"] = train(entry, entry.build(), "aot_eager", steps)
    args, kwargs = entry.inputs()
    model = entry.build()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with noted(row, "prepare"):
            fxquant.prepare(model, args, kwargs, target=target)
        if depth != "brief":
            with noted(row, "coverage"):
                found = fxquant.explain(model, args, kwargs).coverage
                row["coverage"] = {k: v for k, v in found.to_dict().items() if k != "products"}
                row["float_products"] = [
                    f"{p.kind} in {p.module}: {p.reason}" for p in found.products if not p.quantized
                ]
        with noted(row, "train"):
            row["fxquant"] = train(entry, model, backend, steps)
        if depth == "brief":
            with noted(row, "plain"):
                row["plain"] = plain_where_needed(entry, row.get("fxquant"), steps)
        if backend != "fxquant_eager":
            with noted(row, "against_eager"):
                row["against_eager"] = against_eager(entry, target, backend)
        row["unbound"] = list(fxquant.explain(model).unbound)
        if depth != "training":
            row.update(deployed(entry, model, depth == "brief"))
    told = (str(w.message)[:300] for w in caught if issubclass(w.category, NotQuantizedWarning))
    row["warnings"] = sorted(set(told))
    return row


def deployed(entry: Any, model: nn.Module, brief: bool) -> Row:
    """Of a trained model: distortion, export and what the exported file computes."""
    row: Row = {}
    args, kwargs = entry.inputs()
    model.eval()
    if brief:
        with tempfile.TemporaryDirectory() as folder, noted(row, "fixed_export"):
            row["fixed"] = row["dynamic"] = export(entry, model, Path(folder), dynamic=True)
        return row
    with noted(row, "eval"):
        row["sqnr_db"] = signal_to_noise(entry, model)
        # Ranges follow the data by 1 % a step: after a few steps they are the first batch's, which others overflow.
        fxquant.calibrate(model, [named(model, args, kwargs)], progress=False)
        row["sqnr_calibrated_db"] = signal_to_noise(entry, model)
    with tempfile.TemporaryDirectory() as folder:
        with noted(row, "plain_export"), torch.no_grad():
            plain = entry.build().eval()
            torch.onnx.export(plain, args, kwargs=kwargs, dynamo=True, verbose=False, f=f"{folder}/plain.onnx")
        for kind, dynamic in (("fixed", False), ("dynamic", True)):
            with noted(row, f"{kind}_export"):
                row[kind] = export(entry, model, Path(folder), dynamic)
    return row


# ---------------------------------------------------------------- all of them


def in_process(options: argparse.Namespace, name: str, target: str) -> Row:
    """`examine` in a process of its own: counters and caches of one entry never reach the next."""
    command = [sys.executable, __file__, str(options.zoo), "--only", name, "--targets", target, "--child"]
    command += ["--backend", options.backend, "--steps", str(options.steps)]
    command += [f"--{flag}" for flag in ("only-training", "brief") if getattr(options, flag.replace("-", "_"))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"entry": name, "target": target, "crash": f"not done after {LIMIT} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"entry"')]
    if not lines:
        return {"entry": name, "target": target, "crash": f"exit status {done.returncode}: {done.stderr[-1500:]}"}
    return json.loads(lines[-1])


def judge(row: Row) -> dict[str, bool | None]:
    """The promises that an entry keeps; None where plain torch does not go that far."""
    plain, ours, fixed = row.get("plain"), row.get("fxquant"), row.get("fixed")
    trains = bool(plain and plain["finite"])
    exports = trains and ("fixed" in row or "fixed_export_error" in row) and "plain_export_error" not in row
    added = ("graph_breaks", "graphs", "graphs_other_sizes")
    falls = plain and "loss_last" in plain and plain["loss_last"] < plain["loss_first"]
    return {
        "trains": bool(ours and ours["finite"] and ours["no_gradient"] == plain["no_gradient"]) if trains else None,
        "nothing added": bool(ours and all(ours[k] <= plain[k] for k in added)) if trains else None,
        "loss falls": bool(ours and ours["loss_last"] < ours["loss_first"]) if falls else None,
        "eager's step": _equals_eager(row),
        "95 % of FLOPs": _reached(row.get("coverage"), "share", 0.95),
        "exports": bool(fixed) if exports else None,
        "codes": _codes_agree(fixed) if fixed else None,
        "outputs": fixed["outputs_within_code"] >= 0.999
        if fixed and fixed["outputs_within_code"] is not None
        else None,
        "dynamic batch": bool(row.get("dynamic")) if exports else None,
    }


def _equals_eager(row: Row) -> bool | None:
    if "against_eager_error" in row:
        return False
    return row["against_eager"]["gradients"] < GRADIENTS if "against_eager" in row else None


def _reached(found: Row | None, name: str, least: float) -> bool | None:
    return found[name] >= least if found and found[name] is not None else None


def _codes_agree(fixed: Row) -> bool:
    few = fixed["codes_differ"] <= max(2, fixed["codes"] // 10_000)
    return few and fixed["largest_code_difference"] <= 1 and fixed["codes_differ_at_inputs"] == 0


def summary(rows: list[Row]) -> str:
    """A line per promise and target: how many of how many entries keep it, and which do not."""
    lines = []
    for target in dict.fromkeys(row["target"] for row in rows):
        of_target = [row for row in rows if row["target"] == target]
        judged = {row["entry"]: judge(row) for row in of_target}
        for promise in next(iter(judged.values())):
            asked = {entry: found[promise] for entry, found in judged.items() if found[promise] is not None}
            if not asked:
                continue
            failing = [entry for entry, kept in asked.items() if not kept]
            names = f": not {', '.join(failing)}" if failing else ""
            lines.append(f"{target:12} {promise:14} {len(asked) - len(failing)} of {len(asked)}{names}")
        files = [row["fixed"] for row in of_target if row.get("fixed")]
        integer, total = (sum(file[key] for file in files) for key in ("integer_nodes", "nodes"))
        second = sum(_is_attention(line) for file in files for line in file["float_nodes"])
        if total > second:
            share = 100 * integer / (total - second)
            apart = f"; {second} second products of attention in float apart" if second else ""
            lines.append(f"{target:12} {'integer nodes':14} {integer} of {total - second} ({share:.1f} %){apart}")
    return "\n".join(lines)


def _is_attention(line: str) -> bool:
    """Probabilities times values in float: a product of its own, or OpenVINO's one kernel for all of attention."""
    return "comes from Softmax" in line or "runs it on i8, i8, f32" in line


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path, nargs="?")
    parser.add_argument("--targets", default="onnxruntime,openvino")
    parser.add_argument("--only", default="")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--backend", default="fxquant_eager")
    parser.add_argument("--only-training", action="store_true", help="no evaluation, no export")
    parser.add_argument("--brief", action="store_true", help="one export, of open batch; no plain one, coverage, dB")
    parser.add_argument("--resume", action="store_true", help="leave out entries that --out has a row of")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--summary", type=Path, help="only sum up a file that --out wrote")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.summary:
        print(summary([json.loads(line) for line in options.summary.read_text(encoding="utf-8").splitlines()]))
        return
    if options.zoo is None:
        parser.error("a zoo file must be given, or --summary with the results of one.")
    zoo = load_zoo(options.zoo)
    wanted = options.only.split(",") if options.only else list(zoo.names())
    unknown = sorted(set(wanted) - set(zoo.names()))
    if unknown:
        parser.error(f"--only must name entries of {options.zoo}: got {', '.join(unknown)}.")
    if options.child:
        torch.set_num_threads(1)
        (name,), (target,) = wanted, options.targets.split(",")
        depth = "training" if options.only_training else "brief" if options.brief else "all"
        row = examine(zoo, name, target, options.backend, options.steps, depth)
        print(json.dumps({**row, **environment()}), flush=True)
        return
    jobs = [(name, target) for target in options.targets.split(",") for name in wanted]
    rows: list[Row] = []
    if options.resume and options.out and options.out.exists():
        rows = [json.loads(line) for line in options.out.read_text(encoding="utf-8").splitlines()]
        done = {(row["entry"], row["target"]) for row in rows}
        jobs = [job for job in jobs if job not in done]
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(lambda job: in_process(options, *job), jobs):
            emit([row], options.out)
            rows.append(row)
    print(summary(rows))


if __name__ == "__main__":
    main()
