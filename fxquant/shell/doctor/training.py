"""The proof that it all works: a step of a tiny net by the backend, its file, and the file held to the training."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fxquant
from fxquant.shell.doctor.checks import BROKEN, LEFT_OUT, NOTE, OK, Check, Finding

BACKEND = "fxquant"
_SEVEN_BITS = "weights of QuantSpec(bits=7) sum exactly: docs/runtimes.md"
FOR_EXPORT = ("torch", "onnx", "onnxscript")
_REPORT = "mend what is broken above; else it is a bug: report it with the output of fxquant doctor --json"


class Proof:
    """What a step hands on to the next."""

    def __init__(self) -> None:
        self.model: Any = None
        self.args: tuple[Any, ...] = ()
        self.trained = self.exported = False


def checks(*, quick: bool) -> Iterator[Check]:
    """A step, an export, a verification; each needs the one before."""
    proof = Proof()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.onnx"
        train = Check(
            name="train", doing="compiling a training step", ask=lambda: _train(proof), mend=_REPORT, needs=("torch",)
        )
        export = replace(
            train, name="export", doing="exporting a file", ask=lambda: _export(proof, path), needs=FOR_EXPORT
        )
        verify = replace(
            train,
            name="verify",
            doing="holding the file to the training",
            ask=lambda: _verify(proof, path),
            needs=(*FOR_EXPORT, "onnxruntime"),
        )
        for each in (train, export, verify):
            yield replace(each, ask=_left_out) if quick else each


def _left_out() -> Finding:
    return Finding(status=LEFT_OUT, found="by --quick")


def _train(proof: Proof) -> Finding:
    """One step of a convolution with its BatchNorm, and a linear; ``fullgraph`` makes a graph break an error."""
    import torch
    from torch import nn

    if BACKEND not in torch.compiler.list_backends(exclude_tags=()):
        return Finding(
            status=BROKEN,
            found=f'torch.compile knows no backend "{BACKEND}": the package is imported but not installed',
            fix="pip install -e . in the checkout, or import fxquant.backend first",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        x, wanted = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    fxquant.prepare(model, (x,))
    step = torch.compile(model, backend=BACKEND, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(step(x), wanted)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    before, after = losses
    if not (math.isfinite(after) and after < before):
        told = f"a step must lower the loss of the batch that it saw: got {before} → {after}"
        return Finding(status=BROKEN, found=told, fix=_REPORT)
    proof.model, proof.args, proof.trained = model, (x,), True
    return Finding(status=OK, found=f"a compiled step without a graph break; loss {before:.3f} → {after:.3f}")


def _export(proof: Proof, path: Path) -> Finding:
    if not proof.trained:
        return Finding(status=LEFT_OUT, found="nothing was trained")
    fxquant.export_onnx(proof.model.eval(), proof.args, str(path))
    proof.exported = True
    return Finding(status=OK, found=f"a file of {path.stat().st_size} bytes")


def _verify(proof: Proof, path: Path) -> Finding:
    if not proof.exported:
        return Finding(status=LEFT_OUT, found="nothing was exported")
    from fxquant.targets.cpu import sums_saturate

    report = fxquant.verify_onnx(proof.model, proof.args, str(path), rounds=0)
    integer = f"{sum(row.integer for row in report.rows)} of {len(report.rows)} products run on integers"
    codes = f"{report.differing_codes} of {report.compared_codes} codes differ from training's"
    bad = [str(level) for level in report.levels if not level.holds]
    found = "; ".join([f"in {report.runtime} {integer}", codes, *bad])
    if bad and sums_saturate() and report.levels[0].holds:  # the first has no optimized kernels
        return Finding(status=NOTE, found=f"{found}: 8-bit sums saturate on this CPU", fix=_SEVEN_BITS)
    return Finding(status=BROKEN, found=found, fix=_REPORT) if bad else Finding(status=OK, found=found)
