"""`prepare` puts a plan and its quantizers on a model; `strip` takes them off again."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxquant.capture.aside import untouched
from fxquant.capture.dynamo import dynamo_graphs
from fxquant.errors import FxquantError, InvalidArgument, UnsupportedModel
from fxquant.graph.kinds import kind_of
from fxquant.passes.base import run_all
from fxquant.passes.pipelines import normalizing_passes
from fxquant.plan.exceptions import Exceptions, weighted
from fxquant.plan.naming import Naming
from fxquant.plan.plan import Declined, Edge, Plan, Site
from fxquant.plan.positions import modules_around
from fxquant.plan.solver import place
from fxquant.plan.unreached import left_out, unreached
from fxquant.prepared.attach import attach, detach
from fxquant.prepared.frame_marks import frame_marks
from fxquant.prepared.freeze import freeze_batch_norm
from fxquant.prepared.quantizer import owners
from fxquant.prepared.root import plan_of
from fxquant.spec.ranges import Range
from fxquant.spec.recipes import Recipe, get_recipe
from fxquant.spec.rules import Rule, Rulebook
from fxquant.targets.profiles import Profile, get_profile


class Measured(abc.ABC):
    """A recipe that is found by running the model: `prepare` attaches ``base``, then calls `fit`."""

    base: str | Recipe

    @abc.abstractmethod
    def fit(self, model: nn.Module) -> None:
        """Gives a model that was just prepared by ``base`` its formats."""


def prepare(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    recipe: str | Recipe | Measured = "int8",
    target: str = "onnxruntime",
    rules: Iterable[Rule] | None = None,
    ranges: str | Range | None = None,
) -> nn.Module:
    """Decides which tensors of ``model`` are quantized for ``target`` and attaches their state, in place.

    The model runs once on the example inputs under Dynamo; parameters, buffers, modes and random state are left
    as they were. Compiled with ``backend="fxquant"`` it then trains quantized; run without compile it is still
    the float model. Returns the model.

    Args:
        model: any module that torch.compile can run, with floating-point parameters, not yet prepared.
        args: positional example inputs, a tuple; ``kwargs``: keyword ones.
        recipe: ``"int8"``, ``"w4a8"``, ``"int4_weight_only"`` (in groups of 32), a `Recipe`, or a `fxquant.Mixed` that
            measures formats on data.
        target: the runtime that the model will be deployed to: ``"onnxruntime"``, ``"openvino"``, ``"tensorrt"``, or
            ``"generic"`` for none in particular.
        rules: exceptions to the recipe, the first that matches decides: ``[fxquant.skip("head")]``.
        ranges: how activation ranges are found, if not as the recipe says: ``"moving_average"``, ``"delayed"`` (each
            step is quantized with the ranges that the step before left), a `MovingAverage`, or ``CurrentTensor()``
            (each batch has its own, which trains and cannot be exported).

    Raises:
        InvalidArgument: unknown recipe or target, a rule that matches nothing, a model prepared before, inputs the
            model cannot run on.
        UnsupportedModel: nothing to quantize, or parameters that are not floating point.
    """
    chosen, profile = _recipe(recipe).with_rules(rules or ()), get_profile(target)
    if ranges is not None:
        chosen = chosen.with_range(ranges)
    _check(model, args, kwargs)
    kwargs = dict(kwargs or {})
    plan = _make_plan(model, args, kwargs, chosen, profile)
    try:
        attach(model, plan)
        if isinstance(recipe, Measured):
            recipe.fit(model)
    except BaseException:
        detach(model)
        raise
    return model


def _recipe(recipe: str | Recipe | Measured) -> Recipe:
    if recipe == "mixed":
        raise InvalidArgument(
            "recipe 'mixed' must come with data and a budget: got its name alone. "
            "Write recipe=fxquant.Mixed(data=batches, weight_bytes=0.6)."
        )
    return get_recipe(recipe.base if isinstance(recipe, Measured) else recipe)


def strip(model: nn.Module) -> nn.Module:
    """Takes plan, quantizers and frozen BatchNorm modes off again: the float model, with its trained weights."""
    freeze_batch_norm(model, frozen=False)
    detach(model)
    return model


def _check(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> None:
    if not isinstance(model, nn.Module) or hasattr(model, "_orig_mod"):
        raise InvalidArgument(
            f"model must be a plain nn.Module: got {type(model).__name__}. Prepare first, torch.compile afterwards."
        )
    if not isinstance(args, tuple):
        raise InvalidArgument(
            f"args must be a tuple of example inputs: got {type(args).__name__}. Write (x,) for a single input."
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise InvalidArgument(
            f"kwargs must be a mapping of names to example inputs: got {type(kwargs).__name__}. "
            "Settings of prepare, as recipe, are given by name."
        )
    compiled = [path or "the model itself" for path, module in model.named_modules() if _is_compiled(module)]
    if compiled:
        raise InvalidArgument(
            f"model must not be compiled yet: {compiled[0]} is. Prepare first, torch.compile or .compile() afterwards."
        )
    planned = [path or "the model itself" for path, module in model.named_modules() if plan_of(module) is not None]
    if planned or any(owners(model)):
        where = f"{planned[0]} has a plan" if planned else "it is a part of a prepared model"
        raise InvalidArgument(
            f"model must not be prepared twice: {where}. Call fxquant.strip on the prepared model first."
        )
    wrong = [(n, p.dtype) for n, p in model.named_parameters() if not (p.is_floating_point() or p.is_complex())]
    if wrong:
        name, dtype = wrong[0]
        raise UnsupportedModel(
            f"parameters must be floating point: got {dtype} for {name!r}. "
            "Prepare the float model, before any weight is quantized or packed."
        )


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _make_plan(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], recipe: Recipe, profile: Profile
) -> Plan:
    with untouched(model), frame_marks(model):
        failed: Exception | None = None
        graphs: list[fx.GraphModule] = []
        try:
            graphs = dynamo_graphs(model, args, kwargs)
        except FxquantError:
            raise
        except Exception as error:
            failed = error
    if failed is not None:
        _blame(model, args, kwargs, failed)
    sites: dict[tuple[str, tuple[Edge, ...]], Site] = {}
    declined: list[Declined] = []
    for gm in graphs:
        run_all(normalizing_passes(), gm)
    layers = [node for gm in graphs for node in weighted(gm.graph, profile)]
    ends = (layers[0], layers[-1]) if layers else (None, None)
    book = Rulebook(recipe.rules)
    for gm in graphs:
        found = place(gm.graph, recipe, profile, Exceptions(book, modules_around(gm), ends))
        declined += (*found.described_declines(), *unreached(gm, profile))
        naming = Naming(gm, sites)
        for placed in found.placed:
            naming.add(placed, declined)
    declined += left_out(model, graphs)
    _check_kinds(recipe, graphs, sites.values())
    book.check()
    if not sites:
        reasons = "; ".join(sorted({f"{d.where}: {d.reason}" for d in declined})) or "it runs no such operator"
        raise UnsupportedModel(
            f"model must hold an operator that {profile.name} runs on integers "
            f"({', '.join(sorted(profile.hard))}): found none to quantize ({reasons})."
        )
    return Plan(recipe=recipe.name, target=profile.name, sites=tuple(sites.values()), declined=tuple(declined))


def _blame(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], failed: Exception) -> None:
    """Raises for a run under Dynamo that failed: runs the model again without, to tell whose fault it was."""
    try:
        with untouched(model), torch.no_grad():
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


def _check_kinds(recipe: Recipe, graphs: list[fx.GraphModule], sites: Any) -> None:
    used = {edge.kind for site in sites for edge in site.local.edges}
    unmatched = sorted((recipe.kinds or frozenset()) - used)
    if unmatched:
        kinds = {kind.name for gm in graphs for kind in map(kind_of, gm.graph.nodes) if kind is not None}
        raise InvalidArgument(
            f"recipe {recipe.name!r} must match the model with each of its kinds: {', '.join(unmatched)} "
            f"matched no operator. The model has {', '.join(sorted(kinds)) or 'none of any kind'}."
        )
