"""scikit-learn's handwritten digits: 1797 real 8x8 images, split into training and held-out ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.shell.demo.extras import require

HELD_OUT = 0.25
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Images ``[n, 1, 8, 8]`` float32, standardized by the training set; labels ``[n]`` int64.

    ``train_index`` and ``test_index`` are the rows of the original data set, so a split can be checked.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    train_index: Tensor
    test_index: Tensor

    @property
    def example(self) -> Tensor:
        """One training batch, for tracing: ``[64, 1, 8, 8]``."""
        return self.train_x[:BATCH]


def load(seed: int) -> Digits:
    """The digits, a quarter of each class held out; the same seed gives the same split.

    Example::

        >>> load(0).test_x.shape
        torch.Size([450, 1, 8, 8])
    """
    datasets = require("sklearn.datasets")
    selection = require("sklearn.model_selection")
    raw = datasets.load_digits()
    labels = torch.from_numpy(raw.target).long()
    train, test = selection.train_test_split(
        torch.arange(len(labels)).numpy(), test_size=HELD_OUT, random_state=seed, stratify=raw.target
    )
    train, test = torch.from_numpy(train), torch.from_numpy(test)
    images = torch.from_numpy(raw.images).float().unsqueeze(1)
    images = (images - images[train].mean()) / images[train].std()
    return Digits(
        train_x=images[train], train_y=labels[train], test_x=images[test], test_y=labels[test],
        train_index=train, test_index=test,
    )  # fmt: skip


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image rotated by up to 10 degrees, scaled by up to 10 % and moved by up to 0.6 pixels.

    Bilinear; what comes in from outside is blank paper, the smallest value there is.
    """
    count, blank = len(images), images.min()
    draw = torch.rand(4, count, generator=generator) * 2 - 1
    angle, scale = math.radians(10) * draw[0], 1 + 0.1 * draw[1]
    offset = 0.6 / (images.shape[-1] / 2) * draw[2:]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([cos, -sin, offset[0], sin, cos, offset[1]], dim=1).reshape(count, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images - blank, grid, align_corners=False) + blank


def epoch(digits: Digits, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled, distorted training batches of exactly 64, the rest dropped: one shape, so one graph."""
    order = torch.randperm(len(digits.train_y), generator=generator)
    for chosen in order.split(BATCH):
        if len(chosen) == BATCH:
            yield distort(digits.train_x[chosen], generator), digits.train_y[chosen]


def calibration(digits: Digits, batches: int = 8) -> list[tuple[Tensor]]:
    """The first batches of the training images, unshuffled, as argument tuples for ``fxquant.calibrate``."""
    return [(images,) for images in digits.train_x.split(BATCH)[:batches]]
