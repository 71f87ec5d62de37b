"""The work itself: train a net in float, then take a copy through PTQ, QAT, export and verification."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxquant
from fxquant.shell.demo.console import Console
from fxquant.shell.demo.data import Digits, calibration
from fxquant.shell.demo.extras import require
from fxquant.shell.demo.nets import NETS
from fxquant.shell.demo.results import Result
from fxquant.shell.demo.train import Forward, Schedule, accuracy, score, train
from fxquant.targets.cpu import sums_saturate
from fxquant.targets.session import EXACT_SUMS, input_names, run_outputs

RECIPES = ("int8", "w4a8")
TARGET = "onnxruntime"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The schedules: float training for each net, and fine-tuning, the same for every net and recipe."""

    floats: dict[str, Schedule]
    qat: Schedule

    @classmethod
    def full(cls) -> Budget:
        """What a good result needs on two cores: 10 to 15 seconds of float training a net."""
        return cls(
            floats={
                "cnn": Schedule(epochs=30, learning_rate=5e-3),
                "vit": Schedule(epochs=60, learning_rate=6e-3),
            },
            qat=Schedule(epochs=12, learning_rate=5e-4, frozen_epochs=2),
        )

    @classmethod
    def quick(cls) -> Budget:
        """A handful of steps, to see that everything runs; the accuracies mean nothing."""
        short = Schedule(epochs=2, learning_rate=3e-3, steps_per_epoch=4)
        qat = Schedule(epochs=2, learning_rate=5e-4, frozen_epochs=1, steps_per_epoch=2)
        return cls(floats=dict.fromkeys(NETS, short), qat=qat)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A float net with its accuracy and the mean loss of each epoch."""

    net: str
    model: nn.Module
    accuracy: float
    curve: list[float]


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A net under one recipe: the result row, the loss of each epoch, and each site's SQNR in dB."""

    result: Result
    curve: list[float]
    sqnr: dict[str, float] = field(default_factory=dict)


def compiled(model: nn.Module, backend: str) -> Forward:
    """``torch.compile``, told that shapes are fixed: training and evaluation have one each."""
    forward: Forward = torch.compile(model, backend=backend, dynamic=False)
    return forward


def train_float(net: str, digits: Digits, schedule: Schedule, *, seed: int, console: Console) -> Trained:
    """Build and train one net, eagerly: for nets this small that is quicker than compiling first."""
    torch.manual_seed(seed)
    model = NETS[net]()
    with console.bar(f"{net} float", schedule.steps(digits)) as advance:
        curve = train(model, model, digits, schedule, seed=seed, advance=advance)
    reached = accuracy(model, model, digits)
    console.stage(f"{net} float", f"{100 * reached:.1f} % of the held-out digits")
    return Trained(net=net, model=model, accuracy=reached, curve=curve)


def quantize(
    trained: Trained,
    recipe: str,
    digits: Digits,
    schedule: Schedule,
    *,
    seed: int,
    out: Path,
    console: Console,
) -> Quantized:
    """Take a copy of a float net to an ONNX file that is proven against it, and say what each stage cost."""
    from fxquant.report import sqnr

    torch.compiler.reset()  # a net's graphs under the last recipe count against Dynamo's recompile limit
    torch.manual_seed(seed)
    title = f"{trained.net} {recipe}"
    model = fxquant.prepare(copy.deepcopy(trained.model), (digits.example,), recipe=recipe, target=TARGET)

    fxquant.calibrate(model, calibration(digits))
    ptq = accuracy(model, compiled(model, "fxquant_eager"), digits)
    console.stage(f"{title} PTQ", f"{100 * ptq:.1f} %")

    with console.bar(f"{title} QAT", schedule.steps(digits)) as advance:
        curve = fine_tune(model, digits, schedule, seed=seed + 1, advance=advance)
    with torch.no_grad():
        logits = compiled(model, "fxquant_eager")(digits.test_x)
    qat = score(logits, digits)
    console.stage(f"{title} QAT", f"{100 * qat:.1f} %; exporting and verifying")

    path = out / f"{trained.net}-{recipe}.onnx"
    report = deploy(model, digits, path)
    deployed = run_onnx(path, digits.test_x)
    say_of_sums(title, path, console)
    result = Result(
        net=trained.net,
        recipe=recipe,
        float_acc=trained.accuracy,
        ptq_acc=ptq,
        qat_acc=qat,
        onnx_acc=score(deployed, digits),
        same_class=float((deployed.argmax(1) == logits.argmax(1)).double().mean()),
        **proof(report),
    )
    return Quantized(result=result, curve=curve, sqnr=dict(sqnr(model, (digits.test_x,))))


def fine_tune(
    model: nn.Module, digits: Digits, schedule: Schedule, *, seed: int, advance: Callable[[float], None]
) -> list[float]:
    """Train a prepared net, compiled, its batch norms and ranges frozen for the last epochs; leaves it in eval mode."""

    def freeze() -> None:
        fxquant.freeze_batch_norm(model)
        fxquant.freeze_ranges(model)

    step = compiled(model, "fxquant")
    curve = train(model, step, digits, schedule, seed=seed, advance=advance, freeze=freeze)
    model.eval()
    return curve


def deploy(model: nn.Module, digits: Digits, path: Path) -> Any:
    """Write the ONNX file, and beside it what export and verification say, ``.txt`` and ``.html``; the report."""
    from fxquant.report import html

    exported = fxquant.export_onnx(model, (digits.example,), str(path))
    report = fxquant.verify_onnx(model, (digits.test_x,), str(path))
    path.with_suffix(".txt").write_text(f"{exported}\n\n{report}\n", encoding="utf-8")
    html(model, (digits.test_x,), path.with_suffix(".html"), verified=report)
    return report


def proof(report: Any) -> dict[str, Any]:
    """The numbers of a verification report that belong in the results."""
    return {
        "differing_codes": int(report.differing_codes),
        "compared_codes": int(report.compared_codes),
        "integer_share": float(report.integer_share),
        "latency_ratio": float(report.latency_ratio),
        "cascaded_codes": int(report.cascaded_codes),
    }


def say_of_sums(title: str, path: Path, console: Console) -> None:
    """That the file was read with other sums than by default, where those saturate."""
    if sums_saturate():
        told = path.with_suffix(".txt").name
        console.stage(title, f"onnxruntime's sums saturate on this CPU: read with exact ones, see {told}")


def run_onnx(path: Path, images: Tensor) -> Tensor:
    """The file's logits for all ``images``, from onnxruntime on the CPU, with exact sums also where they saturate."""
    require("onnxruntime")
    (name,) = input_names(path)
    (logits,) = run_outputs(path, {name: images.numpy()}, optimize=True, config=EXACT_SUMS)
    return torch.from_numpy(logits)
