"""What a quantized file costs at run time: its time over that of the float export, in the same runtime, at real sizes.

    python bench/bench_latency.py [--nets resnet18,minilm,…] [--runtimes onnxruntime,openvino,torch] [--rounds 30]
                                  [--threads 1] [--keep folder] [--out bench/results/latency.jsonl]

The nets of `latency_nets`, for one picture of 224×224 (yolov8n: 320×320) or one sentence of 128 tokens. Each is
prepared for the runtime, calibrated on its input and exported; that file and the float model's export then run in
turns, and the medians of CPU time are compared. A JSON line per net and runtime. ``off``: the largest distance of the
outputs from those of onnxruntime without optimizations, as a part of their spread. OpenVINO runs with
``INFERENCE_PRECISION_HINT`` f32. ``skip_slow_ms``: of the file of ``prepare(skip_slow=True)``, where there is a table
of costs. ``nncf_ms``: in OpenVINO, of the file that NNCF makes of the float export with the same input, where nncf is
installed. Runtime ``torch`` is `fxquant.convert` under plain torch.compile, beside the float model under the same, and
beside both files in onnxruntime (``onnxruntime_int8_ms``, ``onnxruntime_float_ms``).
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latency_nets import NETS, build
from machine import emit, environment
from nets import Unavailable
from torch import Tensor, nn

import fxquant
from fxquant.errors import InvalidArgument
from fxquant.targets.costs import shipped
from fxquant.targets.session import input_names, run_outputs, session

Feeds = Mapping[Any, np.ndarray]  # by name, or by number
Run = Callable[[], Any]


def quantized(model: nn.Module, x: Tensor, target: str, path: Path, *, skip_slow: bool = False) -> None:
    """Prepares a copy, calibrates it on its input and exports it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ready = fxquant.prepare(copy.deepcopy(model), (x,), target=target, skip_slow=skip_slow)
        fxquant.calibrate(ready, [x], progress=False)
        fxquant.export_onnx(ready.eval(), (x,), path, dynamic_batch=False, verify=False)


def has_costs(target: str) -> bool:
    """Whether fxquant has a table of costs for a target on this class of CPU."""
    try:
        shipped(target)
    except InvalidArgument:
        return False
    return True


def plain(model: nn.Module, x: Tensor, path: Path) -> None:
    """The float model by torch's exporter alone."""
    torch.onnx.export(model, (x,), path, dynamo=True, opset_version=21, verbose=False)


def by_nncf(model: Path, x: Tensor, path: Path) -> None:
    """The float export as NNCF quantizes it, with that input to calibrate on."""
    import nncf
    import openvino

    read = openvino.Core().read_model(str(model))
    read.reshape(list(x.shape))
    has_attention = any(node.get_type_name() == "Softmax" for node in read.get_ops())
    kind = nncf.ModelType.TRANSFORMER if has_attention else None
    found = nncf.quantize(read, nncf.Dataset([x.numpy()]), subset_size=1, model_type=kind)
    openvino.save_model(found, path, compress_to_fp16=False)


def onnxruntime_run(path: Path, feeds: Feeds, threads: int) -> Run:
    """A run of a file in onnxruntime, with all optimizations."""
    built = session(path, optimize=True, threads=threads, config={"session.intra_op.allow_spinning": "0"})
    return lambda: built.run(None, feeds)


def openvino_run(path: Path, feeds: Feeds, threads: int) -> Run:
    """A run of a file in OpenVINO, float32 where it is not integers."""
    import openvino

    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(str(path), "CPU", config)
    request = compiled.create_infer_request()

    def run() -> list[np.ndarray]:
        found = request.infer(dict(feeds))
        return [found[output] for output in compiled.outputs]

    return run


RUNTIMES: dict[str, Callable[[Path, Feeds, int], Run]] = {"onnxruntime": onnxruntime_run, "openvino": openvino_run}


