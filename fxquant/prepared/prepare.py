"""`prepare` puts a plan and its quantizers on a model; `strip` takes them off again."""

from __future__ import annotations

import abc
import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fxquant.capture.arguments import check_args
from fxquant.capture.aside import is_compiled
from fxquant.errors import InvalidArgument, UnsupportedModel
from fxquant.prepared.attach import attach, detach
from fxquant.prepared.freeze import freeze_batch_norm
from fxquant.prepared.planning import make_plan
from fxquant.prepared.quantizer import owners
from fxquant.prepared.root import plan_of
from fxquant.prepared.trainable import make_trainable
from fxquant.spec.ranges import Range
from fxquant.spec.recipes import Recipe, get_recipe
from fxquant.spec.rules import Rule
from fxquant.support.progress import counting
from fxquant.targets.costs import CostTable, shipped
from fxquant.targets.document import ModelPath
from fxquant.targets.profiles import get_profile


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
    skip_slow: bool | ModelPath | CostTable = False,
) -> nn.Module:
    """Decides which tensors of ``model`` are quantized for ``target`` and attaches their state, in place.

    The model runs once on the example inputs under Dynamo; parameters, buffers, modes and random state are left
    as they were. Compiled with ``backend="fxquant"`` it then trains quantized; run without compile it is still
    the float model. Returns the model.

    Args:
        model: any module that torch.compile can run, with floating-point parameters, not yet prepared.
        args: positional example inputs, a tuple; ``kwargs``: keyword ones.
        recipe: a name of `fxquant.spec.RECIPES`, as ``"int8"``, ``"w4a8"``, ``"int4_weight_only"``, ``"fp8"`` or
            ``"nvfp4"`` (`docs/formats.md` says which target runs which), a `Recipe`, or a `fxquant.Mixed` that
            measures formats on data.
        target: the runtime that the model will be deployed to: ``"onnxruntime"``, ``"openvino"``, ``"tensorrt"``, or
            ``"generic"`` for none in particular.
        rules: exceptions to the recipe, the first that matches decides: ``[fxquant.skip("head")]``.
        ranges: how activation ranges are found, if not as the recipe says: ``"moving_average"``, ``"delayed"`` (each
            step is quantized with the ranges that the step before left), a `MovingAverage`, or ``CurrentTensor()``
            (each batch has its own, which trains and cannot be exported).
        skip_slow: leaves products in float that run faster so in ``target``, counting the codes around them, for
            examples one at a time: True by fxquant's own table of costs for this class of CPU, ``"x86_64-vnni"`` or
            ``"x86_64-amx"`` for that one, ``"costs.json"`` by the table that ``python -m fxquant costs`` measured where
            the model will run. Products that a rule names, or that are far from all of the table, stay as rule and
            recipe say; `explain` has the times. Examples are counted by the first dimension that all inputs share.

    Raises:
        InvalidArgument: unknown recipe or target, a rule that matches nothing, a model prepared before, inputs the
            model cannot run on.
        UnsupportedModel: nothing to quantize, or parameters that are not floating point.
    """
    chosen, profile = _recipe(recipe).with_rules(rules or ()), get_profile(target)
    costs = _costs(skip_slow, chosen, target)
    if ranges is not None:
        chosen = chosen.with_range(ranges)
    _check(model, args, kwargs)
    make_trainable(model)
    with counting("prepare") as step:
        step("running the model once")
        plan = make_plan(model, args, dict(kwargs or {}), chosen, profile, costs)
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


def _costs(skip_slow: bool | ModelPath | CostTable, recipe: Recipe, target: str) -> CostTable | None:
    """The table that was asked for."""
    if skip_slow is False:
        return None
    spec = recipe.activation
    if spec is None or spec.group_size is not None or spec.element is not None:
        raise InvalidArgument(
            f"skip_slow must go with integer activations of one scale, whose costs are measured: recipe "
            f"{recipe.name!r} has {'none' if spec is None else spec}. Leave it out."
        )
    if not isinstance(skip_slow, (bool, str, os.PathLike, CostTable)):
        raise InvalidArgument(
            f"skip_slow must be True, a class of CPU, a file of `fxquant costs` or a CostTable: got {skip_slow!r}."
        )
    if isinstance(skip_slow, bool):
        return shipped(target)
    if isinstance(skip_slow, str) and not _is_path(skip_slow):
        return shipped(target, skip_slow)
    table = skip_slow if isinstance(skip_slow, CostTable) else CostTable.load(skip_slow)
    if table.target != target:
        raise InvalidArgument(f"skip_slow must hold costs of target {target!r}: got a table of {table.target!r}.")
    return table


def _is_path(text: str) -> bool:
    return text.lower().endswith(".json") or os.path.basename(text) != text or os.path.exists(text)


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
    check_args(args)
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise InvalidArgument(
            f"kwargs must be a mapping of names to example inputs: got {type(kwargs).__name__}. "
            "Settings of prepare, as recipe, are given by name."
        )
    compiled = [path or "the model itself" for path, module in model.named_modules() if is_compiled(module)]
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
