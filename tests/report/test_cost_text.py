"""The report of `cost` made by hand: its tables to the letter, its plain values, and the sums of two steps by site."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

import fxquant
from fxquant.errors import InvalidArgument
from fxquant.report.cost import Cost, cost, cost_of
from fxquant.report.step_bytes import BATCH, Bytes, Saved, SiteCost
from tests.report.plans_by_hand import S8, plan, site
from tests.report.steps_by_hand import Nodes, kept, kernel, step

aten = torch.ops.aten
PLAN = plan(site("a", "activation", name="activation"), site("a", "weight", name="weight", spec=S8), target="generic")


def saved(size: Any, **fields: Any) -> Saved:
    given = {"dtype": "float32", "shape": (2, 3), "site": None, "made_by": "relu", "serves": ("mm",), "source": ""}
    return Saved(size=size, **{**given, **fields})


FIXED = Cost(
    plan=PLAN,
    training=True,
    sites=(
        SiteCost(key="a.activation", role="activation", spec="u8", bytes=Bytes(read=10, written=20, saved=30)),
        SiteCost(key="a.weight", role="weight", spec="s8 axis 0", bytes=Bytes(read=999, written=1000)),
    ),
    rest=Bytes(read=2_000_000, written=0, saved=70),
    total=Bytes(read=2_001_009, written=1020, saved=100),
    plain=Bytes(read=1_000_000, written=0, saved=400),
    saved=(saved(30, shape=(), site="a.activation"), saved(70, serves=("mm", "sum", "add", "mul"))),
    plain_saved=(saved(400),),
)


def test_the_tables_of_a_report() -> None:
    """Sites and allocations by size, largest first; a ratio only where there is something to divide by."""
    assert_expected_inline(
        str(FIXED),
        """\
one training step, recipe 'int8' for generic

           read     written  saved for backward
─────────  ───────  ───────  ──────────────────
plain      1.00 MB  0 B      400 B
quantized  2.00 MB  1.0 kB   100 B
ratio      2.00              0.25

site          role        format     read     written  saved
────────────  ──────────  ─────────  ───────  ───────  ─────
a.weight      weight      s8 axis 0  999 B    1.0 kB   0 B
a.activation  activation  u8         10 B     20 B     30 B
(the model)                          2.00 MB  0 B      70 B

