"""One run on example inputs: which forward runs, what is left on the model, which errors come through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import InvalidArgument, UnsupportedModel
from fxquant.prepared.root import plan_of
from fxquant.report.example_run import ExampleRun, run_on_examples

X = torch.ones(2, 4)
LAYER, HEAD = ("layer", "linear", 0), ("head", "linear", 0)


def run(model: nn.Module, *args: Any, **kwargs: Any) -> ExampleRun:
    plan = plan_of(model)
    assert plan is not None
    return run_on_examples(model, plan, args, kwargs)


def labels(found: ExampleRun) -> list[str]:
    return [one.label for graph in found.graphs for one in graph]


def forwards(model: nn.Module) -> list[Any]:
    return [module.__dict__.get("forward") for module in model.modules()]


class Layer(nn.Module):
    """``head(between(x))``."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.head, self.between = nn.Linear(4, 4), between

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(self.between(x) * scale)


@pytest.mark.parametrize("own", [False, True], ids=["the class's forward", "one of its own"])
def test_the_module_s_forward_is_what_runs_and_the_binding_one_is_put_back(own: bool) -> None:
    model = Layer()
    if own:
        weight = model.head.weight
        model.head.__dict__["forward"] = lambda x: torch.relu(nn.functional.linear(x, weight))
    fxquant.prepare(model, (X,))
    before = forwards(model)
    found = run(model, X)
    assert labels(found) == ["x", "tanh", "mul", "linear", *(["relu"] if own else []), "output"]
    assert [one is two for one, two in zip(forwards(model), before, strict=True)] == [True] * len(before)


def test_a_model_compiled_in_place_is_read_op_by_op() -> None:
    model = fxquant.prepare(Layer(), (X,))
    model.compile(backend=lambda gm, inputs: pytest.fail("its own compile ran"))
    compiled = model.__dict__["_compiled_call_impl"]
    assert labels(run(model, X)) == ["x", "tanh", "mul", "linear", "output"]
    assert model.__dict__["_compiled_call_impl"] is compiled


def test_keyword_inputs_reach_the_forward() -> None:
    model = fxquant.prepare(Layer(), (X,))
    with pytest.raises(InvalidArgument, match=r"must run through the model: got TypeError: .*'factor'"):
        run(model, X, factor=2.0)
    assert labels(run(model, x=X, scale=2.0)) == labels(run(model, X))


def refuses(x: Tensor) -> Tensor:
    if x.shape[0] != 2:
        raise ValueError("two rows, please.")
    return x


def unsupported(x: Tensor) -> Tensor:
    if x.shape[0] != 2:
        raise UnsupportedModel("the model must have two rows.")
    return x


def test_an_error_of_the_model_is_told_with_its_type_and_leaves_the_model_as_it_was() -> None:
    model = fxquant.prepare(Layer(torch._dynamo.disable(refuses)), (X,))
    before = forwards(model)
    with pytest.raises(InvalidArgument) as error:
        run(model, torch.ones(3, 4))
    assert str(error.value) == (
        "args and kwargs must run through the model: got ValueError: two rows, please. "
        "Give explain what was given to fxquant.prepare."
    )
    assert isinstance(error.value.__cause__, ValueError)
    assert forwards(model) == before
    assert "linear" in labels(run(model, X))


def test_an_error_of_ours_comes_through_as_it_is() -> None:
    model = fxquant.prepare(Layer(torch._dynamo.disable(unsupported)), (X,))
    with pytest.raises(UnsupportedModel, match=r"^the model must have two rows\.$"):
        run(model, torch.ones(3, 4))


def test_a_single_input_is_no_tuple() -> None:
    model = fxquant.prepare(Layer(), (X,))
    plan = plan_of(model)
    assert plan is not None
    single: Any = X
    with pytest.raises(InvalidArgument) as error:
        run_on_examples(model, plan, single, None)
    assert str(error.value) == "args must be a tuple of example inputs: got Tensor. Write (x,) for a single input."


def test_results_of_an_operator_that_runs_in_several_graphs_are_quantized_in_all_or_not() -> None:
    class Twice(nn.Module):
        """The layer's result goes on in float at first; after the break it becomes the head's codes."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.layer(x))
            torch._dynamo.graph_break()
            return self.head(self.layer(x))

    found = run(fxquant.prepare(Twice(), (X,)), X)
    assert len(found.graphs) == 2
    assert [dict(one.results()) for one in found.sited][-2:] == [{LAYER: False}, {LAYER: True, HEAD: False}]
    assert found.results == {LAYER: False, HEAD: False}
