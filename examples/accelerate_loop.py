"""A loop of accelerate's in bfloat16: prepared, compiled in place, saved with ``save_state`` and taken up again.

python examples/accelerate_loop.py [fxquant_eager]
"""

from __future__ import annotations

import sys
import tempfile

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxquant

BACKEND = sys.argv[1] if len(sys.argv) > 1 else "fxquant"
X = torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
Y = (X[:, :1] * X[:, 1:2]).tanh()


class Residual(nn.Module):
    """Two layers and a sum, which the model itself quantizes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(x + self.down(torch.relu(self.up(x)))))


def train(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, batches: DataLoader) -> float:
    for x, y in batches:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
    return loss.item()


def made() -> tuple[Accelerator, nn.Module, torch.optim.Optimizer, DataLoader]:
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = fxquant.prepare(Residual(), (X[:2],))
    # Not TorchDynamoPlugin(backend=…), which takes only names that accelerate lists.
    model.compile(backend=BACKEND, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return accelerator, *accelerator.prepare(model, optimizer, DataLoader(TensorDataset(X, Y), batch_size=64))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = made()
        print(f"first epoch: {train(*whole):.4f}")
        whole[0].save_state(folder)
        expected = train(*whole)
        resumed = made()
        resumed[0].load_state(folder)
        print("resumed run is bit-identical:", train(*resumed) == expected)
        model = resumed[0].unwrap_model(resumed[1], keep_fp32_wrapper=False).eval()
        fxquant.export_onnx(model, (X,), f"{folder}/model.onnx")
        print(fxquant.verify_onnx(model, (X,), f"{folder}/model.onnx"))


if __name__ == "__main__":
    main()
