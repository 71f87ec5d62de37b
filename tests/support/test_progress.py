"""A progress bar where someone can see it, and nothing elsewhere."""

from __future__ import annotations

import builtins
import io
import sys
import threading
import time
from typing import Any

import pytest

from fxquant.support import progress
from fxquant.support.progress import counting, track, waiting


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


def test_steps_are_drawn_after_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, now = on_terminal(monkeypatch), [10.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with counting("tuning") as step:
        now[0] = 11.9
        step("a file")
        assert terminal.getvalue() == ""
        now[0] = 13.0
        step("another")
        assert terminal.getvalue() == "\r\033[Ktuning, 3 s: another"
    assert terminal.getvalue().endswith("\r\033[K"), "the line is cleared"


@pytest.mark.parametrize("show", [True, False])
def test_steps_without_a_terminal_or_a_wish(show: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO() if show else Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "_QUIET", -1)
    with counting("tuning", show=show) as step:
        step("a file")
    assert stream.getvalue() == ""


def test_the_line_is_cleared_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    monkeypatch.setattr(progress, "_QUIET", -1)
    with pytest.raises(ValueError, match="broken"), counting("tuning") as step:
        step("a file")
        raise ValueError("broken")
    assert terminal.getvalue().endswith("a file\r\033[K")


# ---------------------------------------------------------------- one step


def test_a_long_step_is_said_and_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    monkeypatch.setattr(progress, "_QUIET", 0.0)
    with waiting("compiling a kernel"):
        end = time.monotonic() + 10
        while not terminal.getvalue() and time.monotonic() < end:
            time.sleep(0.001)
        assert terminal.getvalue() == "\r\033[Kcompiling a kernel …"
    assert terminal.getvalue().endswith("…\r\033[K")


def test_a_short_step_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, threads = on_terminal(monkeypatch), threading.active_count()
    with waiting("compiling a kernel"):
        pass
    assert terminal.getvalue() == "" and threading.active_count() == threads


@pytest.mark.parametrize("show", [True, False])
def test_a_step_without_a_terminal_or_a_wish(show: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO() if show else Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "_QUIET", 0.0)
    with waiting("compiling a kernel", show=show):
        time.sleep(0.02)
    assert stream.getvalue() == ""
