"""Which kernel a target is expected to make of a quantized operator, as data.

The names for onnxruntime and OpenVINO were seen there; those for TensorRT come from its documents.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What a runtime makes of an operator.

    Attributes:
        name: the kernel; ``{code}`` in it is the code type of the first operand, as OpenVINO names it.
        joined: its name where the operator's own result is quantized too; empty if that changes nothing.
        needs: operands without which it stays float; None for all of them.
        never: why it runs in float though its operands are quantized; empty where it does not.
    """

    name: str = ""
    joined: str = ""
    needs: tuple[str, ...] | None = None
    never: str = ""


_PROBABILITIES = "the probabilities it multiplies are not quantized"
_ORT_MATMUL = Kernel(name="MatMulIntegerToFloat", joined="QLinearMatMul")
FLOAT = "float: "  # begins the forecast for what stays float

# Target → op kind, or operand where the operands of one operator go different ways → kernel.
KERNELS: dict[str, dict[str, Kernel]] = {
    "onnxruntime": {
        "conv": Kernel(name="QLinearConv"),
        "linear": _ORT_MATMUL,
        "matmul": _ORT_MATMUL,
        "einsum": Kernel(never="onnxruntime has no integer Einsum"),
        "add": Kernel(name="QLinearAdd"),
        "cat": Kernel(name="QLinearConcat"),
        "avg_pool": Kernel(name="QLinearAveragePool"),
        "embedding": Kernel(name="DequantizeLinear + Gather"),
        "sdpa": Kernel(name="MatMulIntegerToFloat (query·key)", needs=("query", "key")),
        "sdpa.value": Kernel(never=_PROBABILITIES),
    },
    "openvino": {
        "conv": Kernel(name="Convolution {code}"),
        "conv_transpose": Kernel(name="Deconvolution {code}"),
        "linear": Kernel(name="FullyConnected {code}"),
        "matmul": Kernel(name="MatMul {code}"),
        "einsum": Kernel(never="OpenVINO runs Einsum in float"),
        "cat": Kernel(name="Concat {code}"),
        "avg_pool": Kernel(name="AvgPool {code}"),
        "sdpa": Kernel(name="MatMul {code} (query·key)", needs=("query", "key")),
        "sdpa.value": Kernel(never=_PROBABILITIES),
    },
    "tensorrt": {
        "conv": Kernel(name="int8 Convolution"),
        "conv_transpose": Kernel(name="int8 Deconvolution"),
        "linear": Kernel(name="int8 MatrixMultiply"),
        "matmul": Kernel(name="int8 MatrixMultiply"),
        # Only the operand that comes from elsewhere is quantized: the other never leaves the convolution.
        "add": Kernel(name="sum inside the int8 Convolution", needs=()),
        "cat": Kernel(name="int8 Concatenation"),
        "avg_pool": Kernel(name="int8 Pooling"),
        "sdpa": Kernel(name="int8 MatrixMultiply (query·key)", needs=("query", "key")),
        "sdpa.value": Kernel(never=_PROBABILITIES),
    },
    "generic": {
        **{
            kind: Kernel(name=f"{name} between Q/DQ")
            for kind, name in (
                *(("conv", "Conv"), ("conv_transpose", "ConvTranspose"), ("linear", "Gemm"), ("matmul", "MatMul")),
                *(("einsum", "Einsum"), ("add", "Add"), ("cat", "Concat"), ("avg_pool", "AveragePool")),
            )
        },
        "embedding": Kernel(name="DequantizeLinear + Gather"),
        "sdpa": Kernel(name="MatMul between Q/DQ (query·key)", needs=("query", "key")),
        "sdpa.value": Kernel(name="MatMul with DQ (·value)", needs=("value",)),
    },
}

# Widths of code that the integer kernels of a target read; other codes are exported, and computed with in float.
CODES = {
    "onnxruntime": range(2, 9),
    "openvino": range(2, 9),
    "tensorrt": range(8, 9),
    "generic": range(2, 17),
}


@dataclass(frozen=True, kw_only=True)
class WeightOnly:
    """What a runtime makes of a product with a quantized weight and a float activation.

    ``groups`` are the group sizes that it knows there (None: any), ``channels`` whether a scale per channel will do,
    ``beside`` what it makes of a weight per group beside a quantized activation.
    """

    name: str
    beside: str
    groups: Collection[int] | None = None
    channels: bool = True


WEIGHT_ONLY = {
    "onnxruntime": WeightOnly(
        name="MatMulNBits",
        beside=f"{FLOAT}onnxruntime's integer products have no scales per group",
        groups=frozenset(2**power for power in range(4, 17)),
    ),
    "openvino": WeightOnly(
        name="FullyConnected, i{bits} weight on float", beside="FullyConnected, i{bits} weight on float"
    ),
    "tensorrt": WeightOnly(
        name="MatrixMultiply with an int4 weight",
        beside=f"{FLOAT}TensorRT multiplies an int4 weight by float activations",
        channels=False,
    ),
    "generic": WeightOnly(name="MatMul with a DQ weight", beside="MatMul between Q/DQ"),
}
