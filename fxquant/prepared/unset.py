"""What becomes of sites that no data reached, or that saw only zeros, when a model is deployed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

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
def unset_in_float(model: nn.Module) -> Iterator[None]:
    """Inside, sites whose range is not set quantize nothing.

    Elsewhere they would take the range of the tensor at hand, which a file cannot.
    """
    held = [q for _, q in quantizers(model) if q.is_on and q.site.role != "weight"]  # a weight has its range itself
    unset: list[Quantizer] = [q for q in held if not q.is_set()]
    for quantizer in unset:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer in unset:
            quantizer.enabled = True


def _names(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
