"""What a quantized file costs at run time: its time over that of the float export, in the same runtime, at real sizes.

    python bench/bench_latency.py [--nets resnet18,minilm,…] [--runtimes onnxruntime,openvino,torch] [--rounds 30]
                                  [--threads 1,2] [--keep folder] [--out bench/results/latency.jsonl]

The nets of `latency_nets`, for one picture of 224×224 (yolov8n: 320×320) or one sentence of 128 tokens. Each is
prepared for the runtime, calibrated on its input and exported; that file and the float model's export then run in
turns, and medians are compared: of CPU time on one thread, of the time that is waited on more. A JSON line per net,
runtime and number of threads. ``off``: the largest distance of the outputs from those of onnxruntime without
optimizations, as a part of their spread. OpenVINO runs with ``INFERENCE_PRECISION_HINT`` f32. ``skip_slow_ms``: of the
file of ``prepare(skip_slow=True)``, where there is a table of costs. ``static_ms``, ``nncf_ms``: of the files that
onnxruntime's ``quantize_static`` and, where it is installed, NNCF make of the float export with the same input.
Runtime ``torch`` is `fxquant.convert` under plain torch.compile, beside the float model under the same, and beside both
files in onnxruntime (``onnxruntime_int8_ms``, ``onnxruntime_float_ms``).
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
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
from fxquant.targets.in_turns import in_turns
from fxquant.targets.session import input_names, run_outputs, session

Feeds = Mapping[Any, np.ndarray]  # by name, or by number
Run = Callable[[], Any]
PEERS = ("static", "nncf")  # other tools' files


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


def by_static(model: Path, x: Tensor, path: Path) -> None:
    """The float export by onnxruntime's own quantizer: Q/DQ pairs, a scale for each channel of a weight."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Once(quantization.CalibrationDataReader):  # type: ignore[misc]  # it has no types
        def __init__(self) -> None:
            self.left = [dict(zip(input_names(model), [x.numpy()], strict=True))]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    ready = path.with_suffix(".ready.onnx")
    quant_pre_process(str(model), str(ready))
    quantization.quantize_static(str(ready), str(path), Once(), per_channel=True)


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


def timed(runs: Mapping[str, Run], rounds: int, threads: int) -> dict[str, float]:
    """Median seconds of each, which take turns: CPU time of one thread, of several the time that is waited."""
    found = in_turns(runs, rounds=rounds, threads=threads)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


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


def torch_files(name: str, folder: Path) -> tuple[dict[str, Path], dict[str, Run], Tensor]:
    """Files for onnxruntime, and runs in torch."""
    model, x = build(name)
    files = {"onnxruntime_int8": folder / f"{name}.onnx", "onnxruntime_float": folder / f"{name}_float.onnx"}
    quantized(model, x, "onnxruntime", files["onnxruntime_int8"])
    plain(model, x, files["onnxruntime_float"])
    return files, torch_runs(model, x), x


def files_for(name: str, runtime: str, folder: Path) -> tuple[dict[str, Path], dict[str, Run], Tensor]:
    """Ours, the float model's, and the peer's where it is installed."""
    model, x = build(name)
    files = {key: folder / f"{name}_{runtime}_{key}.onnx" for key in ("int8", "float")}
    quantized(model, x, runtime, files["int8"])
    plain(model, x, files["float"])
    if has_costs(runtime):
        files["skip_slow"] = folder / f"{name}_{runtime}_skip_slow.onnx"
        quantized(model, x, runtime, files["skip_slow"], skip_slow=True)
    if runtime == "onnxruntime":
        files["static"] = folder / f"{name}_static.onnx"
        by_static(files["float"], x, files["static"])
    if runtime == "openvino" and importlib.util.find_spec("nncf"):
        files["nncf"] = folder / f"{name}_nncf.xml"
        by_nncf(files["float"], x, files["nncf"])
    return files, {}, x


def measure(name: str, runtime: str, folder: Path, rounds: int, threads: Sequence[int]) -> Iterator[dict[str, object]]:
    """The row of a net in a runtime for each number of threads."""
    files, runs, x = (torch_files if runtime == "torch" else partial(files_for, runtime=runtime))(name, folder=folder)
    ours = files["onnxruntime_int8" if runtime == "torch" else "int8"]
    feeds = {k: {0: x.numpy()} if p.suffix == ".xml" else _named(p, x) for k, p in files.items()}
    for count in threads:
        torch.set_num_threads(count)
        start = onnxruntime_run if runtime == "torch" else RUNTIMES[runtime]
        runs |= {key: start(path, feeds[key], count) for key, path in files.items()}
        distance = off(ours, _named(ours, x), list(runs["int8"]()))
        found = timed(runs, rounds, count)
        yield {
            "net": name,
            "runtime": runtime,
            "version": importlib.metadata.version(runtime),
            **{f"{key}_ms": round(1e3 * seconds, 2) for key, seconds in found.items()},
            "ratio": round(found["int8"] / found["float"], 3),
            **{f"{k}_ratio": round(v / found["float"], 3) for k, v in found.items() if k in ("skip_slow", *PEERS)},
            "off": float(f"{distance:.2g}"),
            "rounds": rounds,
            **environment(),
            "threads": count,
        }


def _named(path: Path, x: Tensor) -> Feeds:
    return dict(zip(input_names(path), [x.numpy()], strict=True))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--runtimes", default=",".join(RUNTIMES))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", default="1", help="one or more numbers, with a row for each")
    parser.add_argument("--keep", type=Path, help="a folder for the files")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    threads = [int(count) for count in options.threads.split(",")]
    for name in options.nets.split(","):
        for runtime in options.runtimes.split(","):
            with tempfile.TemporaryDirectory() as folder:
                kept = options.keep or Path(folder)
                try:
                    emit(measure(name, runtime, kept, options.rounds, threads), options.out)
                except Unavailable as error:
                    emit([{"net": name, "runtime": runtime, "unavailable": str(error), **environment()}], options.out)


if __name__ == "__main__":
    main()
