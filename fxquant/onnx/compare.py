"""The codes and the outputs of a file held to those of the prepared model that it was exported from."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxquant.capture.aside import untouched
from fxquant.errors import ExportError, InvalidArgument
from fxquant.numerics import code_before_clamp, dequantize, elements, per_channel_view
from fxquant.numerics.formats import float_format
from fxquant.onnx.export import ABSORBED, FLOAT_DTYPE
from fxquant.onnx.feeds import feeds_of, results, tensors_of
from fxquant.onnx.verify_report import CodeRow
from fxquant.passes.export.constants import held_name
from fxquant.prepared.root import trained_autocast
from fxquant.probe.recording import named
from fxquant.probe.visitor import Run, Use, visiting
from fxquant.support.require import require
from fxquant.targets.document import Feeds, ModelPath, Wiring, folder_of, load_model
from fxquant.targets.session import run_codes

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class Case:
    """A prepared model, inputs for it, and the file that is held to what it makes of them.

    ``keys`` are those of the plan's sites.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    path: ModelPath
    keys: tuple[str, ...]

    @cached_property
    def feeds(self) -> Feeds:
        """The file's inputs by name. Raises InvalidArgument where it has another number of them."""
        return feeds_of(self.path, self.args, self.kwargs)


@dataclass
class Codes:
    """Rows per site, codes that differ at the model's inputs, and sites that one of the two does not have.

    Attributes:
        unknown: the file does not have them.
        not_compared: the file quantizes them, and the model's run did not come by, or in another form: some models
            take another way when they are exported (a loop in the place of a scan).
    """

    rows: list[CodeRow] = field(default_factory=list)
    at_inputs: int = 0
    unknown: set[str] = field(default_factory=set)
    not_compared: set[str] = field(default_factory=set)


@contextlib.contextmanager
def running(case: Case) -> Iterator[Run]:
    """Runs of the model for the functions below, which compile it once; under the autocast that it was trained under,
    where that is what the file's float parts are.
    """
    found = next((p.value for p in load_model(case.path).metadata_props if p.key == FLOAT_DTYPE), "")
    trained = trained_autocast(case.model)
    with contextlib.ExitStack() as stack:
        if trained is not None and str(trained) == f"torch.{found}":
            stack.enter_context(torch.autocast(next(case.model.parameters()).device.type, trained))
        yield stack.enter_context(visiting(case.model, "verify_onnx"))


def compare_codes(case: Case, run: Run) -> tuple[Codes, Codes, list[np.ndarray]]:
    """Every site of the model against its QuantizeLinear: each from the file's codes before it, and each from its own.

    The model's own outputs come third: what training sees. Raises InvalidArgument for a file that lacks some of them,
    ExportError where the file quantizes activations and none was compared: two sides that quantize nothing agree on
    nothing.
    """
    feeds, absorbed = case.feeds, _absorbed_codes(case.path)
    theirs = run_codes(case.path, feeds, also=case.keys)
    quantized = {label.partition("@")[0] for label in theirs} & {*case.keys}
    theirs |= {key: codes for key, codes in absorbed.items() if codes is not None}
    cascaded, outputs = _compare(case, run, theirs, follow=False)
    _check_sites(case.path, cascaded.unknown - absorbed.keys())
    compared, _ = _compare(case, run, theirs, follow=True)
    compared.not_compared |= quantized - {row.key.partition("@")[0] for row in compared.rows}
    if quantized and not any(row.compared for row in compared.rows):
        raise ExportError(
            f"the model's run must come by the sites of {os.fspath(case.path)}: got 0 codes of {len(quantized)} sites "
            f"({', '.join(sorted(quantized)[:5])}) to compare. Give inputs that are not empty; if they are not, the "
            "model takes another way than the one that was exported: see fxquant.explain."
        )
    return compared, cascaded, results(outputs)


def compare_found(case: Case, run: Run, found: Mapping[str, np.ndarray]) -> Codes:
    """Every site of the model against codes of the file, each from those codes before it."""
    theirs = {**found, **{key: codes for key, codes in _absorbed_codes(case.path).items() if codes is not None}}
    return _compare(case, run, theirs, follow=True)[0]


def compare_parts(case: Case, run: Run, parts: Iterable[tuple[Set[str], Mapping[str, np.ndarray]]]) -> list[CodeRow]:
    """A row for each site that a part judges: from the codes before it that the part's run of the file showed."""
    return [row for judged, found in parts for row in compare_found(case, run, found).rows if row.key in judged]


