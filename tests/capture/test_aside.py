"""Models that are run and compiled without a trace."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxquant
import fxquant.report
from fxquant.capture.aside import compiled_aside, evaluating, in_compiled_region, own_code, untouched
from fxquant.errors import NotQuantizedWarning


class Counting(nn.Module):
    """Leaves all the traces that a forward can leave."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.calls = 0
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.total = self.total + x.sum(0)
        self.last = x
        self.register_buffer("seen", x.mean(0))
        return self.norm(x + torch.randn(3))


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "own": {name: dict(vars(module)).keys() for name, module in model.named_modules()},
        "training": [module.training for module in model.modules()],
        "ids": [id(buffer) for buffer in model.buffers()],
        "random": torch.random.get_rng_state(),
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["tensors"].keys() == after["tensors"].keys()
    assert all(torch.equal(before["tensors"][name], value) for name, value in after["tensors"].items())
    assert all(before[key] == after[key] for key in ("own", "training", "ids"))
    assert torch.equal(before["random"], after["random"])


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(fails: bool) -> None:
    model = Counting()
    before = state_of(model)
    with contextlib.suppress(KeyError), untouched(model):
        model(torch.randn(4, 3))
        model.eval()
        model.norm.eps = 7.0
        assert model.calls == 1 and "seen" in dict(model.named_buffers())
        if fails:
            raise KeyError
    assert_same_state(before, state_of(model))
    assert model.calls == 0 and not hasattr(model, "last") and model.norm.eps == 1e-5


def test_a_lazy_module_stays_what_it_became() -> None:
    model = nn.Sequential(nn.LazyLinear(2))
    with untouched(model):
        model(torch.randn(4, 3))
    assert type(model[0]) is nn.Linear and model(torch.randn(1, 3)).shape == (1, 2)


def test_parameters_are_the_callers_business() -> None:
    model = nn.Linear(2, 2)
    with untouched(model), torch.no_grad():
        model.weight.fill_(3.0)
    assert torch.equal(model.weight, torch.full((2, 2), 3.0))


def test_evaluating_restores_each_mode() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.ReLU()))
    model[1].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before == [True, True, False, False, False]


def run_backend(gm: fx.GraphModule, inputs: Any) -> Any:
    return gm.forward


def test_no_mark_of_the_compile_is_left() -> None:
    model = nn.Linear(2, 2)
    before = set(vars(model))
    with compiled_aside(model, run_backend) as compiled:
        compiled(torch.ones(1, 2))
        compiled(torch.ones(3, 2, dtype=torch.float32))
    assert set(vars(model)) == before
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    with compiled_aside(model, run_backend):
        assert torch._dynamo.config.recompile_limit > limits[0]
    assert (torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit) == limits


def test_a_mark_of_the_users_stays() -> None:
    model = nn.Linear(2, 2)
    vars(model)["_is_torch_compile"] = True
    with compiled_aside(model, run_backend):
        pass
    assert vars(model)["_is_torch_compile"] is True


def test_a_replaced_compile_leaves_no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning puts such a one in the place of torch.compile, and reads what it kept when it compiles anew."""
    plain = torch.compile

    @functools.wraps(plain)
    def keeping(model: nn.Module, **kwargs: Any) -> Any:
        compiled: Any = plain(model, **kwargs)
        compiled._compile_kwargs = kwargs
        return compiled

    monkeypatch.setattr(torch, "compile", keeping)
    model, users = nn.Linear(2, 2), nn.Linear(2, 2)
    own = keeping(users, dynamic=False)
    before = set(vars(model))
    for each in (model, users):
        with pytest.raises(KeyError), compiled_aside(each, run_backend) as compiled:
            compiled(torch.ones(1, 2))
            raise KeyError
    assert set(vars(model)) == before
    assert own._compile_kwargs == {"dynamic": False}


def test_recompiles_aside_do_not_use_up_the_limit() -> None:
    model = nn.Linear(2, 2)
    with torch._dynamo.config.patch(recompile_limit=1), compiled_aside(model, run_backend, dynamic=False) as compiled:
        for rows in (2, 3, 4):
            assert compiled(torch.ones(rows, 2)).shape == (rows, 2)


def test_where_plain_python_runs() -> None:
    seen: list[bool] = []

    @torch.compiler.disable
    def look() -> None:
        seen.append(in_compiled_region())

    def function(x: Tensor) -> Tensor:
        look()
        return x + 1

    look()
    torch.compile(function, backend=run_backend)(torch.ones(2))
    look()
    assert seen == [False, True, False]


def test_code_of_its_own() -> None:
    offset = 3

    def function(x: int, step: int = 2) -> int:
        return x + step + offset

    copy = own_code(function, "other")
    assert copy(1) == function(1) == 6 and copy(1, 5) == 9
    assert copy.__code__ is not function.__code__ and copy.__code__.co_name == copy.__name__ == "other"


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Broken(nn.Module):
    """Two layers with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), Scaled()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


@pytest.mark.parametrize("part", ["", "second"])
def test_what_was_compiled_in_place_does_not_take_over_after_a_break(part: str) -> None:
    model, x = Broken(), torch.randn(2, 4)
    theirs: list[fx.GraphModule] = []
    ours: list[fx.GraphModule] = []

    def kept_in(graphs: list[fx.GraphModule]) -> Callable[..., Any]:
        def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            graphs.append(gm)
            return gm.forward

        return backend

    model.get_submodule(part).compile(backend=kept_in(theirs))
    model(x)
    before = len(theirs)
    with compiled_aside(model, kept_in(ours), dynamic=False) as compiled:
        compiled(x)
    assert len(ours) == 2 and len(theirs) == before > 0
    assert model.get_submodule(part)._compiled_call_impl is not None
    model(x)
    assert len(theirs) == before, "and is not compiled anew"


def test_every_door_of_a_model_compiled_in_place_runs_our_own_compile(tmp_path: Path) -> None:
    """NotQuantizedWarning would say that a part ran in eager Python; a compile of theirs would be counted."""
    model, x = Broken(), torch.randn(2, 4)
    count = CompileCounterWithBackend("fxquant_eager")
    fxquant.prepare(model, (x,))
    model.compile(backend=count)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotQuantizedWarning)
        model(x).sum().backward()
        before = count.frame_count
        model.eval()
        fxquant.calibrate(model, [x])
        fxquant.explain(model, (x,))
        fxquant.report.sqnr(model, (x,))
        fxquant.export_onnx(model, (x,), tmp_path / "m.onnx")
        report = fxquant.verify_onnx(model, (x,), tmp_path / "m.onnx", rounds=1)
    assert report.compared_codes == x.numel() and count.frame_count == before > 0
