"""`sync_ranges`: over which processes ranges are reduced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import nn

from fxquant.errors import InvalidArgument
from fxquant.prepared.bound_forward import bound_forward
from fxquant.prepared.quantizer import owners
from fxquant.prepared.root import require_plan, unwrap

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def sync_ranges(
    model: nn.Module,
    group: ProcessGroup | None = None,
    *,
    enabled: bool = True,
    when: Literal["after", "before"] = "after",
) -> None:
    """Says over which processes a prepared model's activation ranges are reduced in training, and when.

    Without this call: over all of them, where ``torch.distributed`` is initialized with more than one, after use. Each
    compiled graph that updates ranges then holds one ``all_reduce``, of the extremes of every tensor, so all ranks keep
    the ranges of the global batch; but in a step that also follows its own batch, each quantizes with its own average.

    ``when="before"``: each tensor's extremes are reduced before it is quantized, in an ``all_reduce`` of two numbers,
    which it waits for. Training then is that of one process with the whole batch, up to the order of sums.
    Delayed ranges are those of earlier steps, so there it changes nothing.

    Every rank must run the same graphs equally often. Where they do not, as in pipeline parallelism, name the ``group``
    of ranks that do, or set ``enabled=False``: each rank then keeps its own.

    Calibration and evaluation reduce nothing. Graphs compiled before are compiled again at their next call.
    """
    require_plan(model, "sync_ranges")
    if when not in ("after", "before"):
        raise InvalidArgument(f"when must be 'after' or 'before': got {when!r}.")
    name = None if group is None else str(group.group_name)
    for _, module, _ in owners(unwrap(model)):
        bound = bound_forward(module)
        if bound is not None:
            bound.group = name if enabled else ""
            bound.before = when == "before"
