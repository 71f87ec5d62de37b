"""In which layer each operator of a drawing stands, and in which place of it: few crossings of edges."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

from fxquant.report.drawing.box import Box, Path, box_of
from fxquant.report.operators import Operator

_SWEEPS = 12


def _layers(operators: Sequence[Operator]) -> list[int]:
    """Layer of each operator: one below the lowest that it reads; what reads nothing, just above its first reader."""
    layers: list[int] = []
    readers: dict[int, list[int]] = {}
    for number, one in enumerate(operators):
        sources = [wire.source for wire in one.wires if wire.source is not None]
        layers.append(1 + max((layers[s] for s in sources), default=-1))
        for source in sources:
            readers.setdefault(source, []).append(number)
    for number in range(len(operators)):
        reads = any(wire.source is not None for wire in operators[number].wires)
        if not reads and number in readers:
            layers[number] = min(layers[r] for r in readers[number]) - 1
    return layers


def boxes_and_paths(operators: Sequence[Operator]) -> tuple[list[Box], list[Path]]:
    """Every operator, with the bends of the edges that pass layers, and the edges."""
    boxes = [box_of(one) for one in operators]
    for box, layer in zip(boxes, _layers(operators), strict=True):
        box.layer = layer
    paths = []
    bends: dict[tuple[int, int, str | None], int] = {}  # edges of one value and site share their way
    for number, one in enumerate(operators):
        for wire in one.wires:
            if wire.source is None:
                continue
            way = [wire.source]
            for layer in range(boxes[wire.source].layer + 1, boxes[number].layer):
                key = (wire.source, layer, wire.site)
                if key not in bends:
                    bends[key] = len(boxes)
                    boxes.append(Box(layer=layer))
                way.append(bends[key])
            way.append(number)
            paths.append(Path(tuple(way), wire))
    for upper, lower in dict.fromkeys(pair for path in paths for pair in itertools.pairwise(path.boxes)):
        boxes[upper].below.append(lower)
        boxes[lower].above.append(upper)
    return boxes, paths


def rows_in_order(boxes: list[Box]) -> list[list[int]]:
    """The boxes of each layer from left to right: the order with the fewest crossings of several median sweeps."""
    rows: list[list[int]] = [[] for _ in range(1 + max((box.layer for box in boxes), default=-1))]
    for number, box in enumerate(boxes):
        rows[box.layer].append(number)
    best, fewest = [list(row) for row in rows], _crossings(boxes, rows)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for row in rows[1:] if down else reversed(rows[:-1]):
            at = {number: place for line in rows for place, number in enumerate(line)}
            keys = {n: _median([at[o] for o in (boxes[n].above if down else boxes[n].below)], at[n]) for n in row}
            row.sort(key=lambda n: (keys[n], at[n]))
        crossings = _crossings(boxes, rows)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    return best


def _median(places: list[int], otherwise: int) -> float:
    places = sorted(places)
    middle = len(places) // 2
    if not places:
        return float(otherwise)
    return float(places[middle]) if len(places) % 2 else (places[middle - 1] + places[middle]) / 2


def _crossings(boxes: list[Box], rows: list[list[int]]) -> int:
    count = 0
    for row, below in itertools.pairwise(rows):
        at = {number: place for place, number in enumerate(below)}
        ends: list[int] = []
        for number in row:
            targets = sorted(at[other] for other in boxes[number].below)
            count += sum(len(ends) - bisect.bisect_right(ends, target) for target in targets)
            for target in targets:
                bisect.insort(ends, target)
    return count
