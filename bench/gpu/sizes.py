"""How large what is measured is, and how often: a card's sizes, and tiny ones with which every line runs on a CPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """All sizes of a run.

    Attributes:
        megabytes: of the tensor that an operator reads.
        rounds: how often each thing is timed; at least 15 for a figure that counts.
        warmups: calls before that.
        steps: training steps in one timing, so that the host runs ahead as it does in training.
        stages, channels, images, side: blocks by stage of the ResNet, its stem's width, the batch and its images.
        layers, width, heads, batch, tokens: of the transformer.
        ops: parts of names of operators; empty for all.
        checked, jobs: nets whose gradients are checked, and how many jobs of `steps.JOBS` are done.
    """

    megabytes: int = 256
    rounds: int = 21
    warmups: int = 3
    steps: int = 3
    stages: tuple[int, ...] = (3, 4, 6, 3)
    channels: int = 64
    images: int = 64
    side: int = 224
    layers: int = 12
    width: int = 1024
    heads: int = 16
    batch: int = 16
    tokens: int = 512
    ops: tuple[str, ...] = ()
    checked: tuple[str, ...] = ("transformer", "resnet")
    jobs: int = 3


CARD = Sizes()
TINY = Sizes(
    megabytes=1,
    rounds=3,
    warmups=1,
    steps=1,
    stages=(1,),
    channels=8,
    images=2,
    side=32,
    layers=1,
    width=32,
    heads=2,
    batch=2,
    tokens=16,
    ops=("per tensor divide", "int8 codes"),
    checked=("transformer",),
    jobs=2,
)
# Of the nets whose gradients are held to eager ones: all layers, little to compute.
CHECKED = Sizes(stages=(1, 1), channels=16, images=8, side=64, layers=1, width=128, heads=4, batch=4, tokens=64)
