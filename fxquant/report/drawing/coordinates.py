"""Where the boxes of a drawing lie, and where their edges end, once the order of each layer is known."""

from __future__ import annotations

from fxquant.report.drawing.box import Box, Path

BETWEEN, ABOVE = 22.0, 30.0  # room between boxes of a layer, and between layers
MARGIN = 24.0
_SWEEPS = 24


def set_columns(boxes: list[Box], rows: list[list[int]]) -> None:
    """Sets x: each box as near to the middle of its neighbours as the others of its layer let it."""
    for row in rows:
        _settle(boxes, row, [0.0] * len(row))
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            wanted = []
            for number in row:
                box = boxes[number]
                near = (box.above if down else box.below) or [number]
                # Operators align with operators and bends with bends: a chain beside a long edge stays one line.
                near = [other for other in near if bool(boxes[other].operator) == bool(box.operator)] or near
                wanted.append(sum(boxes[other].x for other in near) / len(near))
            _settle(boxes, row, wanted)
    leftmost = min((box.x - box.width / 2 - box.left for box in boxes), default=0.0)
    for box in boxes:
        box.x += MARGIN - leftmost


def _settle(boxes: list[Box], row: list[int], wanted: list[float]) -> None:
    """Least squares to ``wanted`` under the room each box takes: pooling of adjacent violators."""
    offsets, offset = [], 0.0
    for place, number in enumerate(row):
        if place:
            before, box = boxes[row[place - 1]], boxes[number]
            offset += (before.width + box.width) / 2 + box.left + BETWEEN
        offsets.append(offset)
    pools: list[tuple[float, float, int]] = []  # weighted sum, weight, members
    for place, number in enumerate(row):
        weight = 4.0 if boxes[number].operator else 1.0  # rather the edge gives way
        pool = ((wanted[place] - offsets[place]) * weight, weight, 1)
        while pools and pools[-1][0] / pools[-1][1] >= pool[0] / pool[1]:
            last = pools.pop()
            pool = (last[0] + pool[0], last[1] + pool[1], last[2] + pool[2])
        pools.append(pool)
    values = [total / weight for total, weight, members in pools for _ in range(members)]
    for place, number in enumerate(row):
        boxes[number].x = values[place] + offsets[place]


def set_heights(boxes: list[Box], rows: list[list[int]], top: float) -> float:
    """Sets y, layer below layer from ``top`` on; returns where the last ends."""
    for row in rows:
        height = max(boxes[number].height for number in row)
        for number in row:
            boxes[number].y = top + height / 2
            if boxes[number].operator is None:
                boxes[number].height = height  # an edge goes straight down beside the boxes of a layer
        top += height + ABOVE
    return top - ABOVE


def edge_ends(boxes: list[Box], paths: list[Path]) -> list[float]:
    """Where on the top of its box each edge ends: side by side, in the order in which they come in."""
    coming: dict[int, list[int]] = {}
    for number, path in enumerate(paths):
        coming.setdefault(path.boxes[-1], []).append(number)
    ends = [0.0] * len(paths)
    for target, numbers in coming.items():
        box = boxes[target]
        numbers.sort(key=lambda number: (boxes[paths[number].boxes[-2]].x, number))
        step = min(18.0, box.width * 0.7 / len(numbers))
        for place, number in enumerate(numbers):
            ends[number] = box.x + (place - (len(numbers) - 1) / 2) * step
    return ends
