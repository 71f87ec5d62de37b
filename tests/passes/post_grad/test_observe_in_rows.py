from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import fxquant
from fxquant.backend.inductor.step import trace_step
from fxquant.passes.post_grad.materialize_shared import MaterializeShared
from fxquant.passes.post_grad.observe_in_rows import ObserveInRows
from tests.ops.oracle import assert_same_bits
from tests.passes.graphs import apply, show, untouched


def traced(function: Callable[..., tuple[Tensor, ...]], *shapes: tuple[int, ...]) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(*map(torch.randn, shapes))


def normalized(x: Tensor, dims: list[int]) -> Tensor:
    variance, mean = torch.var_mean(x, dims, keepdim=True, correction=0)
    return (x - mean) * (variance + 1e-5).rsqrt()


def extremes(y: Tensor) -> tuple[Tensor, Tensor]:
    return y.amin(), y.amax()


def test_before_and_after() -> None:
    gm = traced(lambda x: (torch.mean(x, [-1], keepdim=True) * x).view(8, 8).amin([0, 1]), (2, 4, 8))
    assert apply(ObserveInRows(), gm).rewrites == 1
    gm.graph.eliminate_dead_code()
    assert_expected_inline(
        show(gm),
        """\
mean = mean(x_1, [-1], True)
mul = mul(mean, x_1)
amin_default = amin(mul, [2])
amin_default_1 = amin(amin_default, [0, 1])
return amin_default_1
""",
    )


@pytest.mark.parametrize("dims", [[-1], [1, 2], [0, 2, 3]], ids=["layer norm", "two", "batch norm"])
def test_rows_are_those_of_the_statistics(dims: list[int]) -> None:
    shape = (2, 3, 4, 5) if len(dims) == 3 else (2, 3, 4)
    gm = traced(lambda x: extremes(normalized(x, dims).relu()), shape)
    assert apply(ObserveInRows(), gm).rewrites == 2
    rows = [node.args[1] for node in gm.graph.nodes if node.name in ("amin_default", "amax_default")]
    assert rows == [sorted(d % len(shape) for d in dims)] * 2


@pytest.mark.parametrize(
    "view",
    [
        lambda y: y.transpose(1, 2),
        lambda y: y.permute(2, 0, 1),
        lambda y: y.reshape(-1, 4),
        lambda y: y.unsqueeze(0).transpose(1, 3).flatten(0, 1),
        lambda y: y.transpose(1, 2).contiguous(),
    ],
    ids=["transpose", "permute", "reshape", "several", "copy"],
)
def test_views_are_looked_through(view: Callable[[Tensor], Tensor]) -> None:
    model = lambda x: extremes(view(normalized(x, [-1])))  # noqa: E731
    gm = traced(model, (2, 3, 4))
    assert apply(ObserveInRows(), gm).rewrites == 2
    x = torch.randn(2, 3, 4)
    for ours, expected in zip(gm(x), model(x), strict=True):
        assert_same_bits(ours, expected)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf"), 0.0])
def test_the_bits_of_special_values(special: float) -> None:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        return extremes(x * (x.sum([-1], keepdim=True) > 0))

    x = torch.rand(3, 4, 5)
    x[1, 2, 3] = special
    gm = traced(model, (3, 4, 5))
    assert apply(ObserveInRows(), gm).rewrites == 2
    for ours, expected in zip(gm(x), model(x), strict=True):
        assert_same_bits(ours, expected)


NOT_WHOLE = {
    "a part": lambda x: extremes(normalized(x, [-1])[:, 1:]),
    "per channel": lambda x: normalized(x, [-1]).amin([0, 1]),
    "no statistic": lambda x: extremes(x.relu()),
    "statistic of everything": lambda x: extremes(x * x.mean([0, 1, 2], keepdim=True)),
    "statistic of another tensor": lambda x: extremes(x[:, :1] * x.mean([1], keepdim=True)),
    "after a product": lambda x: extremes(normalized(x, [-1]) @ x.transpose(1, 2)),
    "one dimension": lambda x: extremes(x.flatten() * x.flatten().sum()),
}


@pytest.mark.parametrize("case", NOT_WHOLE)
def test_left_alone(case: str) -> None:
    untouched(ObserveInRows(), traced(NOT_WHOLE[case], (2, 3, 4)))


