"""docs/api.md: every public name, with its signature and what its docstring begins with.

python -m tests.house.api_page    writes it
"""

from __future__ import annotations

import enum
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"

MODULES = (
    "fxquant",
    "fxquant.ptq",
    "fxquant.training.distill",
    "fxquant.report",
    "fxquant.onnx",
    "fxquant.kernels",
    "fxquant.ops",
    "fxquant.tensor_quant",
    "fxquant.errors",
)
EXPERIMENTAL = frozenset(
    {
        *("fxquant.convert", "fxquant.export_program", "fxquant.tune_onnx", "fxquant.mixed", "fxquant.Mixed"),
        *("fxquant.kernels.launcher", "fxquant.kernels.using", "fxquant.onnx.tune_onnx", "fxquant.ops.bind"),
        *("fxquant.report.Mixed", "fxquant.report.mixed"),
    }
)

HEAD = """# Every public name

What is named here is the interface; modules and names that are not may change at any time. Signatures and first
paragraphs are those of the code: `python -m tests.house.api_page` writes this page, and a test compares them.

- **Stable** names keep their meaning. In 0.x, a name or an argument is taken away only after a release in which its use
  gives a DeprecationWarning that says what to write instead; new arguments have defaults. Checkpoints, plans and
  pickled models that a release wrote are read by all later ones (`tests/formerly`).
- **Experimental** names may change from one release to the next, with a line in [the changelog](../CHANGELOG.md).
- Codes and gradients: what may change in them, and what may not, is in [numerics.md](numerics.md).

With `torch.compile`, `backend="fxquant"` and `backend="fxquant_eager"` are names too, and so are the keys of `options`
that [guide.md](guide.md) lists, and the commands of [shell.md](shell.md).
"""


def names(module: str) -> list[str]:
    """What a module says is public: all of its classes where it has no list."""
    held = importlib.import_module(module)
    listed = getattr(held, "__all__", None)
    if listed is None:
        listed = [name for name, value in vars(held).items() if inspect.isclass(value) and value.__module__ == module]
    return sorted((name for name in listed if not name.startswith("__")), key=lambda name: (name.lower(), name))


def first_paragraph(value: Any) -> str:
    """Of a docstring, on one line."""
    return " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split())


def signature(value: Any) -> str:
    """Names and defaults of the arguments."""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return "(…)"
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    text = str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    return re.sub(r"<class '([\w.]+)'>", r"\1", re.sub(r"<factory>", "…", re.sub(r" at 0x[0-9a-f]+", "", text)))


def methods(value: type) -> Iterator[str]:
    """A class's own public methods and properties, with their arguments."""
    for name, member in sorted(vars(value).items()):
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            yield f"`.{name}`"
        elif inspect.isfunction(member) or isinstance(member, classmethod | staticmethod):
            yield f"`.{name}{signature(getattr(value, name)).replace('(self, ', '(').replace('(self)', '()')}`"


def entry(module: str, name: str) -> str:
    """One name's lines."""
    value = getattr(importlib.import_module(module), name)
    if inspect.ismodule(value):
        return f"- **`{name}`**: {first_paragraph(value)}"
    mark = " *(experimental)*" if f"{module}.{name}" in EXPERIMENTAL else ""
    is_error = inspect.isclass(value) and issubclass(value, BaseException)
    shown = signature(value) if callable(value) and not is_error and not isinstance(value, enum.EnumMeta) else ""
    lines = [f"- **`{name}{shown}`**{mark}: {first_paragraph(value) if callable(value) else 'a constant.'}"]
    if inspect.isclass(value) and not is_error and (held := list(methods(value))):
        lines.append(f"  Has {', '.join(held)}.")
    return "\n".join(lines)


def page() -> str:
    """All of it."""
    parts = [HEAD]
    for module in MODULES:
        about = first_paragraph(importlib.import_module(module))
        parts += [f"## `{module}`\n\n{about}\n", "\n".join(entry(module, name) for name in names(module)) + "\n"]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
