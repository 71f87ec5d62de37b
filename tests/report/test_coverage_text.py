"""What coverage says of products written by hand: sums, sentences, the table of what is left, plain values."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fxquant.report.coverage import Coverage
from fxquant.report.products import Product


def product(flops: int, why: str = "", **fields: Any) -> Product:
    """Quantized where there is no ``why``."""
    one = Product(
        name="x", kind="conv", module="m", source="", flops=flops, quantized=not why, second=False, reason=why
    )
    return dataclasses.replace(one, **fields)


MIXED = (
    product(60),
    product(20, "a rule"),
    product(7, second=True, kind="sdpa"),
    product(13, "probabilities", second=True, kind="sdpa"),
)


def test_attention_s_second_product_is_counted_apart() -> None:
    found = Coverage(products=MIXED)
    assert (found.flops, found.quantized, found.share) == (80, 60, 0.75)
    assert (found.attention, found.attention_quantized) == (20, 7)


def test_no_products_are_no_share_and_no_error() -> None:
    found = Coverage(products=(product(5, second=True),))
    assert (found.flops, found.share, found.attention) == (0, 0.0, 5)


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ([product(7, "probabilities", second=True)], "attention's second product (7 FLOP) in float."),
        ([product(7, second=True)], "attention's second product (7 FLOP) quantized too."),
        (MIXED[2:], "attention's second product (20 FLOP) quantized for 35.0 %."),
    ],
    ids=["none of it", "all of it", "a part of it"],
)
def test_words_for_attention_s_second_product(second: list[Product], words: str) -> None:
    assert Coverage(products=tuple(second)).summary == f"no convolutions or matrix products seen; {words}"
    both = Coverage(products=(product(60), *second)).summary.replace("\n", " ")
    assert both == f"100 % of 60 FLOP in convolutions and matrix products on quantized operands; {words}"


@pytest.mark.parametrize(
    ("flops", "words"),
    [
        (999, "999 FLOP"),
        (1000, "1 kFLOP"),
        (1_234_567, "1.23 MFLOP"),
        (2 * 10**9, "2 GFLOP"),
        (45_600_000_000_000, "45.6 TFLOP"),
        (7 * 10**15, "7e+03 TFLOP"),
    ],
)
def test_work_in_units(flops: int, words: str) -> None:
    assert Coverage(products=(product(flops),)).summary.startswith(f"100 % of {words} in ")


def test_what_ran_unseen_is_named_up_to_five() -> None:
    five = tuple("abcde")
    head = "no convolutions or matrix products seen.\nNot counted, since no graph shows its work: "
    assert Coverage(products=(), unseen=five).summary == f"{head}a, b, c, d, e."
    assert Coverage(products=(), unseen=(*five, "f", "g")).summary == f"{head}a, b, c, d, e and 2 more."


def test_lines_end_at_120_columns_between_words() -> None:
    names = tuple(f"encoder.layers.{n}.self-attention.projection" for n in range(5))
    lines = Coverage(products=MIXED, unseen=names).summary.splitlines()
    assert max(map(len, lines)) <= 120 and len(lines) > 2
    text = " ".join(lines)
    assert all(name in text for name in names)


def test_the_table_of_what_is_left() -> None:
    left = product(2500, "a rule", kind="linear", module="", source="/src/net.py:12")
    found = Coverage(products=(*MIXED, left))
    assert found.most_float() == [left, MIXED[1]], "most work first, what attention does inside not at all"
    assert found.cells() == [
        ("linear", "the model", "2.5 kFLOP", "a rule", "net.py:12"),
        ("conv", "m", "20 FLOP", "a rule", ""),
    ]
    text = str(found).splitlines()
    assert text[0] == found.summary.splitlines()[0]
    assert [line.split("  ")[0] for line in text[-4:]] == ["most work in float", "─" * 18, "linear", "conv"]


def test_nothing_left_is_no_table() -> None:
    found = Coverage(products=(product(60), MIXED[3]))
    assert str(found) == found.summary


def test_equal_work_stays_in_the_order_of_execution() -> None:
    left = tuple(product(9, "a rule", name=name) for name in "abcdefg")
    assert [one.name for one in Coverage(products=left).most_float()] == list("abcde")


def test_plain_values_have_the_sums_and_every_product() -> None:
    found = Coverage(products=MIXED, unseen=("rnn",)).to_dict()
    products = found.pop("products")
    assert found == {
        "flops": 80,
        "quantized": 60,
        "share": 0.75,
        "attention": 20,
        "attention_quantized": 7,
        "unseen": ["rnn"],
    }
    assert [Product(**one) for one in products] == list(MIXED)
