"""Passes see through how a node is written: with every argument by keyword they do what they do with it in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx, nn

from fxquant.graph.nodes import call_nodes
from fxquant.graph.views import FakeQuant
from fxquant.passes.base import Decline
from fxquant.passes.pipelines import COMPILED, training_passes
from fxquant.spec.recipes import INT8, Recipe
from fxquant.targets.profiles import ONNXRUNTIME
from tests.passes.graphs import by_keyword, captured


class Folded(nn.Module):
    """Convolutions before BatchNorms, a transposed one, a linear seen through a transpose; biases; an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.up, self.norm_up = nn.ConvTranspose2d(8, 8, 1, groups=2, bias=False), nn.BatchNorm2d(8)
        self.fc, self.norm_fc = nn.Linear(8, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu_()
        y = y + self.norm_up(self.up(y)).clamp(0, 6)
        y = nn.functional.dropout(nn.functional.pad(y, [1, 1]), 0.0)
        tokens = y.flatten(2).transpose(1, 2)
        return self.norm_fc(self.fc(tokens).transpose(1, 2)).mean(2)


class Cell(nn.Module):
    """A recurrent cell, and a product of two views."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.cell(x)
        return torch.cat([h @ c.t(), torch.einsum("ij,jk->ik", h, h.t())], 1)


@dataclass(frozen=True)
class Case:
    """A model with what it is run on, how it is quantized, and passes that then find something to do."""

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    training: bool
    acting: tuple[str, ...]
    recipe: Recipe = INT8

    def __str__(self) -> str:
        return self.name


PER_TENSOR = dataclasses.replace(INT8, weight=dataclasses.replace(INT8.weight, axis=None))
ALWAYS = ("InsertFakeQuantize", "PassGradientsThrough")
CASES = [
    Case(
        "evaluated", Folded, (2, 3, 6, 6), False, (*ALWAYS, "FunctionalizeActivations", "FoldBatchNorm", "QuantizeBias")
    ),
    Case("trained", Folded, (2, 3, 6, 6), True, (*ALWAYS, "FunctionalizeActivations", "SinkWeights")),
    Case("per tensor", Folded, (2, 3, 6, 6), True, (*ALWAYS, "FoldTrainingBatchNorm"), recipe=PER_TENSOR),
    Case("cell", Cell, (4, 4), True, (*ALWAYS, "DecomposeRecurrentCells", "HoistViews", "SinkWeights")),
]


Done = tuple[list[tuple[str, int, list[Decline]]], list[object], object]


def quantized(case: Case, x: Tensor, rewritten: Callable[[fx.GraphModule], fx.GraphModule]) -> Done:
    """What the passes did, and the values that their graph gives."""
    torch.manual_seed(1)
    model = case.model().train(case.training)
    inputs = {"L['x']": x} | state_by_source(model)  # before the capture runs the model
    gm = rewritten(captured(model, x))
    passes = training_passes(case.recipe, ONNXRUNTIME, stateless=True) + COMPILED
    done = [(each.name, result.rewrites, result.declines) for each in passes for result in (each.run(gm),)]
    sites = [view for node in call_nodes(gm.graph) if (view := FakeQuant.of(node)) is not None]
    with torch.no_grad():
        values = gm(*(inputs[str(n.meta["source"])] for n in gm.graph.find_nodes(op="placeholder")))
    return done, [(site.axis, site.pass_through, site.rounding) for site in sites], values


def state_by_source(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by Dynamo's expressions of them, each a copy, since BatchNorm writes into its own."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        head = "L['self']" + "".join(f"._modules['{part}']" for part in path.split(".") if part)
        for kind in ("_parameters", "_buffers"):
            for name, value in getattr(module, kind).items():
                if value is not None:
                    found[f"{head}.{kind}['{name}']"] = value.detach().clone()
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_alike(case: Case) -> None:
    x = torch.randn(*case.shape, generator=torch.Generator().manual_seed(1))
    done, sites, values = quantized(case, x, lambda gm: gm)
    done_named, sites_named, values_named = quantized(case, x, by_keyword)
    assert done_named == done
    assert {name for name, rewrites, _ in done if rewrites} >= set(case.acting)
    assert sites_named == sites and sites
    torch.testing.assert_close(values_named, values, rtol=0, atol=0)
