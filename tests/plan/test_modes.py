"""Operators that run in training only: evaluation keeps apart those that it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import NotQuantizedWarning
from fxquant.plan.positions import matching
from fxquant.prepared.quantizer import quantizers
from fxquant.targets.session import EXACT_SUMS, session
from tests.nets import prepared, ranges, step

EAGER = "fxquant_eager"
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.usefixtures("cold")


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Parameter(torch.randn(8, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(F.relu(x), self.b), self.c)


class Auxiliary(Plain):
    """Runs a product of another range first, in training only."""

    def forward(self, x: Tensor) -> Tensor:
        shift = F.linear(100 * x, self.a).mean() if self.training else None
        y = F.linear(F.linear(F.relu(x), self.b), self.c)
        return y if shift is None else y + shift


class Replaced(Plain):
    """Runs another product in evaluation, and one less."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        if self.training:
            return F.linear(F.linear(x, self.b), self.c)
        return F.linear(x, self.a)


class Fused(Plain):
    """Attention by hand in training, by torch's operator in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        q, k = (x @ self.a)[None], (x @ self.b)[None]
        if self.training:
            return torch.softmax(q @ k.mT, -1) @ k
        return F.scaled_dot_product_attention(q, k, k, scale=1.0)


class Helpers(Plain):
    """Runs its products in functions that forward calls, as detection heads do; evaluation decodes what they give."""

    def products(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = F.linear(F.relu(x), self.b)
        return first, F.linear(first, self.c)

    def decoded(self, first: Tensor, second: Tensor) -> Tensor:
        return F.linear(first + second, self.a)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            x = self.decoded(x, x)
        first, second = self.products(x)
        return first + second


class Branches(Plain):
    """Writes the same product twice."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return F.linear(F.relu(x), self.b)
        return F.linear(F.relu(x).detach(), self.b)


def evaluated(model: nn.Module) -> Tensor:
    found: Tensor = torch.compile(model.eval(), backend=EAGER)(X)
    return found.detach()


def test_evaluation_and_export_give_each_operator_its_own_range(tmp_path: Path) -> None:
    model, plain = prepared(Auxiliary(), X), prepared(Plain(), X)
    step(torch.compile(model, backend=EAGER), X)
    mine = [q for _, q in quantizers(model) if q.stateful][1:]
    for theirs, own in zip((q for _, q in quantizers(plain) if q.stateful), mine, strict=True):
        theirs.load_state_dict(own.state_dict())
    expected = evaluated(plain)
    assert torch.equal(evaluated(model), expected)
    before = ranges(model)
    with pytest.warns(NotQuantizedWarning, match="keep the ranges"):
        fxquant.calibrate(model, [X])
    assert ranges(model)["input"] == before["input"]
    with pytest.warns(NotQuantizedWarning, match="have no place in the exported graph"):
        fxquant.export_onnx(model, (X,), tmp_path / "m.onnx")
    built = session(tmp_path / "m.onnx", optimize=True, config=EXACT_SUMS)
    (found,) = built.run(None, {built.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), evaluated(model), rtol=0, atol=1e-5)


def test_functions_that_forward_calls_are_told_apart_in_the_file(tmp_path: Path) -> None:
    model = prepared(Helpers(), X)
    fxquant.calibrate(model, [X], progress=False)
    expected = evaluated(model)
    assert not torch.equal(expected, model(X).detach()), "evaluation is quantized"
    fxquant.export_onnx(model, (X,), tmp_path / "m.onnx")
    built = session(tmp_path / "m.onnx", optimize=True, config=EXACT_SUMS)
    (found,) = built.run(None, {built.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)


def test_an_operator_that_evaluation_runs_instead_is_named() -> None:
    model = prepared(Replaced(), X)
    step(torch.compile(model, backend=EAGER), X)
    with pytest.warns(NotQuantizedWarning, match="other operators than those that fxquant.prepare saw: "):
        found = evaluated(model)
    assert torch.equal(found, model(X).detach())


def test_a_product_of_another_kind_instead_is_named() -> None:
    model = prepared(Fused(), X)
    step(torch.compile(model, backend=EAGER), X)
    with pytest.warns(NotQuantizedWarning, match="other operators than those that fxquant.prepare saw: matmul2_lhs"):
        evaluated(model)


def test_one_operator_on_two_lines_is_one() -> None:
    model = prepared(Branches(), X)
    step(torch.compile(model, backend=EAGER), X)
    assert not torch.equal(evaluated(model), model(X).detach())


@pytest.mark.parametrize(
    ("planned", "found", "expected"),
    [
        (("a", "b"), ("a", "b"), {0: 0, 1: 1}),
        (("a", "b"), ("c", "d"), {0: 0, 1: 1}),
        (("a", "b", "c"), ("b", "c"), {1: 0, 2: 1}),
        (("a", "b", "c"), ("a", "d", "c"), {0: 0, 1: 1, 2: 2}),
        (("a", "b"), ("b", "c"), {1: 0}),
        (("a", "b"), ("z", "a", "b"), {0: 1, 1: 2}),
        (("a", "a", "b"), ("a", "b"), {0: 0, 2: 1}),
        (("a", "a"), ("a", "a", "a"), {0: 0, 1: 1}),
        (("a", "b"), ("y", "z", "z"), {}),
        (("a", "b"), ("",), {0: 0}),
        (("", ""), ("",), {0: 0}),
        ((), ("a",), {0: 0}),
        (("f a", "f b"), ("f a", "f b", "g c"), {0: 0, 1: 1}),
        (("f a", "f b"), ("g c", "f b"), {0: 0, 1: 1}),
        (("f a", "f b"), ("g c", "f b", "f a"), {0: 2, 1: 1}),
        (("f a", "f b"), ("f", "f", "g"), {0: 0, 1: 1}),  # as exported
        (("f a", "f b", "h"), ("g", "f", "f", "h"), {0: 1, 1: 2, 2: 3}),
        (("a",), ("f a", "g"), {0: 0}),
    ],
)
def test_matching(planned: tuple[str, ...], found: tuple[str, ...], expected: dict[int, int]) -> None:
    assert matching(planned, found) == expected
