"""The files that `bench_versions.py` runs: small ones for codes, larger ones for speed, each with input and output.

``files.json`` names them all. Inputs and outputs are float32 in little-endian bytes, as every language reads them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant.targets.session import input_names, run_outputs

RECIPES = {
    "onnxruntime": ("int8", "w4a8", "w4a4", "w4a4_dynamic"),
    "openvino": ("int8", "w4a8", "w4a4"),
    "generic": ("int8", "w4a8", "w4a4"),
}


class ConvNet(nn.Module):
    """Convolutions, one padded and one of groups, a residual, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.group = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head((F.relu(self.group(x)) + x).mean((2, 3)))


class Attention(nn.Module):
    """A block of a transformer, up to its first residual."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))


class Stage(nn.Module):
    """Four dense 3×3 convolutions of 64 channels, in two residual blocks, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(64, 64, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.convs[::2], self.convs[1::2], strict=True):
            x = F.relu(second(F.relu(first(x))) + x)
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    """A block of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = Attention(384, 6), nn.LayerNorm(384)
        self.wide, self.narrow = nn.Linear(384, 1536), nn.Linear(1536, 384)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        return x + self.narrow(F.gelu(self.wide(self.norm(x))))


SETTLE_MS = 3000  # how long a pair runs in wasm before it is timed

Nets = Mapping[str, tuple[type[nn.Module], tuple[int, ...]]]
SMALL: Nets = {"convnet": (ConvNet, (2, 3, 16, 16)), "attention": (Attention, (2, 8, 32))}
LARGE: Nets = {"stage": (Stage, (1, 64, 56, 56)), "block": (Block, (1, 128, 384))}


def make(folder: Path, *, rounds: int, recipes: Mapping[str, Sequence[str]] = RECIPES) -> None:
    """All files and ``files.json``; ``rounds`` is how often each pair is to be timed."""
    files = [
        quantized(folder, name, target, recipe)
        for name in SMALL
        for target, known in recipes.items()
        for recipe in known
    ]
    pairs = []
    for name in LARGE:
        float_file = plain(folder, name)
        pairs += [{"float": float_file, "int8": quantized(folder, name, target, "int8")} for target in recipes]
    written = {"files": files, "pairs": pairs, "rounds": rounds, "settle_ms": SETTLE_MS}
    (folder / "files.json").write_text(json.dumps(written), encoding="utf-8")


def quantized(folder: Path, name: str, target: str, recipe: str) -> dict[str, object]:
    """A file for a target with the output that it must give, that of onnxruntime without optimizations."""
    model, x = build(name)
    path = folder / f"{name}.{target}.{recipe}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fxquant.prepare(model, (x,), target=target, recipe=recipe)
        fxquant.calibrate(model, [x], progress=False)
        fxquant.export_onnx(model.eval(), (x,), path, dynamic_batch=False, verify=False)
    return held(path, x)


def plain(folder: Path, name: str) -> dict[str, object]:
    """The float file, by torch's exporter alone."""
    model, x = build(name)
    path = folder / f"{name}.float.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, opset_version=21, external_data=False, verbose=False)
    return held(path, x)


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A net in evaluation and its input, of one seed."""
    torch.manual_seed(0)
    net, shape = {**SMALL, **LARGE}[name]
    return net().eval(), torch.randn(shape)


def held(path: Path, x: Tensor) -> dict[str, object]:
    """What ``files.json`` says of a file; its input and output are written beside it."""
    (y,) = run_outputs(path, {input_names(path)[0]: x.numpy()}, optimize=False)
    x.numpy().astype("<f4").tofile(path.with_suffix(".x"))
    y.astype("<f4").tofile(path.with_suffix(".y"))
    return {"file": path.name, "shape": list(x.shape)}
