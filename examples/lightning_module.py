"""A Lightning module trained quantized: a checkpoint, a resumed run, and an average of the weights and ranges.

python examples/lightning_module.py [fxquant_eager]
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings

import lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxquant

BACKEND = sys.argv[1] if len(sys.argv) > 1 else "fxquant"
X = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = (X.mean((1, 2, 3)) > 0).long()
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)
        )
        fxquant.prepare(self.net, (X[:2],))
        self.net.compile(backend=BACKEND, dynamic=False)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def fit(folder: str, epochs: int, resume: str | None = None) -> Classifier:
    torch.manual_seed(0)
    model = Classifier()
    callbacks = [ModelCheckpoint(folder, save_last=True), EMAWeightAveraging(decay=0.9, device="cpu")]
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=callbacks, logger=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(X, Y), batch_size=64), ckpt_path=resume)
    return model


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = fit(f"{folder}/whole", epochs=4)
        fit(f"{folder}/half", epochs=2)
        resumed = fit(f"{folder}/half", epochs=4, resume=f"{folder}/half/last.ckpt")
        states = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
        print("resumed run is bit-identical:", all(torch.equal(a, b) for a, b in states))
        model = resumed.net.eval()  # the averages, which the callback moves into the model at the end
        fxquant.export_onnx(model, (X,), f"{folder}/model.onnx")
        print(fxquant.verify_onnx(model, (X,), f"{folder}/model.onnx"))


if __name__ == "__main__":
    main()
