"""torch.library operators of the ``fxquant`` namespace, one file per family; importing this package registers them.

| family | file | operators |
| --- | --- | --- |
| torch's fake-quantize | `fake_quantize` | per tensor, per channel |
| learnable | `learnable` | torch's learnable forms, LSQ+, PACT, TQT |
| observe and quantize | `observe` | torch's fused moving average; delayed |
| integer codes | `quantize`, `int4` | quantize, dequantize, packed int4 |
| small floats | `floating` | fp8, fp6, fp4, with a scale or bare |
| their codes | `elements` | a byte each, with the format's own bits |
| blocks | `blocks` | MX, NVFP4, block integers, double quantization |
| stochastic rounding | `stochastic` | Philox by element index |
| scaled by amax | `amax` | what `fxquant.tensor_quant` is made of |
| ranges, bias, export, state | `qparams`, `bias`, `qdq`, `binding` | what the passes insert |

Each file holds schema, checks, arithmetic and gradient of its operators, and a documented Python function for each.
"""

from fxquant.ops import plain_inductor  # noqa: F401  (says to Inductor, once it is asked, what fuses)
from fxquant.ops.bias import fake_quantize_bias
from fxquant.ops.blocks import fake_quantize_blocks, fake_quantize_mx, fake_quantize_nvfp4
from fxquant.ops.elements import dequantize_elements, quantize_elements
from fxquant.ops.fake_quantize import (
    fake_quantize_differentiable,
    fake_quantize_per_channel_affine,
    fake_quantize_per_tensor_affine,
)
from fxquant.ops.floating import dequantize_float, fake_quantize_float, quantize_float
from fxquant.ops.int4 import pack_int4, unpack_int4
from fxquant.ops.learnable import (
    fake_quantize_learnable_per_channel_affine,
    fake_quantize_learnable_per_tensor_affine,
    fake_quantize_lsq_plus,
    fake_quantize_pact,
    fake_quantize_tqt,
    lsq_grad_factor,
)
from fxquant.ops.marks import bind
from fxquant.ops.observe import Observed, fused_moving_avg_obs_fake_quant, moving_avg_obs_fake_quant
from fxquant.ops.qdq import dequantize_affine, quantize_dequantize
from fxquant.ops.qparams import (
    affine_qparams,
    average_min_max,
    batch_min_max,
    block_qparams,
    channel_min_max,
    extend_min_max,
    resolve_min_max,
    symmetric_qparams,
    update_min_max,
)
from fxquant.ops.quantize import (
    dequantize_per_channel,
    dequantize_per_tensor,
    quantize_per_channel,
    quantize_per_tensor,
)
from fxquant.ops.stochastic import fake_quantize_stochastic, uniform

__all__ = [
    "Observed",
    "affine_qparams",
    "average_min_max",
    "batch_min_max",
    "bind",
    "block_qparams",
    "channel_min_max",
    "dequantize_affine",
    "dequantize_elements",
    "dequantize_float",
    "dequantize_per_channel",
    "dequantize_per_tensor",
    "extend_min_max",
    "fake_quantize_bias",
    "fake_quantize_blocks",
    "fake_quantize_differentiable",
    "fake_quantize_float",
    "fake_quantize_learnable_per_channel_affine",
    "fake_quantize_learnable_per_tensor_affine",
    "fake_quantize_lsq_plus",
    "fake_quantize_mx",
    "fake_quantize_nvfp4",
    "fake_quantize_pact",
    "fake_quantize_per_channel_affine",
    "fake_quantize_per_tensor_affine",
    "fake_quantize_stochastic",
    "fake_quantize_tqt",
    "fused_moving_avg_obs_fake_quant",
    "lsq_grad_factor",
    "moving_avg_obs_fake_quant",
    "pack_int4",
    "quantize_dequantize",
    "quantize_elements",
    "quantize_float",
    "quantize_per_channel",
    "quantize_per_tensor",
    "resolve_min_max",
    "symmetric_qparams",
    "uniform",
    "unpack_int4",
    "update_min_max",
]
