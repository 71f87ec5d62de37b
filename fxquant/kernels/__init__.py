"""Handwritten CUDA kernels, for eager ops on CUDA tensors; compiled graphs have Triton from Inductor instead.

| file | what it does |
| --- | --- |
| ``cuda/arithmetic.cuh`` | `fxquant.numerics` for one element, for devices and, in tests, for the host |
| ``cuda/memory.cuh`` | 16 bytes a thread, grid-stride, 64-bit indices |
| ``cuda/affine.cu``, ``cuda/floating.cu``, ``cuda/amax.cu`` | the kernels |
| `arguments` | their structs |
| `launch` | layouts, grids, what a launcher is |
| `affine`, `floating`, `amax` | from an operator's arguments to a launch |
| `build`, `driver` | NVRTC or nvcc; CUDA's driver library |
| `dispatch` | which path is taken, and why |

Nothing is compiled before the first eager op on a CUDA tensor; without such a tensor nothing here is loaded.
"""

from fxquant.kernels.dispatch import KernelStatus, launcher, status, using

__all__ = ["KernelStatus", "launcher", "status", "using"]
