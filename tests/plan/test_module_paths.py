"""Paths of modules that Dynamo reaches by other expressions than attributes: sites are named, and found, by them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.prepared.root import plan_of
from tests.nets import prepared, step, unset

pytestmark = pytest.mark.usefixtures("cold")


class Window(nn.Module):
    """Sets attributes on itself in forward, as a shifted window does: Dynamo then reads its ``__dict__``."""

    def __init__(self) -> None:
        super().__init__()
        self.window = 4
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.mix = nn.ModuleDict({"1x1": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] <= self.window:
            self.window = x.shape[1]
        h = F.relu(x)
        return self.mix["1x1"](F.relu(self.q(h) + self.k(h)))


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Window(), Window()])

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)[:, ::2]
        return x


def test_a_module_whose_forward_sets_its_attributes() -> None:
    x = torch.randn(2, 6, 8)
    model = prepared(Stages(), x)
    plan = plan_of(model)
    assert plan is not None and not plan.declined
    for site in plan.sites:
        for edge in site.local.edges:
            model.get_submodule(f"{site.owner}.{edge.path}".strip("."))
    first, second = ({s.local for s in plan.sites if s.owner.startswith(f"stages.{n}")} for n in range(2))
    assert {local.name for local in first} == {local.name for local in second}
    step(torch.compile(model, backend="fxquant_eager"), x)
    assert not unset(model)
