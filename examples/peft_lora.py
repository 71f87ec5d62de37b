"""LoRA of peft on a quantized model: adapters are trained, merged, and deployed.

python examples/peft_lora.py [fxquant_eager]
"""

from __future__ import annotations

import sys
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fxquant

BACKEND = sys.argv[1] if len(sys.argv) > 1 else "fxquant"
X = torch.randn(128, 16, generator=torch.Generator().manual_seed(1))
Y = X.roll(1, 1).tanh()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def main() -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(Net(), LoraConfig(r=4, target_modules=["up", "down"]))
    fxquant.prepare(adapted, (X[:2],))  # adapters are layers like others: quantized too
    step = torch.compile(adapted, backend=BACKEND)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for number in range(31):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(step(X), Y)
        loss.backward()
        optimizer.step()
        if number % 10 == 0:
            print(f"step {number}: loss {loss.item():.4f}")
    # A merged weight is another tensor than those that were quantized: the float model is merged, then prepared.
    merged = fxquant.strip(adapted).merge_and_unload().eval()
    fxquant.prepare(merged, (X[:2],))
    fxquant.calibrate(merged, [(X,)])
    with tempfile.TemporaryDirectory() as folder:
        fxquant.export_onnx(merged, (X,), f"{folder}/model.onnx")
        print(fxquant.verify_onnx(merged, (X,), f"{folder}/model.onnx"))


if __name__ == "__main__":
    main()
