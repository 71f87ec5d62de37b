"""The demo's data: how it is split, standardized, distorted and dealt out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxquant.shell.demo import data
from fxquant.shell.demo.data import Digits
from tests.shell.demo.made import few_digits


def test_split_is_disjoint_and_complete(digits: Digits) -> None:
    train_rows, test_rows = set(digits.train_index.tolist()), set(digits.test_index.tolist())
    assert not train_rows & test_rows
    assert train_rows | test_rows == set(range(1797))
    assert digits.train_x.shape == (1347, 1, 8, 8) and digits.test_x.shape == (450, 1, 8, 8)


def test_split_is_stratified(digits: Digits) -> None:
    total = torch.bincount(torch.cat([digits.train_y, digits.test_y]), minlength=10)
    held_out = torch.bincount(digits.test_y, minlength=10)
    assert ((held_out - 0.25 * total).abs() <= 1).all()


def test_same_seed_same_split_other_seed_other_split(digits: Digits) -> None:
    again, other = data.load(0), data.load(1)
    assert torch.equal(again.test_index, digits.test_index) and torch.equal(again.test_x, digits.test_x)
    assert not torch.equal(other.test_index, digits.test_index)


def test_images_and_labels_are_the_original_rows(digits: Digits) -> None:
    from sklearn.datasets import load_digits

    raw = load_digits()
    assert digits.test_y.tolist() == raw.target[digits.test_index.numpy()].tolist()
    pixels = torch.from_numpy(raw.images[digits.test_index.numpy()]).float().unsqueeze(1)
    scale = digits.train_x.max() - digits.train_x.min()
    torch.testing.assert_close((digits.test_x - digits.train_x.min()) / scale * 16, pixels, atol=1e-4, rtol=0)


def test_standardized_by_the_training_images_alone(digits: Digits) -> None:
    torch.testing.assert_close(digits.train_x.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(digits.train_x.std(), torch.tensor(1.0), atol=1e-5, rtol=0)


def test_types_are_those_that_training_wants(digits: Digits) -> None:
    assert {x.dtype for x in (digits.train_x, digits.test_x)} == {torch.float32}
    assert {y.dtype for y in (digits.train_y, digits.test_y)} == {torch.int64}


def test_the_example_is_one_training_batch(digits: Digits) -> None:
    assert digits.example.shape == (64, 1, 8, 8) and torch.equal(digits.example, digits.train_x[:64])


# --- dealing out ---------------------------------------------------------------------------------------


def test_an_epoch_is_shuffled_in_full_batches_and_repeats_with_its_seed(digits: Digits) -> None:
    first, again, other = (list(data.epoch(digits, torch.Generator().manual_seed(seed))) for seed in (3, 3, 4))
    assert len(first) == 1347 // 64 and all(images.shape == (64, 1, 8, 8) for images, _ in first)
    assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(first, again, strict=True))
    assert not torch.equal(first[0][1], other[0][1])


def test_an_epoch_takes_an_image_once_and_its_own_label() -> None:
    ours = few_digits(torch.arange(150), torch.arange(1))
    batches = list(data.epoch(ours, torch.Generator().manual_seed(0)))
    labels = torch.cat([y for _, y in batches])
    assert [len(y) for _, y in batches] == [64, 64], "the last 22 make no batch"
    assert len(labels.unique()) == 128 and not torch.equal(labels, labels.sort().values)
    for images, y in batches:  # what is moved in from outside stays at the edges
        torch.testing.assert_close(images[:, 0, 3:5, 3:5], y.float().view(-1, 1, 1).expand(-1, 2, 2))


def test_the_next_epoch_of_a_generator_is_another_one() -> None:
    ours, generator = few_digits(torch.arange(64), torch.arange(1)), torch.Generator().manual_seed(0)
    ((_, first),), ((_, second),) = data.epoch(ours, generator), data.epoch(ours, generator)
    assert sorted(first.tolist()) == sorted(second.tolist()) and not torch.equal(first, second)


def test_an_epoch_leaves_the_images_as_they_were() -> None:
    ours = few_digits(torch.arange(64), torch.arange(1))
    before = ours.train_x.clone()
    list(data.epoch(ours, torch.Generator().manual_seed(0)))
    assert torch.equal(ours.train_x, before)


@pytest.mark.parametrize(("count", "batches", "sizes"), [(150, 2, [64, 64]), (150, 8, [64, 64, 22]), (10, 1, [10])])
def test_calibration_is_the_first_images_in_order(count: int, batches: int, sizes: list[int]) -> None:
    ours = few_digits(torch.arange(count), torch.arange(1))
    dealt = data.calibration(ours, batches)
    assert [len(images) for (images,) in dealt] == sizes
    assert torch.equal(torch.cat([images for (images,) in dealt]), ours.train_x[: sum(sizes)])


def test_calibration_takes_eight_batches(digits: Digits) -> None:
    assert len(data.calibration(digits)) == 8


# --- distorting ----------------------------------------------------------------------------------------


def test_distorting_is_mild_and_stays_in_range(digits: Digits) -> None:
    images = digits.train_x[:64]
    moved = data.distort(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and not torch.equal(moved, images)
    assert moved.min() >= images.min() - 1e-5 and moved.max() <= images.max() + 1e-5
    similar = torch.nn.functional.cosine_similarity(moved.flatten(1), images.flatten(1))
    assert similar.mean() > 0.8


def test_blank_paper_stays_blank() -> None:
    blank = torch.full((4, 1, 8, 8), -0.8)
    assert torch.equal(data.distort(blank, torch.Generator().manual_seed(0)), blank)


def test_each_image_is_distorted_in_its_own_way() -> None:
    images = torch.randn(1, 1, 8, 8).expand(3, 1, 8, 8)
    first, second, third = data.distort(images, torch.Generator().manual_seed(0))
    assert not torch.equal(first, second) and not torch.equal(second, third) and not torch.equal(first, third)


def bilinear(image: Tensor, x: float, y: float, outside: float) -> float:
    """The value between four pixels, those beyond the edge being ``outside``."""
    left, top, total = math.floor(x), math.floor(y), 0.0
    for column, across in ((left, 1 - (x - left)), (left + 1, x - left)):
        for row, down in ((top, 1 - (y - top)), (top + 1, y - top)):
            inside = 0 <= row < 8 and 0 <= column < 8
            total += across * down * (float(image[row, column]) if inside else outside)
    return total


@pytest.mark.parametrize(
    ("drawn", "degrees", "scale", "right", "down"),
    [
        ((0.5, 0.5, 0.5, 0.5), 0, 1.0, 0.0, 0.0),
        ((1.0, 0.5, 0.5, 0.5), 10, 1.0, 0.0, 0.0),
        ((0.0, 0.5, 0.5, 0.5), -10, 1.0, 0.0, 0.0),
        ((0.5, 1.0, 0.5, 0.5), 0, 1.1, 0.0, 0.0),
        ((0.5, 0.0, 0.5, 0.5), 0, 0.9, 0.0, 0.0),
        ((0.5, 0.5, 1.0, 0.5), 0, 1.0, 0.6, 0.0),
        ((0.5, 0.5, 0.5, 0.0), 0, 1.0, 0.0, -0.6),
        ((1.0, 0.0, 0.0, 1.0), 10, 0.9, -0.6, 0.6),
    ],
    ids=["not at all", "turned", "turned back", "smaller", "larger", "left", "down", "all at once"],
)
def test_the_farthest_that_an_image_moves(
    drawn: tuple[float, ...],
    degrees: float,
    scale: float,
    right: float,
    down: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each pixel is read at its place about the center, turned, scaled and moved."""
    image = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.tensor(drawn).view(4, 1).expand(shape))
    found = data.distort(image.view(1, 1, 8, 8), torch.Generator())
    cos, sin, least = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), float(image.min())
    expected = torch.empty(8, 8)
    for row in range(8):
        for column in range(8):
            x, y = column - 3.5, row - 3.5
            place = 3.5 + right + scale * (cos * x - sin * y), 3.5 + down + scale * (sin * x + cos * y)
            expected[row, column] = bilinear(image, *place, outside=least)
    torch.testing.assert_close(found[0, 0], expected, atol=1e-5, rtol=0)
