"""Every mistake has a message of its own and leaves the model as it was."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxquant
from fxquant.backend.entry import fxquant as fxquant_backend
from fxquant.errors import CompilerMissing, FxquantError, InvalidArgument, PlanMismatch, UnsupportedModel
from fxquant.spec.recipes import INT8, Recipe
from fxquant.targets.profiles import GENERIC
from tests.nets import ConvNet, Mlp, prepared, ranges, step

EAGER = "fxquant_eager"
X = torch.ones(2, 8)


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """All of a model that a failed call could have changed, comparable with ==."""
    state = {}
    for key, value in model.state_dict().items():
        state[key] = (id(value), value.dtype, repr(value.tolist())) if isinstance(value, Tensor) else repr(value)
    modules = []
    for name, module in model.named_modules():
        own = {key: id(value) for key, value in module.__dict__.items()}
        hooks = [list(value) for key, value in module.__dict__.items() if key.endswith("_hooks")]
        hooks.append(list(module._load_state_dict_pre_hooks))
        modules.append((name, type(module), module.training, sorted(own.items()), hooks, list(module._buffers)))
    grads = [None if p.grad is None else p.grad.clone().tolist() for p in model.parameters()]
    return (
        {key: value[1:] if isinstance(value, tuple) else value for key, value in state.items()},
        modules,
        grads,
        torch.get_rng_state().tolist(),
    )


@contextmanager
def refused(model: nn.Module, error: type[FxquantError], message: str) -> Iterator[None]:
    before = snapshot(model)
    with pytest.raises(error, match=re.escape(message)) as caught:
        yield
    after = snapshot(model)
    for was, now in zip(before, after, strict=True):
        assert was == now
    assert str(caught.value).rstrip().endswith((".", ")")), "an error ends with what to do"


class Counting(Mlp):
    """Changes its own attributes as it runs, before it fails on a wrong width."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = self.seen + x.sum()
        return super().forward(torch.dropout(self.norm(x), 0.5, self.training)) @ torch.eye(x.shape[0])


def test_inputs_that_do_not_fit() -> None:
    model = Counting()
    model.norm.eval()
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(2x8 and 2x2\)") as own:
        torch.ones(2, 8) @ torch.eye(2)
    got = f"args and kwargs must run through the model: got RuntimeError: {own.value}"
    with refused(model, InvalidArgument, got):
        fxquant.prepare(model, (X,))
    with refused(model, InvalidArgument, "missing 1 required positional argument: 'x'"):
        fxquant.prepare(model, ())
    with refused(model, InvalidArgument, "unexpected keyword argument 'y'"):
        fxquant.prepare(model, (X,), {"y": X})
    fxquant.prepare(model, (torch.ones(8, 8),))
    assert model.calls == 0 and model.seen.item() == 0


@pytest.mark.parametrize("args", [X, [X], None], ids=["tensor", "list", "none"])
def test_args_that_are_no_tuple(args: Any) -> None:
    model = Mlp()
    got = type(args).__name__
    with refused(model, InvalidArgument, f"args must be a tuple of example inputs: got {got}. Write (x,)"):
        fxquant.prepare(model, args)


def test_kwargs_that_are_no_mapping() -> None:
    model = Mlp()
    with refused(model, InvalidArgument, "kwargs must be a mapping of names to example inputs: got Tensor"):
        fxquant.prepare(model, (X,), X)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"recipe": "int9"}, "recipe must be a Recipe or one of 'int8', 'int8_dynamic', 'w4a8'"),
        ({"recipe": 8}, "recipe must be a Recipe or one of 'int8', 'int8_dynamic', 'w4a8'"),
        ({"target": "tpu"}, "target must be one of 'onnxruntime'"),
        ({"target": None}, "target must be one of 'onnxruntime'"),
        ({"target": GENERIC}, "target must be one of 'onnxruntime'"),
    ],
)
def test_unknown_names(keywords: dict[str, Any], message: str) -> None:
    model = Mlp()
    with refused(model, InvalidArgument, message):
        fxquant.prepare(model, (X,), **keywords)


def test_something_else_than_a_module() -> None:
    with pytest.raises(InvalidArgument, match=r"model must be a plain nn\.Module: got function"):
        fxquant.prepare(lambda x: x, (X,))  # type: ignore[arg-type]


class Elementwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.scale)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


@pytest.mark.parametrize(
    ("make", "x", "reason"),
    [
        (Elementwise, X, "found none to quantize"),
        (Transposed, torch.ones(1, 3, 4, 4), "onnxruntime has no integer ConvTranspose kernel"),
    ],
)
def test_nothing_to_quantize(make: Callable[[], nn.Module], x: Tensor, reason: str) -> None:
    model = make()
    with refused(model, UnsupportedModel, reason):
        fxquant.prepare(model, (x,))


