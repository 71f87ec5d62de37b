"""Trained ranges in compiled code: eager's numbers, one graph, no pass over memory of their own, bytes as promised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import fxquant
from bench.kernels import Made, watch
from fxquant import Learned, QuantSpec, Recipe
from fxquant.prepared.optimizers import range_parameters

X = torch.randn(8, 16, 32, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """The second half of a transformer's layer: a LayerNorm's and a GELU's result are quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def prepared(method: Any = "lsq", net: type[nn.Module] = Block, calibrated: bool = True) -> nn.Module:
    torch.manual_seed(0)
    weights = Learned(method="lsq" if method == "lsq_plus" else method)
    recipe = Recipe(
        name="learned",
        activation=QuantSpec(signed=False, symmetric=False, range=Learned(method=method)),
        weight=QuantSpec(narrow=True, axis=0, range=weights),
    )
    model = fxquant.prepare(net(), (X,), recipe=recipe)
    return fxquant.calibrate(model, [X], progress=False) if calibrated else model


def steps(model: nn.Module, backend: str, count: int = 2) -> list[Tensor]:
    """Results and gradients of some steps of SGD."""
    optimizer = torch.optim.SGD(fxquant.parameter_groups(model, lr=0.1))
    compiled, found = torch.compile(model, backend=backend), []
    for factor in (1.0, 1.5)[:count]:
        optimizer.zero_grad()
        out = compiled(X * factor)
        out.square().mean().backward()
        found += [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    return found


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    """As the benches ask of gradients: sums in another order may move a code, and what that is worth."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 5e-3 * other.norm() + 1e-6


def kept_bytes(model: nn.Module, step: Any) -> int:
    """What autograd keeps between forward and backward, each storage once, parameters, buffers and input excluded."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), X)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step(X)
    return sum(size for place, size in kept.items() if place not in known)


class Compiled:
    """A model after a step, what Inductor made of it, and what Dynamo counted."""

    def __init__(self, model: nn.Module, backend: str = "fxquant") -> None:
        torch._dynamo.reset()
        counters.clear()
        self.model, self.step = model, torch.compile(model, backend=backend)
        with watch(model, X) as made:
            self.step(X).square().mean().backward()
        self.made: Made = made
        self.breaks, self.graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
        model.zero_grad()
        self.kept = kept_bytes(model, self.step)  # now: another model resets Dynamo

    def count(self, name: str) -> int:
        return self.made.fields()[name] or 0


@pytest.fixture(scope="module")
def trained() -> Iterator[Compiled]:
    yield Compiled(prepared())


def test_one_graph_gives_what_eager_gives(trained: Compiled) -> None:
    assert (trained.breaks, trained.graphs) == (0, 1)
    assert_near(steps(prepared(), "fxquant"), steps(prepared(), "fxquant_eager"))


def test_gradients_of_scales_are_sums_in_kernels_that_are_there_anyway(trained: Compiled) -> None:
    """As many passes over memory as with ranges that stand, but for a sum of few numbers for each parameter."""
    model = prepared()
    fxquant.freeze_ranges(model)
    frozen = Compiled(model)
    more = trained.count("kernels") - frozen.count("kernels")
    assert 0 <= more <= 2 * len(range_parameters(model))
    assert trained.count("bytes_accessed") <= 1.03 * frozen.count("bytes_accessed")
    assert trained.count("extern_kernels") == frozen.count("extern_kernels")


def test_bytes_kept_for_backward(trained: Compiled) -> None:
    """What a LayerNorm and a GELU give is computed again, with its error: no copy of it is kept for the scale."""
    plain = Compiled(Block(), "inductor")
    assert trained.kept <= 0.70 * plain.kept


def test_what_a_range_starts_with_is_saved_in_checkpointed_regions() -> None:
    """The step stores it in the parameter that the region reads, which is computed again in backward."""
    found, expected = (prepared(net=Checkpointed, calibrated=False) for _ in range(2))
    torch._dynamo.reset()
    assert_near(steps(found, "fxquant"), steps(expected, "fxquant_eager"))


@pytest.mark.parametrize("method", ["lsq_plus", "tqt"])
def test_every_method_unset_at_first(method: Any) -> None:
    torch._dynamo.reset()
    found, expected = (prepared(method, calibrated=False) for _ in range(2))
    assert_near(steps(found, "fxquant", 1), steps(expected, "fxquant_eager", 1))
    for name, p in range_parameters(found).items():
        torch.testing.assert_close(p, range_parameters(expected)[name], rtol=1e-5, atol=1e-6)
