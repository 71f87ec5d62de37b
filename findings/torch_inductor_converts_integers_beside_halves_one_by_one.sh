#!/usr/bin/env bash
# torch 2.13.0, torch.compile on CPU: in a loop that reads bfloat16, int32 becomes float one number at a time.
#
# Sums of an int8 product that are rescaled into bfloat16, `sums.to(torch.float32) * scale + x` with x in bfloat16, are
# what every int8 layer under autocast ends in. With x in float32 Inductor's C++ converts sixteen sums at once
# (`at::vec::convert<float>`, AVX-512). With x in bfloat16 its vectors are twice as long, and for two vectors of int32
# (`at::vec::convert<float,2,int32_t,2>`) torch's headers have a loop over the numbers, which the compiler is told not
# to vectorize (-fno-tree-loop-vectorize). The same holds for float to int32, and for int32 to int8 and uint8, which
# codes pass through on their way from float. So half the bytes take longer: seen 3 times the time of the float32
# loop on a CPU with AVX-512, on one thread. `code.to(torch.uint8)` straight from float has vectors in both.
#
# Exits 0 while that is so, non-zero when it changes. Needs Python 3.10 to 3.13, pip and g++, and a CPU with AVX2 or
# AVX-512; installs into a folder of its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "numpy==2.4.6" 2>/dev/null
TORCHINDUCTOR_CACHE_DIR="$work/cache" OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON'
import sys
import time

import torch
from torch._inductor.utils import run_and_get_code

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
torch.set_num_threads(1)
BY_NUMBER = "convert<float,2,int32_t,2>"


def rescaled(sums: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (sums.to(torch.float32) * 0.01 + x).to(x.dtype)


sums = torch.randint(-(2**20), 2**20, (512, 1024), dtype=torch.int32)
found = {}
for dtype in (torch.float32, torch.bfloat16):
    x = torch.randn(512, 1024).to(dtype)
    torch._dynamo.reset()
    compiled = torch.compile(rescaled)
    result, (code,) = run_and_get_code(compiled, sums, x)
    assert torch.allclose(result.float(), rescaled(sums, x).float(), rtol=1e-2, atol=1.0)
    best = float("inf")
    for _ in range(200):
        started = time.perf_counter()
        compiled(sums, x)
        best = min(best, time.perf_counter() - started)
    found[dtype] = (BY_NUMBER in code, best)
    print(f"torch {torch.__version__}: {dtype}: {best * 1e6:.0f} µs, {BY_NUMBER} in the code: {BY_NUMBER in code}")
(wide, slow), (narrow, quick) = found[torch.bfloat16], found[torch.float32]
sys.exit(0 if wide and not narrow and slow > 1.5 * quick else 1)
PYTHON
