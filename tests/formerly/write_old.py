"""Wrote the files beside it, with fxquant as it was at commit 29b4908, before modules got the rooms that they have now.

Run there as ``python write_old.py FOLDER``. The tests load what it wrote.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch
from torch import nn

import fxquant


def net() -> nn.Sequential:
    """Convolution, BatchNorm and a linear: plain modules, so that a pickle names no class of a test."""
    torch.manual_seed(0)
    convolution = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(convolution, nn.Flatten(), nn.Linear(16, 8), nn.ReLU6(), nn.Linear(8, 2))


def images() -> torch.Tensor:
    """Four of them, the same each time."""
    return torch.linspace(-1, 1, 64).sin().reshape(4, 1, 4, 4)


def trained(**settings: object) -> nn.Module:
    """The net after three steps."""
    model = net()
    fxquant.prepare(model, (images(),), **settings)
    step = torch.compile(model, backend="fxquant_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        step(images()).square().mean().backward()
        optimizer.step()
    return model.eval()


def main(folder: Path) -> None:
    """Whole models, a checkpoint, and settings as a user may have pickled them."""
    plain = trained()
    delayed = trained(ranges="delayed", recipe="w4a8", target="openvino", rules=[fxquant.skip("4")])
    fxquant.override(delayed, {"2.input": None})
    fxquant.freeze_batch_norm(delayed)
    outputs = {}
    for name, model in (("plain", plain), ("delayed", delayed)):
        torch.save(model, folder / f"{name}.pt")
        with torch.no_grad():
            outputs[name] = torch.compile(model, backend="fxquant_eager")(images())
    torch.save(plain.state_dict(), folder / "checkpoint.pt")
    torch.save(outputs, folder / "outputs.pt")
    weight = fxquant.QuantSpec(bits=4, range=fxquant.CurrentTensor())
    settings = {
        "recipe": fxquant.recipes.INT8,
        "rule": fxquant.Rule(path="head", operand="weight", spec=weight),
        "spec": fxquant.QuantSpec(range=fxquant.Fixed(min=0.0, max=6.0)),
        "range": fxquant.MovingAverage(constant=0.1, delayed=True),
        "plan": fxquant.state.plan_of(plain),
        "format": fxquant.formats.float_format("e4m3"),
    }
    (folder / "settings.pickle").write_bytes(pickle.dumps(settings))


if __name__ == "__main__":
    import fxquant.formats
    import fxquant.recipes
    import fxquant.state

    main(Path(sys.argv[1]))
