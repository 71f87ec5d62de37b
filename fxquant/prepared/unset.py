"""What becomes of sites that no data reached, or that saw only zeros, when a model is deployed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from fxquant.errors import NotQuantizedWarning, RangeNotSet
from fxquant.prepared.bound_forward import bound_forward
from fxquant.prepared.quantizer import Quantizer, owners, quantizers
from fxquant.prepared.root import require_plan
from fxquant.prepared.staged import off_plan


def check_ranges(model: nn.Module) -> list[str]:
    """Looks on the host at every range that is to be exported; what there is to say, which is warned of as well.

    Raises RangeNotSet where none is set, or all are of zeros: such a model was neither trained nor calibrated.
    """
    told = []
    wanted = [(key, q) for key, q in quantizers(model) if q.is_on and q.stateful and q.site.role != "weight"]
    unset = [key for key, q in wanted if not q.settle()]
    zero = [key for key, q in wanted if q.resolved and q.range.is_degenerate(q.state)]
    for keys, what in ((unset, "no data yet"), (zero, "only zeros")):
        if keys and len(keys) == len(wanted):
            raise RangeNotSet(
                f"activation ranges must be set before export: {len(keys)} sites saw {what}: {_names(keys)}. Train "
                "with torch.compile(model, backend='fxquant') or call fxquant.calibrate(model, data) on representative "
                "data."
            )
    near = neighbours(model)
    borrowed, unset = [key for key in unset if key in near], [key for key in unset if key not in near]
    if borrowed:
        told.append(
            f"{len(borrowed)} sites saw no data, and take the range that others of their list of modules have there: "
            f"{_names(borrowed)}"
        )
    if unset:
        told.append(f"{len(unset)} sites saw no data; what the evaluated graph has of them is float: {_names(unset)}")
    if zero:
        told.append(f"{len(zero)} sites saw only zeros, and whatever comes in stays 0 there: {_names(zero)}")
    staged = [f"{key} {now}" for key, now in off_plan(model, require_plan(model, "export")).items()]
    if staged:
        told.append(f"{len(staged)} sites are not yet as planned in this stage of a schedule: {_names(staged)}")
    eager = [path or type(m).__name__ for path, m, _ in owners(model) if (b := bound_forward(m)) and b.eager_runs]
    for text in told:
        warnings.warn(f"{text}.", NotQuantizedWarning, stacklevel=3)
    if eager:
        warnings.warn(
            f"{', '.join(eager[:5])} ran in eager Python inside torch.compile: training did not see the quantizers "
            "that the export will hold there.",
            NotQuantizedWarning,
            stacklevel=3,
        )
    return told


@contextlib.contextmanager
def unset_as_deployed(model: nn.Module) -> Iterator[None]:
    """Inside, sites whose range is not set have that of their `neighbours`, and quantize nothing where there are none.

    Elsewhere they would take the range of the tensor at hand, which a file cannot.
    """
    held = [(key, q) for key, q in quantizers(model) if q.is_on and q.site.role != "weight"]  # it has its range itself
    unset = [(key, q) for key, q in held if not q.is_set()]
    near = neighbours(model)
    before = [{name: value.detach().clone() for name, value in q.state.items()} for _, q in unset]
    try:
        for key, quantizer in unset:
            if key in near:
                _take_range(quantizer, near[key])
            else:
                quantizer.enabled = False
        yield
    finally:
        for (_, quantizer), state in zip(unset, before, strict=True):
            quantizer.enabled, quantizer.resolved = True, False
            with torch.no_grad():
                for name, value in quantizer.state.items():
                    value.copy_(state[name])


def neighbours(model: nn.Module) -> dict[str, list[Quantizer]]:
    """Activation sites without a range, such as those of experts that no token came to → those whose range will do.

    They quantize the same tensor, in the same format, of another module in the same ModuleList, and have seen data.
    """
    held, found = dict(quantizers(model)), {}
    for key, quantizer in held.items():
        where = _in_list(model, key)
        if where is None or not quantizer.is_on or not quantizer.range.takes_ends or quantizer.is_set():
            continue
        alike = [q for name, q in held.items() if _in_list(model, name) == where and q.spec == quantizer.spec]
        seen = [other for other in alike if other.is_set() and not other.range.is_degenerate(other.state)]
        if seen:
            found[key] = seen
    return found


def _in_list(model: nn.Module, key: str) -> tuple[str, str] | None:
    """Of a site in a module of a ModuleList, the innermost one: the list's path, and the site's key from there on."""
    parts = key.split(".")
    for index in reversed(range(1, len(parts) - 1)):
        path = ".".join(parts[:index])
        if parts[index].isdigit() and isinstance(model.get_submodule(path), nn.ModuleList):
            return path, ".".join(parts[index + 1 :])
    return None


def _take_range(quantizer: Quantizer, others: list[Quantizer]) -> None:
    """Gives a quantizer the union of what others have seen."""
    ends = [other.range.ends(other.state, other.spec) for other in others]
    with torch.no_grad():
        widest = min(low for low, _ in ends), max(high for _, high in ends)
        quantizer.range.set_ends(quantizer.state, quantizer.spec, *widest)
    quantizer.settle()


def _names(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
