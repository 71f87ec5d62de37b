"""OpenVINO on the CPU: what it runs as integers, how a file is run in it and held to its rules.

Names of kernels were seen there.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Collection, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fxquant.errors import ExportError
from fxquant.support.require import require
from fxquant.targets.cpu import integer_dot_support
from fxquant.targets.document import Feeds, ModelPath, Wiring, folder_of, load_model
from fxquant.targets.expected import FLOAT_PROBABILITIES, FLOAT_RECURRENT, ExpectedKernel, Forecast, WeightOnly
from fxquant.targets.in_turns import in_turns
from fxquant.targets.lint_reader import Breaches, Lint, LintReader, Rules, attribute
from fxquant.targets.openvino_rows import kernel_rows
from fxquant.targets.profile import FLOAT_CELLS, FLOAT_VALUE, PRODUCT_KINDS, Profile
from fxquant.targets.shown_codes import apart, code_values, show
from fxquant.targets.target import KernelRow, Package, Ran, Runtime, Target

if TYPE_CHECKING:
    import numpy as np
    import onnx

# Integer convolutions and products need no quantized result there; table lookups gain nothing, nor do adds but those
# between codes that a convolution takes in. Measured: products of two activations and transposed
# convolutions run in float beside any zero point but 0.
_PROFILE = Profile(
    name="openvino",
    hard=PRODUCT_KINDS | {"conv_transpose", "lstm", "gru"},
    soft=frozenset({"add", "cat", "avg_pool"}),
    skips=frozenset({"conv"}),
    symmetric_operands=frozenset({"matmul.rhs", "sdpa.key"}),
    zero_based_operands=frozenset({"matmul.lhs", "sdpa.query", "conv_transpose.input"}),
    faster_zero_based=frozenset({"linear.input"}),  # else a kernel of its own takes the zero point's share off
    float_operands=FLOAT_VALUE,
    implied_zero=True,
    activation_bits=range(2, 9),
    weight_bits=range(2, 9),
    half_types=("float16",),  # 2026.4 multiplies in float beside bfloat16, or does not compile the file
    refused={
        "embedding": "OpenVINO looks tables up in float",
        **FLOAT_CELLS,
    },
)

_FORECAST = Forecast(
    kernels={
        "conv": ExpectedKernel(name="Convolution {code}"),
        "conv_transpose": ExpectedKernel(name="Deconvolution {code}"),
        "linear": ExpectedKernel(name="FullyConnected {code}"),
        "matmul": ExpectedKernel(name="MatMul {code}"),
        "einsum": ExpectedKernel(never="OpenVINO runs Einsum in float"),
        # Of the operand that comes from elsewhere: the other is the convolution's own sum. Were that one codes too,
        # OpenVINO would not round it to them before it adds: a fifth of the codes after it would be off by one.
        "add": ExpectedKernel(name="sum with {code}, in the Convolution or after it", needs=()),
        "cat": ExpectedKernel(name="Concat {code}"),
        "avg_pool": ExpectedKernel(name="AvgPool {code}"),
        "lstm": ExpectedKernel(never=FLOAT_RECURRENT),
        "gru": ExpectedKernel(never=FLOAT_RECURRENT),
        "sdpa": ExpectedKernel(name="MatMul {code} (query·key)", needs=("query", "key")),
        "sdpa.value": ExpectedKernel(never=FLOAT_PROBABILITIES),
    },
    codes=range(2, 9),
    weight_only=WeightOnly(
        name="FullyConnected, i{bits} weight on float", beside="FullyConnected, i{bits} weight on float"
    ),
)

_RULES = Rules()


@_RULES.add
def _blocks_divide_the_axis(reader: LintReader) -> Breaches:
    """Blocks are all of one size: OpenVINO loads no others."""
    for node in reader.of("DequantizeLinear"):
        size, shape = attribute(node, "block_size"), reader.shape(node.input[0])
        axis = attribute(node, "axis")
        if size and shape is not None and shape[axis if axis is not None else 1] % size:
            yield node, f"blocks of {size} do not divide axis {axis} of codes of shape {shape}"


@_RULES.add
def _right_operand_is_symmetric(reader: LintReader) -> Breaches:
    """The right operand of a product of two activations has int8 codes with zero point 0, or the same as uint8."""
    for node, pair in _activation_pairs(reader, "MatMul", 1):
        kind, point = reader.code_type(pair), _zero_point(reader, pair)
        if (kind, point) not in (("INT8", 0), ("UINT8", 128)):
            what = f"{(kind or 'unknown').lower()} codes with zero point {point}"
            yield node, f"its right operand must have int8 codes with zero point 0: got {what}"


@_RULES.add
def _zero_point_of_operand_is_zero(reader: LintReader) -> Breaches:
    """The left operand of a product of two activations, and the input of a ConvTranspose, have zero point 0."""
    for op in ("MatMul", "ConvTranspose"):
        for node, pair in _activation_pairs(reader, op, 0):
            right = reader.pair(node, 1)
            if op == "MatMul" and (right is None or reader.is_weight(right)):
                continue
            point = _zero_point(reader, pair)
            if point:
                yield node, f"zero point of its operand 0 must be 0: got {point}, and OpenVINO runs it in float"


@_RULES.add
def _type_of_codes_is_a_zero_point(reader: LintReader) -> Breaches:
    """Codes other than uint8 have a zero point: OpenVINO before 2026.4 knows a QuantizeLinear's type by that alone."""
    for node in reader.of("QuantizeLinear"):
        kind = reader.codes(node)
        if not "".join(node.input[2:]) and kind in ("INT8", "INT4", "UINT4", "INT16", "UINT16"):
            yield node, f"its {kind.lower()} codes are named by output_dtype alone: OpenVINO before 2026.4 takes uint8"


