"""Kernels are handed to the compiler while others are generated, each once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.codecache import CppPythonBindingsCodeCache, PyCodeCache
from torch._inductor.cpp_builder import CppBuilder

import fxquant


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

    monkeypatch.setattr(CppPythonBindingsCodeCache, "load_async", classmethod(asks))
    monkeypatch.setattr(PyCodeCache, "load_by_key_path", classmethod(reloads))
    monkeypatch.setattr(CppBuilder, "build", builds)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Sigmoid()), torch.randn(8, 16)
    if early:
        fxquant.prepare(model, (x,))
    torch._dynamo.reset()
    with torch._inductor.utils.fresh_cache(), torch._inductor.config.patch(compile_threads=2):
        torch.compile(model, backend=backend)(x)
    kernels = len(set(asked))
    assert kernels > 1 and len(asked) == kernels * (2 if early else 1), "the source asked for early is the one of later"
    assert generated == [kernels if early else 0], "how many were asked for as the code of the graph was complete"
    assert len(built) == len(set(built))
