"""Compiling the kernels: by whichever compilers are here, for the architectures that are promised, without a GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fxquant.errors import KernelUnavailable
from fxquant.kernels import build
from fxquant.kernels.build import FAMILIES, FLAGS, SOURCES, Compiler, flags_for

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
DTYPES = ("f32", "f16", "bf16")


def compiler(name: str) -> Compiler:
    """NVRTC or nvcc, or a skip with why it cannot be had."""
    try:
        return getattr(build, name)()  # type: ignore[no-any-return]
    except (RuntimeError, OSError) as error:
        pytest.skip(f"{name}: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["nvrtc", "nvcc"])
def test_all_compile_without_warnings(name: str, architecture: str, caplog: pytest.LogCaptureFixture) -> None:
    found = compiler(name)
    for family in FAMILIES:
        for dtype in DTYPES:
            cubin = found.cubin(family, flags_for(architecture, dtype))
            assert cubin[:4] == b"\x7fELF"
            for kernel in kernels_of(family, dtype):
                assert kernel.encode() in cubin, kernel
    assert not caplog.records  # of NVRTC, which only logs them


def kernels_of(family: str, dtype: str) -> list[str]:
    """The names that launches ask for."""
    if family == "floating":
        places = [f"{kind}quantize_float_{dtype}_{place}" for kind in ("fake_", "") for place in ("tensor", "channel")]
        return [*places, f"blocks_{dtype}"]
    if family == "amax":
        return [f"amax_{dtype}_tensor", f"amax_{dtype}_channel"]
    names = [f"masked_backward_{dtype}"]
    for rounding in ("reciprocal", "divide"):
        names += [f"{kind}_{dtype}_{rounding}" for kind in ("masked", "ranged")]
        for kind in ("fake_quantize", "backward", "quantize"):
            names += [f"{kind}_{dtype}_{rounding}_{place}" for place in ("tensor", "channel")]
    return names


@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_has_the_same_entries(libraries: dict[str, Any], family: str) -> None:
    for dtype in DTYPES:
        for kernel in kernels_of(family, dtype):
            assert hasattr(libraries[family], kernel), kernel


def ptx_of(family: str, folder: Path, *flags: str) -> dict[str, str]:
    """The virtual machine code of each kernel."""
    compiler("nvcc")
    command = build.nvcc().cubin.args[0]  # type: ignore[attr-defined]
    out = folder / "out.ptx"
    subprocess.run([command, "-ptx", *flags, str(SOURCES / f"{family}.cu"), "-o", str(out)], check=True)
    found = re.split(r"\.visible \.entry (\w+)", out.read_text(encoding="utf-8"))
    return dict(zip(found[1::2], found[2::2], strict=True))


@pytest.mark.parametrize("flags", [FLAGS, ("--fmad=true", "-use_fast_math")], ids=["ours", "fast-math"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_operation_is_approximate_or_contracted(family: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    """Flags that allow everything change nothing: each rounding is written as its own instruction."""
    arch = "-arch=sm_90"
    for kernel, text in ptx_of(family, tmp_path, arch, "-DFXQ_F32", *flags).items():
        if flags == FLAGS:
            assert not re.search(r"approx|\.ftz|div\.full", text), kernel
        assert not re.search(r"div\.(approx|full)|rcp\.approx", text), kernel
        divides = "blocks" in kernel or "float" in kernel or "masked_backward" not in kernel
        assert ("div.rn" in text) == divides, kernel
        fused = kernel.endswith("channel") and "reciprocal" in kernel
        assert bool(re.search(r"\bfma\.rn", text)) == fused, kernel
        assert re.search(r"ld\.global\.v4\.\w32", text) and re.search(r"st\.global\.\w*\.?\w*32", text), kernel


def fake(cubin: Any, name: str = "fake 1.0") -> Any:
    return lambda: Compiler(name, cubin)


def refuse(why: str) -> Any:
    def find() -> Compiler:
        raise RuntimeError(why)

    find.__name__ = why.split()[0]
    return find


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FXQUANT_CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_nvcc_is_tried_where_nvrtc_is_missing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "nvrtc", refuse("nvrtc is not there"))
    monkeypatch.setattr(build, "nvcc", fake(lambda family, flags: b"cubin", "nvcc 13"))
    assert build.build("affine", "f32", "sm_90") == (b"cubin", "nvcc 13")


def test_where_none_compiles_the_message_has_every_reason(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "nvrtc", refuse("nvrtc is not there"))
    monkeypatch.setattr(build, "nvcc", refuse("nvcc knows no sm_200"))
    message = (
        r"`affine.cu` must compile for sm_200: nvrtc: nvrtc is not there; nvcc: nvcc knows no sm_200\. "
        r"Install NVRTC .* aten computes the same"
    )
    with pytest.raises(KernelUnavailable, match=message):
        build.build("affine", "f32", "sm_200")


def test_a_cubin_is_kept_for_the_same_build_only(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[tuple[str, ...]] = []

    def cubin(family: str, flags: tuple[str, ...]) -> bytes:
        built.append((family, *flags))
        return b"%d" % len(built)

    monkeypatch.setattr(build, "nvrtc", fake(cubin))
    first = build.build("affine", "f32", "sm_90")
    assert build.build("affine", "f32", "sm_90") == first and len(built) == 1
    others = [build.build("affine", "f16", "sm_90"), build.build("affine", "f32", "sm_80")]
    others.append(build.build("floating", "f32", "sm_90"))
    monkeypatch.setattr(build, "nvrtc", fake(cubin, "fake 1.1"))
    others.append(build.build("affine", "f32", "sm_90"))
    assert len({first[0], *(cubin for cubin, _ in others)}) == 5 == len(list(cache.iterdir()))
    assert built[0] == ("affine", "-arch=sm_90", "-DFXQ_F32", "-std=c++17", *FLAGS)


def test_a_changed_source_is_another_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = build.digest("affine", (), "fake")
    for path in SOURCES.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build.digest("affine", (), "fake") == before
    (tmp_path / "memory.cuh").write_text("// changed")
    assert build.digest("affine", (), "fake") != before


def test_a_cache_that_cannot_be_written_is_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FXQUANT_CACHE_DIR", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(build, "nvrtc", fake(lambda family, flags: b"cubin"))
    with caplog.at_level("INFO", "fxquant.kernels"):
        assert build.build("affine", "f32", "sm_90")[0] == b"cubin"
    assert "compiled kernels are not kept" in caplog.text


@pytest.mark.parametrize("name", ["nvrtc", "nvcc"])
def test_what_the_compiler_says_is_in_the_error(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = compiler(name)
    (tmp_path / "broken.cu").write_text("int f() { return undeclared_name; }")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    with pytest.raises(RuntimeError, match="undeclared_name"):
        found.cubin("broken", flags_for("sm_90", "f32"))


def test_sources_include_nothing_of_others() -> None:
    """NVRTC has no headers of its own; math.h is for the host."""
    for path in SOURCES.iterdir():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("#include"):
                assert line in ('#include "arithmetic.cuh"', '#include "memory.cuh"', "#include <math.h>"), path.name
