"""Files in one runtime, in its own environment: numpy and that runtime, neither torch nor fxquant.

    python run.py onnxruntime|openvino|opencv|tract FOLDER

``FOLDER/files.json`` names the files. A JSON line per file and level: ``off`` values of the output are further than
1/255 of its range from what it must be, ``furthest`` is the largest distance as a part of that range. Then a line per
pair of an int8 and a float file: medians of CPU milliseconds of one thread, run in turns, and how many of the int8
file's products are integer kernels.
"""

from __future__ import annotations

import collections
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[np.ndarray], np.ndarray]
Load = Callable[[str], Run]
Counts = Mapping[str, int]  # kernels by their names

WARM = 3
WHOLE = (
    r"QLinear(Conv|MatMul)|QGemm|MatMulInteger|ConvInteger|DynamicQuantizeMatMul|(Conv|MatMul|Gemm)\w*Int8|\w+ [iu]\d"
)
INTEGER = re.compile(WHOLE)
PRODUCT = re.compile(r"(Nhwc|Fused)*(Conv|MatMul|Gemm)\w*|\w+ b?f\d+")


class Onnxruntime:
    """Every graph optimization level that this version has."""

    NAMES = ("disable", "basic", "extended", "layout", "all")

    def __init__(self) -> None:
        import onnxruntime

        self.ort = onnxruntime

    def levels(self) -> dict[str, Load]:
        """The levels, the last one as it runs by default."""
        known = self.ort.GraphOptimizationLevel
        constants = {"disable": "ORT_DISABLE_ALL", **{name: f"ORT_ENABLE_{name.upper()}" for name in self.NAMES[1:]}}
        found = {name: getattr(known, constants[name], None) for name in self.NAMES}
        return {name: lambda path, at=at: self.load(path, at) for name, at in found.items() if at is not None}

    def session(self, path: str, level: Any, profile: str | None = None) -> Any:
        """A session of one thread."""
        options = self.ort.SessionOptions()
        options.graph_optimization_level, options.log_severity_level = level, 4
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        if profile:
            options.enable_profiling, options.profile_file_prefix = True, profile
        return self.ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def load(self, path: str, level: Any) -> Run:
        """The file at a level."""
        built = self.session(path, level)
        name = built.get_inputs()[0].name
        return lambda x: built.run(None, {name: x})[0]

    def kernels(self, path: str, x: np.ndarray) -> Counts:
        """Operators that ran, of a profile."""
        with tempfile.TemporaryDirectory() as folder:
            built = self.session(path, self.ort.GraphOptimizationLevel.ORT_ENABLE_ALL, f"{folder}/profile")
            built.run(None, {built.get_inputs()[0].name: x})
            events = json.loads(Path(built.end_profiling()).read_text(encoding="utf-8"))
        ran = [event for event in events if event["name"].endswith("_kernel_time")]
        return collections.Counter(event["args"]["op_name"] for event in ran)


class Openvino:
    """In float32 where the file has no integers, and as it compiles by default: bfloat16 on some CPUs."""

    def __init__(self) -> None:
        import openvino

        self.core = openvino.Core()

    def levels(self) -> dict[str, Load]:
        """The default, and float32."""
        return {"default": lambda path: self.load(path), "f32": lambda path: self.load(path, f32=True)}

    def compiled(self, path: str, f32: bool) -> Any:
        """A file for one request at a time."""
        config = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
        return self.core.compile_model(path, "CPU", {**config, **({"INFERENCE_PRECISION_HINT": "f32"} if f32 else {})})

    def load(self, path: str, f32: bool = False) -> Run:
        """The file, in float32 or as the CPU would have it."""
        request = self.compiled(path, f32).create_infer_request()
        return lambda x: request.infer([x], share_inputs=True)[0]

    def kernels(self, path: str, x: np.ndarray) -> Counts:
        """Layers of the graph that it compiled, with their precision."""
        found: collections.Counter[str] = collections.Counter()
        for layer in self.compiled(path, True).get_runtime_model().get_ordered_ops():
            info = {key: layer.get_rt_info()[key].astype(str) for key in ("layerType", "runtimePrecision")}
            if info["layerType"] in ("Convolution", "Deconvolution", "FullyConnected", "MatMul"):
                found["{layerType} {runtimePrecision}".format(**info)] += 1
        return found


class Opencv:
    """OpenCV's dnn module, with the engine that it takes by itself."""

    def __init__(self) -> None:
        os.environ["OPENCV_LOG_LEVEL"] = "OFF"
        import cv2

        self.cv2 = cv2
        cv2.setNumThreads(1)

    def levels(self) -> dict[str, Load]:
        """One."""
        return {"default": self.load}

    def load(self, path: str) -> Run:
        """The file; the output is copied, for OpenCV may write the next one into it."""
        net = self.cv2.dnn.readNetFromONNX(path)

        def run(x: np.ndarray) -> np.ndarray:
            net.setInput(x)
            return net.forward().copy()

        return run

    def kernels(self, path: str, x: np.ndarray) -> Counts:
        """Layers of the net that it made of the file."""
        net = self.cv2.dnn.readNetFromONNX(path)
        net.setInput(x)
        net.forward()
        return collections.Counter(re.findall(r"^ +(\w+) \{$", net.dump(), re.MULTILINE))


