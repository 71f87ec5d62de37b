"""From Dynamo's graph to the QAT graph: what both backends hand on."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxquant.backend.lost_sites import warn_of_checkpointed, warn_of_lost
from fxquant.backend.options import Options
from fxquant.backend.reports import report
from fxquant.capture.cuts import cut_of
from fxquant.capture.dynamo import autocast_of, capture
from fxquant.errors import InvalidArgument, NotQuantizedWarning, UnsupportedModel
from fxquant.graph.bodies import execution_order
from fxquant.graph.nodes import packet
from fxquant.graph.views import Bind
from fxquant.passes.base import Decline, PassResult, run_all
from fxquant.passes.pipelines import training_passes
from fxquant.passes.stages import DYNAMO, enter, operators
from fxquant.plan.site_lists import target_of
from fxquant.prepared.live import of_prepared_model
from fxquant.prepared.root import note_autocast, roots_of, warn_of_replaced
from fxquant.targets.profiles import get_profile


def quantize_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any] | None = None
) -> fx.GraphModule:
    """Dynamo's graph as the captured QAT graph: what both backends hand on."""
    started = time.perf_counter()
    chosen = Options.read(options)
    if not _may_hold_sites(gm, example_inputs):
        return _left_whole(gm, started)
    # Without gradients there is nothing to checkpoint.
    captured = capture(gm, example_inputs, inline_checkpoints=not torch.is_grad_enabled())
    digests = tuple(bind.key for node in execution_order(captured) if (bind := Bind.of(node)) is not None)
    prepared = bool(digests) or of_prepared_model(example_inputs)
    if prepared and chosen.given:
        raise InvalidArgument(
            f"options must not set {' and '.join(chosen.given)} for a prepared model: its plan decides. "
            "Give them to fxquant.prepare."
        )
    _tell_of_fused(captured)
    cut = cut_of(gm)
    warn_of_lost(captured, cut is not None)
    if prepared:
        warn_of_replaced(example_inputs)
        trained = autocast_of(gm) if torch.is_grad_enabled() else None
        if trained is not None:
            note_autocast(example_inputs, trained)
        warn_of_checkpointed(captured)
    if chosen.recipe is None:
        result = PassResult(declines=[left_alone(captured, "recipe=None places nothing")])
    else:
        stateless = not prepared and any(map(_is_trainable, example_inputs))
        target = _target(digests) or chosen.target
        passes = training_passes(chosen.recipe, get_profile(target), stateless=stateless)
        result = run_all(passes, captured)
        if not digests and not stateless:
            result.declines.append(left_alone(captured))
    if cut is not None:
        result.declines.append(_ends(captured, f"the graph ends at {cut}"))
    result.seconds = time.perf_counter() - started
    plans = tuple(root.plan.digest() for root in roots_of(example_inputs)) if prepared else ()
    report(captured, digests, result, plans)
    return captured


def _may_hold_sites(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether a graph of Dynamo's calls an operator of ours (binds an owner), or reads a parameter as a model does.

    An optimizer's step is no model: its parameters are attributes of the graph, which it writes into.
    """
    return bool(operators(execution_order(gm))) or any(map(_is_trainable, example_inputs))


def _left_whole(gm: fx.GraphModule, started: float) -> fx.GraphModule:
    """A graph with nothing to quantize, as Dynamo made it."""
    result = PassResult(declines=[left_alone(gm)])
    result.seconds = time.perf_counter() - started
    report(gm, (), result)
    return enter(gm, DYNAMO)


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


def _is_trainable(value: Any) -> bool:
    """Whether an input shows that the graph belongs to a model: code around one, as an optimizer's, stays float."""
    if not isinstance(value, torch.Tensor):
        return False
    return isinstance(value, nn.Parameter) or (value.is_leaf and value.requires_grad)


_NO_SITES = "a part of a prepared model without sites, or code without parameters: it stays float"


def _ends(gm: fx.GraphModule, reason: str) -> Decline:
    last = [node.name for node in gm.graph.nodes if node.op == "call_function"]
    return Decline(pass_name="fxquant", node=last[-1] if last else "graph", reason=reason)


def left_alone(gm: fx.GraphModule, reason: str = _NO_SITES) -> Decline:
    first = next((node.name for node in gm.graph.nodes if node.op == "call_function"), "graph")
    return Decline(pass_name="fxquant", node=first, reason=reason)
