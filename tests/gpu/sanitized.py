"""Runs every eager kernel once on awkward sizes, for compute-sanitizer: python tests/gpu/sanitized.py [cuda|cpu].

Without torch's caching allocator, each tensor is an allocation of its own, and an access beyond its end is seen.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from fxquant import kernels, ops
from fxquant.ops.fake_quantize import PER_CHANNEL_BACKWARD, PER_TENSOR_BACKWARD

LENGTHS = (0, 1, 3, 16, 33, 257, 4099)


def every_kernel(device: str, dtype: torch.dtype) -> int:
    """Calls made."""
    scale, point = torch.tensor([0.1]).to(device), torch.tensor([3], dtype=torch.int32).to(device)
    calls = 0
    for length in LENGTHS:
        for skip in (0, 1):
            x = torch.randn(length + skip).to(dtype).to(device)[skip:]
            ops.fake_quantize_per_tensor_affine(x, scale, point, 0, 255, rounding="divide")
            PER_TENSOR_BACKWARD(x, x, scale, point, 0, 255)
            ops.quantize_per_tensor(x, scale, point, 0, 255, torch.uint8)
            ops.fake_quantize_float(x, scale.view(()), "e4m3")
            calls += 4
    for shape, axis in (((3, 5), 0), ((3, 5), 1), ((2, 33, 17), 1), ((1, 1, 7), 2)):
        x = torch.randn(shape).to(dtype).to(device)
        scales = torch.linspace(0.1, 1, shape[axis]).to(device)
        points = torch.zeros(shape[axis], dtype=torch.int32).to(device)
        ops.fake_quantize_per_channel_affine(x, scales, points, axis, -8, 7)
        PER_CHANNEL_BACKWARD(x, x, scales, points, axis, -8, 7)
        ops.quantize_per_channel(x, scales, points, axis, -8, 7)
        calls += 3
    for columns in (16, 32, 40, 257):
        x = torch.randn(3, columns).to(dtype).to(device)
        ops.fake_quantize_mx(x, {-1: 32}, "e2m1")
        ops.fake_quantize_nvfp4(x, x.abs().amax().float(), {-1: 16})
        ops.fake_quantize_blocks(x, {-1: 16}, 4)
        calls += 3
    return calls


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    with kernels.using("cuda" if device == "cuda" else "aten"), torch.no_grad():
        calls = sum(every_kernel(device, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16))
        if device == "cuda":
            torch.cuda.synchronize()
    print(f"{calls} calls on {device} by {kernels.status().path}")


if __name__ == "__main__":
    main()
