"""Hooks of mkdocs: pages made of what stands elsewhere in the checkout, and the reference of every public name.

README.md, CHANGELOG.md and CONTRIBUTING.md are pages as they are, each example and each finding by what its head says.
Links between them, which are right in the checkout, become those of the site.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tests.house import api_page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
MEASURED = ROOT / "bench" / "results" / "examples.jsonl"
NO_PACKAGES = {"example", "date", "cpu", "threads", "seconds", "printed"}  # what a row says besides versions
FINDINGS = sorted((ROOT / "findings").glob("*.sh"))
LINK = re.compile(r'(\]\(|src=")((?:\.\./)?[\w./-]+?)(?=[)#"])')


def reference(module: str) -> str:
    """The page of a module's public names."""
    return f"reference/{module}.md"


def from_the_site(page: str, target: str) -> str:
    """``target``, as a file of the checkout is linked from ``page``, by its place in the site."""
    if page in PAGES.values():
        path = target
    elif target.startswith("../") and "/" not in page:
        path = target[3:]
    else:
        return target
    if path.rstrip("/") == "examples":
        return f"examples/{EXAMPLES[0].stem}.md"
    if path.startswith("examples/"):
        return path.rpartition(".")[0] + ".md" if path.endswith(".py") else path
    return PAGES.get(path, path.removeprefix("docs/"))


def measured(script: str) -> list[dict[str, Any]]:
    """The newest row of `bench/bench_examples.py` for each command of a script."""
    rows = [json.loads(line) for line in MEASURED.read_text(encoding="utf-8").splitlines()]
    newest = {row["example"]: row for row in rows if "seconds" in row and row["example"].split()[0] == script}
    return [newest[command] for command in sorted(newest)]


def shown(row: dict[str, Any]) -> str:
    """A command with what it printed, how long it took, and where."""
    versions = [f"{name} {version}" for name, version in row.items() if name not in NO_PACKAGES]
    taken = f"{row['seconds']:.0f} s, compile included; {', '.join(versions)}; {row['cpu']}; {row['date']}"
    return f"```console\n$ python examples/{row['example']}\n{row['printed']}\n```\n\n{taken}"


def example_page(script: Path) -> str:
    """What an example is for, what it printed, and its source."""
    source = script.read_text(encoding="utf-8")
    head, _, rest = (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")
    _, _, more = rest.partition("\n\n")  # the first line is the command
    code = source.partition('\n"""\n')[2].lstrip("\n")
    parts = [f"# {script.stem.replace('_', ' ')}", head, more, *map(shown, measured(script.name))]
    parts += ["What to know of each stack: [training stacks](../stacks.md)."]
    return "\n\n".join([*filter(None, parts), f'```python title="examples/{script.name}"\n{code}```\n'])


def finding(script: Path) -> str:
    """The comment that a script begins with, as a section: its first sentence is the heading."""
    lines = script.read_text(encoding="utf-8").splitlines()[1:]
    comment = [line[1:].strip() for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")]]
    said, _, rest = "\n".join(comment).partition("\n\n")
    body = rest.partition("\n\nExits 0")[0]
    return f"## {' '.join(said.split()).rstrip('.')}\n\n{body}\n\nScript: `findings/{script.name}`"


def findings_page() -> str:
    head = (
        "# Findings about others\n\nWhat runtimes, formats and libraries do that one would not guess, each with a "
        "script that installs pinned public packages, shows it without fxquant, and fails once it changes."
    )
    return "\n\n".join([head, *map(finding, FINDINGS)])


def reference_page(module: str) -> str:
    """Every public name of a module with its whole docstring."""
    held = __import__(module, fromlist=["_"])
    parts = [f"# {module}", api_page.first_paragraph(held)]
    for name in api_page.names(module):
        value = getattr(held, name)
        home, own = getattr(value, "__module__", None), getattr(value, "__qualname__", name)
        if callable(value) and home:
            parts.append(f"::: {home}.{own}")
    return "\n\n".join(parts)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists, in the navigation, what it names as a folder."""
    folders = {
        "examples/": [f"examples/{script.stem}.md" for script in EXAMPLES],
        "reference/": [reference(module) for module in api_page.MODULES],
    }

    def filled(entry: Any) -> Any:
        if isinstance(entry, list):
            flat = [folders.get(item, [item]) if isinstance(item, str) else [filled(item)] for item in entry]
            return [item for items in flat for item in items]
        if isinstance(entry, dict):
            return {name: filled(below) for name, below in entry.items()}
        return folders.get(entry, entry)

    config.nav = filled(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that do not stand in docs/."""
    made = {to: (ROOT / name).read_text(encoding="utf-8") for name, to in PAGES.items()}
    made |= {f"examples/{script.stem}.md": example_page(script) for script in EXAMPLES}
    made |= {reference(module): reference_page(module) for module in api_page.MODULES}
    made |= {f"examples/{path.name}": path.read_text(encoding="utf-8") for path in NOTEBOOKS}
    made["findings.md"] = findings_page()
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the checkout become those of the site."""
    here = page.file.src_uri
    return LINK.sub(lambda found: found[1] + from_the_site(here, found[2]), markdown)
