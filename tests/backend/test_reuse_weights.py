"""``options={"reuse_weights": True}``: numbers of every step as without, to the bit; weights quantized once a change.

What is counted is how often the part of a graph that quantizes its weights runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from fxquant.passes.captured.pass_gradients_through import PassGradientsThrough
from tests.backend.reusing import (
    EAGER,
    IMAGE,
    REUSE,
    Optimizer,
    Run,
    X,
    accumulate,
    kept_values,
    mlp,
    report,
    runs,
    same,
    sgd,
)
from tests.backend.test_caches import compiled
from tests.nets import ConvNet, prepared

pytestmark = pytest.mark.usefixtures("cold", "none_kept")

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "fused adam": lambda p: torch.optim.Adam(p, 0.01, fused=True),  # whose writes autograd does not count
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accumulation_and_evaluation_quantize_once_a_step(name: str) -> None:
    def job(run: Run) -> None:
        run.optimizer = OPTIMIZERS[name](run.model.parameters())
        for _ in range(3):
            for k in range(3):
                run.train(X * (k + 1))
            run.step()
            run.evaluate(X)
            run.evaluate(-X)

    assert same(mlp, job) == 4, "once at first, and after each of three steps"
    assert report().reused == 2 and not report().declines


def alternate(x: Tensor) -> Callable[[Run], None]:
    """Two steps of two microbatches, each with two evaluations after it."""

    def job(run: Run) -> None:
        run.optimizer = torch.optim.Adam(run.model.parameters(), 0.01, fused=True)
        for _ in range(2):
            run.train(x)
            run.train(-x)
            run.step()
            run.evaluate(x)
            run.evaluate(-x)

    return job


def test_compiled_code_gives_the_same_bits() -> None:
    assert same(mlp, alternate(X), backend="fxquant") == 3
    assert report().reused == 2


def test_folded_weights_are_kept_apart_from_those_of_training() -> None:
    """A BatchNorm that is folded in makes them depend on its statistics, which every step of training changes."""
    count = same(lambda: prepared(ConvNet(), IMAGE), alternate(IMAGE))
    assert count == 2 + 2, "of training and of evaluation, twice each"
    assert report().reused == 3


class ByData(torch.optim.Optimizer):
    """An optimizer as many are written: autograd counts none of its changes."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-0.1)


def test_optimizers_that_write_through_data_are_seen() -> None:
    def job(run: Run) -> None:
        run.optimizer = ByData(run.model.parameters())
        for _ in range(3):
            versions = [p._version for p in run.model.parameters()]
            run.train(X)
            run.step()
            assert versions == [p._version for p in run.model.parameters()]

    assert same(mlp, job) == 3


def test_a_compiled_optimizer_is_seen() -> None:
    def job(run: Run) -> None:
        run.optimizer = sgd(run.model.parameters())
        step = torch.compile(run.optimizer.step, backend="eager")
        for _ in range(3):
            run.train(X)
            run.found += [p.grad.clone() for p in run.model.parameters() if p.grad is not None]
            step()
            run.optimizer.zero_grad()

    assert same(mlp, job) == 3


def test_two_forwards_before_one_backward() -> None:
    def job(run: Run) -> None:
        run.optimizer = sgd(run.model.parameters())
        first, second = run.forward(X), run.forward(-X)
        (first.square().mean() + second.mean()).backward()
        run.step()
        run.train(X)

    assert same(mlp, job) == 2


def write_version(model: nn.Module) -> None:
    with torch.no_grad():
        model.first.weight.mul_(1.5)


def write_view(model: nn.Module) -> None:
    with torch.no_grad():
        model.first.weight[0].fill_(2.0)


def doubled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value * 2 if value.is_floating_point() else value for name, value in state.items()}


def write_load(model: nn.Module) -> None:
    model.load_state_dict(doubled(model.state_dict()))


def write_assign(model: nn.Module) -> None:
    model.load_state_dict(doubled(model.state_dict()), assign=True)


