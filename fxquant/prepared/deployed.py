"""The graph of a prepared model as it is deployed: evaluated, its weights integers, its activations labelled Q/DQ."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.capture.arguments import check_args
from fxquant.capture.aside import evaluating
from fxquant.capture.cuts import ONE_WAY, decision_of
from fxquant.capture.exported import exported_graph
from fxquant.capture.open_sizes import OpenSizes, open_as_asked, open_batch
from fxquant.capture.scaled_tables import scaled_tables
from fxquant.errors import ExportError, NotQuantizedWarning
from fxquant.graph.dependence import written_attributes
from fxquant.graph.edit import copied
from fxquant.passes.base import Pass, run_all
from fxquant.passes.export.freeze import Frozen
from fxquant.passes.pipelines import training_passes
from fxquant.passes.stages import EXPORT
from fxquant.plan.plan import Plan
from fxquant.prepared.bound_forward import exporting
from fxquant.prepared.quantizer import quantizers
from fxquant.spec.recipes import get_recipe
from fxquant.targets.profiles import get_profile


def quantized_graph(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sizes: OpenSizes | None,
    plan: Plan,
    passes: Sequence[Pass],
) -> tuple[fx.GraphModule, fx.GraphModule, Frozen]:
    """The evaluation graph of a prepared model through the passes that compile uses and then ``passes``, of export.

    Second, the graph as it is between the two.
    """
    try:
        with evaluating(model), scaled_tables(model), exporting(), torch.no_grad():
            gm = exported_graph(model, args, kwargs, sizes)
    except Exception as error:
        if (place := decision_of(error)) is not None:
            raise ExportError(
                f"forward must not ask for the value of a tensor in Python: it does at {place}. A file does the same "
                f"for all inputs. {ONE_WAY}"
            ) from error
        raise ExportError(
            f"model must export with torch.export on the given inputs: got {type(error).__name__}: {error}"
            f"{_hint(model, sizes)}"
        ) from error
    profile, written = get_profile(plan.target), written_attributes(gm.graph)
    trained = run_all(training_passes(get_recipe("int8"), profile, stateless=False), gm)
    evaluated = copied(gm)
    exported = run_all(passes, gm, EXPORT)
    frozen = exported.product(Frozen)
    frozen.notes += [f"forward writes {name}: each run of the file begins with its value of now" for name in written]
    frozen.notes += [*map(str, trained.declines), *(f"{each.node}: {each.reason}" for each in exported.declines)]
    placed = {label.split("@")[0] for label in frozen.activations} | {*frozen.weights, *frozen.absorbed}
    wanted = {key for key, quantizer in quantizers(model) if quantizer.is_on and quantizer.is_set()}
    absent = [site.key for site in plan.sites if site.key not in placed and site.key in wanted]
    if absent:
        warnings.warn(
            f"{len(absent)} of the plan's sites have no place in the exported graph and stay float: "
            f"{', '.join(absent[:5])}.",
            NotQuantizedWarning,
            stacklevel=3,
        )
    return gm, evaluated, frozen


def _hint(model: nn.Module, sizes: OpenSizes | None) -> str:
    """What an export that failed may be due to."""
    # An exported program is a GraphModule, and loses layers that are named as what that has itself (torch 2.13).
    own = set(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - set(dir(nn.Module()))
    taken = [name for name, _ in model.named_children() if name in own]
    if taken:
        return f" torch.export cannot hold a layer that is named {taken[0]!r}: give it another name."
    if sizes is None:
        return ""
    return " With sizes left open it may be those: try dynamic_batch=False, or fewer of them in dynamic_shapes."


def opened(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, dynamic_batch: bool, dynamic_shapes: Any
) -> tuple[tuple[Any, ...], dict[str, Any], OpenSizes | None]:
    """The inputs that an export traces with, and which of their sizes stay open, as the user asked."""
    named: dict[str, Any] = dict(kwargs or {})
    check_args(args)
    if dynamic_shapes is not None:
        return args, named, open_as_asked(model, args, named, dynamic_shapes)
    if not dynamic_batch:
        return args, named, None
    args, named = _at_least_two(args), _at_least_two(named)
    return args, named, open_batch(args, named)


def _at_least_two(inputs: Any) -> Any:
    """Batches of one, doubled: torch.export takes sizes 0 and 1 for constants."""

    def double(value: Any) -> Any:
        alone = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == 1
        return torch.cat([value, value]) if alone else value

    return torch.utils._pytree.tree_map(double, inputs)
