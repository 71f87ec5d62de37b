"""What the demo prints, on a terminal, into a log, and without rich."""

from __future__ import annotations

import io
import sys

import pytest

from fxquant.shell.demo.console import COLUMNS, Console, cells
from tests.shell.demo.made import result

PLAIN = """\
net  recipe  float %  PTQ %  QAT %  ONNX %  differing codes  integer share  latency ratio
cnn    int8     99.0   97.0   98.5    98.5      0 / 123,456          100 %           0.50
vit    w4a8     99.0    8.1   98.5   100.0   1,007 / 12,345           67 %           1.26
"""
ROWS = [
    result(),
    result("vit", "w4a8", ptq_acc=0.0806, onnx_acc=1.0, differing_codes=1007, compared_codes=12345,
           integer_share=0.6666, latency_ratio=1.2551),
]  # fmt: skip


class Terminal(io.StringIO):
    """What says that it is a terminal."""

    def isatty(self) -> bool:
        return True


class Flushed(io.StringIO):
    """Keeps what was there whenever it was told to write it out."""

    def __init__(self) -> None:
        super().__init__()
        self.known: list[str] = []

    def flush(self) -> None:
        self.known.append(self.getvalue())


@pytest.fixture
def without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rich", "rich.console", "rich.progress", "rich.table"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


# --- lines ---------------------------------------------------------------------------------------------


def test_a_line_is_written_out_at_once() -> None:
    stream = Flushed()
    console = Console(stream)
    console.say("one")
    console.stage("vit w4a8 PTQ", "97.2 %")
    assert stream.known[-1] == "one\nvit w4a8 PTQ       97.2 %\n" and "one\n" in stream.known


def test_lines_go_to_where_the_process_prints(capsys: pytest.CaptureFixture[str]) -> None:
    Console().say("[bold]100 %[/bold]")
    assert capsys.readouterr().out == "[bold]100 %[/bold]\n", "no markup"


def test_what_a_long_stage_says_is_not_cut() -> None:
    stream = io.StringIO()
    Console(stream).stage("a title of more than eighteen letters", "text " * 40)
    assert stream.getvalue() == f"a title of more than eighteen letters {'text ' * 40}\n"


# --- bars ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 3, 100])
def test_a_log_gets_a_few_lines_not_a_bar(total: int) -> None:
    stream = io.StringIO()
    with Console(stream).bar("cnn float", total) as advance:
        for _ in range(total):
            advance(0.5)
    lines = stream.getvalue().splitlines()
    assert len(lines) == min(total, 4) and f"{total}/{total}" in lines[-1] and "0.500" in lines[-1]


def test_a_line_at_every_quarter() -> None:
    stream = io.StringIO()
    with Console(stream).bar("cnn int8 QAT", 10) as advance:
        for step in range(1, 11):
            advance(step / 8)
    assert stream.getvalue() == (
        "cnn int8 QAT           3/10  loss 0.375\n"
        "cnn int8 QAT           5/10  loss 0.625\n"
        "cnn int8 QAT           8/10  loss 1.000\n"
        "cnn int8 QAT          10/10  loss 1.250\n"
    )


def test_a_bar_of_no_steps_prints_nothing() -> None:
    stream = io.StringIO()
    with Console(stream).bar("cnn float", 0):
        pass
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_that_moves(terminal: Terminal) -> None:
    with Console(terminal).bar("cnn float", 3) as advance:
        for loss in (0.75, 0.5, 0.25):
            advance(loss)
    shown = terminal.getvalue()
    assert "cnn float" in shown and "3/3" in shown and "loss 0.250" in shown
    assert "/3  loss" not in shown, "no lines beside it"
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor is shown again"


def test_a_bar_that_is_interrupted_gives_the_terminal_back(terminal: Terminal) -> None:
    with pytest.raises(KeyboardInterrupt), Console(terminal).bar("cnn float", 3) as advance:
        advance(0.5)
        raise KeyboardInterrupt
    shown = terminal.getvalue()
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l") and "1/3" in shown


def test_a_terminal_without_rich_gets_lines(without_rich: None) -> None:
    stream = Terminal()
    console = Console(stream)
    assert console.rich is None
    with console.bar("cnn float", 1) as advance:
        advance(0.125)
    assert stream.getvalue() == "cnn float              1/1  loss 0.125\n"


# --- the table -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_rich", [True, False])
def test_table_shows_every_number(with_rich: bool) -> None:
    stream = io.StringIO()
    console = Console(stream)
    if not with_rich:
        console.rich = None
    console.table([result(), result("vit", "w4a8", differing_codes=7)])
    text = stream.getvalue()
    assert all(word in text for word in ("99.0", "97.0", "98.5", "7 / 123,456", "100 %", "0.50"))
    assert all(word in text for name in COLUMNS for word in name.split())


def test_the_table_without_rich(without_rich: None) -> None:
    stream = io.StringIO()
    Console(stream).table(ROWS)
    assert stream.getvalue() == PLAIN


def test_a_table_of_no_rows_is_its_columns(without_rich: None) -> None:
    stream = io.StringIO()
    Console(stream).table([])
    assert stream.getvalue() == "  ".join(COLUMNS) + "\n"


def test_rows_stand_under_a_title_in_their_order() -> None:
    pytest.importorskip("rich")
    stream = io.StringIO()
    Console(stream).table(ROWS)
    title, *rest = [line.strip() for line in stream.getvalue().splitlines() if line.strip()]
    assert title == "Held-out digits read correctly"
    assert [" ".join(line.split()) for line in rest[-2:]] == [
        " ".join(line.split()) for line in PLAIN.splitlines()[1:]
    ]  # fmt: skip


def test_a_log_has_a_table_of_one_width(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the terminal's that started it."""
    found = []
    for columns in ("40", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        stream = io.StringIO()
        Console(stream).table(ROWS)
        found.append(stream.getvalue())
    assert found[0] == found[1] and "1,007 / 12,345" in found[0]


def test_table_fits_a_terminal_of_80_columns() -> None:
    pytest.importorskip("rich")
    stream = io.StringIO()
    console = Console(stream)
    console.rich.width = 80
    console.table([result(differing_codes=12_345, compared_codes=12_345_678)])
    assert all(cell in stream.getvalue() for cell in ("cnn", "12,345 / 12,345,678", "100 %", "0.50"))
    assert "…" not in stream.getvalue()


def test_cells_of_a_row() -> None:
    assert len(COLUMNS) == 9
    assert cells(ROWS[1]) == ("vit", "w4a8", "99.0", "8.1", "98.5", "100.0", "1,007 / 12,345", "67 %", "1.26")
