"""Semantic segmentation with torchvision: a few steps with an auxiliary loss, then the file for the runtime.

    python examples/torchvision_segmentation.py [lraspp_mobilenet_v3_large|fcn_resnet50|…] [fxquant_eager]

These models return a dict; so does the prepared one, and the file has an output for each of its entries.
"""

from __future__ import annotations

import sys
import tempfile

import torch
import torchvision
from torch.nn.functional import cross_entropy

import fxquant

CLASSES = 3


def batch(seed: int, size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of one bright and one dark square on noise, and the class of each pixel."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 64, 64, generator=draw) * 0.3
    masks = torch.zeros(size, 64, 64, dtype=torch.long)
    for image, mask in zip(images, masks, strict=True):
        for kind, shade in ((1, 2.0), (2, -2.0)):
            top, left = torch.randint(0, 40, (2,), generator=draw).tolist()
            image[:, top : top + 24, left : left + 24] += shade
            mask[top : top + 24, left : left + 24] = kind
    return images, masks


def main() -> None:
    torch.manual_seed(0)
    backend = "fxquant_eager" if "fxquant_eager" in sys.argv else "fxquant"
    name = next((word for word in sys.argv[1:] if word != backend), "lraspp_mobilenet_v3_large")
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES)
    images, _ = batch(0)
    fxquant.prepare(model, (images,), target="onnxruntime")
    step = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for i in range(4):
        images, masks = batch(i)
        outputs = step(images)
        loss = cross_entropy(outputs["out"], masks)
        if "aux" in outputs:
            loss = loss + 0.4 * cross_entropy(outputs["aux"], masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {i}: loss {loss.item():.3f}")

    # A few steps move a range, and a BatchNorm's statistics, a few hundredths of their way: look at data once more.
    fxquant.calibrate(model, [batch(i)[0] for i in range(4)], progress=False)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/{name}.onnx"
        print(fxquant.export_onnx(model, (images,), path))
        print(fxquant.verify_onnx(model, (images,), path, rounds=0))


if __name__ == "__main__":
    main()
