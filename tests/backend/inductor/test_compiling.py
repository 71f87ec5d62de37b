"""Kernels are handed to the compiler while others are generated, each once; Python collects rarely meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache, PyCodeCache
from torch._inductor.cpp_builder import CppBuilder
from torch._inductor.graph import GraphLowering

import fxquant
from fxquant.backend.inductor.compiling import collecting_rarely
from tests.one_translation_unit import ORIGINAL


@pytest.mark.parametrize(("backend", "early"), [("fxquant", True), ("inductor", False)])
def test_kernels_are_compiled_as_they_are_generated(backend: str, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    generated: list[int] = []
    built: list[str] = []
    load, reload, build = CppPythonBindingsCodeCache.load_async, PyCodeCache.load_by_key_path, CppBuilder.build

    def asks(cls: Any, source: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(source)
        return load(source, *args, **kwargs)

    def reloads(cls: Any, *args: Any, **kwargs: Any) -> Any:
        generated.append(len(asked))
        return reload(*args, **kwargs)

    def builds(self: Any) -> None:
        built.append(self.get_target_file_path())
        build(self)

    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", ORIGINAL)
    monkeypatch.setattr(CppPythonBindingsCodeCache, "load_async", classmethod(asks))
    monkeypatch.setattr(PyCodeCache, "load_by_key_path", classmethod(reloads))
    monkeypatch.setattr(CppBuilder, "build", builds)
    torch.manual_seed(0)
    layers = (nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Sigmoid())
    model, x = nn.Sequential(*layers[: 2 if early else 4]), torch.randn(8, 16)
    if early:
        fxquant.prepare(model, (x,))
    torch._dynamo.reset()
    with torch._inductor.utils.fresh_cache(), torch._inductor.config.patch(compile_threads=2):
        torch.compile(model, backend=backend)(x)
    kernels = len(set(asked))
    assert kernels > 1 and len(asked) == kernels * (2 if early else 1), "the source asked for early is the one of later"
    assert generated == [kernels if early else 0], "how many were asked for as the code of the graph was complete"
    assert len(built) == len(set(built))


SELF = pytest.mark.skipif(
    hasattr(torch._dynamo.config, "gc_gen2_threshold_during_compile"), reason="this torch does so by itself"
)
RARELY = (800, 9, 1000)


@pytest.fixture
def thresholds() -> Iterator[tuple[int, ...]]:
    before = gc.get_threshold()
    gc.set_threshold(800, 9, 8)
    yield (800, 9, 8)
    gc.set_threshold(*before)


class TestCollecting:
    def test_rarely_while_forward_and_backward_are_compiled(self, thresholds: tuple[int, ...]) -> None:
        found: list[tuple[bool, tuple[int, ...]]] = []
        load = GraphLowering.compile_to_module

        def loads(graph: Any) -> Any:
            found.append((graph.is_backward, gc.get_threshold()))
            return load(graph)

        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(4, 8)
        fxquant.prepare(model, (x,))
        torch._dynamo.reset()
        with torch._inductor.utils.fresh_cache(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(GraphLowering, "compile_to_module", loads)
            loss = torch.compile(model, backend="fxquant")(x).sum()
            assert gc.get_threshold() == thresholds
            loss.backward()
        assert found == [(False, RARELY), (True, RARELY)]
        assert gc.get_threshold() == thresholds

    @SELF
    def test_as_before_after_an_error_and_until_the_last_has_ended(self, thresholds: tuple[int, ...]) -> None:
        first, second = collecting_rarely(), collecting_rarely()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)  # as in threads, whose compiles overlap
        assert gc.get_threshold() == RARELY
        error = RuntimeError("broken")
        assert not second.__exit__(RuntimeError, error, None), "the error goes on"
        assert gc.get_threshold() == thresholds

    @pytest.mark.parametrize(
        ("given", "inside"), [((0, 10, 10), (0, 10, 1000)), ((700, 5, 5000), (700, 5, 5000))], ids=["off", "rarer"]
    )
    @SELF
    @pytest.mark.usefixtures("thresholds")
    def test_never_more_often_than_told(self, given: tuple[int, ...], inside: tuple[int, ...]) -> None:
        gc.set_threshold(*given)
        with collecting_rarely():
            assert gc.get_threshold() == inside
        assert gc.get_threshold() == given
