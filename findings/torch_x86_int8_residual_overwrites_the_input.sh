#!/usr/bin/env bash
# torch 2.13.0 with torchao 0.18.0: the x86 Inductor lowering of an int8 linear layer whose result is added to the model's
# input computes the sum in the input's own memory. The caller's tensor holds the output afterwards.
#
# x + linear(dequantize(quantize(x)), dequantize(int8 weight)), a residual branch, exported, lowered by
# lower_pt2e_quantized_to_x86 and compiled with Inductor's freezing, as torchao's guide has it. The output is right, and is a
# view of x. Who calls it twice with the same tensor gets two answers.
#
# Exits 0 while that is so, non-zero when it changes. Needs Linux x86_64 with AVX512-VNNI or AMX, a C++ compiler, Python 3.10
# to 3.13 and pip; installs into a folder of its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 numpy 2>/dev/null
"${pip[@]}" --no-deps torchao==0.18.0 2>/dev/null
export TORCHINDUCTOR_CACHE_DIR="$work/inductor"
"$work/venv/bin/python" -W ignore - 2>"$work/stderr" <<'PYTHON' || { tail -5 "$work/stderr"; exit 1; }
import importlib.metadata
import sys

import torch
import torch.ao.quantization.fx._decomposed  # noqa: F401 - registers operators
from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86

ops = torch.ops.quantized_decomposed
GRID = (0.02, 128, 0, 255, torch.uint8)


class Residual(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("codes", torch.randint(-127, 128, (16, 16), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(16) * 0.002 + 0.001)
        self.register_buffer("zeros", torch.zeros(16, dtype=torch.int64))
        self.bias = torch.nn.Parameter(torch.rand(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *GRID), *GRID)
        weight = ops.dequantize_per_channel(self.codes, self.scales, self.zeros, 0, -128, 127, torch.int8)
        return x + torch.nn.functional.linear(y, weight, self.bias)


with torch.no_grad():
    model, x = Residual(), torch.randn(4, 16)
    before, expected = x.clone(), model(x)
    lowered = lower_pt2e_quantized_to_x86(torch.export.export(model, (x,)).module(), (x,))
    with torch._inductor.config.patch(freezing=True, force_disable_caches=True):
        y = torch.compile(lowered)(x)
right, kept, shared = bool((y - expected).abs().max() < 1e-5), torch.equal(x, before), x.data_ptr() == y.data_ptr()
print("torch", torch.__version__, "torchao", importlib.metadata.version("torchao"))
print(f"output right: {right}, input as it was: {kept}, output lies in the input: {shared}")
sys.exit(0 if right and not kept and shared else 1)
PYTHON
