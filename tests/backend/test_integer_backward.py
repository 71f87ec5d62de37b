"""Training with backward products of codes: option ``integer_backward`` of both backends, on whole models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.backend.options import Options
from fxquant.backend.reports import compile_reports
from fxquant.errors import InvalidArgument
from fxquant.ops.integer_matmul import multiplies_exactly
from fxquant.passes.joint.use_integer_backward import IntegerBackward
from tests.nets import Attention, Convs, Mlp, grads, step

pytestmark = [
    pytest.mark.usefixtures("cold"),
    pytest.mark.skipif(bool(multiplies_exactly("matmul", "cpu", False)), reason="no exact integer product here"),
]

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (lambda: Mlp(16), (4, 8, 16), 1),
    "linear": (lambda: nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8)), (16, 16), 1),
    "attention": (lambda: Attention(16), (2, 8, 16), 3),
}


@functools.cache
def run(net: str, backend: str, backward: Any, recipe: str = "int8") -> tuple[Tensor, dict[str, Tensor], int]:
    """A training step of its own compile, drawn from one seed: result, gradients, products of codes in backward."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    make, shape, _ = NETS[net]
    model, x = make(), torch.randn(shape)
    fxquant.prepare(model, (x,), recipe=recipe)
    options = {"integer_matmul": True, "integer_backward": backward}
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(model, backend=backend, options=options)
        torch.manual_seed(1)
        out = step(compiled, x)
    return out, grads(model), compile_reports()[-1].integer_backward


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.cosine_similarity(found[name].flatten(), value.flatten(), 0) > 0.999, name


@pytest.mark.parametrize("net", ["mlp", "attention"])
def test_gradients_are_near_those_of_float_products(net: str) -> None:
    out, found, count = run(net, "fxquant_eager", True)
    floating, expected, none = run(net, "fxquant_eager", False)
    assert (count, none) == (NETS[net][2], 0)
    assert torch.equal(out, floating), "forward is what it was"
    assert_alike(found, expected)
    assert any(not torch.equal(found[name], expected[name]) for name in expected)


def test_compiled_steps_draw_what_eager_ones_draw() -> None:
    """The same codes, so all that differs is the rounding of float sums before them."""
    _, found, count = run("linear", "fxquant", True)
    _, expected, _ = run("linear", "fxquant_eager", True)
    assert count == 1
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4 * value.abs().max().item())


def test_codes_of_four_bits_are_unpacked_for_the_product() -> None:
    _, found, count = run("mlp", "fxquant_eager", True, recipe="w4a4")
    _, expected, _ = run("mlp", "fxquant_eager", False, recipe="w4a4")
    assert count == NETS["mlp"][2] + 1, "the input's range is trained, so it has a gradient"
    assert_alike(found, expected)


def test_rounding_to_the_nearest_draws_nothing() -> None:
    nearest = {"mode": True, "rounding": "nearest"}
    torch._dynamo.reset()
    model, x = Mlp(16), torch.randn(4, 8, 16)
    fxquant.prepare(model, (x,))
    compiled = torch.compile(model, backend="fxquant_eager", options={"integer_backward": nearest})
    step(compiled, x)
    before = torch.get_rng_state()
    step(compiled, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_outliers_stay_float_in_compiled_steps_as_in_eager_ones() -> None:
    class Few(dict[str, Any]):
        """An option that can be a key."""

        __hash__ = object.__hash__  # type: ignore[assignment]

    few = Few(mode=True, rounding="nearest", outliers=0.1)
    _, found, count = run("linear", "fxquant", few)
    _, expected, _ = run("linear", "fxquant_eager", few)
    assert count == 1
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4 * value.abs().max().item())
    without = run("linear", "fxquant", Few(mode=True, rounding="nearest"))[1]
    assert not torch.equal(found["0.weight"], without["0.weight"])


def test_training_takes_the_same_course_and_resumes_with_the_same_bits() -> None:
    def trained(options: dict[str, Any]) -> tuple[list[float], list[float], list[float]]:
        """Losses of a training, then of three more steps, and of these again from a checkpoint."""
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = Mlp(16), torch.randn(4, 8, 16)
        target = torch.sin(x.sum(-1, keepdim=True)).expand_as(x)
        fxquant.prepare(model, (x,))
        compiled = torch.compile(model, backend="fxquant_eager", options=options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)

        def losses(steps: int) -> list[float]:
            found = []
            for _ in range(steps):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(compiled(x), target)
                loss.backward()
                optimizer.step()
                found.append(loss.item())
            return found

        first = losses(24)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        generator = torch.get_rng_state()
        more = losses(3)
        model.load_state_dict(state)
        torch.set_rng_state(generator)
        return first, more, losses(3)

    integers, more, resumed = trained({"integer_backward": True})
    floats, _, _ = trained({})
    assert integers != floats and integers[-1] < 0.85 * integers[0]
    torch.testing.assert_close(torch.tensor(integers), torch.tensor(floats), rtol=0.02, atol=0)
    assert resumed == more


def test_a_convolution_says_why_it_stays_float() -> None:
    model, x = Convs(), torch.randn(2, 3, 8, 8)
    fxquant.prepare(model, (x,))
    step(torch.compile(model, backend="fxquant_eager", options={"integer_backward": True}), x)
    report, wanted = compile_reports()[-1], "float product in backward: torch has no gradient of an integer convolution"
    assert wanted in {d.reason for d in report.declines if d.pass_name == "UseIntegerBackward"}
    assert wanted in str(fxquant.explain(model))


def test_the_option_is_read() -> None:
    def read(value: object) -> IntegerBackward:
        return Options.read({"integer_backward": value}).integer_backward

    assert Options.read({}).integer_backward.mode is False
    assert read("auto") == IntegerBackward(mode="auto")
    assert read({}) == read(True) == IntegerBackward(mode=True)
    assert read({"mode": "auto", "rounding": "nearest"}) == IntegerBackward(mode="auto", rounding="nearest")
    assert read({"outliers": 0.25}) == IntegerBackward(mode=True, outliers=0.25) and read({"outliers": 0}) == read(True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"integer_backward": 2}, "options['integer_backward'] must be True, False or 'auto': got 2."),
        ({"integer_backward": None}, "options['integer_backward'] must be True, False or 'auto': got None."),
        (
            {"integer_backward": {"mode": "always"}},
            "options['integer_backward']['mode'] must be True, False or 'auto': got 'always'.",
        ),
        (
            {"integer_backward": {"rounding": "up"}},
            "options['integer_backward']['rounding'] must be 'stochastic' or 'nearest': got 'up'.",
        ),
        (
            {"integer_backward": {"seed": 1}},
            "options['integer_backward'] must hold 'mode', 'rounding' and 'outliers' only: got 'seed'.",
        ),
        *(
            (
                {"integer_backward": {"outliers": given}},
                f"options['integer_backward']['outliers'] must be a share from 0 to 0.25: got {given!r}.",
            )
            for given in (True, "few", -0.1, 0.3, float("nan"))
        ),
        (
            {"integer_backward": True, "reuse_weights": True},
            "options['reuse_weights'] must be False where options['integer_backward'] is True: got True. Weights are "
            "kept as floats, and those products are taken of codes: leave one of the two out.",
        ),
    ],
)
def test_other_values_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Options.read(given)
    assert str(caught.value) == message
