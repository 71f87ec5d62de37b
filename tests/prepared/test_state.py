"""What happens to quantizer state when a model is saved, loaded, copied, moved or trained in common ways."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.backend.reports import compile_reports
from fxquant.prepared.bound_forward import bound_forward
from fxquant.prepared.quantizer import quantizers
from fxquant.prepared.root import plan_of
from fxquant.spec.mode import Mode
from tests.nets import ConvNet, Mlp, grads, prepared, ranges, step, unset

EAGER = "fxquant_eager"


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield


def trained(scale: float = 1.0) -> nn.Module:
    model = prepared(Mlp(), torch.randn(2, 8))
    step(torch.compile(model, backend=EAGER), torch.randn(4, 8) * scale)
    return model


def test_ranges_are_unset_until_seen_and_follow_training_batches() -> None:
    model = prepared(Mlp(), torch.randn(2, 8))
    assert unset(model) == list(ranges(model))
    compiled = torch.compile(model, backend=EAGER)
    first, second = torch.randn(4, 8), torch.randn(4, 8) * 3
    step(compiled, first)
    assert ranges(model)["first.input"] == (first.min().item(), first.max().item())
    step(compiled, second)
    low, high = ranges(model)["first.input"]
    assert low == pytest.approx(first.min().item() + 0.01 * (second.min() - first.min()).item(), rel=1e-6)
    assert high == pytest.approx(first.max().item() + 0.01 * (second.max() - first.max()).item(), rel=1e-6)


def test_eval_and_frozen_ranges_leave_the_state_alone() -> None:
    model = trained()
    before = ranges(model)
    compiled = torch.compile(model, backend=EAGER)
    model.eval()
    compiled(torch.randn(4, 8) * 100)
    assert ranges(model) == before
    model.train()
    fxquant.freeze_ranges(model)
    step(compiled, torch.randn(4, 8) * 100)
    assert ranges(model) == before
    fxquant.freeze_ranges(model, frozen=False)
    step(compiled, torch.randn(4, 8) * 100)
    assert ranges(model) != before


def test_eval_before_any_training_uses_the_batch_range_and_stores_nothing() -> None:
    model = prepared(Mlp(), torch.randn(2, 8)).eval()
    assert {q.mode(False) for _, q in quantizers(model)} == {Mode.RESOLVE, Mode.STATIC}
    out = torch.compile(model, backend=EAGER)(torch.randn(4, 8))
    assert torch.isfinite(out).all()
    assert unset(model) == list(ranges(model))


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_restores_ranges_and_the_compiled_model_uses_them(assign: bool) -> None:
    source, target = trained(), trained(scale=5)
    x = torch.randn(4, 8)
    compiled = torch.compile(target.eval(), backend=EAGER)
    compiled(x)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    assert not any(target.load_state_dict(torch.load(file), assign=assign))
    assert ranges(target) == ranges(source)
    assert torch.equal(compiled(x), torch.compile(source.eval(), backend=EAGER)(x))
    step(torch.compile(target.train(), backend=EAGER), x)
    assert ranges(target) != ranges(source), "the assigned tensors are the ones that training updates"


def test_loading_settles_so_that_evaluation_need_not_look_for_unset_ranges() -> None:
    source, target = trained(), prepared(Mlp(), torch.randn(2, 8))
    target.load_state_dict(source.state_dict())
    assert {q.mode(False) for _, q in quantizers(target)} == {Mode.STATIC}
    target.load_state_dict(prepared(Mlp(), torch.randn(2, 8)).state_dict())
    assert Mode.RESOLVE in {q.mode(False) for _, q in quantizers(target)}


def test_a_float_checkpoint_loads_strictly_and_leaves_ranges() -> None:
    plain = Mlp()
    model = trained()
    before = ranges(model)
    assert not any(model.load_state_dict(plain.state_dict(), strict=True))
    assert ranges(model) == before
    assert torch.equal(model.first.weight, plain.first.weight)


def test_state_dict_keys_stand_with_their_owners() -> None:
    keys = [key for key in prepared(Mlp(), torch.randn(2, 8)).state_dict() if "quantizers" in key]
    assert sorted(keys) == [
        "first.quantizers.input.max_val",
        "first.quantizers.input.min_val",
        "quantizers_frozen",
        "quantizers_plan",
        "second.quantizers.input.max_val",
        "second.quantizers.input.min_val",
    ]


def by_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
def test_a_copy_has_state_of_its_own(duplicate: Any) -> None:
    model = trained()
    twin = duplicate(model)
    assert ranges(twin) == ranges(model)
    assert plan_of(twin) == plan_of(model)
    for module in twin.modules():
        bound = bound_forward(module)
        assert bound is None or bound.module is module
    before = ranges(model)
    step(torch.compile(twin, backend=EAGER), torch.randn(4, 8) * 9)
    assert ranges(model) == before
    assert ranges(twin) != before
    assert not grads(model) or twin.first.weight is not model.first.weight
    fxquant.strip(twin)
    assert bound_forward(twin.first) is None and bound_forward(model.first) is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_ranges_stay_float32_when_the_model_changes_its_dtype(dtype: torch.dtype) -> None:
    model = trained()
    before = ranges(model)
    model.to(dtype)
    assert ranges(model) == before
    assert {q.min_val.dtype for _, q in quantizers(model) if q.stateful} == {torch.float32}
    out = step(torch.compile(model, backend=EAGER), torch.randn(4, 8, dtype=dtype))
    assert out.dtype == dtype and torch.isfinite(out).all()
    assert {g.dtype for g in grads(model).values()} == {dtype}
    assert {q.min_val.dtype for _, q in quantizers(model) if q.stateful} == {torch.float32}


def test_moving_to_another_device_moves_ranges() -> None:
    model = trained().to("meta")
    assert {q.min_val.device.type for _, q in quantizers(model) if q.stateful} == {"meta"}


def test_autocast_trains_with_float32_ranges() -> None:
    model = prepared(ConvNet(), torch.randn(2, 3, 6, 6))
    compiled = torch.compile(model, backend=EAGER)
    with torch.autocast("cpu", torch.bfloat16):
        out = compiled(torch.randn(2, 3, 6, 6))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert not unset(model)
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads(model).values())


def test_gradients_accumulate() -> None:
    model = trained()
    fxquant.freeze_ranges(model)
    compiled = torch.compile(model, backend=EAGER)
    x = torch.randn(4, 8)
    model.zero_grad()
    step(compiled, x)
    once = grads(model)
    step(compiled, x)
    for name, grad in grads(model).items():
        torch.testing.assert_close(grad, 2 * once[name])


def test_functional_call_swaps_weights_and_ranges() -> None:
    model = trained().eval()
    compiled = torch.compile(lambda tensors, x: torch.func.functional_call(model, tensors, (x,)), backend=EAGER)
    x = torch.randn(4, 8)
    with_own = compiled(dict(model.named_parameters()), x)
    assert torch.equal(with_own, torch.compile(model, backend=EAGER)(x))
    other = {name: p.detach() * 2 for name, p in model.named_parameters()}
    assert not torch.equal(compiled(other, x), with_own)
    narrow = {name: b / 4 for name, b in model.named_buffers()}
    assert not torch.equal(compiled({**dict(model.named_parameters()), **narrow}, x), with_own)


def test_strip_gives_the_trained_float_model_back() -> None:
    plain, x = Mlp(), torch.randn(4, 8)
    model = prepared(copy.deepcopy(plain), x)
    expected = model(x)
    assert fxquant.strip(model) is model
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [sorted(m.__dict__) for m in model.modules()] == [sorted(m.__dict__) for m in plain.modules()]
    assert not model._load_state_dict_pre_hooks
    assert torch.equal(model(x), expected)
    step(torch.compile(model, backend=EAGER, options={"recipe": "w4a8"}), x)
    assert compile_reports()[-1].digests == () and compile_reports()[-1].quantized == 4
    fxquant.prepare(model, (x,))
    step(torch.compile(model, backend=EAGER), x)
    assert not unset(model)


def test_a_forward_that_was_set_on_the_instance_survives() -> None:
    model = Mlp()
    original = model.forward
    model.forward = lambda x: original(x) + 1  # type: ignore[method-assign]
    x = torch.randn(4, 8)
    expected = model(x)
    replaced = model.__dict__["forward"]
    prepared(model, x)
    assert torch.equal(model(x), expected)
    step(torch.compile(model, backend=EAGER), x)
    assert not unset(model)
    fxquant.strip(model)
    assert model.__dict__["forward"] is replaced


@pytest.mark.parametrize("nested", [False, True])
def test_a_sequential_runs_as_before(nested: bool) -> None:
    x = torch.randn(4, 8)
    layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    plain = nn.Sequential(layers) if nested else layers
    model = prepared(copy.deepcopy(plain), x)
    assert torch.equal(model(x), plain(x))
    assert len(model) == len(plain) and type(model[-1]) is type(plain[-1])
    step(torch.compile(model, backend=EAGER), x)
    assert len(ranges(model)) == 2 and not unset(model)


def test_the_signature_is_the_modules_own() -> None:
    import inspect

    assert str(inspect.signature(prepared(Mlp(), torch.randn(2, 8)).forward)) == "(x: 'Tensor') -> 'Tensor'"


def test_eager_python_is_the_float_model() -> None:
    model = trained()
    x = torch.randn(4, 8)
    expected = model.second(torch.relu(model.first(x)))
    assert torch.equal(model(x), expected)
    plain = Mlp()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "quantizers" not in k})
    assert torch.equal(plain(x), expected)


def test_prepare_leaves_parameters_buffers_modes_and_random_state() -> None:
    model = ConvNet()
    model.relu.eval()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    parameters = list(model.parameters())
    prepared(model, torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(p.grad is None for p in parameters)
    assert [m.training for m in (model, model.relu, model.bn1)] == [True, False, True]
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), key
