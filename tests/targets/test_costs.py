"""Tables of costs: what they say of layers that were measured, near and far, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxquant.errors import InvalidArgument
from fxquant.targets.costs import CostTable, Line, Size, cpu_class, shipped
from fxquant.targets.costs.table import _FOLDER
from tests.costs import table_of

SMALL = Size(op="linear", rows=16, depth=64, columns=64)
LARGE = Size(op="linear", rows=64, depth=64, columns=64)


def test_a_measured_layer_costs_what_was_measured_and_one_between_two_lies_between() -> None:
    found = table_of({SMALL: (1.0, 4.0), LARGE: (3.0, 20.0)})
    near = found.estimate(SMALL)
    assert near is not None
    assert (near.integer, near.plain) == (pytest.approx(1.0, rel=0.01), pytest.approx(4.0, rel=0.01))
    between = found.estimate(Size(op="linear", rows=32, depth=64, columns=64))
    assert between is not None and 1.0 < between.integer < 3.0 and 4.0 < between.plain < 20.0
    # Twice the rows at the mean of both rates, in logarithms.
    assert between.integer == pytest.approx(2 * (1.0 * 3.0 / 4) ** 0.5)
    assert between.plain == pytest.approx(2 * (4 * 5) ** 0.5)


@pytest.mark.parametrize(
    "size",
    [Size(op="matmul", rows=16, depth=64, columns=64), Size(op="linear", rows=16, depth=64, columns=64 * 512)],
    ids=["another operator", "far away"],
)
def test_nothing_is_said_of_a_layer_that_is_far_from_all_rows(size: Size) -> None:
    assert table_of({SMALL: (1.0, 4.0), LARGE: (3.0, 20.0)}).estimate(size) is None


def test_a_change_of_form_costs_by_the_numbers() -> None:
    assert Line(fixed=2.0, each=0.5).at(4000) == 4.0


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    before = table_of({SMALL: (1.25, 4.5), Size(op="conv", rows=9, depth=27, columns=8, stride=2): (3.0, 20.0)})
    (tmp_path / "costs.json").write_text(before.to_json())
    assert CostTable.load(tmp_path / "costs.json") == before


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no json", "must be a table of costs.*JSONDecodeError"),
        ("[]", "must be a table of costs"),
        ('{"rows": []}', "rows must hold sizes of at least 1, and times above 0"),
        ('{"rows": [["linear", 1, 1, 1, 1, 0.0, 1.0]]}', "times above 0"),
        ('{"rows": [["linear", 1, 1, 1, 1, NaN, 1.0]]}', "times above 0"),
        ('{"rows": [["linear", 1, 1, 1, 0, 1.0, 1.0]]}', "sizes of at least 1"),
        ('{"rows": [["linear", 1, 1, 1, 1, 1.0, 1.0]], "edges": {"conv": {}}}', "KeyError: 'enter'"),
        ('{"rows": [["linear", 1, 1, 1, 1, 1.0, 1.0]], "edges": {}}', "KeyError: 'conv'"),
    ],
    ids=["text", "list", "empty", "no time", "no number", "no stride", "no edges", "no family"],
)
def test_a_file_that_is_none_is_refused_by_name(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(InvalidArgument, match=told):
        CostTable.load(tmp_path / "costs.json")


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_a_change_of_form_takes_time(wrong: float, tmp_path: Path) -> None:
    text = table_of({SMALL: (1.0, 2.0)}, each=0.5).to_json().replace("[1.0, 0.5]", f"[{json.dumps(wrong)}, 0.5]", 1)
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(InvalidArgument, match="edges must hold times of at least 0"):
        CostTable.load(tmp_path / "costs.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"must be a file: got '.*none.json' \(No such file"):
        CostTable.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("flags", "ends"),
    [
        ("flags : avx2 avx512_vnni amx_int8", "x86_64-amx"),
        ("flags : avx2 avx512_vnni", "x86_64-vnni"),
        ("flags : avx2", "x86_64"),
    ],
    ids=["amx", "vnni", "avx2"],
)
def test_the_class_of_a_cpu(flags: str, ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    (tmp_path / "cpuinfo").write_text(flags)
    assert cpu_class(tmp_path / "cpuinfo") == ends


def test_shipped_tables_are_whole() -> None:
    """Each is of the target and CPU that its name says, and has every operator."""
    paths = sorted(_FOLDER.glob("*.json"))
    assert paths
    for path in paths:
        target, _, cpu = path.stem.partition(".")
        found = shipped(target, cpu)
        assert (found.target, found.cpu) == (target, cpu) and json.loads(path.read_text())["machine"]
        assert {row.size.op for row in found.rows} == {"conv", "pointwise", "depthwise", "linear", "matmul", "add"}
        assert found.edges.keys() == {"conv", "product"}


def test_a_table_that_is_not_there_is_told_with_the_command_that_makes_it() -> None:
    with pytest.raises(InvalidArgument, match=r"on a CPU of class 'riscv64'.*`fxquant costs --target onnxr"):
        shipped("onnxruntime", "riscv64")
    with pytest.raises(InvalidArgument, match=r"costs are measured, 'onnxruntime': got 'tensorrt'"):
        shipped("tensorrt")
