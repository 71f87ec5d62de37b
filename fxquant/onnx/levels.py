"""A file at every graph optimization level of onnxruntime: whether it loads there, and whether it is the same file."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from fxquant.errors import ExportError
from fxquant.onnx.compare import Case, compare_found, within_code
from fxquant.onnx.verify_report import CodeRow, LevelRow
from fxquant.probe.visitor import Run
from fxquant.targets.document import ModelPath, load_model
from fxquant.targets.session import levels, run_codes, run_outputs, runs_as_written

if TYPE_CHECKING:
    import numpy as np

LARGE = 256 * 2**20  # bytes, with external data: beyond, a level is loaded once and its outputs are compared


def compare_levels(case: Case, run: Run, unoptimized: list[np.ndarray]) -> tuple[LevelRow, ...]:
    """The file at each level; none where onnxruntime has no kernels for it as it is.

    A level's codes are read from a copy of the graph that gives them as outputs too: of what a fusion swallowed there
    are none. Where all are those of the level before, which were compared, the model is not run again. Of a `LARGE`
    file, which is then loaded once for each level, outputs alone are compared.
    """
    if not runs_as_written(case.path):
        return ()
    rows: list[LevelRow] = []
    known: dict[str, np.ndarray] | None = None
    codes: list[CodeRow] = []
    large = is_large(case.path)
    for level in levels():
        try:
            outputs = run_outputs(case.path, case.feeds, optimize=True, level=level)
            found = None if large else run_codes(case.path, case.feeds, also=case.keys, level=level)
        except ExportError as error:
            rows.append(LevelRow(level=level, error=next(iter(str(error).splitlines()), "")))
            continue
        share = within_code(outputs, unoptimized)
        if not found:  # of a large file, and of one whose weights alone are codes
            rows.append(LevelRow(level=level, outputs_within_code=share))
            continue
        if known is None or not _equal(found, known):
            known, codes = found, compare_found(case, run, found).rows
        rows.append(_row(level, codes, share))
    return tuple(rows)


def _row(level: str, codes: Collection[CodeRow], share: float) -> LevelRow:
    return LevelRow(
        level=level,
        differing=sum(row.differing for row in codes),
        compared=sum(row.compared for row in codes),
        largest=max((row.largest for row in codes), default=0),
        outputs_within_code=share,
    )


def _equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    import numpy as np

    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def is_large(path: ModelPath) -> bool:
    """Whether the file, and the external data that it names, are more than `LARGE`."""
    folder = Path(path).parent
    held = {
        entry.value
        for tensor in load_model(path).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    files = [Path(path), *(folder / name for name in held)]
    return sum(os.path.getsize(each) for each in files if each.is_file()) > LARGE
