"""Ways of writing a model that real architectures have: each trains, exports and verifies as any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.backend.reports import compile_reports
from fxquant.prepared.root import plan_of
from tests.nets import prepared, step, unset
from tests.onnx.agreement import assert_codes_agree


class ClippedBlocks(nn.Module):
    """ReLU6, whose range is fixed, in front of convolutions and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.second(F.relu6(self.first(x))))
        return self.head(x.mean((2, 3)))


class DeadSum(nn.Module):
    """The sum of the last round is never read, as in WaveNet; another one comes after it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(4, 4, 1) for _ in range(2))
        self.last = nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.last(x)
        for layer in self.layers:
            y = torch.relu(layer(x))
            x = x + y
            skip = skip + y
        return self.last(skip)


class LearnedQuery(nn.Module):
    """Pooling by attention from a parameter: its projection is constant where the batch is."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, 8))
        self.to_query, self.to_key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        query = self.to_query(self.query.expand(x.shape[0], -1, -1))
        return query @ self.to_key(x).transpose(1, 2)


class ChosenByName(nn.Module):
    """One layer reached by the same expression in a loop: Dynamo gives two calls one key."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = nn.ModuleDict({"wide": nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))})

    def run(self, parts: list[Tensor], name: str) -> list[Tensor]:
        return [self.ops[name](part) for part in parts]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.run([x, x.tanh(), -x], "wide"))


class ForwardByName(nn.Module):
    """Layers whose ``forward`` is called without their ``__call__``, as SqueezeBERT does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.forward(x) @ x.transpose(1, 2) @ x
        return x


class RepeatedHeads(nn.Module):
    """Keys shared by two query heads: a whole slice, which only symbolic sizes leave in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).unflatten(-1, (2, 4)).transpose(1, 2)
        value = self.value(x).unflatten(-1, (1, 4)).transpose(1, 2)
        batch, heads, length, width = value.shape
        value = value[:, :, None, :, :].expand(batch, heads, 2, length, width).reshape(batch, 2 * heads, length, width)
        return F.scaled_dot_product_attention(query, value, value)


class TransposedLinear(nn.Module):
    """GPT-2's Conv1D: addmm with the weight as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, 8), self.weight).view(*x.shape[:-1], 6)


class BatchedWeight(nn.Module):
    """A matrix for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x.unsqueeze(1), self.weight)


class TiedAcrossBreak(nn.Module):
    """Each half of a broken graph has a quantizer for the shared weight; the export needs one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        torch._dynamo.graph_break()
        return self.head(x)


class ZeroState(nn.Module):
    """The first layer's input is zeros whatever the data, as the value of DETR's first decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(torch.zeros_like(x)) + x))


class EqualAcrossBreak(nn.Module):
    """Two layers read one tensor, each with a range of its own: the exporter makes one QuantizeLinear of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        return y + self.second(x)


SEQUENCE, IMAGE = (3, 5, 8), (2, 3, 8, 8)
# Net, input, and which part of its Conv, Gemm and MatMul nodes runs as integers.
CASES = [
    (ClippedBlocks, IMAGE, 1.0),
    (DeadSum, (2, 4, 6), 1.0),
    (LearnedQuery, SEQUENCE, None),
    (ChosenByName, SEQUENCE, 1.0),
    (ForwardByName, SEQUENCE, 1.0),
    (RepeatedHeads, SEQUENCE, 0.75),
    (TransposedLinear, SEQUENCE, 1.0),
    (BatchedWeight, SEQUENCE, 1.0),
    (TiedAcrossBreak, SEQUENCE, 1.0),
    (ZeroState, SEQUENCE, None),
    (EqualAcrossBreak, SEQUENCE, 1.0),
]


pytestmark = pytest.mark.usefixtures("cold")


@pytest.mark.parametrize(("make", "shape", "share"), CASES, ids=[case[0].__name__ for case in CASES])
def test_it_verifies_with_a_fixed_and_with_an_open_batch(
    make: Callable[[], nn.Module], shape: tuple[int, ...], share: float | None, tmp_path: Path
) -> None:
    x = torch.randn(shape)
    model = prepared(make(), x)
    step(torch.compile(model, backend="fxquant_eager"), x)
    assert not unset(model)
    for dynamic in (False, True):
        path = tmp_path / f"{dynamic}.onnx"
        fxquant.export_onnx(model, (x,), path, dynamic_batch=dynamic)
        report = fxquant.verify_onnx(model, (x,), path, rounds=0)
        assert_codes_agree(report)
        assert share is None or report.integer_share == share


def test_a_dead_operator_has_no_site_and_is_not_counted() -> None:
    plan = plan_of(prepared(DeadSum(), torch.randn(2, 4, 6)))
    assert plan is not None
    sums = {edge.ordinal for site in plan.sites for edge in site.local.edges if edge.kind == "add"}
    assert sums == {0, 1, 2}


def test_calls_of_one_module_share_its_sites() -> None:
    plan = plan_of(prepared(ChosenByName(), torch.randn(SEQUENCE)))
    assert plan is not None
    assert [site.key for site in plan.sites] == [f"ops.wide.{i}.{name}" for i in (0, 2) for name in ("input", "weight")]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.ones_like(x[:, 0])
        for t in range(x.shape[1]):
            state = torch.tanh(self.cell(state * x[:, t]))
        return state


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_layer_is_quantized_however_often_it_runs(length: int) -> None:
    model = prepared(Recurrent(), torch.randn(2, 3, 8))
    step(torch.compile(model, backend="fxquant_eager", dynamic=False), torch.randn(2, length, 8))
    plan = plan_of(model)
    assert plan is not None and [site.key for site in plan.sites] == ["cell.input", "cell.weight"]
    assert compile_reports()[-1].quantized == length + 1


def test_a_layer_whose_forward_is_called_by_name_belongs_to_its_caller() -> None:
    plan = plan_of(prepared(ForwardByName(), torch.randn(SEQUENCE)))
    assert plan is not None
    assert {site.owner for site in plan.sites} >= {"", "layers.0.0"} and "layers.1" not in plan.owners()
