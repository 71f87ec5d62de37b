"""ultralytics' own trainer and EMA on a small YOLO, quantized, and the averaged model's file.

    python examples/ultralytics_yolo.py [fxquant_eager]

Its own validation and export are of the float model: what is compiled is quantized, and they compile nothing.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from PIL import Image, ImageDraw
from torch import nn

os.environ |= {"YOLO_OFFLINE": "true", "YOLO_VERBOSE": "false"}
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel

import fxquant

BACKEND = sys.argv[1] if len(sys.argv) > 1 else "fxquant"
CONVS = [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "C2f", [16, True]]]
NECK = [[-1, 1, "nn.Upsample", [None, 2, "nearest"]], [[-1, 2], 1, "Concat", [1]], [-1, 1, "C2f", [16]]]
NET = {
    "nc": 2,
    "backbone": [*CONVS, [-1, 1, "Conv", [32, 3, 2]], [-1, 1, "SPPF", [32, 5]]],
    "head": [*NECK, [[7, 4], 1, "Detect", ["nc"]]],
}


def written(folder: Path) -> str:
    """Sixteen images of a square or a disc, each with its box, and the file that names them."""
    draw = torch.Generator().manual_seed(0)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for number in range(16):
        image, kind = Image.new("RGB", (64, 64)), number % 2
        x, y, size = torch.randint(16, 32, (3,), generator=draw).tolist()
        shape = ImageDraw.Draw(image).ellipse if kind else ImageDraw.Draw(image).rectangle
        shape((x - size / 2, y - size / 2, x + size / 2, y + size / 2), fill=(250, 60 * kind, 90))
        image.save(folder / f"images/{number}.png")
        (folder / f"labels/{number}.txt").write_text(f"{kind} {x / 64} {y / 64} {size / 64} {size / 64}\n")
    about = {"path": str(folder), "train": "images", "val": "images", "names": ["square", "disc"]}
    (folder / "data.yaml").write_text(yaml.safe_dump(about))
    return str(folder / "data.yaml")


class Quantized(DetectionTrainer):
    def get_model(self, cfg: object = None, weights: object = None, verbose: bool = True) -> nn.Module:
        return fxquant.prepare(DetectionModel(NET, nc=2, verbose=False), (torch.rand(2, 3, 64, 64),))

    def _setup_train(self) -> None:
        super()._setup_train()  # makes the optimizer and the EMA; `compile` of its own takes no backend's name
        self.model, self.args.compile = torch.compile(self.model, backend=BACKEND, dynamic=False), True

    def final_eval(self) -> None:
        """Looks at the float model, with convolutions and BatchNorms merged: left out."""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        options = {"model": "small.yaml", "data": written(Path(folder, "data")), "project": folder, "plots": False}
        options |= {"epochs": 2, "imgsz": 64, "batch": 8, "workers": 0, "device": "cpu", "amp": False, "val": False}
        trainer = Quantized(overrides={**options, "optimizer": "AdamW", "lr0": 1e-3, "mosaic": 0.0})
        trainer.train()
        model, images = trainer.ema.ema, next(iter(trainer.train_loader))["img"] / 255
        model(images)  # makes the head's anchors for this size, which no graph can
        fxquant.calibrate(model, [images], progress=False)  # an average of few steps is narrow yet
        model.model[-1].export = True  # boxes alone, as its own export does
        fxquant.export_onnx(model, (images,), f"{folder}/model.onnx")
        print(fxquant.verify_onnx(model, (images,), f"{folder}/model.onnx", rounds=0))


if __name__ == "__main__":
    main()
