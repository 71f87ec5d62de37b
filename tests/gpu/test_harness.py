"""The harness itself, on CPU and without CUDA: it notices what it is there to notice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.ops.library import ARITHMETIC
from tests.gpu import harness
from tests.gpu.harness import CASES, arguments, assert_same, evaluated, hard, moved, random

ROOT = Path(__file__).resolve().parents[2]
ONE = next(case for case in CASES if case.name == "per tensor")
LEARNED = next(case for case in CASES if case.name == "learnable per channel")
# torch convolves integers on CPU only, and gradients are rounded to codes there only.
CPU_ONLY = {"fxquant.integer_convolution.default", "fxquant.rounding_words.default"}


def test_every_operator_has_a_case() -> None:
    assert fxquant.ops and fxquant.tensor_quant
    defined = {name.replace("::", ".") for name in torch._C._dispatch_get_all_op_names() if name.startswith("fxquant:")}
    defined = {name if name.count(".") == 2 else f"{name}.default" for name in defined}
    assert defined - CPU_ONLY == {str(case.op) for case in CASES}
    assert set(ARITHMETIC) <= {case.op for case in CASES}


def test_hard_values_hold_the_specials_and_grow() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        x = hard((-1, 5, 8), dtype)
        assert x.shape[1:] == (5, 8) and x.dtype == dtype
        assert x.isnan().any() and x.isposinf().any() and x.isneginf().any()
        zeros = torch.signbit(x[x == 0])
        assert zeros.any() and not zeros.all()
        assert torch.equal(harness.bits(x), harness.bits(hard((-1, 5, 8), dtype)))
    assert hard((), torch.float32).shape == () and hard((0,), torch.float32).shape == (0,)
    assert hard((3, 7), torch.float32).shape == (3, 7) and hard((2, 0, 8), torch.float32).shape == (2, 0, 8)


@pytest.mark.parametrize("place", [0, 1], ids=["output", "gradient"])
def test_one_bit_is_noticed(place: int) -> None:
    args = arguments(ONE, hard((-1, 5, 8), torch.float32), "cpu")
    expected, got = evaluated(ONE, args), evaluated(ONE, args)
    assert_same(ONE, got, expected, "twice")
    flat = got[place].view(torch.int32).flatten()
    where = int(torch.nonzero(got[place].flatten() != 0)[5])
    flat[where] += 1
    with pytest.raises(AssertionError, match=rf"per tensor, changed, result {place} of 2: "):
        assert_same(ONE, got, expected, "changed")


def test_a_zero_of_the_other_sign_and_another_nan_are_noticed() -> None:
    args = arguments(ONE, hard((-1, 5, 8), torch.float32), "cpu")
    expected = evaluated(ONE, args)
    for value in (-0.0, float("nan")):
        got = [out.clone() for out in expected]
        got[0].flatten()[int(torch.nonzero(expected[0].flatten() == 0)[0])] = value
        with pytest.raises(AssertionError):
            assert_same(ONE, got, expected, "changed")


def test_sums_may_differ_in_their_last_bits_and_no_more() -> None:
    expected = evaluated(LEARNED, arguments(LEARNED, random((6, 5, 8)), "cpu"))
    got = [out.clone() for out in expected]
    got[2] *= 1 + 2e-6
    assert_same(LEARNED, got, expected, "another order")
    got[2] *= 1.001
    with pytest.raises(AssertionError, match="result 2 of 4"):
        assert_same(LEARNED, got, expected, "wrong")


def test_a_view_is_kept_for_x_and_gradients_have_their_own_leaf() -> None:
    x = random((12, 5, 8))
    args = arguments(ONE, x, "cpu", lambda t: t[::2].transpose(1, 2))
    assert args[0].shape == (6, 8, 5) and args[0].stride() == (80, 1, 8)
    got = evaluated(ONE, args)
    assert not args[0].requires_grad
    assert_same(ONE, got, evaluated(ONE, [args[0].contiguous(), *args[1:]]), "view")


def test_moved_keeps_everything_but_the_place() -> None:
    found = moved((torch.ones(2), [torch.zeros(1, dtype=torch.int32), 3], "text"), "meta")
    assert found[0].device.type == found[1][0].device.type == "meta"
    assert found[1][0].dtype == torch.int32 and found[1][1] == 3 and found[2] == "text"


def test_products_are_exact_inside_and_as_before_outside() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.deterministic
    with harness.exact_products():
        assert not torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.deterministic
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.deterministic) == before


def test_too_little_memory_skips_with_both_numbers() -> None:
    with pytest.raises(pytest.skip.Exception, match=r"needs 4 GiB of device memory: 1\.0 GiB are free"):
        harness.needs_bytes(2**32, "cpu")
    harness.needs_bytes(2**20, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: nothing is left out")
def test_without_cuda_every_other_module_is_left_out_with_its_reason() -> None:
    modules = sorted(path.name for path in Path(__file__).parent.glob("test_*.py") if path.name != "test_harness.py")
    assert modules
    command = [sys.executable, "-m", "pytest", "-rs", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/gpu/{name}" for name in modules]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 5, found.stdout + found.stderr  # nothing was collected
    for name in modules:
        assert f"tests of {name} left out" in found.stdout
    assert f"{len(modules)} skipped" in found.stdout
