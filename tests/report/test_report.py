"""explain and sqnr."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import fxquant
from fxquant.errors import InvalidArgument
from fxquant.report import Explanation, sqnr
from fxquant.support.table import megabytes, table
from tests.report.nets import FLAT, Forked


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


FOUR = fxquant.QuantSpec(bits=4, narrow=True, axis=0, range=fxquant.CurrentTensor())
SIX = fxquant.QuantSpec(bits=6, signed=False, symmetric=False)


def printed(found: Explanation) -> str:
    """The tables, with XX for the lines of ``tests/report/nets.py``."""
    return re.sub(r"nets\.py:\d\d", "nets.py:XX", str(found))


def test_snapshot_of_a_table():
    model = fxquant.prepare(Forked(), (FLAT,), rules=[fxquant.Rule(path="b", operand="weight", spec=FOUR)])
    assert_expected_inline(
        printed(fxquant.explain(model)),
        """\
recipe 'int8' for onnxruntime: 3 sites, all not yet run
site             format     expected kernel       why                                           source
───────────────  ─────────  ────────────────────  ────────────────────────────────────────────  ──────────
a_linear0_input  u8         MatMulIntegerToFloat  operand of linear, linear_1                   nets.py:XX
a.weight         s8 axis 0  MatMulIntegerToFloat  weight of linear                              nets.py:XX
b.weight         s4 axis 0  MatMulIntegerToFloat  weight of linear_1; format by Rule(path='b',  nets.py:XX
                                                  operand='weight', spec=s4 axis 0)""",
    )


def test_snapshot_of_what_shares_a_tensor_and_what_stayed_float():
    rules = [fxquant.Rule(path="b", operand="input", spec=SIX), fxquant.skip("b", operand="weight")]
    found = fxquant.explain(fxquant.prepare(Forked(), (FLAT,), rules=rules), (FLAT,))
    assert_expected_inline(
        printed(found),
        """\
recipe 'int8' for onnxruntime: 3 sites, all not yet run
50.0 % of 432 FLOP in convolutions and matrix products on quantized operands.
site      format     expected kernel                     why                                        source
────────  ─────────  ──────────────────────────────────  ─────────────────────────────────────────  ──────────
a.input   u8         MatMulIntegerToFloat                operand of linear; shares with b.input     nets.py:XX
a.weight  s8 axis 0  MatMulIntegerToFloat                weight of linear                           nets.py:XX
b.input   u6         float: its weight is not quantized  operand of linear_1; format by             nets.py:XX
                     (Rule(path='b', operand='weight',   Rule(path='b', operand='input', spec=u6);
                     spec=None))                         shares with a.input

most work in float  in  work      why                                                      source
──────────────────  ──  ────────  ───────────────────────────────────────────────────────  ──────────
linear              b   216 FLOP  its weight: Rule(path='b', operand='weight', spec=None)  nets.py:XX

left in float: 1
operator  why                                                      source
────────  ───────────────────────────────────────────────────────  ──────────
linear_1  its weight: Rule(path='b', operand='weight', spec=None)  nets.py:XX""",
    )
    sites = {site["key"]: site for site in found.to_dict()["sites"]}
    assert sites["b.input"]["shares"] == ("a.input",) and sites["a.weight"]["shares"] == ()
    assert sites["b.input"]["kernels"] == (
        "float: its weight is not quantized (Rule(path='b', operand='weight', spec=None))",
    )


def test_a_table_fits_120_columns_and_shortens_nothing_in_the_dict():
    rule = fxquant.Rule(path="*", module="Linear", kind="linear", operand="weight", spec=FOUR)
    found = fxquant.explain(fxquant.prepare(Net(), (torch.randn(4, 6),), rules=[rule]))
    assert max(map(len, str(found).splitlines())) <= 120
    reasons = [site["reason"] for site in found.to_dict()["sites"] if site["role"] == "weight"]
    assert all(reason.endswith(f"; format by {rule}") for reason in reasons) and len(reasons) == 2


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


def test_what_compiles_of_other_models_declined_is_not_told(cold, no_earlier_compiles):
    """Their layers have the site lists of this one's."""
    x = torch.randn(4, 16)
    model, other = (fxquant.prepare(nn.Sequential(nn.Linear(16, width)), (x,)) for width in (16, 8))
    options = {"integer_matmul": "auto", "integer_backward": "auto"}
    torch.compile(model, backend="fxquant_eager", options=options)(x).sum().backward()
    torch.compile(other, backend="fxquant_eager")(x).sum().backward()
    assert [told for told in fxquant.explain(model).compile_declines if "last layer" in told]
    assert fxquant.explain(other).compile_declines == ()
    assert {row.status for row in fxquant.explain(other).rows} == {"compiled"}
    # A model with the same plan may run the same graph.
    twin = fxquant.prepare(nn.Sequential(nn.Linear(16, 16)), (x,))
    assert fxquant.explain(twin).compile_declines == fxquant.explain(model).compile_declines


def test_unprepared():
    for function in (fxquant.explain, lambda m: sqnr(m, ())):
        with pytest.raises(InvalidArgument, match="must be given a prepared model"):
            function(nn.Linear(2, 2))


def test_table():
    assert table(("a", "bb"), [("long", 1)]) == "a     bb\n────  ──\nlong  1"
    assert megabytes(1_250_000) == "1.25 MB" and megabytes(12_300) == "12.3 kB"
