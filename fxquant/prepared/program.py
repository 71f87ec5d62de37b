"""`export_program`: a prepared model as a torch.export program, quantized as PT2E quantizes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from fxquant.capture.in_float32 import in_float32, widened
from fxquant.capture.open_sizes import by_parameter
from fxquant.errors import ExportError, InvalidArgument, NotQuantizedWarning
from fxquant.ops.quantize import quantize_per_tensor
from fxquant.passes.pipelines import PROGRAM_RUNTIMES, program_passes
from fxquant.prepared.deployed import opened, quantized_graph
from fxquant.prepared.root import require_plan, unwrap
from fxquant.prepared.unset import check_ranges, unset_as_deployed

TOLERANCE = 1e-4  # of the spread of an output: what sums in another order make


def export_program(
    model: nn.Module,
    args: tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    runtime: str | None = None,
    verify: bool = True,
) -> torch.export.ExportedProgram:
    """A prepared, trained (or calibrated) model as an exported program with ``quantized_decomposed`` operators.

    What torchao's x86 Inductor lowering, ExecuTorch's XNNPACK and other backends of PT2E take, with the scales that
    training found::

        relu(linear(x, w, b))  →  q = quantize_per_tensor(x, s, z, lo, hi, uint8)
                                  w = dequantize_per_channel(codes, scales, zero_points, 0, -128, 127, int8)
                                  relu(linear(dequantize_per_tensor(q, …), w, b))

    Evaluation graph with BatchNorm folded; codes of weights are buffers; biases are float, on the int32 grid that
    integer kernels have. Pairs stand directly before the products that read them. Everything float is float32, also
    where the model is of a half type. The model, its modes and its compiled graphs stay as they were.

    torch's ``quantize_per_tensor`` multiplies by ``1 / s`` in float32 where training and ONNX divide: a value next to
    the middle between two codes may get the other one: 34 of 50 million, measured.

    Args:
        kwargs: keyword example inputs.
        dynamic_batch: as in `export_onnx`; a size that is left open may change.
        dynamic_shapes: as in `export_onnx`.
        runtime: ``"xnnpack"`` (ExecuTorch): codes of activations are int8, unsigned ones moved by 128 with their zero
            points, which changes no value; and weights of products whose result nobody quantizes are float, with the
            same values, since its integer kernels give integers. ``"x86"`` (Inductor with oneDNN), or None: as planned.
        verify: hold the program to the evaluated graph on the given inputs, quantizers dividing as in training: then
            both have the same codes.

    What stays float there, and why, is told in a NotQuantizedWarning.

    Raises:
        InvalidArgument: not prepared, or a ``runtime`` that is none.
        RangeNotSet: no activation range has been set.
        ExportError: torch.export failed; a format has no such operator (small floats, scales of groups, blocks and
            tokens); the program computes another thing.

    Source: PyTorch 2 export quantization, `quantized_decomposed` in ``torch.ao.quantization.fx._decomposed``.
    """
    plan = require_plan(model, "export_program")
    if runtime is not None and runtime not in PROGRAM_RUNTIMES:
        names = ", ".join(map(repr, PROGRAM_RUNTIMES))
        raise InvalidArgument(f"runtime must be among {names}, or None: got {runtime!r}. For ONNX see export_onnx.")
    plain = unwrap(model)
    check_ranges(plain)
    args, named, sizes = opened(plain, args, kwargs, dynamic_batch, dynamic_shapes)
    with in_float32(plain), unset_as_deployed(plain), torch.no_grad():
        wide_args, wide_named = widened((args, named))
        gm, evaluated, frozen = quantized_graph(plain, wide_args, wide_named, sizes, plan, program_passes(runtime))
        if frozen.notes:
            warnings.warn("; ".join(frozen.notes), NotQuantizedWarning, stacklevel=2)
        gm = on_its_own(gm)
        shapes = None if sizes is None else by_parameter(gm.forward, sizes)
        program = torch.export.export(gm, wide_args, wide_named, dynamic_shapes=shapes)
        if verify:
            _check(program, gm, evaluated, (wide_args, wide_named))
    return program


def on_its_own(gm: fx.GraphModule) -> fx.GraphModule:
    """Without float weights and ranges, which nothing reads any more, and with copies of all else.

    What lowers a program may write into its state, as Inductor's freezing does, and that would be the model's.
    """
    found = fx.GraphModule(gm, gm.graph)
    for path, value in [*found.named_parameters(), *found.named_buffers()]:
        owner, _, name = path.rpartition(".")
        copy = value.detach().clone()
        held = nn.Parameter(copy, value.requires_grad) if isinstance(value, nn.Parameter) else copy
        setattr(found.get_submodule(owner), name, held)
    return found


class _Divided(fx.Interpreter):
    """Runs a program whose quantizers divide by their scale, as those of training do, and not by torch's reciprocal."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not torch.ops.quantized_decomposed.quantize_per_tensor.default:
            return super().call_function(target, args, kwargs)
        return quantize_per_tensor(*args)


def _check(program: torch.export.ExportedProgram, gm: fx.GraphModule, evaluated: fx.GraphModule, inputs: Any) -> None:
    """ExportError where an output is off, of the graph that was exported or of the program's own form of it."""
    leaves = _pytree.tree_leaves(inputs)
    expected = _pytree.tree_leaves(evaluated(*leaves))
    for graph in (gm, program.module()):
        assert isinstance(graph, fx.GraphModule)
        found = _pytree.tree_leaves(_Divided(graph).run(*leaves))
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            if not isinstance(other, Tensor) or not other.is_floating_point():
                continue
            spread = float(other.max() - other.min()) or 1.0
            off = float((one - other).abs().max())
            if not off <= TOLERANCE * spread:
                raise ExportError(
                    f"program must compute what the model does: got output {number} off by {off:.3g}, "
                    f"{off / spread:.0%} of its spread. Please report it with the model."
                )
