"""Every example runs, in a process of its own (`tests/forked.py`), and prints what docs/stacks.md shows."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked

ROOT = Path(__file__).parent.parent
STACKS = (ROOT / "docs" / "stacks.md").read_text(encoding="utf-8")
SHOWN = dict(re.findall(r"```console\n\$ python examples/(.*?)\n(.*?)```", STACKS, re.DOTALL))
MOST_LINES = 80


def packages(script: Path) -> set[str]:
    """What a script imports, by their first names."""
    imports = [node for node in ast.walk(ast.parse(script.read_text(encoding="utf-8")))]
    names = [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in imports if isinstance(node, ast.ImportFrom) and node.module]
    return {name.partition(".")[0] for name in names}


def lacking(command: str) -> list[str]:
    script = ROOT / "examples" / command.split()[0]
    return sorted(name for name in packages(script) if importlib.util.find_spec(name) is None)


def as_pattern(shown: str) -> re.Pattern[str]:
    """The lines that are shown; … for the rest of a line, or any lines."""
    lines = [".*" if line == "…" else re.escape(line).replace("…", "[^\n]*") for line in shown.rstrip("\n").split("\n")]
    return re.compile("\n".join(lines).replace(".*\n", "(?:.*\n)?"), re.DOTALL)


def test_each_script_is_shown_and_short() -> None:
    scripts = {path.name: path.read_text(encoding="utf-8").splitlines() for path in (ROOT / "examples").glob("*.py")}
    assert {command.split()[0] for command in SHOWN} == scripts.keys()
    assert {name for name, lines in scripts.items() if len(lines) > MOST_LINES} == set()


@pytest.mark.slow
@pytest.mark.parametrize("command", SHOWN)
def test_an_example(command: str) -> None:
    if missing := lacking(command):
        pytest.skip(f"needs {', '.join(missing)}: pip install -e '.[examples]'")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    script = f"examples/{command.split()[0]}"
    options = ["-W", "error::fxquant.errors.NotQuantizedWarning"]
    arguments = [script, *command.split()[1:], "fxquant_eager"]
    if "mp.spawn" in (ROOT / script).read_text(encoding="utf-8"):  # ranks begin with the script itself
        run = [sys.executable, *options, *arguments]
        done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    else:
        done = forked.run([*options, "-m", "tests.quick", *arguments], env)
    assert done.returncode == 0, done.stderr
    assert "NotQuantizedWarning" not in done.stderr
    assert as_pattern(SHOWN[command]).fullmatch(done.stdout.rstrip("\n")), done.stdout
