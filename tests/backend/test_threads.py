"""One thread compiles and trains while another asks something else of its own model: each finds what it finds alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.capture.exported import exported_graph
from fxquant.ops import fake_quantize_per_tensor_affine
from tests.nets import Mlp, grads, prepared, step

LIMIT = 600  # seconds; a deadlock is a failure and no hung run


def together(*runs: Callable[[], Any]) -> list[Any]:
    """What each gives, all begun at once, each in a thread of its own."""
    gate, found = threading.Barrier(len(runs)), [None] * len(runs)
    errors: list[BaseException] = []

    def run(number: int, work: Callable[[], Any]) -> None:
        try:
            gate.wait(LIMIT)
            found[number] = work()
        except BaseException as error:  # told below, in the thread of the test
            errors.append(error)

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return found


class Autocast(nn.Module):
    """Computes in bfloat16 by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x)


def seeded(kind: Callable[[], nn.Module]) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = kind()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


X = torch.linspace(-1, 1, 24).reshape(3, 8)


def quantized() -> nn.Module:
    return prepared(seeded(Mlp), X)


class Trains:
    """Two compiled steps of a model of its own, by one backend; the gradients, and the type of its result."""

    def __init__(self, backend: str, kind: Callable[[], nn.Module]) -> None:
        self.model = seeded(kind)
        if backend == "fxquant":
            prepared(self.model, X)
        self.compiled = torch.compile(self.model, backend=backend)

    def __call__(self) -> tuple[dict[str, Tensor], torch.dtype]:
        for _ in range(2):
            self.model.zero_grad()
            step(self.compiled, X)
        return grads(self.model), self.compiled(X).dtype


def exports(model: nn.Module) -> Any:
    """The graph of the model, as text: that of a model in float32, autocast or not."""
    return exported_graph(model, (X,), {}, None).code


def costs(model: nn.Module) -> Any:
    return fxquant.cost(model, (X,)).to_dict()


def explains(model: nn.Module) -> Any:
    return str(fxquant.explain(model))


def calibrates(model: nn.Module) -> Any:
    fxquant.calibrate(model, [X, 2 * X])
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in expected)
    if isinstance(expected, tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected


@pytest.fixture(autouse=True)
def cold_caches(cold: None) -> None:
    """Each graph is compiled, by both threads."""


@pytest.mark.parametrize("asks", [exports, costs, explains, calibrates])
@pytest.mark.parametrize(("backend", "kind"), [("fxquant", Mlp), ("inductor", Autocast)], ids=["fxquant", "inductor"])
def test_one_compiles_while_another(asks: Callable[[nn.Module], Any], backend: str, kind: Any) -> None:
    own = (lambda: seeded(Autocast)) if asks is exports else quantized
    alone = asks(own())
    expected = Trains(backend, kind)()
    torch._dynamo.reset()
    model, trains = own(), Trains(backend, kind)
    with torch._inductor.config.patch(force_disable_caches=True):
        trained, found = together(trains, lambda: [asks(model) for _ in range(3)][-1])
    assert same(trained, expected), "what is trained is what is trained alone"
    assert same(found, alone), "what is found is what is found alone"


def test_two_calibrate() -> None:
    alone = calibrates(quantized())
    models = [quantized(), quantized()]
    for found in together(*(lambda model=model: calibrates(model) for model in models)):  # type: ignore[misc]
        assert same(found, alone)


def test_an_operator_compiles_in_two_threads() -> None:
    """The first that Dynamo meets tells Inductor; both are fused."""

    def quantize(x: Tensor) -> Tensor:
        return fake_quantize_per_tensor_affine(x, 0.1, 0, -8, 7)

    for found in together(*[lambda: torch.compile(quantize)(X)] * 2):
        assert torch.equal(found, quantize(X))


def test_an_error_in_one_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        together(lambda: 1 / 0, lambda: exports(seeded(Mlp)))
