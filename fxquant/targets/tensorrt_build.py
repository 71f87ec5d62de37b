"""Parses an ONNX file with NVIDIA's own parser and builds it with TensorRT for RTX: a program of its own.

`fxquant.targets.tensorrt_run` starts it, so that a builder that ends the process ends this one. It reads a request and
writes an answer, both JSON. It imports nothing of fxquant and no torch: it starts in a part of a second. Tried with
tensorrt_rtx 1.7.1, public API only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# Of an input whose sizes are open, where the request does not say: the least, the most usual and the largest.
_OPEN_SIZES = (1, 8, 8)

# Said once for each library where there is no driver, which a build does not need.
_NO_DEVICE = "Cuda Runtime"


def logger(trt: Any, lines: list[tuple[str, str]]) -> Any:
    """A logger that keeps errors and warnings in ``lines``."""
    severities = trt.ILogger.Severity

    def log(self: Any, severity: Any, text: str) -> None:
        if severity <= severities.WARNING and _NO_DEVICE not in text:
            lines.append(("warning" if severity == severities.WARNING else "error", text))

    def start(self: Any) -> None:
        trt.ILogger.__init__(self)

    return type("Log", (trt.ILogger,), {"__init__": start, "log": log})()


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Parses ``model``, builds it and writes the ``plan``, if it is asked for.

    The request: paths of ``model``, ``plan`` (or None) and ``location``, beside which external weights lie;
    ``shapes``, input → sizes; ``capability``, as ``[8, 9]`` (or None, for one that the builder chooses).
    """
    import tensorrt_rtx as trt

    lines: list[tuple[str, str]] = []
    log = logger(trt, lines)
    builder = trt.Builder(log)
    network = builder.create_network(0)  # strongly typed, as all are from TensorRT 11 on
    parser = trt.OnnxParser(network, log)
    answer: dict[str, Any] = {"version": trt.__version__, "parsed": False, "built": False, "errors": [], "log": lines}
    answer["parsed"] = parser.parse(Path(request["model"]).read_bytes(), request["location"])
    if not answer["parsed"]:
        found = [parser.get_error(index) for index in range(parser.num_errors)]
        answer["errors"] = [(error.node_name(), error.node_operator(), _said(error.desc())) for error in found]
        return answer
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the plan then names the file's nodes
    if request["capability"] is not None:
        major, minor = request["capability"]
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{major}{minor}"), 0)
    _set_sizes(builder, network, config, request["shapes"])
    plan = builder.build_serialized_network(network, config)
    if plan is not None:
        answer["built"] = True
        Path(request["plan"]).write_bytes(plan)
    return answer


def _said(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if _NO_DEVICE not in line)


def _set_sizes(builder: Any, network: Any, config: Any, shapes: dict[str, list[int]]) -> None:
    """One optimization profile for the inputs whose sizes are open."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        value = network.get_input(index)
        given = shapes.get(value.name)
        if any(size < 0 for size in value.shape):
            ranges = [given if given else [_size(s, open_) for s in value.shape] for open_ in _OPEN_SIZES]
            profile.set_shape(value.name, *ranges)
    config.add_optimization_profile(profile)


def _size(size: int, open_size: int) -> int:
    return open_size if size < 0 else size


if __name__ == "__main__":
    asked, answered = sys.argv[1:]
    Path(answered).write_text(json.dumps(build(json.loads(Path(asked).read_text()))))
