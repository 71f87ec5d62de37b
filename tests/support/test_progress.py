"""A progress bar where someone can see it, and nothing elsewhere."""

from __future__ import annotations

import builtins
import io
import sys
from typing import Any

import pytest

from fxquant.support.progress import track


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
