"""The public interface is what docs/api.md says: names, signatures, and a docstring for each."""

from __future__ import annotations

import importlib

import pytest

from tests.house.api_page import EXPERIMENTAL, MODULES, PAGE, entry, first_paragraph, names, page, signature


def test_the_page_is_that_of_the_code() -> None:
    """A name or signature that changed is a decision: write the page anew, and a line in the changelog."""
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.house.api_page"


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_documented(module: str) -> None:
    held = importlib.import_module(module)
    assert names(module)
    for name in names(module):
        value = getattr(held, name)
        said = first_paragraph(value)
        # A dataclass without one gets its own signature.
        assert not callable(value) or (said and not said.startswith(f"{name}(")), f"{module}.{name} has no docstring"


def test_experimental_names_are_there() -> None:
    for path in EXPERIMENTAL:
        module, _, name = path.rpartition(".")
        assert name in names(module)
        assert "*(experimental)*" in entry(module, name)


def test_signatures_are_names_and_defaults() -> None:
    def function(a: int, *rest: str, b: float = 0.5, c: type = int) -> None: ...

    assert signature(function) == "(a, *rest, b=0.5, c=int)"
