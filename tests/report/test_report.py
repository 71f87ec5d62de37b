"""explain and sqnr."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import InvalidArgument
from fxquant.report import sqnr
from fxquant.table import megabytes, table


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.down(self.norm(self.up(x)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return fxquant.prepare(Net(), (torch.randn(4, 6),))


def test_explain_before_and_after_a_compiled_step(model):
    before = fxquant.explain(model)
    assert {row.status for row in before.rows} == {"not yet run"} and {row.range for row in before.rows} == {
        "unset",
        "of the tensor",
    }
    torch.compile(model, backend="fxquant_eager")(torch.randn(4, 6)).sum().backward()
    after = fxquant.explain(model)
    assert [row.key for row in after.rows] == ["up.input", "up.weight", "down.input", "down.weight"]
    assert after.unbound == ()
    assert all(row.source.endswith(f"test_report.py:{_line()}") for row in after.rows)
    (declined,) = after.declined
    assert declined.where == "add" and "used in float" in declined.reason


def _line() -> int:
    """Where Net.forward calls its linears."""
    return Net.forward.__code__.co_firstlineno + 1


def test_explain_prints_and_serializes(model):
    found = fxquant.explain(model)
    text = str(found)
    assert text.startswith("recipe 'int8' for onnxruntime: 4 sites") and "left in float: 1" in text
    assert json.loads(json.dumps(found.to_dict()))["sites"][0]["key"] == "up.input"


def test_sqnr_is_the_ratio_of_its_definition():
    torch.manual_seed(0)
    model = fxquant.prepare(nn.Sequential(nn.Linear(64, 4)), (torch.randn(8, 64),))
    x = torch.randn(8, 64)
    fxquant.calibrate(model, [x])
    found = sqnr(model, (x,))
    assert list(found) == ["0.input", "0.weight"] or list(found) == ["0.weight", "0.input"]
    low, high = x.min().item(), x.max().item()
    scale = (high - low) / 255
    zero = -round(low / scale)
    y = ((x.double() / scale).round() + zero).clamp(0, 255).sub(zero) * scale
    wanted = 10 * math.log10(float((x.double() ** 2).sum() / ((y - x) ** 2).sum()))
    assert found["0.input"] == pytest.approx(wanted, abs=0.05)
    assert 30 < found["0.weight"] < 60


def test_unprepared():
    for function in (fxquant.explain, lambda m: sqnr(m, ())):
        with pytest.raises(InvalidArgument, match="must be given a prepared model"):
            function(nn.Linear(2, 2))


def test_table():
    assert table(("a", "bb"), [("long", 1)]) == "a     bb\n────  ──\nlong  1"
    assert megabytes(1_250_000) == "1.25 MB" and megabytes(12_300) == "12.3 kB"
