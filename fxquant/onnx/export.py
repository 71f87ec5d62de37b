"""`export_onnx`: a prepared model as an ONNX file in the form that its target runs as integers."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx, nn

from fxquant.capture.in_float32 import in_float32, widened
from fxquant.errors import InvalidArgument
from fxquant.onnx.block_forms import write_blocks
from fxquant.onnx.card import check_card
from fxquant.onnx.clip_codes import clip_codes
from fxquant.onnx.edges import NOTE, Edges
from fxquant.onnx.element_types import type_codes
from fxquant.onnx.file_check import FileCheck, Inputs
from fxquant.onnx.pools import means_by_axis, pool_floats
from fxquant.onnx.precision import Precision, choose_precision
from fxquant.onnx.runtime_forms import fold_pads, one_node_silu, prelu_of_halves, sum_before_norms
from fxquant.onnx.site_edges import write_sites
from fxquant.onnx.typed import type_floats
from fxquant.onnx.unpacked import unpack_recurrent_weights
from fxquant.onnx.whole_products import keep_products_whole
from fxquant.onnx.write import pack_int4, save, to_onnx
from fxquant.onnx.zero_points import imply_zero_points, move_codes_of_tables, own_zero_points
from fxquant.passes.export.freeze import Frozen
from fxquant.passes.export.pairs import elements_of
from fxquant.passes.pipelines import export_passes
from fxquant.plan.plan import Plan
from fxquant.prepared.deployed import opened, quantized_graph
from fxquant.prepared.root import require_plan, unwrap
from fxquant.prepared.unset import check_ranges, unset_as_deployed
from fxquant.support.progress import counting
from fxquant.support.require import require
from fxquant.support.table import megabytes
from fxquant.targets.profiles import Profile, get_profile
from fxquant.targets.session import REFERENCE

ABSORBED = "fxquant.absorbed"  # in a file's metadata: sites that have no QuantizeLinear of their own there
FLOAT_DTYPE = "fxquant.float_dtype"  # there too: the half type of a file's float parts
WeightStorage = Literal["int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written.

    Attributes:
        float_bytes: what the same parameters take in float32.
        float_dtype: the type of the file's float parts.
        typed_difference: how far the outputs of a file of a half type are from those in float32 on the given inputs:
            the largest distance, as a part of the output's spread (greatest less least); None where not measured.
    """

    path: str
    target: str
    opset: int
    activations: tuple[str, ...]
    weights: tuple[str, ...]
    dynamic_batch: bool
    file_bytes: int
    float_bytes: int
    notes: tuple[str, ...]
    float_dtype: str = "float32"
    typed_difference: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))

    def __str__(self) -> str:
        batch = "dynamic batch" if self.dynamic_batch else "fixed batch"
        typed = "" if self.float_dtype == "float32" else f", {self.float_dtype}"
        lines = [
            f"{self.path}: ONNX opset {self.opset} for {self.target}, {batch}{typed}",
            f"  {len(self.activations)} quantized activations, {len(self.weights)} integer weights",
            f"  {megabytes(self.file_bytes)} on disk, {megabytes(self.float_bytes)} of parameters in float32",
            *(
                [f"  outputs are within {self.typed_difference:.2%} of the spread of those in float32"]
                if self.typed_difference is not None
                else []
            ),
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    opset: int | None = None,
    float_dtype: torch.dtype | None = None,
    io_dtype: torch.dtype | None = None,
    weight_storage: WeightStorage = "int8",
    capability: str | None = None,
    verify: bool = True,
) -> ExportReport:
    """Writes a prepared, trained (or calibrated) model as ONNX QuantizeLinear/DequantizeLinear.

    Evaluation graph with BatchNorm folded; scales as trained; weights as integer initializers after a
    DequantizeLinear; one Q/DQ per quantized tensor, whose QuantizeLinear result is named by the site's key.
    The file is written whole or not at all; the model, its modes and its compiled graphs stay as they were.

    Args:
        path: where the file goes; its folder must exist.
        dynamic_batch: leave dimension 0 of every input tensor open. ``dynamic_shapes`` (torch.export's) overrides.
        opset: ONNX opset, the target's default if None; 23 for a file of a half type.
        float_dtype: the type of all that is float in the file but for scales: ``torch.float32``, ``torch.float16`` or
            ``torch.bfloat16``. None is what the model was trained in, where the target computes in it beside integer
            products: the type of its parameters; for tensorrt, which runs float parts in the type that they have,
            also that of the autocast that a compiled training step ran under in this process. Else float32.
            `docs/numerics.md` says what stays float32 in a half file, and how close it is.
        io_dtype: the type of the graph's float inputs and outputs. None: as the model's are, but bfloat16 ones are
            float32, since numpy has no such type. Where it is not the type of the rest, a Cast stands there.
        weight_storage: ``"int4"`` packs codes of at most 4 bits as ONNX int4 (half the size; onnxruntime then runs
            them in float). Those of weights per group always are.
        capability: the compute capability of the card that the file is for, such as ``"8.9"``, for tensorrt: what it
            cannot run is an error before a file is written. None: any card. The file is the same.
        verify: hold the file to the evaluated graph on the given inputs before it takes its place: one run, in
            onnxruntime without optimizations or, where none that knows the opset is installed, in onnx's own
            evaluator. What cannot be run there is a note, of a file for onnxruntime an error. `verify_onnx` is the
            whole proof.

    Raises:
        InvalidArgument: not prepared, unusable path or opset; a ``float_dtype`` or ``io_dtype`` that is none, that the
            target or the opset does not have, or in which a tensor overflows on the given inputs: it is named. A
            ``capability`` that is none, or whose cards have not the formats of the plan or the type of the file.
        RangeNotSet: no activation range has been set. Of some that no data reached, what the evaluated graph has
            takes the range of its neighbours in a ModuleList, as experts have them, or stays float, with a warning.
        ExportError: torch.export or the exporter failed on the model, the target is onnxruntime and refuses the file,
            or the file computes another thing; the first tensor that is off is named. An earlier file stays.
        MissingDependency: onnx or onnxscript is not installed.
    """
    plan = require_plan(model, "export_onnx")
    for name in ("onnx", "onnxscript"):
        require(name)
    plain, profile = unwrap(model), get_profile(plan.target)
    _check_storage(weight_storage)
    precision = choose_precision(plain, profile, float_dtype, io_dtype, opset, _elements(plan))
    told = check_card(capability, plan, precision, profile)
    destination = check_path(path)
    told += check_ranges(plain)
    args, named, sizes = opened(plain, args, kwargs, dynamic_batch, dynamic_shapes)
    edges = Edges.of(plain, args, named)
    with counting("export_onnx") as step, in_float32(plain), unset_as_deployed(plain):
        wide: Inputs = widened((args, named))
        passes = export_passes(profile, float_pools=precision.name in profile.float_pools)
        step("tracing the model")
        gm, evaluated, frozen = quantized_graph(plain, *wide, sizes, plan, passes)
        step("translating it to ONNX")
        program = to_onnx(gm, *wide, sizes, precision.opset)
        int4 = weight_storage == "int4"
        notes = [*told, *frozen.notes, *_finish(program.model, gm.graph, frozen, profile, precision, int4=int4)]
        notes += _set_types(program.model, edges, precision, profile)
        write_sites(program.model, plan, frozen.weights, frozen.activations)
        half = precision.compute if precision.is_half else None
        check = None
        if verify:
            check = FileCheck(
                evaluated, (args, named), wide, frozen.labels, half, precision.io, plan.target == REFERENCE
            )
        step("holding the file to the model" if verify else "writing")
        size = save(program, destination, check)
    notes += [] if check is None else check.notes
    return ExportReport(
        path=os.fspath(path),
        target=plan.target,
        opset=precision.opset,
        activations=tuple(label.removesuffix("@0") for label in frozen.activations),
        weights=tuple(frozen.weights),
        dynamic_batch=any(not isinstance(d, int) for i in program.model.graph.inputs for d in (i.shape or [])[:1]),
        file_bytes=size,
        float_bytes=4 * sum(p.numel() for p in plain.parameters()),
        notes=tuple(notes),
        float_dtype=precision.name,
        typed_difference=None if check is None else check.difference,
    )