saved  dtype    shape  made by  read in backward by
─────  ───────  ─────  ───────  ───────────────────
70 B   float32  2×3    relu     mm, sum and 2 more
30 B   float32  ()     relu     mm""",
    )


def test_twelve_allocations_are_printed_and_the_others_counted() -> None:
    def lines(count: int) -> list[str]:
        found = dataclasses.replace(FIXED, saved=tuple(saved(n, made_by=f"op{n}") for n in range(1, count + 1)))
        text = str(found).splitlines()
        return text[next(i for i, line in enumerate(text) if line.startswith("saved  ")) + 2 :]

    assert [line.split()[0] for line in lines(12)] == [str(n) for n in range(12, 0, -1)]
    assert lines(13)[-2].startswith("2 B ") and lines(13)[-1] == "… and 1 smaller: see .saved"


def test_a_step_of_a_model_in_eval_mode_says_so() -> None:
    head = str(dataclasses.replace(FIXED, training=False)).splitlines()[0]
    assert head == "one eval-mode step, recipe 'int8' for generic"


# ---------------------------------------------------------------- open batch


OPEN = Cost(
    plan=PLAN,
    training=True,
    sites=(SiteCost(key="a.weight", role="weight", spec="s8 axis 0", bytes=Bytes(read=100, saved=BATCH)),),
    rest=Bytes(read=4 * BATCH, written=BATCH + 1),
    total=Bytes(read=4 * BATCH + 100, written=BATCH + 1, saved=BATCH),
    plain=Bytes(read=2 * BATCH, written=8, saved=6 * BATCH + 2),
    saved=(saved(BATCH, shape=(BATCH, 1)),),
    plain_saved=(saved(6 * BATCH + 2, shape=(3 * BATCH + 1,)),),
    batch=5,
)


def test_an_open_batch_is_put_into_every_size() -> None:
    found = OPEN.at(10)
    assert found.batch is None and found.plan is PLAN
    assert found.total == Bytes(read=140, written=11, saved=10)
    assert (found.plain, found.rest) == (Bytes(read=20, written=8, saved=62), Bytes(read=40, written=11))
    assert found.sites[0].bytes == Bytes(read=100, saved=10)
    assert [(one.size, one.shape) for one in (*found.saved, *found.plain_saved)] == [(10, (10, 1)), (62, (31,))]
    assert all(type(size) is int for size in vars(found.total).values())
    assert OPEN.total.saved == BATCH


def test_the_tables_of_an_open_batch_are_those_of_the_example_with_the_formula_beside() -> None:
    text, fixed = str(OPEN).splitlines(), str(OPEN.at(5)).splitlines()
    assert text[0] == f"{fixed[0]}, batch 5"
    assert text[7] == "saved: plain 6*batch + 2, quantized batch bytes"
    assert text[1:7] == fixed[1:7] and text[8:] == fixed[7:]


@pytest.mark.parametrize("batch", [1, 0, -3, 2.0, "8"], ids=repr)
def test_a_batch_that_no_open_graph_has(batch: Any) -> None:
    with pytest.raises(InvalidArgument) as error:
        OPEN.at(batch)
    assert str(error.value) == f"batch must be a whole number above 1: got {batch!r}. torch compiles 1 by itself."


def test_a_fixed_report_has_no_other_batch() -> None:
    with pytest.raises(InvalidArgument, match=r"open batch: got one of a fixed size\. Write .*dynamic_batch=True\)"):
        FIXED.at(4)


# ---------------------------------------------------------------- plain values


def test_plain_values_to_the_letter() -> None:
    plain = {
        "recipe": "int8",
        "target": "generic",
        "training": True,
        "batch": 5,
        "sites": [
            {
                "key": "a.weight",
                "role": "weight",
                "spec": "s8 axis 0",
                "bytes": {"read": 100, "written": 0, "saved": "batch"},
            }
        ],
        "rest": {"read": "4*batch", "written": "batch + 1", "saved": 0},
        "total": {"read": "4*batch + 100", "written": "batch + 1", "saved": "batch"},
        "plain": {"read": "2*batch", "written": 8, "saved": "6*batch + 2"},
    }
    found = json.loads(json.dumps(OPEN.to_dict()))
    assert {key: found[key] for key in plain} == plain
    assert [(one["size"], one["shape"], one["serves"]) for one in found["saved"]] == [("batch", ["batch", 1], ["mm"])]
    assert [one["size"] for one in found["plain_saved"]] == ["6*batch + 2"]
    assert set(found) == {*plain, "saved", "plain_saved", "products"}


# ---------------------------------------------------------------- from two steps


def test_two_steps_become_a_report_by_the_sites_of_the_plan() -> None:
    nodes = Nodes()
    weight, other, model = nodes.call(aten.amax, "a.weight"), nodes.call(aten.amax, "gone"), nodes.call(aten.mm)
    before = step([kernel(reads=[(9, [model])], writes=[(8, [model])])], [kept(7, model, [model])])
    quantized = step(
        [kernel(reads=[(100, [weight]), (20, [model]), (1, [other])], writes=[(3, [weight])])],
        [kept(40, weight, [model]), kept(6, model, [model])],
    )
    found = cost_of(PLAN, before, quantized, training=False, batch=None)
    assert [(one.key, one.role, one.spec, one.bytes) for one in found.sites] == [
        ("a.activation", "activation", "u8", Bytes()),  # in the plan, in no kernel
        ("a.weight", "weight", "s8 axis 0", Bytes(read=100, written=3, saved=40)),
    ]
    assert found.rest == Bytes(read=21, saved=6)  # of the model, and of a site that is not the plan's
    assert found.total == Bytes(read=121, written=3, saved=46)
    assert found.plain == Bytes(read=9, written=8, saved=7)
    assert [one.size for one in found.saved] == [40, 6] and [one.size for one in found.plain_saved] == [7]
    assert (found.training, found.batch) == (False, None)


@pytest.mark.parametrize(
    ("args", "got"),
    [((), 0), ((torch.tensor(3.0),), 0), (("text", torch.ones(1, 9)), 1)],
    ids=["no tensor", "a number", "one sample"],
)
def test_a_batch_to_leave_open_is_two_at_least(args: tuple[Any, ...], got: int) -> None:
    model = fxquant.prepare(torch.nn.Linear(9, 9), (torch.ones(2, 9),))
    with pytest.raises(InvalidArgument) as error:
        cost(model, args, dynamic_batch=True)
    assert str(error.value) == (
        f"args must have a batch of at least 2 to be left open: got {got}. torch compiles a batch of 1 by itself."
    )
