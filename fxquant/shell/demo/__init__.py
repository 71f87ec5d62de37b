"""``python -m fxquant demo``: two small nets on real digits, from float training to a proven ONNX file.

Everything lands in one folder: ``results.json`` (a list of `fxquant.shell.demo.results.Result`), ``curves.png``,
and for each net and recipe the ``.onnx`` file, with a ``.txt`` beside it that holds what its export and its
verification say, and a page for a browser, ``.html`` (`fxquant.report.html`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fxquant.errors import FxquantError
from fxquant.shell.tree import Parser


def parser(prog: str = "python -m fxquant demo") -> Parser:
    """The command line, with the name that it was called by."""
    from fxquant.shell.demo.job import RECIPES
    from fxquant.shell.demo.nets import NETS
    from fxquant.shell.demo.panels import processors

    about = "Two small nets on real digits: float training, PTQ, QAT, ONNX, and the proof that they agree."
    result = Parser(prog=prog, description=about)
    add, nets = result.add_argument, list(NETS)
    add("--out", type=Path, default=Path("build/demo"), help="folder to write (build/demo)")
    add("--seed", type=int, default=0, help="same seed, same numbers (0)")
    add("--nets", nargs="+", choices=nets, default=nets, help="which nets (all)")
    add("--recipes", nargs="+", default=[*RECIPES], help=f"recipes ({' '.join(RECIPES)})")
    add("--jobs", type=int, default=processors(), metavar="N", help="nets at a time, a process each (all processors)")
    add("--quick", action="store_true", help="a handful of steps: shows that it runs, no more")
    return result


def run(options: argparse.Namespace) -> None:
    """Train, quantize, prove and write, in the order that the options name."""
    from fxquant.shell.demo import plot, results
    from fxquant.shell.demo.console import Console
    from fxquant.shell.demo.extras import require_all
    from fxquant.shell.demo.panels import panels

    require_all()
    console, out = Console(), options.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").unlink(missing_ok=True)  # it describes the files that are now replaced one by one
    done = panels(options, console)
    plot.draw(done, out / "curves.png")
    rows = [run.result for panel in done for run in panel.runs]
    results.write(rows, out / "results.json")
    console.table(rows)
    pairs = (f"{row.net}-{row.recipe}.{kind}" for row in rows for kind in ("onnx", "html"))
    files = ["results.json", "curves.png", *pairs]
    console.say(f"Written to {out}: {', '.join(files)}")


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m fxquant demo") -> int:
    """Run the demo; the process's exit code: 0, 1 for an error of fxquant's, 130 when interrupted."""
    options = parser(prog).parse_args(argv)
    try:
        run(options)
    except FxquantError as error:
        print(f"fxquant demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"fxquant demo: interrupted; {options.out} holds no results.json", file=sys.stderr)
        return 130
    return 0
