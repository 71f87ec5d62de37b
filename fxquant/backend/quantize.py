"""From Dynamo's graph to the QAT graph: what both backends hand on."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxquant.backend.options import Options
from fxquant.backend.reports import report
from fxquant.capture.dynamo import capture
from fxquant.errors import InvalidArgument, NotQuantizedWarning, UnsupportedModel
from fxquant.graph.bodies import execution_order
from fxquant.graph.nodes import packet
from fxquant.graph.views import Bind
from fxquant.passes.base import Decline, PassResult, run_all
from fxquant.passes.pipelines import training_passes
from fxquant.plan.positions import bound_sites
from fxquant.plan.site_lists import target_of
from fxquant.prepared.live import of_prepared_model
from fxquant.targets.profiles import get_profile


def quantize_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any] | None = None
) -> fx.GraphModule:
    """Dynamo's graph as the captured QAT graph: what both backends hand on."""
    started = time.perf_counter()
    chosen = Options.read(options)
    # Without gradients there is nothing to checkpoint.
    captured = capture(gm, example_inputs, inline_checkpoints=not torch.is_grad_enabled())
    digests = tuple(bind.key for node in execution_order(captured) if (bind := Bind.of(node)) is not None)
    prepared = bool(digests) or of_prepared_model(example_inputs)
    if prepared and chosen.given:
        raise InvalidArgument(
            f"options must not set {' and '.join(chosen.given)} for a prepared model: its plan decides. "
            "Give them to fxquant.prepare."
        )
    _refuse_buckets(captured)
    _tell_of_fused(captured)
    if chosen.recipe is None:
        result = PassResult(declines=[left_alone(captured, "recipe=None places nothing")])
    else:
        stateless = not prepared and any(map(_is_trainable, example_inputs))
        target = _target(digests) or chosen.target
        passes = training_passes(chosen.recipe, get_profile(target), stateless=stateless)
        result = run_all(passes, captured)
        if not digests and not stateless:
            result.declines.append(left_alone(captured))
    result.seconds = time.perf_counter() - started
    report(captured, digests, result)
    return captured


def _target(digests: Iterable[str]) -> str | None:
    """What the prepared parts of a graph are for; None where there are none."""
    found = sorted({target_of(key) for key in digests})
    if len(found) > 1:
        raise UnsupportedModel(
            f"models that run in one graph must be prepared for one target: got {' and '.join(found)}. "
            "Prepare them for the same, or compile them apart."
        )
    return found[0] if found else None


def _tell_of_fused(gm: fx.GraphModule) -> None:
    """Warns of layers that are one operator of torch's here: of prepared models, those called by other code."""
    fused = [node.name for node in execution_order(gm) if packet(node) is torch.ops.aten._transformer_encoder_layer_fwd]
    if fused:
        warnings.warn(
            f"{', '.join(fused[:4])} evaluates a whole layer of attention in one operator of torch's, in float. Call "
            "torch.backends.mha.set_fastpath_enabled(False), or prepare the model: it then evaluates as it trains.",
            NotQuantizedWarning,
            stacklevel=2,
        )


def _refuse_buckets(gm: fx.GraphModule) -> None:
    """DDP's bucket splitter may part an owner's operators from its state, and would leave them float unseen."""
    if nn.parallel.DistributedDataParallel._get_active_ddp_module() is None:  # private; tried on 2.13 and 2.15
        return
    _, missing = bound_sites(gm)
    if missing:
        names = ", ".join(absent.site.name for absent in missing[:4])
        raise UnsupportedModel(
            "a prepared model must reach the backend whole under DistributedDataParallel: Dynamo cut its graph into "
            f"buckets, and {len(missing)} sites of this one have their operators in another ({names}). "
            "Set torch._dynamo.config.optimize_ddp = False."
        )


def _is_trainable(value: Any) -> bool:
    """Whether an input shows that the graph belongs to a model: code around one, as an optimizer's, stays float."""
    if not isinstance(value, torch.Tensor):
        return False
    return isinstance(value, nn.Parameter) or (value.is_leaf and value.requires_grad)


_NO_SITES = "a part of a prepared model without sites, or code without parameters: it stays float"


def left_alone(gm: fx.GraphModule, reason: str = _NO_SITES) -> Decline:
    first = next((node.name for node in gm.graph.nodes if node.op == "call_function"), "graph")
    return Decline(pass_name="fxquant", node=first, reason=reason)
