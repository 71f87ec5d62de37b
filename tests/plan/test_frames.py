"""Every way in which Dynamo cuts a model into frames: sites stay bound, and where they cannot, it is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxquant
from fxquant.backend.reports import compile_reports
from fxquant.errors import NotQuantizedWarning
from fxquant.prepared.bound_forward import bound_forward
from fxquant.prepared.quantizer import quantizers
from fxquant.prepared.root import plan_of
from tests.nets import (
    Attention,
    Blocks,
    ConvNet,
    Mlp,
    TiedLanguageModel,
    counted,
    eager_runs,
    grads,
    prepared,
    ranges,
    step,
    unset,
)

EAGER = "fxquant_eager"


pytestmark = pytest.mark.usefixtures("cold")


def plain_and_quantized(make: Callable[[], nn.Module], x: Tensor, run: Callable[[nn.Module, str], Any]) -> nn.Module:
    """Asserts that fxquant compiles as many graphs with as many breaks as plain; the quantized model, trained."""
    plain, model = make(), prepared(make(), x)
    with counted() as expected:
        run(plain, "aot_eager")
    with counted() as got:
        run(model, EAGER)
    assert got == expected
    assert not unset(model) and not eager_runs(model)
    return model


def whole(x: Tensor) -> Callable[[nn.Module, str], Any]:
    return lambda model, backend: step(torch.compile(model, backend=backend), x)


@pytest.mark.parametrize(
    ("make", "shape"),
    [(Mlp, (2, 8)), (ConvNet, (2, 3, 6, 6)), (Attention, (2, 4, 8)), (Blocks, (2, 8))],
    ids=["mlp", "conv", "attention", "blocks"],
)
def test_no_graph_and_no_break_is_added(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    plain_and_quantized(make, torch.randn(shape), whole(torch.randn(shape)))


def test_twelve_blocks_with_breaks_between() -> None:
    model = plain_and_quantized(
        lambda: Blocks(between=torch._dynamo.graph_break), torch.randn(2, 8), whole(torch.randn(2, 8))
    )
    assert len(ranges(model)) == 24


@pytest.mark.parametrize("how", ["block.compile", "torch.compile(block)"])
def test_twelve_blocks_compiled_one_by_one(how: str) -> None:
    def run(model: nn.Module, backend: str) -> None:
        for index, block in enumerate(model.blocks):
            if how == "block.compile":
                block.compile(backend=backend)
            else:
                model.blocks[index] = torch.compile(block, backend=backend)  # type: ignore[index, operator]
        step(model, torch.randn(2, 8))

    plain_and_quantized(Blocks, torch.randn(2, 8), run)


def test_instances_of_a_class_share_one_compile_and_keep_their_state() -> None:
    models = [prepared(ConvNet(), torch.randn(2, 3, 6, 6)) for _ in range(10)]
    with counted() as got:
        for scale, model in enumerate(models, start=1):
            step(torch.compile(model, backend=EAGER), torch.full((2, 3, 6, 6), float(scale)))
    assert got == {"graphs": 1, "breaks": 0}
    assert [ranges(model)["conv1.input"] for model in models] == [(float(i), float(i)) for i in range(1, 11)]
    assert not any(eager_runs(model) for model in models)


def test_many_classes_do_not_use_up_one_recompile_limit() -> None:
    for index in range(torch._dynamo.config.recompile_limit + 2):
        scope: dict[str, Any] = {"F": torch.nn.functional}
        exec(f"def forward(self, x): return F.linear(x, self.weight) * {index + 1}", scope)  # code of its own
        kind = type(f"Kind{index}", (nn.Module,), {"forward": scope["forward"]})
        model = kind()
        model.weight = nn.Parameter(torch.randn(8, 8))
        prepared(model, torch.randn(2, 8))
        assert bound_forward(model) is not None
        step(torch.compile(model, backend=EAGER), torch.randn(2, 8))
        assert not unset(model) and not eager_runs(model)


def test_preparing_often_neither_fails_nor_counts_as_recompiling() -> None:
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        model = prepared(Blocks(2, between=torch._dynamo.graph_break), torch.randn(2, 8))
    assert len(ranges(model)) == 4
    step(torch.compile(model, backend=EAGER), torch.randn(2, 8))
    assert not unset(model) and not eager_runs(model)


def test_train_eval_and_batch_sizes_share_state() -> None:
    model = prepared(Mlp(), torch.randn(2, 8))
    compiled = torch.compile(model, backend=EAGER, dynamic=True)
    with counted() as got:
        for size in (2, 3, 5, 7):
            step(compiled, torch.randn(size, 8))
    assert got["graphs"] == 1
    seen = ranges(model)
    for size in (2, 5):
        model.eval()
        compiled(torch.randn(size, 8))
        assert ranges(model) == seen
    model.train()
    step(compiled, torch.randn(4, 8))
    assert ranges(model) != seen


class Breaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(8, 8)
        self.after = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.before(x))
        torch._dynamo.graph_break()
        return self.after(x)


def test_a_graph_break_inside_forward() -> None:
    model = plain_and_quantized(Breaking, torch.randn(2, 8), whole(torch.randn(2, 8)))
    assert set(ranges(model)) == {"before.input", "after.input"}
    assert set(grads(model)) == {name for name, _ in model.named_parameters()}


class BreakingAttention(nn.Module):
    """Three consumers of one tensor, in a frame that cannot own its quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        x = torch.tanh(x)
        return self.q(x) * self.k(x) - self.v(x)