class Tract:
    """tract, which is of one thread."""

    def __init__(self) -> None:
        import tract

        self.tract = tract

    def levels(self) -> dict[str, Load]:
        """One."""
        return {"default": self.load}

    def load(self, path: str) -> Run:
        """The file, optimized."""
        built = self.tract.onnx().load(path).into_model().into_runnable()
        return lambda x: built.run([x])[0].to_numpy()

    def kernels(self, path: str, x: np.ndarray) -> Counts:
        """Operators of the optimized model that multiply and add, with the type in which they do."""
        told = json.loads(self.tract.onnx().load(path).into_model().into_runnable().profile_json(None))
        found: collections.Counter[str] = collections.Counter()
        for node in told["nodes"]:
            types = [key[4:-1].lower() for key in node.get("cost", {}) if key.startswith("FMA(")]
            if types and re.search("MatMul|Conv", node["op_name"]):
                found[f"{node['op_name']} {types[0]}"] += 1
        return found


RUNTIMES = {"onnxruntime": Onnxruntime, "openvino": Openvino, "opencv": Opencv, "tract": Tract}


def main() -> None:
    """Command line."""
    runtime, folder = RUNTIMES[sys.argv[1]](), Path(sys.argv[2])
    given = json.loads((folder / "files.json").read_text(encoding="utf-8"))
    levels = runtime.levels()
    for file in given["files"]:
        for level, load in levels.items():
            print(json.dumps({"file": file["file"], "level": level, **codes(load, folder, file)}), flush=True)
    level, load = list(levels.items())[-1]
    for pair in given["pairs"]:
        row = {"file": pair["int8"]["file"], "level": level, **codes(load, folder, pair["int8"])}
        if row["error"] is None:
            row |= speed(load, folder, pair, given["rounds"])
            row |= integers(runtime.kernels(str(folder / pair["int8"]["file"]), data(folder, pair["int8"])))
        print(json.dumps(row), flush=True)


def data(folder: Path, file: Mapping[str, Any]) -> np.ndarray:
    """The input of a file."""
    found = np.fromfile((folder / file["file"]).with_suffix(".x"), "<f4")
    return found.reshape(file["shape"])


def codes(load: Load, folder: Path, file: Mapping[str, Any]) -> dict[str, object]:
    """The output beside the one that must be, or why there is none."""
    path = folder / file["file"]
    expected = np.fromfile(path.with_suffix(".y"), "<f4")
    try:
        found, why = load(str(path))(data(folder, file)).reshape(-1), None
    except Exception as error:  # every runtime has its own
        return {"off": None, "furthest": None, "of": expected.size, "error": words(error)}
    distance = np.where(np.isfinite(found), abs(found - expected), np.inf) / np.ptp(expected)
    furthest = float(f"{distance.max():.2g}") if np.isfinite(distance).all() else None
    return {"off": int((distance > 1 / 255).sum()), "furthest": furthest, "of": expected.size, "error": why}


def words(error: Exception) -> str:
    """What an exception says, in one line, without the trace of its runtime."""
    told = str(error).partition("Stack backtrace:")[0].splitlines()
    lines = [line.strip() for line in told if line.strip() and not line.startswith("Exception from")]
    return " ".join(lines)[:400] or type(error).__name__


def speed(load: Load, folder: Path, pair: Mapping[str, Any], rounds: int) -> dict[str, object]:
    """Medians of both files, which take turns, and of the ratios of each turn."""
    x = data(folder, pair["int8"])
    runs = {key: load(str(folder / pair[key]["file"])) for key in ("int8", "float")}
    taken: dict[str, list[float]] = {key: [] for key in runs}
    for number in range(rounds + WARM):
        for key in list(runs)[:: 1 if number % 2 else -1]:
            start = time.process_time()
            runs[key](x)
            if number >= WARM:
                taken[key].append(time.process_time() - start)
    ratios = [int8 / plain for int8, plain in zip(taken["int8"], taken["float"], strict=True)]
    median = {f"{key}_ms": round(1e3 * statistics.median(found), 3) for key, found in taken.items()}
    return {**median, "ratio": round(statistics.median(ratios), 3), "clock": "CPU", "rounds": rounds}


def integers(kernels: Counts) -> dict[str, object]:
    """How many products are integer kernels, and of how many."""
    whole = sum(count for name, count in kernels.items() if INTEGER.match(name))
    products = {name: count for name, count in kernels.items() if INTEGER.match(name) or PRODUCT.fullmatch(name)}
    return {"integer": whole, "products": sum(products.values()), "kernels": dict(sorted(products.items()))}


if __name__ == "__main__":
    main()