def _finish(
    model: Any, graph: fx.Graph, frozen: Frozen, profile: Profile, precision: Precision, *, int4: bool
) -> list[str]:
    """What the exporter's model lacks of the file; notes."""
    type_codes(model, elements_of(graph))
    write_blocks(model, frozen.blocks, profile.block_form)
    fold_pads(model.graph)
    if profile.onnxruntime_forms:
        sum_before_norms(model.graph)
        one_node_silu(model)
        prelu_of_halves(model.graph)
        own_zero_points(model.graph)
        clip_codes(model.graph)
        pool_floats(model.graph)
        means_by_axis(model.graph)
    move_codes_of_tables(model.graph)
    if profile.implied_zero:
        imply_zero_points(model.graph)
    if profile.splits_weights:
        keep_products_whole(model.graph)
    channels = not (precision.is_half and profile.int4_half_scales)
    notes = pack_int4(model, only_blocks=not int4, convolutions=profile.int4_convolutions, channels=channels)
    if profile.unpacks:
        unpack_recurrent_weights(model)
    written = {value.name for node in model.graph for value in node.outputs}
    merged = [label for label in frozen.activations if label not in written]  # the exporter joins equal nodes
    model.metadata_props[ABSORBED] = json.dumps([*frozen.absorbed, *merged])
    return notes


def _elements(plan: Plan) -> set[str]:
    """The small floats that codes of a plan are, also those of the scales of weights."""
    specs = [site.local.spec for site in plan.sites]
    return {spec.element for spec in specs if spec.element} | {"e4m3" for spec in specs if spec.scale_format == "e4m3"}


def _set_types(model: Any, edges: Edges | None, precision: Precision, profile: Profile) -> list[str]:
    """The types of the edges and of what is float between them; notes."""
    if edges is not None or precision.io is not None:
        (edges or Edges.single(model.graph)).narrow(model.graph, precision.io)
    if not precision.is_half:
        return [] if edges is None else [NOTE]
    model.metadata_props[FLOAT_DTYPE] = precision.name
    without = profile.without.get(precision.name, ())
    return type_floats(model, precision.compute, precision.opset, without, int4=profile.int4_half_scales)


def check_path(path: str | os.PathLike[str]) -> Path:
    """A file that can be written; InvalidArgument where it cannot."""
    destination = Path(path)
    folder = destination.absolute().parent
    if not folder.is_dir():
        raise InvalidArgument(f"path must be in an existing folder: got {os.fspath(path)!r}. Create {folder} first.")
    if destination.is_dir():
        raise InvalidArgument(f"path must name a file: got the folder {os.fspath(path)!r}.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidArgument(f"path must be writable: got {os.fspath(path)!r} ({error.strerror}).") from error
    return destination


def _check_storage(storage: str) -> None:
    if storage not in ("int8", "int4"):
        raise InvalidArgument(f"weight_storage must be 'int8' or 'int4': got {storage!r}.")
