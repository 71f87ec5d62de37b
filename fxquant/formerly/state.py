"""Now `fxquant.prepared`. Pickles of whole models name the private ones, too."""

from fxquant.prepared.bound_forward import BoundForward, bound_forward
from fxquant.prepared.freeze import _FrozenTrain, freeze_batch_norm, freeze_ranges
from fxquant.prepared.quantizer import Quantizer, QuantizerSet, owners, quantizers
from fxquant.prepared.root import Root, _refuse_other_plan, _save_plan, plan_of, require_plan, unwrap
from fxquant.prepared.sync_ranges import sync_ranges

__all__ = [
    "BoundForward",
    "Quantizer",
    "QuantizerSet",
    "Root",
    "_FrozenTrain",
    "_refuse_other_plan",
    "_save_plan",
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
