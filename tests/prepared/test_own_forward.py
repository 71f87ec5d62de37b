"""Forwards of prepared modules in the hands of others: rebound, wrapped, copied, taken off, compiled in place."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import NotQuantizedWarning
from fxquant.prepared.bound_forward import BoundForward, bound_forward
from fxquant.prepared.unfused import Unfused
from tests.nets import prepared, ranges, step, unset

EAGER = "fxquant_eager"
X = torch.linspace(-9, 9, 2 * 3 * 6 * 6).sin().reshape(2, 3, 6, 6)
pytestmark = pytest.mark.usefixtures("cold")


class Residual(nn.Module):
    """The root owns the sites of its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Documented."""
        y = torch.relu(self.a(x * scale))
        return torch.relu(self.b(y) + y)


def quantized(model: nn.Module) -> Tensor:
    """Its evaluation; all of its ranges are set before."""
    step(torch.compile(model, backend=EAGER), X)
    assert not unset(model)
    with torch.no_grad():
        result: Tensor = torch.compile(model.eval(), backend=EAGER)(X)
    return result


@functools.cache
def of_its_own_forward() -> Tensor:
    torch.manual_seed(0)
    return quantized(prepared(Residual(), X))


@pytest.fixture
def expected(cold: None) -> Tensor:
    return of_its_own_forward()


def in_float32(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs).float()

    return wrapped


def rebound(model: nn.Module) -> None:
    model.forward = types.MethodType(model.forward.__func__, model)


def by_accelerate_in_bf16(model: nn.Module) -> None:
    """As its prepare_model does, but for bfloat16."""
    model._original_forward = model.forward
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=False)
    model.forward = types.MethodType(autocast(model.forward.__func__), model)
    model.forward = types.MethodType(in_float32(model.forward.__func__), model)


def by_accelerate_and_back(model: nn.Module) -> None:
    """As its unwrap_model does afterwards."""
    by_accelerate_in_bf16(model)
    forward: Any = model.forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    model.forward = types.MethodType(forward, model)


def by_accelerate_s_hooks(model: nn.Module) -> None:
    """As its add_hook_to_module does."""
    before = model.forward
    model._old_forward = before

    def new_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module._old_forward(*args, **kwargs)

    model.forward = functools.update_wrapper(functools.partial(new_forward, model), before)


def by_wraps(model: nn.Module) -> None:
    model.forward = in_float32(model.forward)


def by_hooks(model: nn.Module) -> None:
    model.register_forward_pre_hook(lambda module, args: None)
    model.register_forward_hook(lambda module, args, out: None)


WAYS = [rebound, by_accelerate_in_bf16, by_accelerate_and_back, by_accelerate_s_hooks, by_wraps, by_hooks]


@pytest.mark.parametrize("way", WAYS)
def test_a_forward_that_others_took_still_quantizes(way: Callable[[nn.Module], None], expected: Tensor) -> None:
    torch.manual_seed(0)
    model = prepared(Residual(), X)
    plain = model(X)
    way(model)
    assert torch.equal(model(X), plain), "eager Python is the float model"
    assert list(inspect.signature(model.forward).parameters) == ["x", "scale"]
    assert torch.equal(quantized(model), expected)


@pytest.mark.parametrize("way", WAYS)
def test_it_is_taken_off_and_put_on_under_a_wrapper(way: Callable[[nn.Module], None], expected: Tensor) -> None:
    torch.manual_seed(0)
    model = prepared(Residual(), X)
    way(model)
    plain = model(X)
    fxquant.override(model, {"a.weight": None})
    assert bound_forward(model) is not None and torch.equal(model(X), plain)
    fxquant.strip(model)
    assert bound_forward(model) is None and torch.equal(model(X), plain)
    assert torch.equal(torch.compile(model, backend="eager")(X), plain)
    fxquant.prepare(model, (X,))
    assert torch.equal(model(X), plain)
    assert torch.equal(quantized(model), expected)


@pytest.mark.parametrize("way", [rebound, by_hooks])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_of_it_quantizes(way: Callable[[nn.Module], None], duplicate: Any, expected: Tensor) -> None:
    torch.manual_seed(0)
    model = prepared(Residual(), X)
    if way is rebound or duplicate is copy.deepcopy:
        way(model)
    twin = duplicate(model)
    assert bound_forward(twin) is not bound_forward(model)
    assert torch.equal(quantized(twin), expected)
    assert unset(model) == list(ranges(model)), "the copy's own state was written"


def test_what_the_forward_shows_is_the_module_s_own() -> None:
    model = prepared(Residual(), X)
    plain = inspect.signature(Residual().forward)
    assert inspect.signature(model.forward) == plain
    assert inspect.signature(in_float32(model.forward)) == plain
    other = Residual()
    other.forward = lambda x, more=2: x.relu()  # type: ignore[method-assign]
    bound = BoundForward(other, model.__dict__["_fxquant_root"])
    bound.bind_sites((), "onnxruntime")
    assert str(inspect.signature(other.forward)) == "(x, more=2)"
    assert str(inspect.signature(in_float32(other.forward))) == "(x, more=2)"
    assert torch.equal(other(X), X.relu())


def test_an_encoder_s_forward_is_rebound() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0.0)
    x = torch.randn(2, 3, 8)
    prepared(model, x)
    rebound(model)
    step(torch.compile(model, backend=EAGER), x)
    assert not unset(model) and Unfused.of(model) is not None
    with torch.no_grad():
        assert not torch.equal(torch.compile(model.eval(), backend=EAGER)(x), model(x))
    fxquant.strip(model)
    assert model(x).isfinite().all()


# Compiled in place


def by_torch_save(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_torch_save, lambda m: copy.deepcopy(copy.deepcopy(m))])
def test_a_copy_of_what_was_compiled_in_place_says_that_it_is_float(duplicate: Any, whole: bool) -> None:
    model = prepared(Residual(), X)
    if whole:
        model.compile(backend=EAGER)
        step(model, X)
    else:
        model.a.compile(backend=EAGER)
    twin = duplicate(model)
    with pytest.warns(
        NotQuantizedWarning, match="this Residual is a copy of a model that was compiled in place"
    ) as said:
        twin(X)
    assert len(said) == 1 and twin(X) is not None, "once"
    other = duplicate(model)
    other.compile(backend=EAGER)
    step(other, X)
    assert not unset(other)


def test_no_other_copy_says_it() -> None:
    model = prepared(Residual(), X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(model)(X)
        step(torch.compile(copy.deepcopy(model), backend=EAGER), X)
        model.compile(backend=EAGER)
        twin = copy.deepcopy(model)
        fxquant.strip(twin)(X)
        fxquant.calibrate(copy.deepcopy(model), [X], progress=False)
    wrapped = copy.deepcopy(torch.compile(prepared(Residual(), X), backend=EAGER))
    step(wrapped, X)
    assert not unset(wrapped._orig_mod)
