"""TensorRT: what it runs as integers, how a file is parsed and built by NVIDIA's own libraries and held to its rules.

Measured with TensorRT for RTX 1.7.1, whose builder needs no GPU.
"""

from __future__ import annotations

from fxquant.targets.cards import Cards
from fxquant.targets.expected import FLOAT, FLOAT_PROBABILITIES, FLOAT_RECURRENT, ExpectedKernel, Forecast, WeightOnly
from fxquant.targets.lint_reader import Lint
from fxquant.targets.profile import FLOAT_CELLS, FLOAT_VALUE, PRODUCT_KINDS, Profile
from fxquant.targets.target import Package, Runtime, Target
from fxquant.targets.tensorrt_rules import FP4_QUANTIZE, MEASURED, RULES, THROUGH, WAIVED
from fxquant.targets.tensorrt_run import CAPABILITIES, kernel_rows, require_builder, run

# Each built for each card that the builder knows. It does not know 8.7, 9.0, 10.0, 10.3 and 11.0: that fp4 begins with
# 10.0 is of NVIDIA's documents.
_CARDS = Cards(
    known=("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1"),
    least={
        "e4m3": "8.9",
        "e2m1": "10.0",
        "int4 groups": "8.0",
        "bfloat16": "8.0",
        "float32 matrices": "8.0",
    },
    float_convolutions=("7.5",),
)

_PROFILE = Profile(
    name="tensorrt",
    hard=PRODUCT_KINDS | {"lstm"},
    soft=frozenset({"cat"}),
    skips=frozenset({"conv"}),
    symmetric=True,
    float_operands=FLOAT_VALUE,
    fused_half_attention="TensorRT runs attention in half types as one kernel, which codes of q and k would break",
    implied_zero=True,
    float_volume_pools=True,
    splits_weights=True,
    rounding="reciprocal",  # it multiplies by 1 / scale, rounded once
    activation_bits=range(8, 9),
    weight_bits=range(4, 9),
    families=frozenset({"e4m3", "e4m3 e8m0 32", "e2m1 e4m3 16"}),
    block_form="trt",
    one_kind_of_codes=True,
    group_bits=range(4, 5),
    group_sizes=(16, 32, 64, 128),
    lone_groups=False,  # "ScaleMode is illegal", TensorRT for RTX 1.7.1
    int4_convolutions=False,
    int4_half_scales=True,
    float_beside_groups=True,
    refused={
        "conv_transpose": "TensorRT has no integer transposed convolution",
        "avg_pool": "TensorRT averages in float",
        "embedding": "TensorRT looks tables up in float",
        "gru": "TensorRT's builder fails on a GRU whose weights have codes",
        **FLOAT_CELLS,
    },
    float_pools=("bfloat16",),
    # TensorRT for RTX 1.7.1: build error, parse errors.
    without={"bfloat16": frozenset({"ConvTranspose", "GRU", "LSTM", "HardSwish"})},
    strongly_typed=True,
    cards=_CARDS,
    highest_opset=25,
)

_FORECAST = Forecast(
    kernels={
        "conv": ExpectedKernel(name="{kind} Convolution"),
        "linear": ExpectedKernel(name="{kind} MatrixMultiply"),
        "matmul": ExpectedKernel(name="{kind} MatrixMultiply"),
        "einsum": ExpectedKernel(name="{kind} MatrixMultiply"),
        # Only the operand that comes from elsewhere is quantized: the other never leaves the convolution.
        "add": ExpectedKernel(name="sum inside the {kind} Convolution", needs=()),
        "cat": ExpectedKernel(name="{kind} Concatenation"),
        "lstm": ExpectedKernel(never=FLOAT_RECURRENT),
        "sdpa": ExpectedKernel(name="{kind} MatrixMultiply (query·key)", needs=("query", "key")),
        "sdpa.value": ExpectedKernel(never=FLOAT_PROBABILITIES),
    },
    codes=range(4, 9),  # int4 codes are widened as the kernel runs, others of weights are int8 in the file
    families={"e4m3 e8m0 32": f"{FLOAT}TensorRT for RTX makes floats of MXFP8 codes before it multiplies"},
    weight_only=WeightOnly(
        name="MatrixMultiply with an {kind} weight",
        beside=f"{FLOAT}TensorRT multiplies an int4 weight by float activations",
        channels=False,
    ),
)

TARGET = Target(
    profile=_PROFILE,
    forecast=_FORECAST,
    lint=Lint(
        rules=RULES,
        waived=WAIVED,
        measured=MEASURED,
        misplaced=THROUGH,
        quantizers={FP4_QUANTIZE: ("FLOAT4E2M1", "FLOAT8E4M3FN")},
    ),
    runtime=Runtime(
        require=require_builder,
        run=run,
        kernels=kernel_rows,
        rules_do=True,
        capabilities=CAPABILITIES,
        has_timeout=True,
        package=Package(module="tensorrt_rtx", extra="tensorrt", oldest="1.7", newest="1.7"),
    ),
)
