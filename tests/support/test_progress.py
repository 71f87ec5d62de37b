"""A progress bar where someone can see it, and nothing elsewhere."""

from __future__ import annotations

import builtins
import contextlib
import io
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from fxquant.support import progress
from fxquant.support.progress import counting, track


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """From here on; pytest puts its own stream in place between fixtures and the test."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "rich":
            raise ImportError("No module named 'rich'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_without_a_terminal_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([1, 2, 3], "counting")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")


def test_rich_draws_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    terminal = on_terminal(monkeypatch)
    assert list(track(iter([1, 2]), "counting")) == [1, 2]
    assert "counting" in terminal.getvalue()


def test_without_rich_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    without_rich(monkeypatch)
    terminal = on_terminal(monkeypatch)
    assert list(track("abc", "counting")) == ["a", "b", "c"]
    assert terminal.getvalue() == "\rcounting 1\rcounting 2\rcounting 3\n"


def test_nothing_to_count_writes_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    without_rich(monkeypatch)
    terminal = on_terminal(monkeypatch)
    assert list(track([], "counting")) == [] and terminal.getvalue() == ""


def test_it_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    assert list(track([1], "counting", show=False)) == [1] and terminal.getvalue() == ""


def test_an_interrupt_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    on_terminal(monkeypatch)

    def interrupted() -> Any:
        yield 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(track(interrupted(), "counting"))


# ---------------------------------------------------------------- steps that are not known before


def threads() -> list[str]:
    """Ours, that still run."""
    return [each.name for each in threading.enumerate() if each.name == "fxquant-progress"]


def drawn(terminal: Terminal, end: str) -> str:
    """What is there once ``end`` is, or after ten seconds."""
    last = time.monotonic() + 10
    while not terminal.getvalue().endswith(end) and time.monotonic() < last:
        time.sleep(0.001)
    return terminal.getvalue()


def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the line takes for the time, to be set."""
    now = [10.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_long_step_is_said_and_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, now = on_terminal(monkeypatch), clock(monkeypatch)
    monkeypatch.setattr(progress, "_QUIET", 0.05)
    with counting("tuning") as step:
        step("a file")
        now[0] = 12.0
        assert drawn(terminal, "a file") == "\r\033[Ktuning, 2 s: a file"
        now[0] = 13.0
        step("another")
        assert drawn(terminal, "another").endswith("\r\033[Ktuning, 3 s: another"), "each second anew"
    assert terminal.getvalue().endswith("another\r\033[K") and not threads()


def test_a_narrow_terminal_has_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, _ = on_terminal(monkeypatch), clock(monkeypatch)
    monkeypatch.setenv("COLUMNS", "12")
    monkeypatch.setattr(progress, "_QUIET", 0.0)
    with counting("tuning") as step:
        step("a file")
        assert drawn(terminal, " 0 s") == "\r\033[Ktuning, 0 s"


def test_work_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, _ = on_terminal(monkeypatch), clock(monkeypatch)
    monkeypatch.setattr(progress, "_QUIET", 0.0)
    with counting("compiling a kernel"):
        assert drawn(terminal, " s") == "\r\033[Kcompiling a kernel, 0 s"


def test_a_short_one_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    start = time.monotonic()
    with counting("compiling a kernel") as step:
        step("it")
    assert terminal.getvalue() == "" and not threads() and time.monotonic() - start < 1


@pytest.mark.parametrize("why", ["no terminal", "no wish", "inside another"])
def test_steps_that_nobody_is_to_see(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO() if why == "no terminal" else Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "_QUIET", 0.0 if why != "inside another" else 1000.0)
    with counting("the other") if why == "inside another" else contextlib.nullcontext():
        monkeypatch.setattr(progress, "_QUIET", 0.0)
        with counting("tuning", show=why != "no wish") as step:
            step("a file")
            time.sleep(0.02)
    assert stream.getvalue() == ""


def test_the_line_is_cleared_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    monkeypatch.setattr(progress, "_QUIET", 0.0)
    with pytest.raises(ValueError, match="broken"), counting("tuning") as step:
        step("a file")
        drawn(terminal, "a file")
        raise ValueError("broken")
    assert terminal.getvalue().endswith("a file\r\033[K")