def write_data(model: nn.Module) -> None:
    model.first.weight.data = model.first.weight.data * 0.5


def write_data_twice(model: nn.Module) -> None:
    """The second one is likely to lie where the first lay."""
    for _ in range(2):
        model.first.weight.data = model.first.weight.data * 0.5


def write_parameter(model: nn.Module) -> None:
    model.first.weight = nn.Parameter(model.first.weight.detach() * 3)


WRITES = [v for name, v in sorted(globals().items()) if name.startswith("write_")]


def test_writes_are_seen() -> None:
    """One net for all: each write costs a run, and none is missed."""

    def job(run: Run) -> None:
        run.train(X)
        for write in WRITES:
            write(run.model)
            run.model.zero_grad()
            run.train(X)
            run.found += [p.grad.clone() for p in run.model.parameters() if p.grad is not None]
            run.train(-X)

    assert same(mlp, job) == 1 + len(WRITES)


def test_a_write_through_data_is_not_seen() -> None:
    """What the option's description warns of, and why it is off unless asked for."""
    run = Run(mlp(), True)
    run.evaluate(X)
    before = run.found[-1]
    run.model.first.weight.data.mul_(2)
    run.evaluate(X)
    assert torch.equal(before, run.found[-1]) and runs() == 1
    run.model.first.weight.data = run.model.first.weight.data.clone()
    run.evaluate(X)
    assert not torch.equal(before, run.found[-1]) and runs() == 2


def test_backward_has_the_weights_of_its_forward() -> None:
    """Without the option autograd raises there; what is kept for backward here is not what was changed."""
    expected, changed = Run(mlp(), True), None
    changed = Run(expected.model, True)
    expected.train(X)
    loss = changed.forward(X).square().mean()
    with torch.no_grad():
        changed.model.first.weight.mul_(2)
    changed.forward(X)  # quantizes anew
    loss.backward()
    for a, b in zip(expected.model.parameters(), changed.model.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


def test_a_gradient_that_reads_the_weight_is_guarded_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """With clip masks, which no recipe makes today: backward takes them of the weight and its known scale."""
    monkeypatch.setattr(PassGradientsThrough, "rewrite", lambda self, gm, result: 0)

    def job(run: Run) -> None:
        accumulate(X, -X)(run)
        loss = run.forward(X).square().mean()
        with torch.no_grad():
            run.model.first.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    assert same(mlp, job) == 3
    assert len(kept_values()) == 6, "two weights, their scales and zero points"


# ---------------------------------------------------------------- caches


def test_a_second_compile_finds_the_graph_and_its_part_in_the_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part is a graph without gradient; the rest has a forward and a backward."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plain, first, again = (compiled(X, **options) for options in ({}, REUSE, REUSE))
    assert (plain.autograd, plain.graphs) == ((0, 1), (0, 2))
    assert (first.autograd, first.graphs) == ((0, 2), (0, 3)), "none of it is what was made without the option"
    assert (again.autograd, again.graphs) == ((2, 0), (3, 0))
    assert first.same_numbers(plain) and again.same_numbers(plain)
    other = compiled(X, recipe="w4a8", **REUSE)
    assert other.graphs[1] >= 1 and not other.same_numbers(plain), "other codes are another part"


# ---------------------------------------------------------------- the option


@pytest.mark.parametrize("value", [1, "auto", None])
def test_the_option_is_a_bool(value: Any) -> None:
    message = re.escape(f"options['reuse_weights'] must be True or False: got {value!r}.")
    compiled = torch.compile(mlp(), backend=EAGER, options={"reuse_weights": value})
    with pytest.raises(BackendCompilerFailed, match=message):
        compiled(X)


def test_integer_products_have_no_kept_floats() -> None:
    compiled = torch.compile(mlp(), backend=EAGER, options={"reuse_weights": True, "integer_matmul": "auto"})
    message = r"options\['reuse_weights'\] must be False where options\['integer_matmul'\] is 'auto': got True\."
    with pytest.raises(BackendCompilerFailed, match=message):
        compiled(X)
