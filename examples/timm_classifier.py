"""A classifier of timm: a few steps with timm's EMA, then the file that onnxruntime runs on integers.

    python examples/timm_classifier.py [resnet18|mobilenetv3|efficientnet|convnext|vit|swin|repvgg] [fxquant_eager]

RepVGG trains with its branches merged (`reparameterize_model`): what is deployed is one convolution a block, and a
fake-quant of each branch would be none of that convolution.
"""

from __future__ import annotations

import sys
import tempfile

import timm
import torch
from timm.utils import ModelEmaV3
from timm.utils.model import reparameterize_model
from torch.nn.functional import cross_entropy

import fxquant

MODELS = {
    "resnet18": ("resnet18", {}),
    "mobilenetv3": ("mobilenetv3_small_050", {}),
    "efficientnet": ("efficientnet_lite0", {}),
    "convnext": ("convnext_atto", {"depths": (1, 1, 2, 1)}),
    "vit": ("vit_tiny_patch16_224", {"img_size": 64, "depth": 3}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4, "depths": (2, 2), "num_heads": (3, 6)}),
    "repvgg": ("repvgg_a0", {}),
}


def batch(seed: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose class is the quadrant that is bright."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (size,), generator=draw)
    images = torch.randn(size, 3, 64, 64, generator=draw) * 0.5
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, label // 2 * 32 :, label % 2 * 32 :][:, :32, :32] += 1.5
    return images, labels


def main() -> None:
    torch.manual_seed(0)
    backend = "fxquant_eager" if "fxquant_eager" in sys.argv else "fxquant"
    name, arguments = MODELS[next((word for word in sys.argv[1:] if word in MODELS), "resnet18")]
    model = timm.create_model(name, pretrained=False, num_classes=4, **arguments)
    if "repvgg" in name:
        model = reparameterize_model(model)
    images, _ = batch(0)
    fxquant.prepare(model, (images,), target="onnxruntime")
    step = torch.compile(model, backend=backend)
    ema = ModelEmaV3(model, decay=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for i in range(4):
        images, labels = batch(i)
        loss = cross_entropy(step(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)
        print(f"step {i}: loss {loss.item():.3f}")

    averaged = ema.module  # a copy of the model, its quantizers averaged like its weights
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/{name}.onnx"
        print(fxquant.export_onnx(averaged, (images,), path))
        print(fxquant.verify_onnx(averaged, (images,), path, rounds=0))


if __name__ == "__main__":
    main()
