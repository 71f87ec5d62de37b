"""Every recipe in a training step: the bits of its gradients, and what is kept for backward."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

import fxquant
from fxquant.spec.recipes import RECIPES
from tests.backend.test_saved_activations import WIDTH, two_steps
from tests.nets import Block, kept_bytes

# Blocks of 32 must divide the axes that products sum over.
SHAPE = (8, 16, 2 * WIDTH)
ACTIVATIONS = [name for name, recipe in RECIPES.items() if recipe.activation is not None]


def prepared(recipe: str) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Block(2 * WIDTH), torch.randn(*SHAPE)
    fxquant.prepare(model, (x,), recipe=recipe, target="generic")
    return fxquant.calibrate(model, [x], progress=False), x  # a first step of learned ranges is another graph


@pytest.mark.parametrize("recipe", ACTIVATIONS)
def test_gradients_keep_their_bits(recipe: str) -> None:
    model, x = prepared(recipe)
    found = []
    for save in (True, False):
        torch._dynamo.reset()
        own = copy.deepcopy(model)
        step = torch.compile(own, backend="fxquant_eager", options={"save_quantized": save})
        found.append(two_steps(own, step, x))
    for compressed, floats in zip(*found, strict=True):
        assert torch.equal(compressed, floats)


@functools.cache
def kept_by_plain() -> int:
    """Whatever the recipe: without its quantizers, the model is the same."""
    model, x = prepared("int8")
    return kept_bytes(model, torch.compile(fxquant.strip(model)), x)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("recipe", RECIPES)
def test_at_most_seven_tenths_of_plain_training_is_kept(recipe: str) -> None:
    of_plain = kept_by_plain()
    torch._dynamo.reset()
    model, x = prepared(recipe)
    kept = kept_bytes(model, torch.compile(model, backend="fxquant"), x)
    if recipe in ACTIVATIONS:
        assert kept <= 0.70 * of_plain
    else:  # activations are float, weights are quantized again for backward
        assert kept <= 1.05 * of_plain
