"""DDP or FSDP2 on two processes: the losses of one process, a sharded checkpoint, and its deployed file.

python examples/distributed.py [ddp | fsdp2] [fxquant_eager]
"""

from __future__ import annotations

import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxquant

MODE = next((word for word in sys.argv[1:] if word in ("ddp", "fsdp2")), "ddp")
BACKEND = "fxquant_eager" if "fxquant_eager" in sys.argv else "fxquant"
RANKS, X = 2, torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
Y = X.roll(1, 1).tanh()


def prepared() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)) for _ in range(2)]
    model = fxquant.prepare(nn.Sequential(*blocks), (X[:2],))
    fxquant.sync_ranges(model, when="before")  # of the whole batch, not of a rank's part
    return model


def train(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    step = torch.compile(model, backend=BACKEND)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(step(x), y)
        loss.backward()
        optimizer.step()
        mean = loss.detach()
        if dist.is_initialized():
            dist.all_reduce(mean.div_(RANKS))
        losses.append(mean.item())
    return losses


def rank(number: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29611")
    dist.init_process_group("gloo", rank=number, world_size=RANKS)
    model = prepared()
    if MODE == "fsdp2":
        for part in (*model, model):
            fully_shard(part, mesh=dist.device_mesh.init_device_mesh("cpu", (RANKS,)))
    # No name for the wrapper: a reducer that outlives the group joins a thread of gloo's that waits for Python's lock.
    losses = train(model if MODE == "fsdp2" else DistributedDataParallel(model), X[number::RANKS], Y[number::RANKS])
    dcp.save(get_model_state_dict(model), checkpoint_id=folder)
    if number == 0:
        print(f"{RANKS} processes, {MODE}:", " ".join(f"{loss:.6f}" for loss in losses))
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print("one process:", " ".join(f"{loss:.6f}" for loss in train(prepared(), X, Y)))
        mp.spawn(rank, (folder,), RANKS)
        model = prepared()
        dcp.load(state := model.state_dict(), checkpoint_id=folder)
        model.load_state_dict(state)
        fxquant.export_onnx(model.eval(), (X,), f"{folder}/model.onnx")
        print(fxquant.verify_onnx(model, (X,), f"{folder}/model.onnx"))


if __name__ == "__main__":
    main()
