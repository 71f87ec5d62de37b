"""A file run as the standard says, with what goes into and comes out of its quantizers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fxquant.errors import MissingDependency
from fxquant.support.require import require
from fxquant.targets.document import Feeds, ModelPath, Wiring, as_declared, folder_of, load_model
from fxquant.targets.rounded import is_beyond_onnxruntime, rounded
from fxquant.targets.session import data_folder, is_newer_than_onnxruntime, run_session, session
from fxquant.targets.standard import TRT, needs_standard, run_standard

if TYPE_CHECKING:
    import numpy as np
    import onnx


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What a run gave.

    Attributes:
        outputs: the graph's, by name, in order.
        pairs: QuantizeLinear's result → what it read, and what the DequantizeLinear after it gave.
        too_new: why the installed onnxruntime did not run it, empty where it did or is not installed.
    """

    outputs: Mapping[str, np.ndarray]
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]
    too_new: str = ""


def evaluate(path: ModelPath, inputs: Sequence[np.ndarray], labels: Collection[str]) -> Evaluated:
    """One run: in onnxruntime without optimizations, or, where none that knows the opset is installed, in onnx's own
    evaluator.

    A file of a half type that onnxruntime has no kernels for runs as `rounded`, in float32 with each result rounded.

    ``inputs`` are in the graph's order. ``labels`` are results of QuantizeLinear nodes; those that the file lacks are
    left out. Raises what the runtime raises, ExportError where onnxruntime does not load or run the file, ValueError
    for another number of inputs.
    """
    model = load_model(path)
    outputs = [output.name for output in model.graph.output]
    feeds = as_declared(model, dict(zip([value.name for value in model.graph.input], inputs, strict=True)))
    pairs = _pairs(Wiring(model=model, folder=folder_of(path)), labels)
    model = rounded(model, folder_of(path)) if is_beyond_onnxruntime(model) else model
    wanted = dict.fromkeys(name for pair in pairs.values() for name in pair if name not in feeds)
    shown = [*outputs, *(name for name in wanted if name not in outputs)]
    for name in shown[len(outputs) :]:
        model.graph.output.append(require("onnx").ValueInfoProto(name=name))
    too_new = _too_new(model)
    run = _run_by_standard if too_new is None or too_new or needs_standard(model) else _run
    found = {**feeds} | dict(zip(shown, run(model, path, shown, feeds), strict=True))
    return Evaluated(
        outputs={name: found[name] for name in outputs},
        pairs={label: (found[read], found[given]) for label, (read, given) in pairs.items()},
        too_new=too_new or "",
    )


def _pairs(wiring: Wiring, labels: Collection[str]) -> dict[str, tuple[str, str]]:
    found = {}
    for node in wiring.model.graph.node:
        label = node.output[0] if node.output else ""
        quantize = node if node.domain == TRT else wiring.quantizer_of(label)
        if quantize is not None and label in labels and quantize.input[0] not in wiring.constants:
            after = [user for user in wiring.consumers.get(label, ()) if user.op_type.endswith("DequantizeLinear")]
            if after:
                found[label] = (quantize.input[0], after[0].output[0])
    return found


def _too_new(model: onnx.ModelProto) -> str | None:
    """How the installed onnxruntime is older than the model, empty where it is not; None where none is installed."""
    try:
        ort = require("onnxruntime")
    except MissingDependency:
        return None
    if not is_newer_than_onnxruntime(model):
        return ""
    opset = next((each.version for each in model.opset_import if not each.domain), None)
    return f"onnxruntime {ort.__version__} is older than the file's opset {opset} or format {model.ir_version}"


def _run_by_standard(model: onnx.ModelProto, path: ModelPath, names: list[str], feeds: Feeds) -> list[np.ndarray]:
    require("onnx").load_external_data_for_model(model, folder_of(path))
    return run_standard(model, names, feeds)


def _run(model: onnx.ModelProto, path: ModelPath, names: list[str], feeds: Feeds) -> list[np.ndarray]:
    built = session(model.SerializeToString(), optimize=False, config=data_folder(path))
    return run_session(built, names, feeds)
