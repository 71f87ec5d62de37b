"""A project that uses fxquant as it is installed: passes mypy --strict, and runs."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import fxquant


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return y


def train(model: Net, x: Tensor, y: Tensor, backend: str) -> float:
    step = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = torch.optim.SGD(fxquant.parameter_groups(model, lr=0.1, scale_lr=0.01))
    schedule = fxquant.Schedule(model, [fxquant.Stage(at=2, freeze_ranges=True)], total_steps=3)
    loss = torch.zeros(())
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(step(x), y)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return loss.item()


def main(path: Path, backend: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 1, 12, 12), torch.randint(4, (8,))
    weight = fxquant.QuantSpec(bits=4, narrow=True, axis=0, range=fxquant.CurrentTensor())
    rules = [fxquant.Rule(path="head", operand="weight", spec=weight), fxquant.skip(kind="add", optional=True)]
    model = Net()
    prepared: nn.Module = fxquant.prepare(model, (x,), recipe="int8", target="onnxruntime", rules=rules)
    calibrated: Net = fxquant.calibrate(model, [x], progress=False)
    assert prepared is calibrated is model
    loss = train(model, x, y, backend)
    model.eval()
    explained: str = str(fxquant.explain(model, (x,)))
    exported = fxquant.export_onnx(model, (x,), path)
    report = fxquant.verify_onnx(model, (x,), path, rounds=3)
    assert report.integer_share == 1 and report.runtime == "onnxruntime", report
    assert report.differing_codes <= 1 + report.compared_codes // 10_000 and "head.weight" in explained
    stripped: nn.Module = fxquant.strip(model)
    assert stripped is model
    print(f"loss {loss:.3f}, {exported.file_bytes} bytes, {report.differing_codes} of {report.compared_codes} differ")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