def test_integer_parameters() -> None:
    model = Mlp()
    model.first.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    with refused(model, UnsupportedModel, "parameters must be floating point: got torch.int8 for 'first.weight'"):
        fxquant.prepare(model, (X,))


def test_prepared_twice() -> None:
    model = prepared(Mlp(), X)
    with refused(model, InvalidArgument, "model must not be prepared twice: the model itself has a plan"):
        fxquant.prepare(model, (X,))
    outer = nn.Sequential(model)
    with refused(outer, InvalidArgument, "model must not be prepared twice: 0 has a plan"):
        fxquant.prepare(outer, (X,))


def test_a_part_of_a_prepared_model() -> None:
    model = prepared(Mlp(), X)
    with refused(model, InvalidArgument, "model must not be prepared twice: it is a part of a prepared model"):
        fxquant.prepare(model.first, (X,))


def test_an_already_compiled_model() -> None:
    model = Mlp()
    compiled = torch.compile(model, backend=EAGER)
    with refused(model, InvalidArgument, "Prepare first, torch.compile afterwards"):
        fxquant.prepare(compiled, (X,))
    outer = nn.Sequential(compiled)
    with refused(outer, InvalidArgument, "model must not be compiled yet: 0 is. Prepare first"):
        fxquant.prepare(outer, (X,))
    model.compile(backend=EAGER)
    with refused(model, InvalidArgument, "model must not be compiled yet: the model itself is. Prepare first"):
        fxquant.prepare(model, (X,))


@pytest.mark.parametrize("where", ["first", "second"])
def test_an_attribute_named_quantizers(where: str) -> None:
    model = Mlp()
    model.get_submodule(where).quantizers = "mine"  # type: ignore[assignment]
    with refused(model, UnsupportedModel, f"{where or 'model'} must not have an attribute 'quantizers' of its own"):
        fxquant.prepare(model, (X,))


def test_a_refused_prepare_leaves_batch_norm_frozen() -> None:
    model = ConvNet()
    fxquant.freeze_batch_norm(model)
    model.conv1.quantizers = "mine"  # type: ignore[assignment]
    with pytest.raises(UnsupportedModel, match="must not have an attribute 'quantizers' of its own"):
        fxquant.prepare(model, (torch.randn(2, 3, 8, 8),))
    model.train()
    assert not model.bn1.training


def test_a_kind_that_matches_nothing() -> None:
    model = Mlp()
    recipe = dataclasses.replace(INT8, name="mine", kinds=frozenset({"linear", "conv", "embedding"}))
    with refused(model, InvalidArgument, "recipe 'mine' must match the model with each of its kinds: conv, embedding"):
        fxquant.prepare(model, (X,), recipe=recipe)
    unknown = Recipe(name="typo", kinds=frozenset({"linaer"}))
    with refused(model, InvalidArgument, "linaer matched no operator. The model has linear."):
        fxquant.prepare(model, (X,), recipe=unknown)


@pytest.mark.parametrize("backend", ["fxquant", "fxquant_eager"])
def test_an_unknown_option(backend: str) -> None:
    model = Mlp()
    with backend_refuses(
        model,
        "options must be among 'recipe', 'target', 'inductor', 'integer_matmul', 'integer_backward', "
        "'save_quantized', 'reuse_weights': got 'recpie'",
    ):
        torch.compile(model, backend=backend, options={"recpie": "int8"})(X)


@contextmanager
def backend_refuses(model: nn.Module, message: str) -> Iterator[None]:
    """Dynamo wraps what a backend raises; the words must come through."""
    before = snapshot(model)
    with pytest.raises(Exception, match=re.escape(message)) as caught:
        yield
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), InvalidArgument)
    # torch.compile marks what it is given; nothing else may differ.
    del model.__dict__["_is_torch_compile"]
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "int9"}, "recipe must be a Recipe or one of"),
        ({"target": "tpu"}, "target must be one of"),
    ],
)
def test_unknown_names_in_options(options: dict[str, Any], message: str) -> None:
    model = Mlp()
    with backend_refuses(model, message):
        torch.compile(model, backend=EAGER, options=options)(X)


@pytest.mark.parametrize("option", [{"recipe": "w4a8"}, {"target": "onnxruntime"}])
def test_recipe_or_target_options_on_a_prepared_model(option: dict[str, str]) -> None:
    model = prepared(Mlp(), X)
    name = next(iter(option))
    with backend_refuses(model, f"options must not set '{name}' for a prepared model: its plan decides"):
        torch.compile(model, backend=EAGER, options=option)(X)