def timed(runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """Median seconds of the process's CPU time of each, which take turns; after three runs that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 3):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if number >= 3:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def off(path: Path, feeds: Feeds, outputs: list[np.ndarray]) -> float:
    """The largest distance from the outputs of onnxruntime without optimizations, as a part of their spread."""
    exact = run_outputs(path, feeds, optimize=False)
    pairs = zip(exact, outputs, strict=True)
    return max(float(np.abs(a - b).max() / max(float(np.ptp(a)), 1e-30)) for a, b in pairs)


def torch_runs(model: nn.Module, x: Tensor) -> dict[str, Run]:
    """The converted model and the float one, both compiled by plain Inductor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ready = fxquant.prepare(copy.deepcopy(model), (x,))
        fxquant.calibrate(ready, [x], progress=False)
        converted = fxquant.convert(ready.eval(), (x,), dynamic_batch=False)

    def run(compiled: Callable[[Tensor], Any]) -> Run:
        def once() -> list[np.ndarray]:
            with torch.no_grad():
                found = compiled(x)
            return [value.numpy() for value in torch.utils._pytree.tree_leaves(found)]

        return once

    return {"int8": run(torch.compile(converted)), "float": run(torch.compile(model))}


def measure_torch(name: str, folder: Path, rounds: int, threads: int) -> dict[str, object]:
    """The row of a net in torch itself, with onnxruntime's times of the same run beside it."""
    torch.set_num_threads(threads)
    model, x = build(name)
    paths = {"onnxruntime_int8": folder / f"{name}.onnx", "onnxruntime_float": folder / f"{name}_float.onnx"}
    quantized(model, x, "onnxruntime", paths["onnxruntime_int8"])
    plain(model, x, paths["onnxruntime_float"])
    runs = torch_runs(model, x)
    feeds = {key: dict(zip(input_names(path), [x.numpy()], strict=True)) for key, path in paths.items()}
    runs |= {key: onnxruntime_run(path, feeds[key], threads) for key, path in paths.items()}
    ours, theirs = paths["onnxruntime_int8"], feeds["onnxruntime_int8"]
    distance = off(ours, theirs, list(runs["int8"]()))
    found = timed(runs, rounds)
    return {
        "net": name,
        "runtime": "torch",
        "version": torch.__version__,
        **{f"{key}_ms": round(1e3 * seconds, 2) for key, seconds in found.items()},
        "ratio": round(found["int8"] / found["float"], 3),
        **({"skip_slow_ms": round(1e3 * found["skip_slow"], 2)} if "skip_slow" in found else {}),
        **({"skip_slow_ratio": round(found["skip_slow"] / found["float"], 3)} if "skip_slow" in found else {}),
        "off": float(f"{distance:.2g}"),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "rounds": rounds,
        **environment(),
        "threads": threads,
    }


def measure(name: str, runtime: str, folder: Path, rounds: int, threads: int) -> dict[str, object]:
    """The row of a net in a runtime."""
    model, x = build(name)
    ours, theirs = folder / f"{name}_{runtime}.onnx", folder / f"{name}_float.onnx"
    quantized(model, x, runtime, ours)
    plain(model, x, theirs)
    files, runs = {"int8": ours, "float": theirs}, {}
    if has_costs(runtime):
        files["skip_slow"] = folder / f"{name}_{runtime}_skip_slow.onnx"
        quantized(model, x, runtime, files["skip_slow"], skip_slow=True)
    for key, path in files.items():
        feeds = dict(zip(input_names(path), [x.numpy()], strict=True))
        runs[key] = RUNTIMES[runtime](path, feeds, threads)
    if runtime == "openvino" and importlib.util.find_spec("nncf"):
        by_nncf(theirs, x, folder / f"{name}_nncf.xml")
        runs["nncf"] = openvino_run(folder / f"{name}_nncf.xml", dict.fromkeys([0], x.numpy()), threads)
    found = timed(runs, rounds)
    distance = off(ours, dict(zip(input_names(ours), [x.numpy()], strict=True)), list(runs["int8"]()))
    return {
        "net": name,
        "runtime": runtime,
        "version": importlib.metadata.version(runtime),
        "int8_ms": round(1e3 * found["int8"], 2),
        "float_ms": round(1e3 * found["float"], 2),
        "ratio": round(found["int8"] / found["float"], 3),
        **({"skip_slow_ms": round(1e3 * found["skip_slow"], 2)} if "skip_slow" in found else {}),
        **({"skip_slow_ratio": round(found["skip_slow"] / found["float"], 3)} if "skip_slow" in found else {}),
        **({"nncf_ms": round(1e3 * found["nncf"], 2)} if "nncf" in found else {}),
        **({"nncf_ratio": round(found["nncf"] / found["float"], 3)} if "nncf" in found else {}),
        "off": float(f"{distance:.2g}"),
        "rounds": rounds,
        **environment(),
        "threads": threads,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--runtimes", default=",".join(RUNTIMES))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a folder for the files")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for name in options.nets.split(","):
        for runtime in options.runtimes.split(","):
            with tempfile.TemporaryDirectory() as folder:
                kept = options.keep or Path(folder)
                try:
                    if runtime == "torch":
                        row = measure_torch(name, kept, options.rounds, options.threads)
                    else:
                        row = measure(name, runtime, kept, options.rounds, options.threads)
                except Unavailable as error:
                    row = {"net": name, "runtime": runtime, "unavailable": str(error), **environment()}
            emit([row], options.out)


if __name__ == "__main__":
    main()
