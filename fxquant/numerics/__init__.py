"""The one definition of every quantizer's arithmetic, as pure tensor functions.

Eager kernels, the lowering for Inductor, gradients, vmap and export all call these, so they agree bit for bit.
Nothing here reads a value on the host or checks one: `fxquant.ops` does, in front.

| file | arithmetic |
| --- | --- |
| `division` | quotients that compilers would round twice |
| `affine` | scale and zero point: torch's fake_quantize family, ONNX QuantizeLinear |
| `integer` | codes in integer dtypes, four bits packed |
| `learnable` | gradients to scale, zero point, offset and thresholds |
| `observe` | torch's moving-average observer and its choice of scale and zero point |
| `floating` | rounding to small floats: e4m3, e5m2, e3m2, e2m3, e2m1 |
| `blocks` | a scale per block: MX, NVFP4, integers; scales quantized in turn |
| `stochastic` | Philox-4x32-10 by element index, rounding by chance |
| `amax` | codes scaled by a largest magnitude: ModelOpt's tensor_quant |

What stands here by name is what other parts of fxquant use; the rest is reached through its file.
"""

from fxquant.numerics.affine import (
    clamp_code,
    clip_mask,
    code_before_clamp,
    dequantize,
    fake_quantize_per_channel,
    fake_quantize_per_channel_backward,
    fake_quantize_per_tensor,
    fake_quantize_per_tensor_backward,
    per_channel_view,
)

__all__ = [
    "clamp_code",
    "clip_mask",
    "code_before_clamp",
    "dequantize",
    "fake_quantize_per_channel",
    "fake_quantize_per_channel_backward",
    "fake_quantize_per_tensor",
    "fake_quantize_per_tensor_backward",
    "per_channel_view",
]
