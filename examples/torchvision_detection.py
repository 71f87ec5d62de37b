"""Detection with torchvision: its detector trains whole, its network quantized, and the network's file.

    python examples/torchvision_detection.py [ssdlite320_mobilenet_v3_large] [fxquant_eager]

Resizing, anchors, losses and the choice of boxes depend on values and stay torchvision's, in float.
"""

from __future__ import annotations

import sys
import tempfile

import torch
import torchvision
from torch import Tensor, nn

import fxquant

SIZE = 96


def batch(seed: int, rows: int = 4) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images with one bright square on noise, and its box."""
    draw = torch.Generator().manual_seed(seed)
    images, targets = torch.rand(rows, 3, SIZE, SIZE, generator=draw) * 0.3, []
    for image in images:
        top, left = torch.randint(0, SIZE - 40, (2,), generator=draw).tolist()
        image[:, top : top + 40, left : left + 40] += 0.7
        box = torch.tensor([[left, top, left + 40, top + 40]], dtype=torch.float32)
        targets.append({"boxes": box, "labels": torch.tensor([1])})
    return list(images), targets


class Network(nn.Module):
    """What of a detector depends on no value: the backbone, then the heads on each of its levels."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.backbone(images).values()))


def main() -> None:
    torch.manual_seed(0)
    backend = "fxquant_eager" if "fxquant_eager" in sys.argv else "fxquant"
    name = next((word for word in sys.argv[1:] if word != backend), "ssdlite320_mobilenet_v3_large")
    build = getattr(torchvision.models.detection, name)
    detector = build(weights=None, weights_backbone=None, num_classes=2)
    detector.transform.fixed_size = (SIZE, SIZE)
    network = Network(detector)
    example = torch.stack(batch(0)[0])
    fxquant.prepare(network, (example,), target="onnxruntime")
    detector.backbone.compile(backend=backend)  # the two that the detector calls
    detector.head.compile(backend=backend)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    for i in range(4):
        losses = detector(*batch(i))
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {i}: loss {loss.item():.3f}")

    fxquant.calibrate(network, [example], progress=False)  # four steps move a range a little of its way
    detector.eval()
    print("boxes of the first image:", len(detector(batch(0)[0])[0]["boxes"]))
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/{name}.onnx"
        fxquant.export_onnx(network, (example,), path)
        print(fxquant.verify_onnx(network, (example,), path, rounds=0))


if __name__ == "__main__":
    main()
