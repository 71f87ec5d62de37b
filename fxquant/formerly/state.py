"""Now `fxquant.prepared`."""

from fxquant.prepared.bound_forward import BoundForward, bound_forward
from fxquant.prepared.freeze import freeze_batch_norm, freeze_ranges
from fxquant.prepared.quantizer import Quantizer, QuantizerSet, owners, quantizers
from fxquant.prepared.root import Root, plan_of, require_plan, unwrap
from fxquant.prepared.sync_ranges import sync_ranges

__all__ = [
    "BoundForward",
    "Quantizer",
    "QuantizerSet",
    "Root",
    "bound_forward",
    "freeze_batch_norm",
    "freeze_ranges",
    "owners",
    "plan_of",
    "quantizers",
    "require_plan",
    "sync_ranges",
    "unwrap",
]