@pytest.mark.parametrize(("columns", "split"), [(64, 2), (32, 0)])
def test_a_stored_value_with_a_bias_has_its_columns_for_rows(columns: int, split: int) -> None:
    gm = traced(lambda x, bias: _with_codes((x + bias).erf()), (4, 2, columns), (columns,))
    assert apply(MaterializeShared(), gm).rewrites == 1
    result = ObserveInRows().run(gm)
    assert result.rewrites == split
    assert [node.args[1] for node in gm.graph.nodes if node.name == "amin_default"] == [[2]] * (split // 2)


def test_a_stored_value_without_one_is_left() -> None:
    gm = traced(lambda x: _with_codes((x + 1).erf()), (4, 2, 64))
    assert apply(MaterializeShared(), gm).rewrites == 1
    untouched(ObserveInRows(), gm)


def test_what_is_stored_besides_keeps_the_loop_that_stores_it() -> None:
    gm = traced(lambda x, other: _with_codes(normalized(x, [-1]) + other), (4, 2, 8), (4, 2, 8))
    assert apply(MaterializeShared(), gm).rewrites == 1
    untouched(ObserveInRows(), gm)


def _with_codes(y: Tensor) -> tuple[Tensor, ...]:
    return y.amin(), y.amax(), y.round(), y * 2


class Normed(nn.Module):
    """A residual sum, its norm, and a Linear that quantizes the norm's result."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.norm(x + self.inner(x)))


class Convolved(nn.Module):
    """Convolution, BatchNorm and ReLU, and a convolution that quantizes the result."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.outer = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.inner = nn.Conv2d(8, 8, 3, padding=1, bias=False)  # a bias in front of a BatchNorm has noise for gradient

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.relu(self.norm(self.inner(x))))


NETS = {"layer norm": (Normed, (4, 8, 64)), "batch norm": (Convolved, (4, 8, 6, 6))}


@pytest.mark.parametrize("net", NETS)
def test_ranges_are_those_of_eager(net: str) -> None:
    make, shape = NETS[net]
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = fxquant.prepare(make(), (x,))
    found = []
    for backend in ("fxquant_eager", "fxquant"):
        torch._dynamo.reset()
        own = copy.deepcopy(model)
        torch.compile(own, backend=backend)(x).square().sum().backward()
        found.append([*own.buffers(), *(p.grad for p in own.parameters())])
    for ours, eager in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def written_together(net: nn.Module, x: Tensor, batch: int | None = None) -> list[set[str]]:
    """Of each kernel of a step what it writes, by the names of the nodes in Inductor's graph."""
    step = trace_step(fxquant.prepare(net, (x,)), (x,), {}, quantized=True, batch=batch)
    return [{node.name for access in kernel.writes for node in access.nodes} for kernel in step.kernels]


@pytest.mark.parametrize(
    ("shape", "batch"),
    [((4, 8, 64), None), ((4, 8, 64), 4), ((32, 1, 64), None), ((1, 32, 64), None), ((32, 64), None)],
    ids=["three", "open batch", "one column", "one batch", "two"],
)
def test_a_sum_its_norm_and_their_range_are_one_kernel(shape: tuple[int, ...], batch: int | None) -> None:
    """The sum is stored, mean and variance are taken, and the extremes of each row: in one loop over the rows."""
    found = written_together(Normed(), torch.randn(shape), batch)
    together = next(names for names in found if "materialize_default" in names)
    assert {"materialize_default", "var_mean", "rsqrt", "amin_default", "amax_default"} <= together


def test_a_batch_norm_and_its_range_are_one_kernel() -> None:
    together = next(names for names in written_together(Convolved(), torch.randn(4, 8, 6, 6)) if "rsqrt" in names)
    assert {"amin_default", "amax_default"} <= together


def test_a_stored_value_and_its_range_are_one_kernel() -> None:
    """A residual sum of two BatchNorms, which the extremes read as it is computed and not as it is stored."""

    class Residual(Convolved):
        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.norm(self.inner(x)) + x)
            return self.outer(y) + y

    together = written_together(Residual(), torch.randn(4, 8, 6, 6))
    (storing,) = [names for names in together if "materialize_default" in names and len(names) > 1]
    assert any(name.startswith("amin") for name in storing) and any(name.startswith("amax") for name in storing)
