"""Quantization-aware distillation: the teacher is the same prepared model, run without compile, that is, in float.

    python examples/distill.py [fxquant_eager]

The teacher is a copy taken before the student's first step: what trains cannot teach what it was. Both are prepared,
and one of them is compiled.
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


def divergence(student: nn.Module, teacher: nn.Module, x: Tensor) -> Tensor:
    """KL of the student's answers from the teacher's, the mean over rows."""
    with torch.no_grad():
        aim = F.log_softmax(teacher(x), 1)
    return F.kl_div(F.log_softmax(student(x), 1), aim, log_target=True, reduction="batchmean")


def shown(student: nn.Module, teacher: nn.Module, x: Tensor) -> str:
    """How near the student is to the teacher on rows that it was not trained on."""
    student.eval()
    with torch.no_grad():
        same = (student(x).argmax(1) == teacher(x).argmax(1)).float().mean().item()
        text = f"KL {divergence(student, teacher, x).item():.4f}, same answers {same:.1%}"
    student.train()
    return text


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
    fxquant.calibrate(model, [(x,)], progress=False)
    print("quantized, before:", shown(student, teacher, held_out))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(100):
        optimizer.zero_grad()
        divergence(student, teacher, x).backward()
        optimizer.step()
    print("distilled, after: ", shown(student, teacher, held_out))
    with tempfile.TemporaryDirectory() as folder:
        fxquant.export_onnx(model.eval(), (x,), f"{folder}/model.onnx")
        print(fxquant.verify_onnx(model, (x,), f"{folder}/model.onnx"))


if __name__ == "__main__":
    main()
