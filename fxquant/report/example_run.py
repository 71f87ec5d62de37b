"""One run of a prepared model on example inputs, in float: its graphs and the sites in them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from fxquant.capture.arguments import check_args
from fxquant.capture.aside import untouched
from fxquant.capture.dynamo import dynamo_graphs
from fxquant.errors import FxquantError, InvalidArgument
from fxquant.passes.base import run_all
from fxquant.passes.pipelines import normalizing_passes
from fxquant.plan.plan import Plan
from fxquant.plan.unreached import left_out
from fxquant.prepared.bound_forward import BoundForward
from fxquant.prepared.frame_marks import frame_marks
from fxquant.prepared.own_forward import inactive
from fxquant.report.forecast import Place
from fxquant.report.graph_operators import graph_operators
from fxquant.report.operators import Operator
from fxquant.report.sited_graph import SitedGraph


@dataclass(frozen=True, kw_only=True)
class ExampleRun:
    """What one run on example inputs shows beside the plan.

    Attributes:
        graphs: the operators of each graph, in execution order.
        same_tensor: site key → other sites that quantize the same tensor.
        results: operator → whether its result is quantized.
        served: operator → operand → key of the site that serves it: also one on the result that the operand reads.
        sited: the graphs themselves with their sites.
        unread: modules with parameters that no graph reads: Dynamo ran them in Python, or the inputs not at all.
    """

    graphs: tuple[tuple[Operator, ...], ...]
    same_tensor: dict[str, tuple[str, ...]] = field(default_factory=dict)
    results: dict[Place, bool] = field(default_factory=dict)
    served: dict[Place, dict[str, str]] = field(default_factory=dict)
    sited: tuple[SitedGraph, ...] = ()
    unread: tuple[str, ...] = ()


def run_on_examples(
    model: nn.Module, plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> ExampleRun:
    """Runs a prepared model once on example inputs, in float, and reads its graphs; the model stays as it was.

    Raises InvalidArgument for inputs that the model cannot run on.
    """
    sited = tuple(SitedGraph(gm, plan) for gm in _graphs(model, args, dict(kwargs or {})))
    served: dict[Place, dict[str, str]] = {}
    for place, operand, key in (row for one in sited for row in one.served()):
        served.setdefault(place, {}).setdefault(operand, key)
    named = tuple(inspect.signature(model.forward).parameters)  # the first graph begins in the model's forward
    graphs = (graph_operators(one, () if number else named) for number, one in enumerate(sited))
    return ExampleRun(
        # A graph of marks alone: Dynamo broke off before the first operator.
        graphs=tuple(graph for graph in graphs if any(one.role in ("operator", "mover") for one in graph)),
        same_tensor=_others(keys for one in sited for keys in one.keys_by_tensor() if len(keys) > 1),
        results=_all_true(result for one in sited for result in one.results()),
        served=served,
        sited=sited,
        unread=tuple(one.where for one in left_out(model, [one.gm for one in sited])),
    )


def _others(groups: Iterable[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Key → the other keys of its groups."""
    shared: dict[str, dict[str, None]] = {}
    for keys in groups:
        for key in keys:
            shared.setdefault(key, {}).update(dict.fromkeys(other for other in keys if other != key))
    return {key: tuple(others) for key, others in shared.items()}


def _all_true(results: Iterable[tuple[Place, bool]]) -> dict[Place, bool]:
    every: dict[Place, bool] = {}
    for place, result in results:
        every[place] = every.get(place, True) and result
    return every


def _graphs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[fx.GraphModule]:
    """The graphs as `fxquant.prepare` saw them: without sites, every module's frame marked with its path."""
    check_args(args)
    try:
        with untouched(model), inactive(model, BoundForward):
            for module in model.modules():
                module.__dict__.pop("_compiled_call_impl", None)
            with frame_marks(model):
                graphs = dynamo_graphs(model, args, kwargs)
    except FxquantError:
        raise
    except Exception as error:
        raise InvalidArgument(
            f"args and kwargs must run through the model: got {type(error).__name__}: {str(error).rstrip('.')}. "
            "Give explain what was given to fxquant.prepare."
        ) from error
    for gm in graphs:
        run_all(normalizing_passes(), gm)
    return graphs
