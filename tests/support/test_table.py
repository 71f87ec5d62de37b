"""Tables as text, and figures in them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fxquant.support.table import megabytes, short, table


def test_columns_are_aligned_under_a_ruled_header() -> None:
    assert table(("site", "bits"), [("conv.weight", 8), ("fc", 16)]).splitlines() == [
        "site         bits",
        "───────────  ────",
        "conv.weight  8",
        "fc           16",
    ]


def test_no_row_leaves_the_header() -> None:
    assert table(("a", "longer"), []) == "a  longer\n─  ──────"


def test_no_line_ends_in_blanks() -> None:
    lines = table(("a", "b"), [("x" * 5, ""), ("", "y")]).splitlines()
    assert [line for line in lines if line != line.rstrip()] == []


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises((ValueError, IndexError)):
        table(("a", "b"), [("only one",)])


@dataclass(frozen=True)
class Amount:
    """A number of bytes and how it is written."""

    count: float
    shown: str


@pytest.mark.parametrize(
    "amount",
    [Amount(0, "0.0 kB"), Amount(12_345, "12.3 kB"), Amount(999_949, "999.9 kB"), Amount(1e6, "1.00 MB")],
    ids=lambda amount: amount.shown,
)
def test_amounts(amount: Amount) -> None:
    assert megabytes(amount.count) == amount.shown


@pytest.mark.parametrize("source", ["a/b/net.py:12", "net.py:12", "a\\b\\net.py:12"])
def test_a_source_without_its_folders(source: str) -> None:
    assert short(source) == "net.py:12"
