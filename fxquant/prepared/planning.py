"""The plan of a model: run under Dynamo, its graphs placed, its sites named."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from fxquant.capture.aside import tracing_recurrent_layers, uncompiled, untouched
from fxquant.capture.cuts import ONE_WAY
from fxquant.capture.dynamo import dynamo_graphs
from fxquant.errors import ExportWarning, FxquantError, InvalidArgument, UnsupportedModel
from fxquant.graph.kinds import kind_of
from fxquant.passes.base import run_all
from fxquant.passes.pipelines import normalizing_passes
from fxquant.plan.exceptions import Exceptions, weighted
from fxquant.plan.naming import Naming
from fxquant.plan.paying import Prices, examples_in
from fxquant.plan.plan import Edge, FloatPlace, Plan, Site
from fxquant.plan.positions import modules_around
from fxquant.plan.solver import place
from fxquant.plan.unreached import left_out, unreached
from fxquant.prepared.frame_marks import frame_marks, may_own
from fxquant.prepared.unfused import unfused
from fxquant.spec.recipes import Recipe
from fxquant.spec.rules import Rulebook
from fxquant.targets.costs import CostTable
from fxquant.targets.profiles import Profile


def make_plan(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    recipe: Recipe,
    profile: Profile,
    costs: CostTable | None = None,
) -> Plan:
    """What a recipe quantizes of a model that is run on these inputs; the model is left as it was.

    With a table of ``costs``, products that are faster in float are left there.

    Raises InvalidArgument for inputs that the model cannot run on, and for rules or kinds that match nothing;
    UnsupportedModel for a model that Dynamo cannot run, and where nothing is to be quantized.
    """
    graphs = _graphs(model, args, kwargs)
    prices = None if costs is None else Prices(table=costs, examples=examples_in((args, kwargs)))
    sites: dict[tuple[str, tuple[Edge, ...]], Site] = {}
    declined: list[FloatPlace] = []
    layers = [node for gm in graphs for node in weighted(gm.graph, profile)]
    ends = (layers[0], layers[-1]) if layers else (None, None)
    book = Rulebook(recipe.rules)
    classes = {path: type(module) for path, module in model.named_modules()}
    for gm in graphs:
        found = place(gm.graph, recipe, profile, Exceptions(book, modules_around(gm, classes), ends), prices)
        declined += (*found.described_declines(), *unreached(gm, profile))
        naming = Naming(gm, sites, may_own(model))
        for placed in found.placed:
            naming.add(placed, declined)
    declined += left_out(model, graphs)
    _warn_of_decisions(graphs)
    _check_kinds(recipe, graphs, sites.values())
    book.check()
    if not sites and costs is not None:
        raise UnsupportedModel(
            f"model must hold a product that is faster on integers in {costs}: skip_slow leaves all of its products in "
            "float. Deploy it in float, or leave skip_slow out, or name layers in rules, which keep them."
        )
    if not sites:
        reasons = "; ".join(sorted({f"{d.where}: {d.reason}" for d in declined})) or "it runs no such operator"
        raise UnsupportedModel(
            f"model must hold an operator that {profile.name} runs on integers "
            f"({', '.join(sorted(profile.hard))}): found none to quantize ({reasons})."
        )
    return Plan(recipe=recipe.name, target=profile.name, sites=tuple(sites.values()), declined=tuple(declined))


def _graphs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[fx.GraphModule]:
    """The graphs that the model runs, normalized, with marks where the frames of modules begin."""
    failed: Exception | None = None
    graphs: list[fx.GraphModule] = []
    layers = dict(model.named_modules())
    with untouched(model), unfused(model), frame_marks(model) as recurrent:
        try:
            graphs = dynamo_graphs(model, args, kwargs)
            with tracing_recurrent_layers():
                for path, given in recurrent.items():
                    graphs += [graph for one in given[:1] for graph in dynamo_graphs(layers[path], (one,), {})]
        except FxquantError:
            raise
        except Exception as error:
            failed = error
    ours = getattr(failed, "inner_exception", None)  # of what a backend raises, Dynamo makes an error of its own
    if isinstance(ours, FxquantError):
        raise ours
    if failed is not None:  # outside: the model runs again, without marks
        _blame(model, args, kwargs, failed)
    for gm in graphs:
        run_all(normalizing_passes(), gm)
    return graphs


def _blame(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], failed: Exception) -> None:
    """Raises for a run under Dynamo that failed: runs the model again without, to tell whose fault it was."""
    try:
        with untouched(model), uncompiled(model), torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        raise InvalidArgument(
            f"args and kwargs must run through the model: got {type(error).__name__}: {str(error).rstrip('.')}. "
            "Give prepare what the model's forward takes in training."
        ) from error
    raise UnsupportedModel(
        f"model must run under torch.compile: got {type(failed).__name__}: {str(failed).rstrip('.')}. "
        'It runs without; try torch.compile(model, backend="eager").'
    ) from failed


def _warn_of_decisions(graphs: list[fx.GraphModule]) -> None:
    """Names the lines where Python goes one way or another by a tensor's value, which a file cannot."""
    places = [cut.place for gm in graphs if (cut := gm.meta["cut"]) is not None and cut.decides]
    if places:
        warnings.warn(
            f"forward decides by the value of a tensor at {', '.join(dict.fromkeys(places))}. It trains in several "
            "graphs; where it decides so in evaluation too, export_onnx and convert, which need one, refuse it. "
            f"{ONE_WAY}",
            ExportWarning,
            stacklevel=4,
        )


def _check_kinds(recipe: Recipe, graphs: list[fx.GraphModule], sites: Iterable[Site]) -> None:
    used = {edge.kind for site in sites for edge in site.local.edges}
    unmatched = sorted((recipe.kinds or frozenset()) - used)
    if unmatched:
        kinds = {kind.name for gm in graphs for kind in map(kind_of, gm.graph.nodes) if kind is not None}
        raise InvalidArgument(
            f"recipe {recipe.name!r} must match the model with each of its kinds: {', '.join(unmatched)} "
            f"matched no operator. The model has {', '.join(sorted(kinds)) or 'none of any kind'}."
        )
