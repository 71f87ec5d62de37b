"""The demo's nets side by side: the same numbers as one after the other, and what comes of a process that is ended."""

from __future__ import annotations

import io
import os
from concurrent.futures.process import ProcessPoolExecutor
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch

from fxquant.errors import ExportError, InvalidArgument
from fxquant.shell.demo import parser
from fxquant.shell.demo.console import Console
from fxquant.shell.demo.panels import panels


def options(jobs: int) -> Any:
    """Float training alone: there are no recipes."""
    found = parser().parse_args(["--quick", "--nets", "vit", "cnn", "--jobs", str(jobs)])
    found.recipes = []
    return found


@pytest.mark.slow
def test_side_by_side_gives_the_numbers_of_one_after_the_other() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of two processes has of two
    try:
        streams = [io.StringIO(), io.StringIO()]
        beside, after = (panels(options(jobs), Console(stream)) for jobs, stream in zip((2, 1), streams, strict=True))
    finally:
        torch.set_num_threads(before)
    assert [panel.trained.net for panel in beside] == ["vit", "cnn"]
    for one, other in zip(beside, after, strict=True):
        assert one.trained.curve == other.trained.curve and one.trained.accuracy == other.trained.accuracy
    assert streams[0].getvalue() == "vit, cnn           side by side, 2 at a time\n", "each prints for itself"
    assert "vit float " in streams[1].getvalue()


def test_a_net_that_fails_ends_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = tmp_path / "written"
    later = f"import pathlib, time\ntime.sleep(20)\npathlib.Path({str(written)!r}).touch()"
    codes = iter([later, "from fxquant.errors import ExportError\nraise ExportError('no file')"])
    submit = ProcessPoolExecutor.submit
    monkeypatch.setattr(ProcessPoolExecutor, "submit", lambda pool, panel, *rest: submit(pool, exec, next(codes)))
    with pytest.raises(ExportError, match=r"^no file$"):
        panels(options(2), Console(io.StringIO()))
    assert not written.exists() and not active_children()


def test_a_process_that_is_ended_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    submit = ProcessPoolExecutor.submit
    monkeypatch.setattr(ProcessPoolExecutor, "submit", lambda pool, panel, *rest: submit(pool, os._exit, 9))
    with pytest.raises(InvalidArgument, match=r"^jobs must be as many as fit in memory: got 2, .* Give --jobs 1\.$"):
        panels(options(2), Console(io.StringIO()))
