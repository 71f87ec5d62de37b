"""The one definition of every quantizer's arithmetic, as pure tensor functions.

Eager kernels, the lowering for Inductor, gradients, vmap and export all call these, so they agree bit for bit.
Nothing here reads a value on the host or checks one: `fxquant.ops` does, in front.

| file | arithmetic |
| --- | --- |
| `affine` | scale and zero point: torch's fake_quantize family, ONNX QuantizeLinear |
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
