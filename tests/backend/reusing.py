"""A prepared net's steps with and without ``options={"reuse_weights": True}``, and how often weights were quantized."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.backend.reports import CompileReport, compile_reports
from fxquant.backend.reuse import stores
from tests.nets import Mlp, prepared

EAGER = "fxquant_eager"
REUSE = {"reuse_weights": True}
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))

Step = Callable[..., Tensor]
Optimizer = Callable[..., torch.optim.Optimizer]


def runs() -> int:
    return sum(store.runs for store in stores())


def kept_values() -> list[Tensor]:
    return [value for store in stores() for kept in store.held.values() for value in kept.values]


class Run:
    """A prepared net under one setting of the option, and all that its steps gave."""

    def __init__(self, model: nn.Module, reuse: bool, backend: str = EAGER, dynamic: bool | None = None) -> None:
        self.model, self.reuse = copy.deepcopy(model), reuse
        options = REUSE if reuse else None
        self.compiled: Step = torch.compile(self.model, backend=backend, options=options, dynamic=dynamic)
        self.found: list[Tensor] = []
        self.optimizer: torch.optim.Optimizer | None = None

    def forward(self, *x: Tensor) -> Tensor:
        out = self.compiled(*x)
        self.found.append(out.detach().clone())
        return out

    def train(self, *x: Tensor) -> None:
        """A microbatch."""
        self.forward(*x).float().square().mean().backward()

    def step(self) -> None:
        """Notes gradients and lets the optimizer use them."""
        assert self.optimizer is not None
        self.found += [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evaluate(self, *x: Tensor) -> None:
        self.model.eval()
        with torch.no_grad():
            self.forward(*x)
        self.model.train()


def same(make: Callable[[], nn.Module], job: Callable[[Run], None], **how: Any) -> int:
    """Runs a job without the option and with it; all they found is equal. How often parts ran."""
    torch.manual_seed(0)
    model = make()
    without, with_it = Run(model, False, **how), Run(model, True, **how)
    job(without)
    assert not stores()
    job(with_it)
    assert len(without.found) == len(with_it.found)
    for number, (a, b) in enumerate(zip(without.found, with_it.found, strict=True)):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b), number
    count = runs()
    del without, with_it
    return count


def mlp() -> nn.Module:
    return prepared(Mlp(), X)


def report() -> CompileReport:
    return compile_reports()[-1]


def accumulate(*x: Tensor, steps: int = 2, optimizer: Optimizer | None = None) -> Callable[[Run], None]:
    """A job of several steps, each of one microbatch for every ``x``."""

    def job(run: Run) -> None:
        run.optimizer = (optimizer or sgd)(run.model.parameters())
        for _ in range(steps):
            for each in x:
                run.train(each)
            run.step()

    return job


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1)
