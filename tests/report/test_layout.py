"""The layout of a drawing: layers, their order, and places, on graphs written by hand."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pytest

from fxquant.report.drawing.box import LETTER, SMALL_LETTER, STUB, Box, box_of, kernel_words, module_words
from fxquant.report.drawing.coordinates import ABOVE, BETWEEN, MARGIN, edge_ends, set_columns, set_heights
from fxquant.report.drawing.layers import boxes_and_paths, rows_in_order
from fxquant.report.operators import Operator, Wire


def graph(reads: list[tuple[int | None, ...]]) -> list[Operator]:
    """An operator for each entry, which reads the results of those numbered in it; None is a parameter."""
    return [
        Operator(
            role="operator",
            label=f"op{number}",
            name=f"op{number}",
            wires=tuple(Wire(operand=str(i), source=source) for i, source in enumerate(sources)),
        )
        for number, sources in enumerate(reads)
    ]


def random_graph(seed: int, size: int = 14) -> list[Operator]:
    chance = random.Random(seed)
    reads: list[tuple[int | None, ...]] = [()]
    for number in range(1, size):
        reads.append(tuple(chance.sample(range(number), min(number, chance.choice([1, 1, 2, 3])))))
    return graph(reads)


# ---------------------------------------------------------------- boxes


@dataclass(frozen=True)
class Words:
    name: str
    kernel: str
    shown: str

    def __str__(self) -> str:
        return self.name


@pytest.mark.parametrize(
    "case",
    [
        Words("a kernel", "QLinearConv", "\u00a0→ QLinearConv"),
        Words("the first of two", "MatMulInteger + float: why", "\u00a0→ MatMulInteger"),
        Words("without what is in brackets", "Conv u8 (fused)", "\u00a0→ Conv u8"),
        Words("float", "float: its input is not quantized", ""),
        Words("another's", "part of QLinearConv", ""),
        Words("none", "", ""),
    ],
    ids=str,
)
def test_the_kernel_in_the_box(case: Words) -> None:
    assert kernel_words(Operator(role="operator", label="x", name="x", kernel=case.kernel)) == case.shown


@pytest.mark.parametrize(("length", "shown"), [(30, 30), (31, 30), (80, 30)])
def test_of_a_long_path_the_end_is_shown(length: int, shown: int) -> None:
    path = "".join(chr(97 + i % 26) for i in range(length))
    words = module_words(Operator(role="operator", label="x", name="x", module=path))
    assert len(words) == shown and words[-29:] == path[-29:] and words.startswith("…") == (length > 30)


def test_a_box_holds_its_words_and_its_parameters() -> None:
    wires = tuple(Wire(operand=str(i), source=None) for i in range(4))
    one = Operator(role="operator", label="l" * 20, name="x", module="m" * 10, kernel="k" * 5, wires=wires)
    box = box_of(one)
    assert box.width >= 20 * LETTER + 5 * SMALL_LETTER and box.height == 48 and box.left == STUB
    small = box_of(Operator(role="mover", label="view", name="view"))
    assert small.height < box_of(Operator(role="operator", label="view", name="view")).height and small.left == 0


# ---------------------------------------------------------------- layers and order


@dataclass(frozen=True)
class Layered:
    name: str
    reads: list[tuple[int | None, ...]]
    layers: list[int]

    def __str__(self) -> str:
        return self.name


@pytest.mark.parametrize(
    "case",
    [
        Layered("chain", [(), (0,), (1,)], [0, 1, 2]),
        Layered("residual", [(), (0,), (1, 0)], [0, 1, 2]),
        Layered("parameters alone count nothing", [(), (0, None), (1, None)], [0, 1, 2]),
        Layered("a late input stands just above its reader", [(), (0,), (1,), (), (2, 3)], [0, 1, 2, 2, 3]),
        Layered("of several readers the first", [(), (0,), (), (1, 2), (3, 2)], [0, 1, 1, 2, 3]),
        Layered("what nobody reads stays on top", [(), (0,), ()], [0, 1, 0]),
    ],
    ids=str,
)
def test_layers_are_longest_paths(case: Layered) -> None:
    boxes, _ = boxes_and_paths(graph(case.reads))
    assert [box.layer for box in boxes if box.operator] == case.layers


def test_an_edge_bends_once_in_each_layer_that_it_passes() -> None:
    boxes, paths = boxes_and_paths(graph([(), (0,), (1,), (2, 0)]))
    (long,) = [path for path in paths if path.boxes[0] == 0 and path.boxes[-1] == 3]
    assert [boxes[number].layer for number in long.boxes] == [0, 1, 2, 3]
    assert all(boxes[number].operator is None for number in long.boxes[1:-1])


def test_edges_of_one_value_share_their_bends_unless_a_site_parts_them() -> None:
    shared, _ = boxes_and_paths(graph([(), (0,), (1, 0), (2, 0)]))
    assert sum(box.operator is None for box in shared) == 2  # layers 1 and 2
    operators = graph([(), (0,), (1, 0), (2, 0)])
    wire = Wire(operand="1", source=0, site="a.input")
    operators[3] = Operator(role="operator", label="x", name="x", wires=(operators[3].wires[0], wire))
    parted, _ = boxes_and_paths(operators)
    assert sum(box.operator is None for box in parted) == 3


@pytest.mark.parametrize("seed", range(8))
def test_every_edge_leads_from_each_layer_to_the_next(seed: int) -> None:
    operators = random_graph(seed)
    boxes, paths = boxes_and_paths(operators)
    assert len(paths) == sum(wire.source is not None for one in operators for wire in one.wires)
    for path in paths:
        layers = [boxes[number].layer for number in path.boxes]
        assert layers == list(range(layers[0], layers[-1] + 1))
        for upper, lower in itertools.pairwise(path.boxes):
            assert lower in boxes[upper].below and upper in boxes[lower].above


def crossings(boxes: list[Box], rows: list[list[int]]) -> int:
    """The oracle: pairs of edges between two layers whose ends lie in opposite order."""
    count = 0
    for row, below in itertools.pairwise(rows):
        edges = [(row.index(n), below.index(o)) for n in row for o in boxes[n].below]
        count += sum((a - c) * (b - d) < 0 for (a, b), (c, d) in itertools.combinations(edges, 2))
    return count


def test_a_crossing_that_need_not_be_is_undone() -> None:
    """Two inputs whose readers come in opposite order, joined at the end."""
    boxes, _ = boxes_and_paths(graph([(), (), (1,), (0,), (2, 3)]))
    rows = rows_in_order(boxes)
    assert crossings(boxes, [sorted(row) for row in rows]) > 0 and crossings(boxes, rows) == 0


@pytest.mark.parametrize("seed", range(12))
def test_the_order_crosses_no_more_than_that_of_the_graph(seed: int) -> None:
    boxes, _ = boxes_and_paths(random_graph(seed))
    rows = rows_in_order(boxes)
    first = [sorted(row) for row in rows]
    assert sorted(n for row in rows for n in row) == list(range(len(boxes)))
    assert all(boxes[n].layer == layer for layer, row in enumerate(rows) for n in row)
    assert crossings(boxes, rows) <= crossings(boxes, first)


def test_no_operators_have_no_rows() -> None:
    assert boxes_and_paths([]) == ([], []) and rows_in_order([]) == [[]][:0]


# ---------------------------------------------------------------- places


@pytest.mark.parametrize("seed", range(8))
def test_boxes_of_a_layer_keep_their_order_and_their_room(seed: int) -> None:
    boxes, _ = boxes_and_paths(random_graph(seed))
    rows = rows_in_order(boxes)
    set_columns(boxes, rows)
    bottom = set_heights(boxes, rows, 10.0)
    for row in rows:
        for left, right in itertools.pairwise(row):
            room = boxes[right].x - boxes[left].x - (boxes[left].width + boxes[right].width) / 2 - boxes[right].left
            assert room >= BETWEEN - 1e-6
    assert min(box.x - box.width / 2 - box.left for box in boxes) == pytest.approx(MARGIN)
    assert max(box.y + box.height / 2 for box in boxes) == pytest.approx(bottom)
    for upper, lower in itertools.pairwise(rows):
        end = max(boxes[n].y + boxes[n].height / 2 for n in upper)
        assert min(boxes[n].y - boxes[n].height / 2 for n in lower) >= end + ABOVE - 1e-6


def test_a_chain_is_one_straight_line() -> None:
    boxes, _ = boxes_and_paths(graph([(), (0,), (1,), (2,)]))
    rows = rows_in_order(boxes)
    set_columns(boxes, rows)
    assert len({round(box.x, 6) for box in boxes}) == 1


def test_a_fork_lies_around_the_middle_of_its_source() -> None:
    boxes, _ = boxes_and_paths(graph([(), (0,), (0,)]))
    rows = rows_in_order(boxes)
    set_columns(boxes, rows)
    assert boxes[0].x == pytest.approx((boxes[1].x + boxes[2].x) / 2)


def test_edges_end_side_by_side_in_the_order_in_which_they_come() -> None:
    boxes, paths = boxes_and_paths(graph([(), (), (), (2, 0, 1)]))
    rows = rows_in_order(boxes)
    set_columns(boxes, rows)
    ends = edge_ends(boxes, paths)
    by_source = sorted(zip(ends, paths, strict=True), key=lambda pair: boxes[pair[1].boxes[0]].x)
    places = [end for end, _ in by_source]
    assert places == sorted(places) and len(set(places)) == 3
    assert sum(places) / 3 == pytest.approx(boxes[3].x)
    assert all(abs(end - boxes[3].x) < boxes[3].width / 2 for end in places)
