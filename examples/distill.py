"""Quantization-aware distillation: the teacher is the same prepared model, run without compile, that is, in float.

    python examples/distill.py [fxquant_eager]

The teacher takes no second copy of the weights here, as they start equal and only the student's quantized step trains
them towards what they said before: keep a float copy instead where the weights move far.
"""

from __future__ import annotations

import sys
import tempfile

import torch
import torch.nn.functional as F
from torch import nn

import fxquant

BACKEND = sys.argv[1] if len(sys.argv) > 1 else "fxquant"
X = torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
Y = (X[:, :4].argmax(1)).long()


def agreement(student: nn.Module, targets: torch.Tensor) -> float:
    with torch.no_grad():
        return (student(X).argmax(1) == targets.argmax(1)).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):  # the float start
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    with torch.no_grad():
        teacher = F.log_softmax(model(X), 1)
    fxquant.prepare(model, (X[:2],), recipe="w4a8")
    student = torch.compile(model, backend=BACKEND)
    fxquant.calibrate(model, [(X,)])
    model.eval()
    print(f"agreement with float before: {agreement(student, teacher):.3f}")
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(50):
        optimizer.zero_grad()
        F.kl_div(F.log_softmax(student(X), 1), teacher, log_target=True, reduction="batchmean").backward()
        optimizer.step()
    model.eval()
    print(f"agreement with float after: {agreement(student, teacher):.3f}")
    with tempfile.TemporaryDirectory() as folder:
        fxquant.export_onnx(model, (X,), f"{folder}/model.onnx")
        print(fxquant.verify_onnx(model, (X,), f"{folder}/model.onnx"))


if __name__ == "__main__":
    main()
