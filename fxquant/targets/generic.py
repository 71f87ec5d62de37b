"""No runtime in mind: every product on integers, and what stands between quantized tensors too."""

from __future__ import annotations

from fxquant.targets.expected import FLOAT_RECURRENT, ExpectedKernel, Forecast, WeightOnly
from fxquant.targets.profile import FLOAT_CELLS, PRODUCT_KINDS, Profile
from fxquant.targets.target import Target

_PROFILE = Profile(
    name="generic",
    hard=PRODUCT_KINDS | {"conv_transpose", "embedding", "lstm", "gru"},
    soft=frozenset({"add", "cat", "avg_pool"}),
    families=None,
    refused=FLOAT_CELLS,
)

_FORECAST = Forecast(
    kernels={
        **{
            kind: ExpectedKernel(name=f"{name} between Q/DQ")
            for kind, name in (
                *(("conv", "Conv"), ("conv_transpose", "ConvTranspose"), ("linear", "Gemm"), ("matmul", "MatMul")),
                *(("einsum", "Einsum"), ("add", "Add"), ("cat", "Concat"), ("avg_pool", "AveragePool")),
            )
        },
        "lstm": ExpectedKernel(never=FLOAT_RECURRENT),
        "gru": ExpectedKernel(never=FLOAT_RECURRENT),
        "embedding": ExpectedKernel(name="Gather + DequantizeLinear"),
        "sdpa": ExpectedKernel(name="MatMul between Q/DQ (query·key)", needs=("query", "key")),
        "sdpa.value": ExpectedKernel(name="MatMul with DQ (·value)", needs=("value",)),
    },
    codes=range(2, 17),
    weight_only=WeightOnly(name="MatMul with a DQ weight", beside="MatMul between Q/DQ"),
)

TARGET = Target(profile=_PROFILE, forecast=_FORECAST)