def test_mode_without_a_compiler_behind() -> None:
    model = Mlp()
    with backend_refuses(model, "mode must be left out with backend 'fxquant_eager': got 'max-autotune'"):
        torch.compile(model, backend=EAGER, mode="max-autotune")(X)


def test_an_inductor_setting_that_does_not_exist() -> None:
    model = Mlp()
    with backend_refuses(model, "options['inductor'] must hold Inductor's own settings: got 'no_such_setting'"):
        torch.compile(model, backend="fxquant", options={"inductor": {"no_such_setting": 1}})(X)


def test_no_cpp_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    model = prepared(Mlp(), X)
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent/compiler")}),
        pytest.raises(Exception, match=r"must find a C\+\+ compiler to run on CPU: found none\. Install g") as caught,
    ):
        torch.compile(model, backend="fxquant")(X)
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), CompilerMissing)
    step(torch.compile(model, backend=EAGER), X)  # which needs none


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with FakeTensorMode():
        on_gpu = torch.empty(2, 8, device="cuda")
    gm = torch.fx.symbolic_trace(torch.nn.Identity())
    with pytest.raises(CompilerMissing, match=r"must find Triton to run on CUDA: found none\. Install triton, or"):
        fxquant_backend(gm, [on_gpu])


def test_a_checkpoint_of_another_plan() -> None:
    model = prepared(Mlp(), X)
    other = prepared(Mlp(), X, recipe="w4a8")
    step(torch.compile(model, backend=EAGER), X)
    step(torch.compile(other, backend=EAGER), 5 * X)
    before, kept = ranges(model), copy.deepcopy(model.state_dict())
    with refused(model, PlanMismatch, "2 sites differ"):
        model.load_state_dict(other.state_dict())
    with refused(model, PlanMismatch, "first.weight: s8 axis 0 in the model, s4 axis 0 in the checkpoint"):
        model.load_state_dict(other.state_dict(), strict=False, assign=True)
    with refused(model, PlanMismatch, "drop the quantizers' keys"):
        model.load_state_dict(other.state_dict())
    assert ranges(model) == before
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items() if isinstance(v, Tensor))


def test_a_checkpoint_of_another_architecture_names_missing_sites() -> None:
    model = prepared(ConvNet(), torch.ones(2, 3, 6, 6))
    other = prepared(Mlp(), X).state_dict()
    with refused(model, PlanMismatch, "only in the checkpoint: first.input"):
        model.load_state_dict(other, strict=False)


def test_a_checkpoint_of_another_version() -> None:
    model = prepared(Mlp(), X)
    state = model.state_dict()
    plan = bytes(state.pop("quantizers_plan").tolist()).decode().replace('"version": 3', '"version": 99')
    for saved in ({"quantizers.plan": plan}, {"quantizers_plan": torch.tensor(list(plan.encode()))}):
        with refused(model, PlanMismatch, "checkpoint's plan must be of version 1 to 3: got 99"):
            model.load_state_dict({**state, **saved})


def test_a_checkpoint_whose_plan_is_none() -> None:
    model = prepared(Mlp(), X)
    for codes in (torch.arange(200, 250, dtype=torch.uint8), torch.tensor(list(b"{}"))):
        with refused(model, PlanMismatch, f"plan as it was saved: got {len(codes)} bytes of something else ("):
            model.load_state_dict({**model.state_dict(), "quantizers_plan": codes})


def test_a_checkpoint_with_flags_of_another_model() -> None:
    model = prepared(Mlp(), X)
    with refused(model, PlanMismatch, "got 3 flags for 4 sites and 0 BatchNorm modules"):
        model.load_state_dict({**model.state_dict(), "quantizers_frozen": torch.zeros(3)})


def test_what_needs_a_plan_says_so() -> None:
    model = Mlp()
    with refused(model, InvalidArgument, "freeze_ranges must be given a prepared model: got Mlp without a plan"):
        fxquant.freeze_ranges(model)
    assert fxquant.strip(model) is model


def test_parts_of_one_graph_are_for_one_target() -> None:
    parts = nn.Sequential(
        fxquant.prepare(nn.Sequential(nn.Linear(8, 8)), (X[:, :8],), target="onnxruntime"),
        fxquant.prepare(nn.Sequential(nn.Linear(8, 8)), (X[:, :8],), target="openvino"),
    )
    with pytest.raises(Exception, match="prepared for one target: got onnxruntime and openvino"):
        torch.compile(parts, backend="fxquant_eager")(X[:, :8])
