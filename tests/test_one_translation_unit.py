"""Kernels that test sessions compile together compute what each computes compiled alone."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.cpp_builder import CppBuilder
from torch._inductor.exc import CppCompileError
from torch._inductor.utils import fresh_cache

from tests import one_translation_unit
from tests.nets import Mlp, grads, prepared, step
from tests.one_translation_unit import KNOWN, ORIGINAL, WAITING, CompiledAlone, Kernel, compile_waiting

TYPES = ["const float*", "float*"]
INCLUDE = "#include <torch/csrc/inductor/cpp_prefix.h>\n"
HEAD = 'extern "C" void kernel(const float* in_ptr0, float* out_ptr0)'
X = torch.tensor([1.5])


def source(expression: str, before: str = "") -> str:
    return f"\n{INCLUDE}{before}{HEAD}\n{{\n    out_ptr0[0] = {expression};\n}}\n"


def waiting(*sources: str) -> list[Kernel]:
    compile_waiting()
    kernels = [AsyncCompile().cpp_pybinding(TYPES, each) for each in sources]
    assert kernels == WAITING
    return kernels


def result(kernel: Any) -> Tensor:
    out = torch.zeros(1)
    kernel(X, out)
    return out


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What g++ makes, in a cache in which none is."""
    paths: list[str] = []
    build = CppBuilder.build

    def builds(self: CppBuilder) -> None:
        paths.append(self.get_target_file_path())
        build(self)

    monkeypatch.setattr(CppBuilder, "build", builds)
    with fresh_cache():
        yield paths


def test_a_step_is_two_libraries_and_the_same_to_the_bit(
    built: list[str], cold: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stepped() -> tuple[int, Tensor, dict[str, Tensor]]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x, before = Mlp(), torch.randn(3, 8), len(built)
        out = step(torch.compile(prepared(model, x), backend="fxquant"), x)
        return len([path for path in built[before:] if path.endswith(".main.so")]), out, grads(model)

    libraries, *together = stepped()
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", ORIGINAL)
    with fresh_cache():
        kernels, *alone = stepped()
    assert libraries == 2 and kernels > 4, "the graph of the weights runs before there is another"
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


def test_the_first_call_compiles_all_that_wait(built: list[str]) -> None:
    helper = "static float more(float x) { return x + %s; }\n"
    first, second, third = waiting(*(source("more(in_ptr0[0])", helper % f"{n}.0f") for n in (1, 2, 3)))
    assert result(second) == 3.5 and not WAITING
    assert (result(first), result(third)) == (2.5, 4.5)
    assert len([path for path in built if path.endswith(".main.so")]) == 1
    assert AsyncCompile().cpp_pybinding(TYPES, first.source) is first and not WAITING


def test_what_nobody_calls_is_compiled_at_the_end_of_its_test() -> None:
    kernel, _ = waiting(source("in_ptr0[0] * 2.0f"), source("nothing_of_this_name"))
    with pytest.raises(CppCompileError, match="nothing_of_this_name"):
        compile_waiting()
    assert result(kernel) == 3.0


@pytest.mark.parametrize("position", [0, 1])
def test_the_error_is_that_of_the_kernel(position: int, built: list[str]) -> None:
    sources = [source("in_ptr0[0] * 4.0f")]
    sources.insert(position, source("nothing_of_this_name"))
    kernels = waiting(*sources)
    for _ in range(2):
        with pytest.raises(CppCompileError, match="nothing_of_this_name"):
            kernels[position](X, torch.zeros(1))
    assert result(kernels[1 - position]) == 6.0


def test_what_compiles_alone_only_is_compiled_alone() -> None:
    """A source that opens a namespace of torch or of C++ hides it where it is a namespace itself."""
    kernels = waiting(
        source("std::max(std::mine(in_ptr0[0]), 2.0f)", "namespace std { float mine(float x) { return x; } }\n"),
        source("in_ptr0[0] + 8.0f"),
    )
    with pytest.warns(CompiledAlone, match="2 kernels compile alone, not together: .*"):
        assert result(kernels[0]) == 2.0
    assert result(kernels[1]) == 9.5


def test_another_call_of_the_compiler_is_its_own() -> None:
    with torch._inductor.config.patch({"cpp.enable_floating_point_contract_flag": "fast"}):
        kernel = AsyncCompile().cpp_pybinding(TYPES, source("in_ptr0[0] + 16.0f"))
    assert not isinstance(kernel, Kernel) and not WAITING


@pytest.mark.parametrize("name", KNOWN)
def test_this_torch_is_known(name: str) -> None:
    function, wanted = KNOWN[name]
    given = tuple(inspect.signature(function).parameters)
    assert given[: len(wanted)] == wanted, f"{name} takes {given}: tests/one_translation_unit.py counts on {wanted}"


def test_another_torch_compiles_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", ORIGINAL)
    monkeypatch.setitem(KNOWN, "load_async", (lambda code: None, ("main_code",)))
    with pytest.warns(CompiledAlone, match="load_async takes"), one_translation_unit.compiled_together():
        assert AsyncCompile.cpp_pybinding is ORIGINAL
    monkeypatch.undo()
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", ORIGINAL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with one_translation_unit.compiled_together():
            assert AsyncCompile.cpp_pybinding is not ORIGINAL
    assert AsyncCompile.cpp_pybinding is ORIGINAL
