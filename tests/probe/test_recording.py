"""record: names of uses, in the order of the run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import InvalidArgument
from fxquant.probe.recording import named, record
from fxquant.probe.visitor import Use
from tests.probe.nets import Frames, Twice, random, ready

X = random(4, 6, seed=2)


def use(*keys: str) -> Use:
    zero = torch.zeros(())
    return Use(keys=keys, role="activation", input=zero, scale=zero, zero_point=zero, compute=lambda: zero)


def test_uses_of_one_site_are_numbered() -> None:
    names: list[str] = []
    visit = named(lambda name, use: names.append(name))
    for keys in (("a",), ("b", "a"), ("a",), ("a", "b"), ("b",)):
        assert visit(use(*keys)) is None
    assert names == ["a", "b", "a@1", "a@2", "b@1"]


def test_each_run_counts_from_the_start_and_answers_go_through() -> None:
    answer = torch.ones(())
    for _ in range(2):
        names: list[str] = []

        def visit(name: str, use: Use, names: list[str] = names) -> Tensor:
            names.append(name)
            return answer

        assert named(visit)(use("a")) is answer and names == ["a"]


@pytest.fixture(scope="module")
def twice() -> nn.Module:
    torch.manual_seed(0)
    return ready(Twice(), X)


def test_a_layer_that_runs_twice_has_two_inputs_and_one_weight(twice: nn.Module) -> None:
    seen: dict[str, Tensor] = {}
    output = record(twice, (X,), {"scale": 3.0}, lambda name, use: seen.update({name: use.quantized}))
    assert sorted(seen) == ["again.input", "again.input@1", "again.weight"]
    weight, bias = seen["again.weight"], twice.again.bias
    first = seen["again.input"] @ weight.t() + bias
    torch.testing.assert_close(3.0 * (seen["again.input@1"] @ weight.t() + bias), output, rtol=1e-5, atol=1e-5)
    assert (torch.tanh(first) - seen["again.input@1"]).abs().max() < 0.01


def test_wrappers_of_the_model_are_looked_through(twice: nn.Module) -> None:
    names: list[str] = []
    record(torch.compile(twice, backend="fxquant_eager"), (X,), None, lambda name, use: names.append(name))
    assert sorted(names) == ["again.input", "again.input@1", "again.weight"]


def test_graphs_of_one_run_have_names_of_the_whole_model() -> None:
    torch.manual_seed(0)
    names: list[str] = []
    record(ready(Frames(), X), (X,), None, lambda name, use: names.append(name))
    sites = [f"blocks.{i}.{layer}.{role}" for i in "01" for layer in ("up", "down") for role in ("input", "weight")]
    assert sorted(names) == sorted(sites)


def test_an_unprepared_model() -> None:
    with pytest.raises(InvalidArgument, match="record must be given a prepared model: got Linear"):
        record(nn.Linear(6, 6), (X,), None, lambda name, use: None)