def test_a_tensor_shared_in_a_broken_frame_is_quantized_for_each_consumer() -> None:
    x = torch.randn(2, 8)
    model = plain_and_quantized(BreakingAttention, x, whole(x))
    assert set(ranges(model)) == {"q.input", "k.input", "v.input"}
    assert len(set(ranges(model).values())) == 1
    assert not plan_of(model).declined  # type: ignore[union-attr]


class FunctionalBreaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return torch.nn.functional.linear(self.inner(x), self.weight)


def test_an_operator_of_a_broken_frame_itself_is_declined_with_the_reason() -> None:
    x = torch.randn(2, 8)
    model = plain_and_quantized(FunctionalBreaking, x, whole(x))
    assert set(ranges(model)) == {"inner.input"}
    reasons = {each.reason for each in plan_of(model).declined}  # type: ignore[union-attr]
    assert reasons == {"a graph break or checkpoint lies between it and the start of the model's forward"}


class Frames(nn.Module):
    """What runs the two linears is chosen by the caller."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = Mlp()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.body, x)


def module_checkpoint(body: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(body, x, use_reentrant=False)


def function_checkpoint(body: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda y: body.second(torch.relu(body.first(y))), x, use_reentrant=False)


@pytest.mark.parametrize("run", [module_checkpoint, function_checkpoint])
def test_checkpointing_changes_no_number(run: Callable[[nn.Module, Tensor], Tensor]) -> None:
    x = torch.randn(4, 8)
    results = []
    for how in (run, lambda body, y: body(y)):
        torch.manual_seed(0)
        model = prepared(Frames(how), x)
        compiled = torch.compile(model, backend=EAGER)
        outs = [step(compiled, x * scale) for scale in (1, 3, 0.5)]
        assert not unset(model) and not eager_runs(model)
        results.append((outs, grads(model), ranges(model)))
    (outs, gradients, found), (plain_outs, plain_gradients, plain_found) = results
    assert list(found.values()) == list(plain_found.values())
    torch.testing.assert_close(outs, plain_outs, rtol=0, atol=0)
    torch.testing.assert_close(gradients, plain_gradients, rtol=0, atol=0)


def test_a_module_called_twice_has_one_quantizer_that_sees_both() -> None:
    def twice(body: nn.Module, x: Tensor) -> Tensor:
        return body(x) + body(10 * x)

    x = torch.randn(4, 8)
    model = plain_and_quantized(lambda: Frames(twice), x, whole(x))
    low, high = ranges(model)["body.first.input"]
    assert high == pytest.approx((x.max() + 0.01 * (10 * x.max() - x.max())).item())
    assert low == pytest.approx((x.min() + 0.01 * (10 * x.min() - x.min())).item())
    assert len(plan_of(model).sites) == len({site.key for site in plan_of(model).sites})  # type: ignore[union-attr]


def test_a_tied_weight_has_one_quantizer() -> None:
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    model = plain_and_quantized(TiedLanguageModel, tokens, whole(tokens))
    tied = [site for site in plan_of(model).sites if len(site.local.edges) > 1]  # type: ignore[union-attr]
    assert [(site.local.role, "tied" in site.reason) for site in tied] == [("weight", True)]
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.grad is not None


@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(training: bool) -> None:
    model = prepared(Attention(), torch.randn(2, 4, 8))
    model.train(training)
    x = torch.randn(2, 4, 8)
    with counted() as got:
        out = torch.compile(model, backend=EAGER)(x)
    assert got == {"graphs": 1, "breaks": 0}
    report = compile_reports()[-1]
    assert report.quantized == len(plan_of(model).sites), report.declines  # type: ignore[union-attr]
    assert bool(unset(model)) is not training
    assert not torch.equal(out, model(x))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 100 * grad  # not the derivative: shows that this is what runs


def test_a_custom_autograd_function_keeps_its_backward() -> None:
    x = torch.randn(4, 8)
    model = plain_and_quantized(lambda: Frames(lambda body, y: body.second(Square.apply(body.first(y)))), x, whole(x))
    compiled = torch.compile(model, backend=EAGER)
    model.zero_grad()
    hidden = model.body.first(x).requires_grad_()
    step(compiled, x)
    (expected,) = torch.autograd.grad(model.body.second(hidden**2).square().mean(), hidden)
    expected = (expected / (2 * hidden) * 100).sum(0)
    torch.testing.assert_close(model.body.first.bias.grad, expected, rtol=0.2, atol=0.1 * expected.abs().max().item())


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Mlp()

    def forward(self, *, batch: dict[str, Any], scale: float = 1.0) -> dict[str, Tensor]:
        return {"logits": self.body(batch["x"] * scale) + batch["nested"][0]}


def test_keyword_and_dictionary_inputs() -> None:
    batch = {"x": torch.randn(2, 8), "nested": (torch.randn(2, 8),)}
    model = fxquant.prepare(Structured(), (), {"batch": batch, "scale": 2.0})
    with counted() as got:
        torch.compile(model, backend=EAGER)(batch=batch, scale=2.0)["logits"].sum().backward()
    assert got == {"graphs": 1, "breaks": 0}
    assert not unset(model)
    assert ranges(model)["body.first.input"][1] == (2 * batch["x"]).max().item()


@pytest.mark.parametrize("how", ["torch.compile(model)", "model.compile()", "function"])
def test_ways_to_compile(how: str) -> None:
    model = prepared(Mlp(), torch.randn(2, 8))
    x = torch.randn(4, 8)
    with counted() as got:
        if how == "torch.compile(model)":
            compiled: Callable[..., Any] = torch.compile(model, backend=EAGER)
        elif how == "model.compile()":
            model.compile(backend=EAGER)
            compiled = model
        else:
            compiled = torch.compile(lambda y: model(y) + model(2 * y), backend=EAGER)
        out = step(compiled, x)
    assert got == {"graphs": 1, "breaks": 0}
    assert not unset(model) and not eager_runs(model)
    low, high = x.min().item(), x.max().item()
    expected = (low, high) if how != "function" else (low + 0.01 * low, high + 0.01 * high)
    assert ranges(model)["first.input"] == pytest.approx(expected)
    assert torch.isfinite(out).all()


def test_a_frame_past_the_recompile_limit_is_reported() -> None:
    model = prepared(Mlp(), torch.randn(2, 8))
    compiled = torch.compile(model, backend=EAGER, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2), pytest.warns(NotQuantizedWarning, match="ran in eager"):
        for size in range(2, 6):
            compiled(torch.randn(size, 8))
    assert eager_runs(model) == 2 * len(ranges(model)), "each owner counts the two batches past the limit"


def test_a_disabled_parent_is_reported_once_and_counted() -> None:
    @torch.compiler.disable
    def opaque(body: nn.Module, x: Tensor) -> Tensor:
        return body(x)

    model = Frames(lambda body, x: body(x))
    prepared(model, torch.randn(2, 8))
    model.run = opaque
    compiled = torch.compile(model, backend=EAGER)
    with pytest.warns(NotQuantizedWarning, match="stayed float") as caught:
        compiled(torch.randn(2, 8))
        compiled(torch.randn(2, 8))
    names = [str(w.message).split(" ran in eager")[0] for w in caught if w.category is NotQuantizedWarning]
    assert sorted(names) == ["Linear", "Linear"], names
    found = [bound_forward(module) for module in (model.body.first, model.body.second)]
    assert [bound.eager_runs for bound in found if bound is not None] == [2, 2]


def test_plain_eager_use_does_not_warn() -> None:
    model = prepared(Mlp(), torch.randn(2, 8))
    model(torch.randn(2, 8))
    torch.compiler.disable(model)(torch.randn(2, 8))
    assert eager_runs(model) == 0


def test_a_recurrent_layer_without_gates_stays_float_beside_quantized_ones() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.recurrent = nn.RNN(8, 8, batch_first=True)
            self.outer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.recurrent(self.inner(x))[0])

    model = prepared(Recurrent(), torch.randn(2, 3, 8))
    step(torch.compile(model, backend=EAGER), torch.randn(2, 3, 8))
    assert set(ranges(model)) == {"inner.input", "outer.input"}
    assert not unset(model)
    assert all(not key.startswith("recurrent") for key, _ in quantizers(model))
    declined = {each.where: each.reason for each in plan_of(model).declined}  # type: ignore[union-attr]
    assert list(declined) == ["rnn_tanh"] and "its products stay float" in declined["rnn_tanh"]


def test_a_recurrent_layer_without_gates_alone_is_refused() -> None:
    with pytest.raises(fxquant.errors.UnsupportedModel, match=r"found none to quantize \(rnn_tanh: a file holds"):
        prepared(nn.RNN(8, 8), torch.randn(2, 3, 8))


class Dense(nn.ModuleDict):
    """Runs all that it holds, as the blocks of DenseNet do: quantizers in it would be layers too."""

    def __init__(self) -> None:
        super().__init__({"one": nn.Linear(4, 4), "two": nn.Linear(8, 4)})
        self.weight = nn.Parameter(torch.randn(4, 12))

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.values():
            found.append(layer(torch.cat(found, 1)))
        return torch.nn.functional.linear(torch.cat(found, 1), self.weight)


def test_a_module_that_runs_all_that_it_holds_owns_no_quantizer() -> None:
    x = torch.randn(3, 4)
    model = plain_and_quantized(lambda: nn.Sequential(Dense(), nn.Linear(4, 4)), x, whole(x))
    plan = plan_of(model)
    assert plan is not None and {site.owner for site in plan.sites} == {"", "0.one", "0.two", "1"}
    assert {"0_linear0_input", "0_linear0_weight"} <= {site.key for site in plan.sites}


def test_such_a_module_alone_keeps_its_own_operators_in_float() -> None:
    x = torch.randn(3, 4)
    plan = plan_of(plain_and_quantized(Dense, x, whole(x)))
    assert plan is not None and {site.owner for site in plan.sites} == {"one", "two"}
    reasons = {each.reason for each in plan.declined if "ModuleDict" in each.reason}
    assert reasons == {
        "the model is a ModuleDict or ModuleList, which may run all that it holds: put it into another module"
    }
