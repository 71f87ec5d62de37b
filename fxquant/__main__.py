"""``python -m fxquant``: the main job from a shell."""

from __future__ import annotations

import argparse
import sys

import fxquant


def main(argv: list[str] | None = None) -> int:
    """Dispatches to a command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fxquant", description="Quantization-aware training for ONNX.")
    parser.add_argument("--version", action="version", version=f"fxquant {fxquant.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser(
        "demo", help="train, quantize, export and verify two nets on handwritten digits", add_help=False
    )
    kernels = commands.add_parser("kernels", help="which nodes of an ONNX file onnxruntime runs on integers")
    kernels.add_argument("path", help="an ONNX file")
    known, rest = parser.parse_known_args(argv)
    if known.command == "demo":
        from fxquant.demo import main as demo

        return demo(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return _kernels(known.path)


def _kernels(path: str) -> int:
    from fxquant.onnx.kernels import kernel_rows
    from fxquant.table import table

    try:
        rows = kernel_rows(path)
    except fxquant.errors.FxquantError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    cells = [(r.name, r.op_type, r.kernel, "yes" if r.integer else "no", r.reason or "") for r in rows]
    sys.stdout.write(table(("node", "op", "kernel", "integer", "why not"), cells) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
