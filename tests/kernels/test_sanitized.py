"""The kernels under the undefined-behaviour sanitizer: a host forgives a misaligned vector, a GPU does not."""

from __future__ import annotations

import subprocess

import pytest
import torch

from fxquant.kernels import affine
from fxquant.kernels.affine import Qparams
from fxquant.kernels.build import FAMILIES, SOURCES
from fxquant.kernels.dispatch import ENTRIES
from tests.kernels.host import COMPILER, HostLauncher, compile_library

SANITIZE = ("-O1", "-fsanitize=undefined,float-cast-overflow", "-fno-sanitize=float-divide-by-zero")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> HostLauncher:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("sanitized")
    (folder / "empty.cpp").write_text("")
    command = [COMPILER, "-shared", "-fPIC", *SANITIZE, str(folder / "empty.cpp"), "-o", str(folder / "empty.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the compiler has no sanitizer: {done.stderr.splitlines()[-1]}")
    return HostLauncher({family: compile_library(SOURCES / f"{family}.cu", folder, *SANITIZE) for family in FAMILIES})


def run_everything(launcher: HostLauncher, dtype: torch.dtype, shift: int) -> None:
    """Each kernel on an aligned or a shifted tensor, of lengths with and without a tail."""
    codes, ints = (-8, 7), {"dtype": torch.int32}
    for rows, columns in ((8, 64), (3, 37), (16, 8), (1, 1)):
        x = torch.linspace(-20, 20, rows * columns + shift)[shift:].to(dtype)
        x = torch.cat([x.new_zeros(shift), x])[shift:].view(rows, columns)
        one, many = Qparams(0.1, 0, *codes, "divide"), torch.rand(columns) + 0.1
        for by in (one, Qparams(many, torch.zeros(columns, **ints), *codes, "reciprocal", 1)):
            affine.fake_quantize(launcher, x, by)
            affine.backward(launcher, x, x, by)
            affine.quantize(launcher, x, by, torch.int8)
        affine.fake_quantize_with_range(launcher, x, one)
        if rows % 8 == 0:
            _, mask = affine.fake_quantize_with_mask(launcher, x, one)
            affine.backward_from_mask(launcher, x, mask)
        for scale in (None, many):
            ENTRIES["fake_quantize_float"](launcher, x, scale, "e4m3")
            ENTRIES["quantize_float"](launcher, x, scale, torch.float8_e5m2, saturate=False)
            ENTRIES["scaled_float"](launcher, x, scale)
        ENTRIES["fake_tensor_quant"](launcher, x, torch.tensor(1.0))
        if columns == 64:
            ENTRIES["fake_quantize_mx"](launcher, x, axes=[1], sizes=[32], element="e2m1")
            static = {"axes": [1], "sizes": [16], "element": "e2m1", "quant_min": 0, "quant_max": 0}
            ENTRIES["fake_quantize_blocks"](launcher, x, **static, scale_format="e4m3")


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_undefined(
    sanitized: HostLauncher, dtype: torch.dtype, shift: int, capfd: pytest.CaptureFixture[str]
) -> None:
    run_everything(sanitized, dtype, shift)
    assert "runtime error" not in capfd.readouterr().err


def test_the_sanitizer_sees_a_misaligned_vector(
    sanitized: HostLauncher, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of 4 bytes, which an x86 host writes all the same."""
    monkeypatch.setattr(affine, "is_aligned", lambda *tensors: True)
    monkeypatch.setattr(torch, "empty_like", lambda x, dtype=torch.float32: torch.empty(65, dtype=dtype)[1:])
    x = torch.ones(68)[4:]
    affine.quantize(sanitized, x, Qparams(0.1, 0, -8, 7, "divide"), torch.int8)
    assert "misaligned address" in capfd.readouterr().err
