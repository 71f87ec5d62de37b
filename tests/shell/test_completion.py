"""Completion: bash runs its script; zsh and fish too where they are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fxquant.__main__ import main
from fxquant.shell.completion import commands, script
from fxquant.shell.parser import parser
from fxquant.shell.tree import Parser
from fxquant.spec.recipes import RECIPES
from fxquant.targets.registry import TARGETS

TREE = parser("0")
COMMANDS = ["doctor", "demo", "explain", "cost", "passes", "lint", "kernels", "tune", "costs", "completion"]


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script, two files and a folder."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    folder = tmp_path_factory.mktemp("completion")
    (folder / "fxquant.bash").write_text(script("bash", TREE), encoding="utf-8")
    for name in ("model.onnx", "my model.onnx"):
        (folder / name).touch()
    (folder / "models").mkdir()
    return folder


def completed(folder: Path, *words: str) -> list[str]:
    """What Tab gives at the end of the last word."""
    code = """
        source fxquant.bash
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        $(complete -p fxquant | sed 's/.*-F \\([^ ]*\\) .*/\\1/') fxquant "${COMP_WORDS[COMP_CWORD]}"
        for reply in "${COMPREPLY[@]}"; do echo "$reply"; done
    """
    command = ["bash", "--norc", "-u", "-c", code, "bash", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.splitlines()


def test_commands(bash: Path) -> None:
    assert completed(bash, "fxquant", "") == ["-h", "--help", "--version", "--traceback", *COMMANDS]
    assert completed(bash, "fxquant", "co") == ["cost", "costs", "completion"]
    assert completed(bash, "fxquant", "--traceback", "exp") == ["explain"]
    assert completed(bash, "fxquant", "fly") == []


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_every_command(command: str, bash: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    found = completed(bash, "fxquant", command, "--")
    assert "--help" in found and all(
        f"{name} " in shown or f"{name}\n" in shown or f"{name}]" in shown for name in found
    )
    if command not in ("demo", "costs", "completion"):
        assert "--json" in found
    assert completed(bash, "fxquant", command, "--no-such") == []


def test_values(bash: Path) -> None:
    assert completed(bash, "fxquant", "explain", "m:net", "--target", "") == list(TARGETS)
    assert completed(bash, "fxquant", "lint", "--target", "=", "op") == ["openvino"]
    assert completed(bash, "fxquant", "lint", "--target", "=") == list(TARGETS)
    assert completed(bash, "fxquant", "cost", "--recipe", "w4") == [name for name in RECIPES if name.startswith("w4")]
    assert completed(bash, "fxquant", "demo", "--nets", "") == ["cnn", "vit"]
    assert completed(bash, "fxquant", "completion", "") == ["bash", "zsh", "fish"]
    assert completed(bash, "fxquant", "explain", "m:net", "--input", "") == [], "nobody knows"


def test_files_where_files_go(bash: Path) -> None:
    files = ["model.onnx", "models", "my model.onnx"]
    for command in ("lint", "kernels", "tune"):
        assert sorted(completed(bash, "fxquant", command, "m")) == files
    for words in (("explain", "--draw"), ("tune", "x.onnx", "--output"), ("costs", "--output"), ("demo", "--out")):
        assert sorted(completed(bash, "fxquant", *words, "m")) == files
    assert completed(bash, "fxquant", "kernels", "--target", "m") == [], "no file there"


def test_a_tree_with_quotes_and_brackets() -> None:
    """Help is shown by zsh and fish: it ends no quotation and no bracket."""
    tree = Parser(prog="fxquant")
    added = tree.add_subparsers(dest="command")
    tree.add_command(added, "demo", "a model's [size]: 5 of it")
    tree.add_command(added, "part", "a part").add_argument("--a", help="it's [x]: 5 %% of it")
    assert "'demo:A model’s [size]: 5 of it.'" in script("zsh", tree)
    assert "'--a[it’s (x)\\: 5 % of it]:value:'" in script("zsh", tree)
    told = commands(tree)
    assert [each.name for each in told] == ["", "demo", "part"] and told[1].options[1].names == ("--out",), (
        "the demo's own parser"
    )


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        assert capsys.readouterr().out == script(shell, TREE)
    with pytest.raises(SystemExit):
        main(["completion", "powershell"])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_one(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    path = tmp_path / "script"
    path.write_text(script(shell, TREE), encoding="utf-8")
    subprocess.run([shell, "-n", str(path)], check=True, timeout=60)


def test_fish_completes(tmp_path: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    (tmp_path / "model.onnx").touch()
    path = tmp_path / "fxquant.fish"
    path.write_text(script("fish", TREE), encoding="utf-8")

    def found(line: str) -> list[str]:
        command = ["fish", "-N", "-c", f"source {path}; complete -C '{line}'"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
        return [row.split("\t")[0] for row in done.stdout.splitlines()]

    assert sorted(found("fxquant ")) == sorted(COMMANDS)
    assert sorted(found("fxquant explain --target ")) == sorted(TARGETS)
    assert found("fxquant explain --dra") == ["--draw"] and found("fxquant lint mod") == ["model.onnx"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_every_command_and_option_is_in_it(shell: str) -> None:
    """Where the shell itself is not there to ask."""
    text = script(shell, TREE)
    for command in commands(TREE):
        assert command.name in text
        for each in command.options:
            for name in each.names:
                assert f"{name}[" in text if shell == "zsh" else f" {name.lstrip('-')} " in text
            assert all(word in text for word in each.words)
