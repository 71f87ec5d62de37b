"""The codes and the outputs of a file held to those of the prepared model that it was exported from."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxquant.errors import InvalidArgument
from fxquant.numerics import code_before_clamp, dequantize
from fxquant.onnx.export import ABSORBED
from fxquant.onnx.verify_report import CodeRow
from fxquant.passes.export.constants import held_name
from fxquant.probe.recording import named
from fxquant.probe.visitor import Run, Use, visiting
from fxquant.support.require import require
from fxquant.targets.document import Feeds, ModelPath, Wiring, folder_of, load_model
from fxquant.targets.session import input_names, run_codes

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class Case:
    """A prepared model, inputs for it, and the file that is held to what it makes of them."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    path: ModelPath

    @property
    def tensors(self) -> list[Tensor]:
        """The inputs that are tensors, flattened in order, as the exporter does."""
        return [t for t in torch.utils._pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]

    @cached_property
    def feeds(self) -> Feeds:
        """The file's inputs by name. Raises InvalidArgument where it has another number of them."""
        names, leaves = input_names(self.path), self.tensors
        if len(names) != len(leaves):
            raise InvalidArgument(
                f"args and kwargs must hold the file's {len(names)} inputs ({', '.join(names)}): "
                f"got {len(leaves)} tensors."
            )
        return {name: leaf.detach().cpu().numpy() for name, leaf in zip(names, leaves, strict=True)}


@dataclass
class Codes:
    """Rows per site, codes that differ at the model's inputs, and sites that the file does not know."""

    rows: list[CodeRow] = field(default_factory=list)
    at_inputs: int = 0
    unknown: set[str] = field(default_factory=set)


def compare_codes(case: Case, keys: Collection[str]) -> tuple[Codes, Codes]:
    """Every site of the model against its QuantizeLinear: each from the file's codes before it, and each from its own.

    ``keys`` are those of the plan's sites. Raises InvalidArgument for a file that lacks some of them.
    """
    feeds, absorbed = case.feeds, _absorbed_codes(case.path)
    theirs = run_codes(case.path, feeds, also=keys)
    theirs |= {key: codes for key, codes in absorbed.items() if codes is not None}
    with visiting(case.model, "verify_onnx") as run:
        cascaded = _compare(case, run, theirs, follow=False)
        _check_sites(case.path, cascaded.unknown - absorbed.keys())
        return _compare(case, run, theirs, follow=True), cascaded


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


def _compare(case: Case, run: Run, found: Mapping[str, np.ndarray], *, follow: bool) -> Codes:
    """Runs the model and compares every site; ``follow``: each goes on from the file's codes."""
    result = Codes()
    inputs = {tensor.data_ptr() for tensor in case.tensors}

    def visit(key: str, use: Use) -> Tensor | None:
        if use.role == "weight":
            return None
        if key not in found:
            result.unknown.add(key)
            return None
        y = use.quantized
        theirs = torch.from_numpy(found[key].astype("int64")).reshape(y.shape)
        ours = code_before_clamp(y, use.scale, use.zero_point, "divide").to(torch.int64)
        distance = (theirs - ours).abs()
        differing = int((distance > 0).sum())
        largest = int(distance.max()) if distance.numel() else 0
        result.rows.append(CodeRow(key=key, differing=differing, compared=distance.numel(), largest=largest))
        result.at_inputs += differing if use.input.data_ptr() in inputs else 0
        if not (follow and differing):
            return None
        # In y's strides, which views rely on.
        return torch.empty_like(y).copy_(dequantize(theirs, use.scale, use.zero_point))

    run(case.args, case.kwargs, named(visit))
    return result


def arrays(outputs: Any) -> list[np.ndarray]:
    """A model's outputs in the order of the file's."""
    return [_array(value) for value in torch.utils._pytree.tree_leaves(outputs) if isinstance(value, Tensor)]


def _array(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()  # numpy has no bfloat16


def largest_difference(found: list[np.ndarray], reference: list[np.ndarray]) -> float:
    """The largest distance of a value from the reference's."""
    import numpy as np

    return max((float(np.abs(f - r).max(initial=0)) for f, r in zip(found, reference, strict=True)), default=0.0)


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
