"""Scripts by which bash, zsh and fish complete ``fxquant`` on Tab, made from the command line's own tree.

They are static: nothing of fxquant runs while somebody types.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from fxquant.shell.tree import FILE, RECIPE, TARGET, Parser, completed_by


@dataclass(frozen=True, kw_only=True)
class Argument:
    """An option, or a positional argument where ``names`` is empty.

    Attributes:
        takes: whether a value follows it.
        words: the values that there are; none where they are not known.
        files: whether the value is a file.
    """

    names: tuple[str, ...]
    help: str
    takes: bool
    repeats: bool
    words: tuple[str, ...] = ()
    files: bool = False


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command with its arguments; ``""`` is what stands before any."""

    name: str
    help: str
    arguments: tuple[Argument, ...]

    @property
    def options(self) -> tuple[Argument, ...]:
        return tuple(each for each in self.arguments if each.names)

    @property
    def positionals(self) -> tuple[Argument, ...]:
        return tuple(each for each in self.arguments if not each.names)


def script(shell: str, tree: Parser) -> str:
    """The script for ``"bash"``, ``"zsh"`` or ``"fish"``."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands(tree))


def commands(tree: Parser) -> tuple[Command, ...]:
    """What may stand before a command, then every command; the demo's options are its own parser's."""
    from fxquant.shell.demo import parser as demo

    found = [
        Command(name=name, help=each.description or "", arguments=_arguments(demo() if name == "demo" else each))
        for name, each in tree.commands.items()
    ]
    return (Command(name="", help="", arguments=_arguments(tree)), *found)


def _arguments(parser: Parser) -> tuple[Argument, ...]:
    return tuple(
        Argument(
            names=tuple(each.option_strings),
            help=(each.help or "").replace("%%", "%"),
            takes=each.nargs != 0,
            repeats=type(each).__name__ == "_AppendAction",
            words=_words(each),
            files=completed_by(each) == FILE or getattr(each.type, "__name__", "") == "Path",
        )
        for each in parser.arguments
    )


def _words(action: argparse.Action) -> tuple[str, ...]:
    if completed_by(action) == TARGET:
        from fxquant.targets.registry import TARGETS

        return tuple(TARGETS)
    if completed_by(action) == RECIPE:
        from fxquant.spec.recipes import RECIPES

        return tuple(RECIPES)
    return tuple(map(str, action.choices or ()))


def _bash(every: tuple[Command, ...]) -> str:
    names = " ".join(each.name for each in every[1:])
    return f"""\
# bash completion of fxquant, by: fxquant completion bash
_fxquant() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command= at
    COMPREPLY=()
    if [[ $word == = ]]; then word=; elif [[ $before == = ]]; then before=${{COMP_WORDS[COMP_CWORD-2]}}; fi
    for ((at = 1; at < COMP_CWORD; at++)); do
        if [[ ${{COMP_WORDS[at]}} != -* ]]; then command=${{COMP_WORDS[at]}}; break; fi
    done
    case "$command $before" in
{_lines(_bash_values(every))}
    esac
    case "$command" in
        "") _fxquant_words "$word" "{_names(every[0])} {names}" ;;
{_lines(_bash_commands(every))}
    esac
}}
_fxquant_words() {{
    local IFS=$' \\t\\n'
    COMPREPLY=($(compgen -W "$2" -- "$1"))
}}
_fxquant_files() {{
    local IFS=$'\\n'
    compopt -o filenames 2>/dev/null
    COMPREPLY=($(compgen -f -- "$1"))
}}
complete -F _fxquant fxquant
"""


def _bash_values(every: tuple[Command, ...]) -> Iterator[str]:
    """What may follow an option that takes a value."""
    for command in every:
        for each in command.options:
            if each.takes:
                patterns = "|".join(f'"{command.name} {name}"' for name in each.names)
                yield f"{patterns}) {_bash_value(each)}return ;;"


def _bash_value(argument: Argument) -> str:
    if argument.files:
        return '_fxquant_files "$word"; '
    return f'_fxquant_words "$word" "{" ".join(argument.words)}"; ' if argument.words else ""


def _bash_commands(every: tuple[Command, ...]) -> Iterator[str]:
    """The options of a command after a dash, else what its positional argument may be."""
    for command in every[1:]:
        options = f'_fxquant_words "$word" "{_names(command)}"'
        value = next((_bash_value(each) for each in command.positionals), "")
        told = f"if [[ $word == -* ]]; then {options}; else {value}fi" if value else options
        yield f"{command.name}) {told} ;;"


def _names(command: Command) -> str:
    return " ".join(name for each in command.options for name in each.names)


def _lines(lines: Iterator[str]) -> str:
    return "\n".join(f"        {line}" for line in lines)


def _zsh(every: tuple[Command, ...]) -> str:
    told = "\n".join(f"                {_quoted(f'{each.name}:{each.help}')}" for each in every[1:])
    before = " ".join(_zsh_option(each) for each in every[0].options)
    cases = "\n".join(f"                {each.name}) _arguments {_zsh_arguments(each)} ;;" for each in every[1:])
    return f"""\
#compdef fxquant
# zsh completion of fxquant, by: fxquant completion zsh
_fxquant() {{
    local context state state_descr line
    local -a commands
    typeset -A opt_args
    _arguments -C {before} '1:command:->command' '*::argument:->argument'
    case $state in
        command)
            commands=(
{told}
            )
            _describe command commands ;;
        argument)
            case $words[1] in
{cases}
            esac ;;
    esac
}}
if [ "$funcstack[1]" = _fxquant ]; then _fxquant "$@"; else compdef _fxquant fxquant; fi
"""


def _zsh_arguments(command: Command) -> str:
    positionals = [_quoted(f":{command.name}:{_zsh_value(each)}") for each in command.positionals]
    return " ".join([*map(_zsh_option, command.options), *positionals])


def _zsh_option(argument: Argument) -> str:
    help = argument.help.replace("[", "(").replace("]", ")").replace(":", "\\:")
    value = f":value:{_zsh_value(argument)}" if argument.takes else ""
    star = "*" if argument.repeats else ""
    return " ".join(_quoted(f"{star}{name}[{help}]{value}") for name in argument.names)


def _zsh_value(argument: Argument) -> str:
    return "_files" if argument.files else f"({' '.join(argument.words)})" if argument.words else ""


def _fish(every: tuple[Command, ...]) -> str:
    lines = ["# fish completion of fxquant, by: fxquant completion fish", "complete -c fxquant -f"]
    lines += [
        f"complete -c fxquant -n __fish_use_subcommand -a {each.name} -d {_quoted(each.help)}" for each in every[1:]
    ]
    for command in every:
        seen = _quoted(f"__fish_seen_subcommand_from {command.name}") if command.name else "__fish_use_subcommand"
        for each in command.arguments:
            flags = " ".join(f"-{'l' if name.startswith('--') else 's'} {name.lstrip('-')}" for name in each.names)
            told = [flags, _fish_value(each), f"-d {_quoted(each.help)}" if each.names else ""]
            if each.names or told[1]:
                lines.append(" ".join(filter(None, ["complete -c fxquant -n", seen, *told])))
    return "\n".join(lines) + "\n"


def _fish_value(argument: Argument) -> str:
    if argument.files:
        return "-r -F" if argument.names else "-F"
    words = f"-a {_quoted(' '.join(argument.words))}" if argument.words else ""
    return f"-x {words}".strip() if argument.names and argument.takes else words


def _quoted(text: str) -> str:
    """In single quotes, an apostrophe as the one of typography: each shell escapes it otherwise."""
    return "'" + text.replace("'", "’") + "'"
