"""torch.library operators of the ``fxquant`` namespace, one file per family.

Importing this package registers them; each family's file holds schema, kernel, fake and autograd together.
"""

from fxquant.ops.binding import bind
from fxquant.ops.fake_quantize import fake_quantize_per_channel_affine, fake_quantize_per_tensor_affine
from fxquant.ops.qdq import dequantize_affine, quantize_dequantize
from fxquant.ops.qparams import affine_qparams, extend_min_max, resolve_min_max, symmetric_qparams, update_min_max

__all__ = [
    "affine_qparams",
    "bind",
    "dequantize_affine",
    "extend_min_max",
    "fake_quantize_per_channel_affine",
    "fake_quantize_per_tensor_affine",
    "quantize_dequantize",
    "resolve_min_max",
    "symmetric_qparams",
    "update_min_max",
]