def _activation_pairs(reader: LintReader, op: str, index: int) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
    for node in reader.of(op):
        pair = reader.pair(node, index)
        if pair is not None and not reader.is_weight(pair):
            yield node, pair


def _zero_point(reader: LintReader, pair: onnx.NodeProto) -> int | None:
    if len(pair.input) < 3:
        return 0
    point = reader.array(pair, 2)
    return int(point) if point is not None and point.size == 1 else None


def _require() -> ModuleType:
    return require(
        "openvino",
        "openvino must be installed to verify a model for target 'openvino': it is not. "
        'Run `pip install "fxquant[openvino]"`.',
    )


def run(path: ModelPath, feeds: Feeds) -> Ran:
    """Compiles the file for the CPU, with float32 wherever it does not ask for integers, and runs it.

    Raises ExportError where the file does not load or run, MissingDependency without openvino.
    """
    with _loading(path) as version:
        compiled = _compiled(path)
        found = compiled(dict(feeds))
    return Ran(
        runtime=f"OpenVINO {version.partition('-')[0]}",
        rows=tuple(kernel_rows(compiled.get_runtime_model().get_ordered_ops(), path)),
        outputs=[found[output] for output in compiled.outputs],
        integer_dot=integer_dot_support(),
    )


def codes(
    path: ModelPath, feeds: Feeds, *, also: Collection[str] = ()
) -> list[tuple[frozenset[str], dict[str, np.ndarray]]]:
    """What the file's quantizers of activations give in OpenVINO, in a run for each `Part`. Raises as `run`."""
    found = []
    file = Wiring(model=load_model(path), folder=folder_of(path))
    for part in apart(file, code_values(file, also)):
        wiring = Wiring(model=load_model(path), folder=folder_of(path))
        names = show(wiring, part.shown)
        require("onnx").load_external_data_for_model(wiring.model, wiring.folder)
        with _loading(path):
            compiled = _compiled(_require().Core().read_model(wiring.model.SerializeToString()))
            read = {name for each in compiled.inputs for name in each.get_names()}  # of bytes, none that nothing reads
            given = compiled({name: array for name, array in feeds.items() if name in read})
        arrays = {name: given[output] for output in compiled.outputs for name in output.get_names()}
        found.append((part.judged, {label: arrays[name] for label, name in names.items()}))
    return found


def kernels(path: ModelPath) -> tuple[KernelRow, ...]:
    """A row per product of the file, compiled and not run. Raises as `run`."""
    with _loading(path):
        return tuple(kernel_rows(_compiled(path).get_runtime_model().get_ordered_ops(), path))


@contextlib.contextmanager
def _loading(path: ModelPath) -> Iterator[str]:
    """OpenVINO's version; its errors become ExportError."""
    version = str(_require().__version__)
    try:
        yield version
    except Exception as error:  # OpenVINO raises RuntimeError and its subclasses, with all detail in the text
        raise ExportError(f"{os.fspath(path)} must load and run in OpenVINO {version}: got {error}") from error


def samples(cases: Mapping[str, tuple[ModelPath, Feeds]], *, rounds: int, threads: int = 1) -> dict[str, list[float]]:
    """Seconds of one run of each file in each round, compiled for one request at a time. Raises as `run`."""
    runs = {}
    for key, (path, feeds) in cases.items():
        with _loading(path):
            request = _compiled(path, INFERENCE_NUM_THREADS=threads, PERFORMANCE_HINT="LATENCY").create_infer_request()
            runs[key] = functools.partial(request.infer, dict(feeds), share_inputs=True, share_outputs=True)
            runs[key]()
    return in_turns(runs, rounds=rounds, threads=threads)


def _compiled(model: Any, **config: object) -> Any:
    """A file, by its path, or what `Core.read_model` made of one."""
    hint = {"INFERENCE_PRECISION_HINT": "f32", **config}  # else bfloat16 where the CPU has it
    source = os.fspath(model) if isinstance(model, (str, os.PathLike)) else model
    return _require().Core().compile_model(source, "CPU", hint)


TARGET = Target(
    profile=_PROFILE,
    forecast=_FORECAST,
    lint=Lint(rules=_RULES),
    runtime=Runtime(
        require=_require,
        run=run,
        kernels=kernels,
        samples=samples,
        codes=codes,
        package=Package(module="openvino", extra="openvino", oldest="2025.3", newest="2026.4"),
    ),
)
