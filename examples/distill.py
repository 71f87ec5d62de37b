"""Quantization-aware distillation: a quantized model learns the answers of the float model that it was made of.

    python examples/distill.py [fxquant_eager]

The teacher is a copy taken before the student's first step. Without one the student's float twin teaches, at no second
copy of the weights; it moves with the student, and wants a loss of the task beside it.
"""

from __future__ import annotations

import copy
import sys
import tempfile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant

BACKEND = sys.argv[1] if len(sys.argv) > 1 else "fxquant"
CLASSES = 10
CENTRES = torch.randn(CLASSES, 16, generator=torch.Generator().manual_seed(1))
# With weights of 3 bits the float model's answers are not kept by rounding alone.
W3A8 = fxquant.Recipe(name="w3a8", weight=fxquant.QuantSpec(bits=3, narrow=True, axis=0, range=fxquant.CurrentTensor()))


def points(seed: int) -> tuple[Tensor, Tensor]:
    """Points around the centre of their class, which overlap."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (2048,), generator=draw)
    return CENTRES[labels] + 1.2 * torch.randn(2048, 16, generator=draw), labels


def shown(student: nn.Module, distill: fxquant.distill.Distillation, x: Tensor) -> str:
    """How near the student is to the teacher on rows that it was not trained on."""
    student.eval()
    with torch.no_grad():
        answers, divergence, _ = distill(x)
        same = (answers.argmax(1) == distill.teacher(x).argmax(1)).float().mean().item()
    student.train()
    return f"KL {divergence.item():.4f}, same answers {same:.1%}"


def main() -> None:
    torch.manual_seed(0)
    (x, labels), (held_out, _) = points(1), points(2)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):  # the float start
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    fxquant.prepare(model, (x[:2],), recipe=W3A8)
    teacher = copy.deepcopy(model)
    student = torch.compile(model, backend=BACKEND)
    distill = fxquant.distill.loss(student, teacher)
    fxquant.calibrate(model, [(x,)], progress=False)
    print("quantized, before:", shown(student, distill, held_out))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(100):
        optimizer.zero_grad()
        distill(x).loss.backward()
        optimizer.step()
    print("distilled, after: ", shown(student, distill, held_out))
    with tempfile.TemporaryDirectory() as folder:
        fxquant.export_onnx(model.eval(), (x,), f"{folder}/model.onnx")
        print(fxquant.verify_onnx(model, (x,), f"{folder}/model.onnx"))


if __name__ == "__main__":
    main()
