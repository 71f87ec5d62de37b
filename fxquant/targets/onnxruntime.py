"""onnxruntime on the CPU: what it runs as integers, how a file is run in it and held to its rules.

Names of kernels were seen there.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from fxquant.errors import ExportError
from fxquant.support.require import require
from fxquant.targets.cpu import integer_dot_support, sums_saturate
from fxquant.targets.document import Feeds, ModelPath
from fxquant.targets.expected import FLOAT, FLOAT_PROBABILITIES, FLOAT_RECURRENT, ExpectedKernel, Forecast, WeightOnly
from fxquant.targets.lint_reader import Breaches, Lint, LintReader, Rules, attribute, title
from fxquant.targets.onnxruntime_rows import kernel_rows
from fxquant.targets.profile import FLOAT_CELLS, PRODUCT_KINDS, Profile
from fxquant.targets.session import EXACT_SUMS, REFERENCE, latency, run_outputs, samples
from fxquant.targets.target import Package, Ran, Runtime, Target

if TYPE_CHECKING:
    import numpy as np

_PROFILE = Profile(
    name="onnxruntime",
    hard=PRODUCT_KINDS | {"embedding", "lstm", "gru"},
    soft=frozenset({"add", "cat", "avg_pool"}),
    needs_output=frozenset({"conv"}),
    bias_apart=True,
    integer_bias=True,
    onnxruntime_forms=True,
    float_pads=True,
    unpacks=True,
    families=frozenset({"token", "affine token"}),
    block_form="integer",
    # Beside a quantized activation it takes wider blocks for scales per column, and fails at run time.
    group_bits=range(2, 5),
    # 1.31 has no bfloat16 kernels, reads no float32 scale beside float16, and multiplies in float after a Cast.
    half_types=(),
    refused={"conv_transpose": "onnxruntime has no integer ConvTranspose kernel", **FLOAT_CELLS},
)

_MATMUL = ExpectedKernel(name="MatMulIntegerToFloat", joined="QLinearMatMul")
_FORECAST = Forecast(
    kernels={
        "conv": ExpectedKernel(name="QLinearConv"),
        "linear": _MATMUL,
        "matmul": _MATMUL,
        "einsum": ExpectedKernel(never="onnxruntime has no integer Einsum"),
        "add": ExpectedKernel(name="QLinearAdd"),
        "cat": ExpectedKernel(name="QLinearConcat"),
        "avg_pool": ExpectedKernel(name="QLinearAveragePool"),
        "embedding": ExpectedKernel(name="Gather + DequantizeLinear"),
        "lstm": ExpectedKernel(never=FLOAT_RECURRENT),
        "gru": ExpectedKernel(never=FLOAT_RECURRENT),
        "sdpa": ExpectedKernel(name="MatMulIntegerToFloat (query·key)", needs=("query", "key")),
        "sdpa.value": ExpectedKernel(never=FLOAT_PROBABILITIES),
    },
    codes=range(2, 9),
    families={"token": "MatMulInteger", "affine token": "MatMulInteger"},
    weight_only=WeightOnly(
        name="MatMulNBits",
        beside=f"{FLOAT}onnxruntime's integer products have no scales per group",
        groups=frozenset(2**power for power in range(4, 17)),
    ),
)

_RULES = Rules()


@_RULES.add
def _activation_codes_are_bytes(reader: LintReader) -> Breaches:
    """Integer kernels read uint8 or int8 activations."""
    for node in reader.of("QuantizeLinear"):
        kind = reader.code_type(node)
        if kind not in (None, "UINT8", "INT8"):
            yield node, f"its codes are {kind.lower()}: onnxruntime's kernels stay float there"


@_RULES.add
def _blocks_beside_codes_are_int4(reader: LintReader) -> Breaches:
    """Beside a quantized activation, a weight in blocks has 4-bit codes: of others the product fails at run time."""
    for node in reader.of("MatMul", "Gemm"):
        activation, weight = reader.pair(node, 0), reader.pair(node, 1)
        if activation is None or weight is None or not attribute(weight, "block_size"):
            continue
        kind = reader.code_type(weight)
        if kind in ("INT8", "UINT8"):
            yield weight, f"its blocks of {kind.lower()} codes stand beside a quantized activation in {title(node)}"


def _require() -> ModuleType:
    return require("onnxruntime")


def run(path: ModelPath, feeds: Feeds) -> Ran:
    """With every optimization; the same package without them is the reference of all targets."""
    return Ran(
        runtime=REFERENCE,
        rows=kernel_rows(path),
        outputs=run_outputs(path, feeds, optimize=True),
        integer_dot=integer_dot_support(),
        exact_outputs=_exact_outputs(path, feeds) if sums_saturate() else None,
        exact_by='the session entry "session.x64quantprecision" set to "1"' if sums_saturate() else None,
    )


def _exact_outputs(path: ModelPath, feeds: Feeds) -> list[np.ndarray] | None:
    """With every optimization and sums that do not saturate, on any CPU.

    None where onnxruntime refuses the file under that setting: 1.31 does so for a weight that two products read.
    """
    try:
        return run_outputs(path, feeds, optimize=True, config=EXACT_SUMS)
    except ExportError:
        return None


TARGET = Target(
    profile=_PROFILE,
    forecast=_FORECAST,
    lint=Lint(rules=_RULES),
    runtime=Runtime(
        require=_require,
        run=run,
        kernels=kernel_rows,
        latency=latency,
        samples=samples,
        package=Package(module="onnxruntime", extra="onnx", oldest="1.20", newest="1.32"),
    ),
)
