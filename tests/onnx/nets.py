"""The nets that are exported for every target, and how a file is shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant.targets.cpu import sums_saturate
from tests.onnx.models import calibrated


def conv(inputs: int, outputs: int, size: int = 3, **kwargs: Any) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **kwargs)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    def __init__(self, down: bool) -> None:
        super().__init__()
        self.one, self.two, self.last = conv(4, 4), conv(4, 4), nn.Conv2d(4, 4, 1)
        self.short = conv(4, 4, 1) if down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.two(F.relu(self.one(x))) + self.short(x)))


class Inverted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depth, self.project = conv(4, 8, 1), conv(8, 8, groups=8), conv(8, 4, 1)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.project(F.relu6(self.depth(F.relu6(self.expand(x))))))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.deep, self.up, self.out = conv(4, 4), conv(4, 8), nn.ConvTranspose2d(8, 4, 2, 2), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.enter(x))
        return self.out(torch.cat([skip, self.up(F.relu(self.deep(F.max_pool2d(skip, 2))))], 1))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.down, self.up, self.last = (
            conv(4, 4),
            nn.Conv2d(4, 8, 1),
            nn.Conv2d(8, 4, 1),
            nn.Conv2d(4, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.body(x))
        return self.last(h * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(h, 1))))))


class Attention(nn.Module):
    """A pre-norm block; ``scaled`` says where: in the operator, before or after the product, or by a division."""

    def __init__(self, scaled: str) -> None:
        super().__init__()
        self.scaled = scaled
        self.norm, self.after = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.scaled == "operator":
            return F.scaled_dot_product_attention(q, k, v)
        if self.scaled == "before":
            scores = (q * 3**-0.5) @ k.transpose(-2, -1)
        else:
            scores = q @ k.transpose(-2, -1)
            scores = scores * 3**-0.5 if self.scaled == "after" else scores / 1.7
        return torch.softmax(scores, -1) @ v

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        heads = (layer(h).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(self.attend(*heads).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.after(x))))


class Decoder(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.one, self.two = nn.ConvTranspose2d(4, 6, 2, 2), nn.ConvTranspose2d(6, 3, 3, 2, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.two(F.relu(self.norm(self.one(x)))))


class Pool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = conv(4, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.avg_pool2d(F.relu(self.body(x)), 2)
        return self.head(F.adaptive_avg_pool2d(h, 1).flatten(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


# Its own generator: what is drawn must not depend on what else was collected before.
DRAW = torch.Generator().manual_seed(0)
IMAGE, TOKENS = torch.randn(3, 4, 8, 8, generator=DRAW), torch.randn(3, 5, 8, generator=DRAW)
NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "residual": (lambda: Residual(False), IMAGE),
    "residual-with-downsample": (lambda: Residual(True), IMAGE),
    "inverted-residual": (Inverted, IMAGE),
    "unet-skip": (UNet, IMAGE),
    "squeeze-and-excitation": (Gate, IMAGE),
    **{f"attention-{s}": (lambda s=s: Attention(s), TOKENS) for s in ("operator", "before", "after", "division")},
    "mlp": (mlp, TOKENS),
    "decoder": (lambda: Decoder(False), IMAGE),
    "decoder-with-norm": (lambda: Decoder(True), IMAGE),
    "average-pool": (Pool, IMAGE),
}


SEVEN_BITS = fxquant.Recipe(
    name="w7a8", weight=fxquant.QuantSpec(bits=7, narrow=True, axis=0, range=fxquant.CurrentTensor())
)
EXACT = SEVEN_BITS if sums_saturate() else "int8"  # what no integer kernel of this CPU saturates with


def exported(
    name: str, target: str, folder: Path, recipe: str | fxquant.Recipe = "int8"
) -> tuple[nn.Module, Tensor, Path]:
    make, x = NETS[name]
    torch.manual_seed(0)
    model = calibrated(make(), x, target=target, recipe=recipe)
    path = folder / "net.onnx"
    fxquant.export_onnx(model, (x,), path)
    return model, x, path


class Scores(nn.Module):
    """Nothing but the scores of attention and their softmax."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.softmax((q @ k.transpose(1, 2)) * 0.3, -1)


def scores_file(target: str, folder: Path) -> Path:
    torch.manual_seed(0)
    args = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    model = fxquant.prepare(Scores(), args, target=target)
    fxquant.calibrate(model, [args], progress=False)
    fxquant.export_onnx(model, args, folder / "scores.onnx", dynamic_batch=False)
    return folder / "scores.onnx"


def shown(path: Path) -> str:
    """``result = Op(operands)`` a line; constants by their rank."""
    graph = onnx.load(path).graph
    ranks = {tensor.name: f"const{len(tensor.dims)}" for tensor in graph.initializer}
    lines = [f"{n.output[0]} = {n.op_type}({', '.join(ranks.get(i, i) for i in n.input)})" for n in graph.node]
    return "\n".join(lines) + "\n"