def _absorbed_codes(path: ModelPath) -> dict[str, np.ndarray | None]:
    """Codes of the sites that are constants in the file; None for those that are a part of another one."""
    model = load_model(path)
    listed = next((p.value for p in model.metadata_props if p.key == ABSORBED), "[]")
    held = Wiring(model=model, folder=folder_of(path)).initializers
    tensors = {key: held.get(held_name(f"{key}.codes")) for key in json.loads(listed)}
    to_array = require("onnx.numpy_helper").to_array
    return {key: None if tensor is None else to_array(tensor) for key, tensor in tensors.items()}


def _check_sites(path: ModelPath, absent: Set[str]) -> None:
    if absent:
        raise InvalidArgument(
            f"{os.fspath(path)} must be an export of this model: it has no QuantizeLinear for "
            f"{', '.join(sorted(absent)[:5])}. Export the model again."
        )


def _compare(case: Case, run: Run, found: Mapping[str, np.ndarray], *, follow: bool) -> tuple[Codes, Any]:
    """Runs the model and compares every site; its output too. ``follow``: each goes on from the file's codes."""
    result = Codes()
    inputs = {tensor.data_ptr() for tensor in tensors_of(case.args, case.kwargs)}

    def visit(key: str, use: Use) -> Tensor | None:
        if use.role == "weight":
            return None
        if key not in found:
            result.unknown.add(key)
            return None
        y = use.quantized
        if found[key].size != y.numel():
            result.not_compared.add(key)
            return None
        theirs = torch.from_numpy(found[key].astype("int64")).reshape(y.shape)
        theirs = theirs if use.element is None else _ordered(theirs, use.element)
        ours = _codes_of(y, use).to(torch.int64)
        distance = (theirs - ours).abs()
        differing = int((distance > 0).sum())
        largest = int(distance.max()) if distance.numel() else 0
        result.rows.append(CodeRow(key=key, differing=differing, compared=distance.numel(), largest=largest))
        result.at_inputs += differing if use.input.data_ptr() in inputs else 0
        if not (follow and differing):
            return None
        # In y's strides, which views rely on.
        return torch.empty_like(y).copy_(_values_of(theirs, use))

    with untouched(case.model):  # a cache that the model writes holds the same in each run
        return result, run(case.args, case.kwargs, named(visit))


def _along(use: Use, value: Tensor) -> Tensor:
    return value if use.axis is None else per_channel_view(value, use.input.dim(), use.axis)


def _codes_of(quantized: Tensor, use: Use) -> Tensor:
    """The codes of a tensor that lies on its quantizer's grid. Small floats are counted from the least one."""
    scale = _along(use, use.scale)
    if use.element is None:
        return code_before_clamp(quantized, scale, _along(use, use.zero_point), "divide")
    format = float_format(use.element)
    return _ordered(elements.encode(elements.quantize(quantized, scale, format, "divide"), format), use.element)


def _values_of(codes: Tensor, use: Use) -> Tensor:
    scale = _along(use, use.scale)
    if use.element is None:
        return dequantize(codes, scale, _along(use, use.zero_point))
    format = float_format(use.element)
    sign = 1 << (format.bits - 1)
    return elements.decode(torch.where(codes < 0, sign - codes, codes).to(torch.uint8), format) * scale


def _ordered(codes: Tensor, element: str) -> Tensor:
    """Bits of small floats as integers in the order of their values, neighbours one apart; both zeros are 0."""
    sign = 1 << (float_format(element).bits - 1)
    wide = codes.to(torch.int64)
    return torch.where(wide >= sign, sign - wide, wide)


def largest_difference(found: list[np.ndarray], reference: list[np.ndarray]) -> float:
    """The largest distance of a value from the reference's."""
    import numpy as np

    pairs = [(f.astype("float64"), r.astype("float64")) for f, r in zip(found, reference, strict=True)]
    return max((float(np.abs(f - r).max(initial=0)) for f, r in pairs), default=0.0)


def within_code(found: list[np.ndarray], reference: list[np.ndarray]) -> float:
    """The share of values within one 8-bit code of the reference's: 1/255 of the range of their output."""
    import numpy as np

    close = total = 0
    for f, r in zip(found, reference, strict=True):
        if r.size and r.dtype.kind == "f":
            finite = r[np.isfinite(r)]  # masks put -inf there
            step = np.ptp(finite) / 255 if finite.size else 0.0
            with np.errstate(invalid="ignore"):  # inf − inf
                close += int(((f == r) | (np.abs(f - r) <= step)).sum())
            total += r.size
    return close / total if total else 1.0
