"""Rows of a prepared model: ranges in words, and a status from compile reports and ranges that are set by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.backend.reports import LOGS, CompileReport, Log
from fxquant.prepared.bound_forward import bound_forwards
from fxquant.prepared.quantizer import quantizers
from fxquant.prepared.root import plan_of
from fxquant.report.forecast import operations
from fxquant.report.site_rows import Row, site_rows
from tests.report.nets import FLAT, Forked

FIXED = fxquant.QuantSpec(bits=8, range=fxquant.Fixed(min=-1.0, max=1.0))


class Twins(nn.Module):
    """Two modules of one class, which share their compiled graph, and a layer of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Twin(), Twin()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Twin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x))


def rows(model: nn.Module, shares: dict[str, tuple[str, ...]] | None = None) -> dict[str, Row]:
    plan = plan_of(model)
    assert plan is not None
    return {row.key: row for row in site_rows(model, plan, operations(plan), shares or {})}


def statuses(model: nn.Module) -> dict[str, str]:
    return {key: row.status for key, row in rows(model).items()}


def set_range(model: nn.Module, key: str, low: float, high: float) -> None:
    quantizer = dict(quantizers(model))[key]
    quantizer.min_val.fill_(low)
    quantizer.max_val.fill_(high)


def compiled(model: nn.Module, *paths: str) -> None:
    """Reports a compile of one graph with the sites of these owners."""
    keys = tuple(bound_forwards(model)[path].key for path in paths)
    LOGS.append(Log(CompileReport(digests=keys, quantized=1, declines=(), seconds=0.0)))


@pytest.fixture
def twins() -> nn.Module:
    return fxquant.prepare(Twins(), (FLAT,))


# ---------------------------------------------------------------- what a row holds


def test_a_row_is_its_site_of_the_plan() -> None:
    model = fxquant.prepare(Forked(), (FLAT,))
    plan = plan_of(model)
    assert plan is not None
    found = rows(model, {"a.weight": ("elsewhere",)})
    assert list(found) == [site.key for site in plan.sites] == ["a_linear0_input", "a.weight", "b.weight"]
    shared, weight = found["a_linear0_input"], found["a.weight"]
    assert (shared.role, shared.spec, shared.shares) == ("activation", "u8", ())
    assert shared.operators == ("a.linear0.input", "b.linear0.input")
    assert shared.kernels == ("MatMulIntegerToFloat",) * 2
    assert (weight.role, weight.spec, weight.operators) == ("weight", "s8 axis 0", ("a.linear0.weight",))
    assert (weight.reason, weight.shares) == ("weight of linear", ("elsewhere",))
    assert weight.source.endswith(f"nets.py:{Forked.forward.__code__.co_firstlineno + 2}")


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-1.5, 2.0, "[-1.5, 2]"),
        (0.0, 0.0, "[0, 0]"),
        (-1234.56, 0.000123456, "[-1235, 0.0001235]"),
        (float("nan"), float("nan"), "unset"),
    ],
)
def test_a_range_has_four_digits(low: float, high: float, words: str) -> None:
    model = fxquant.prepare(nn.Linear(4, 4), (torch.ones(2, 4),))
    set_range(model, "input", low, high)
    assert {key: row.range for key, row in rows(model).items()} == {"input": words, "weight": "of the tensor"}


def test_a_range_of_the_format_is_in_the_format() -> None:
    model = fxquant.prepare(nn.Linear(4, 4), (torch.ones(2, 4),), rules=[fxquant.Rule(operand="input", spec=FIXED)])
    row = rows(model)["input"]
    assert (row.range, row.spec) == ("", str(FIXED)) and "[-1, 1]" in row.spec


# ---------------------------------------------------------------- status


def test_nothing_ran(twins: nn.Module) -> None:
    assert set(statuses(twins).values()) == {"not yet run"}


def test_a_graph_of_the_class_alone_does_not_say_that_an_instance_ran(twins: nn.Module) -> None:
    bound = bound_forwards(twins)
    assert bound["a.fc"].key == bound["b.fc"].key, "both have the same sites"
    compiled(twins, "a.fc")
    assert set(statuses(twins).values()) == {"not yet run"}
    set_range(twins, "b.fc.input", 0.0, 1.0)
    assert statuses(twins) == {
        "a.fc.input": "not yet run",
        "a.fc.weight": "not yet run",
        "b.fc.input": "compiled",
        "b.fc.weight": "compiled",
    }


def test_a_range_alone_does_not_say_that_a_graph_was_compiled(twins: nn.Module) -> None:
    """A checkpoint or a calibration may have set it."""
    set_range(twins, "a.fc.input", 0.0, 1.0)
    assert set(statuses(twins).values()) == {"not yet run"}
    LOGS.append(Log(CompileReport(digests=("another model's",), quantized=1, declines=(), seconds=0.0)))
    assert set(statuses(twins).values()) == {"not yet run"}


def test_a_frame_that_ran_in_python_says_so_whatever_was_compiled(twins: nn.Module) -> None:
    compiled(twins, "a.fc")
    set_range(twins, "a.fc.input", 0.0, 1.0)
    set_range(twins, "b.fc.input", 0.0, 1.0)
    bound_forwards(twins)["b.fc"].eager_runs = 1
    found = statuses(twins)
    assert (found["a.fc.weight"], found["b.fc.input"], found["b.fc.weight"]) == ("compiled", "eager", "eager")


def test_an_owner_without_ranges_ran_if_any_of_the_model_did() -> None:
    rules = [fxquant.Rule(path="b.fc", operand="input", spec=None)]
    model = fxquant.prepare(Twins(), (FLAT,), rules=rules)
    compiled(model, "a.fc", "b.fc")
    assert set(statuses(model).values()) == {"not yet run"}
    set_range(model, "a.fc.input", 0.0, 1.0)
    assert set(statuses(model).values()) == {"compiled"}


def test_a_model_without_ranges_is_judged_by_its_graphs() -> None:
    model = fxquant.prepare(Twins(), (FLAT,), rules=[fxquant.Rule(operand="input", spec=None)])
    assert statuses(model) == {"a.fc.weight": "not yet run", "b.fc.weight": "not yet run"}
    compiled(model, "a.fc")
    assert set(statuses(model).values()) == {"compiled"}
