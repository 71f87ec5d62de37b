"""A module under torch.export as an ATen training graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxquant.capture.aside import uncompiled
from fxquant.capture.open_sizes import OpenSizes, by_parameter, keywords_named
from fxquant.capture.reexported import remember
from fxquant.graph.edit import without_dead_nodes
from fxquant.passes.base import run_all
from fxquant.passes.captured.silence_bodies import SilenceBodies
from fxquant.passes.pipelines import dynamo_passes
from fxquant.passes.stages import CAPTURED, DYNAMO
from fxquant.plan.positions import tell_calls_apart
from fxquant.support.patches import MODULE_CALLS, NO_AUTOCAST, REGIONS


def exported_graph(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: OpenSizes | None
) -> fx.GraphModule:
    """The model under torch.export as an ATen training graph that keeps the model's calling convention.

    Parameters and buffers are get_attr nodes, all in front, named by their paths in the model; modules have the first
    of their paths. Autocast is a way to train: the graph computes in the precision of the parameters.
    """
    with _as_deployed(), uncompiled(model), keywords_named(model, kwargs):
        shapes = by_parameter(model.forward, sizes)
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    gm = program.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    remember(gm, program)
    run_all(dynamo_passes(), gm, DYNAMO)
    SilenceBodies().run(gm, CAPTURED)
    _call_by_first_path(gm, model)
    tell_calls_apart(gm)
    first = next(iter(gm.graph.nodes))
    for node in list(gm.graph.nodes):
        if node.op == "get_attr" and node is not first:
            first.prepend(node)
    return without_dead_nodes(gm)


@contextlib.contextmanager
def _as_deployed() -> Iterator[None]:
    """Inside, autocast and regions that are compiled once for all their calls are what they enclose.

    Other threads' compiles wait: torch.export replaces methods of `torch.nn.Module` in the whole process, and so does
    AOTAutograd; each would trace what the other runs, and put the other's methods back in place for good.
    """
    from torch._dynamo.convert_frame import compile_lock  # private; tried on 2.13, read in 2.11 and 2.14

    with compile_lock, NO_AUTOCAST.acting(), REGIONS.acting(), MODULE_CALLS.acting():
        yield


def _call_by_first_path(gm: fx.GraphModule, model: torch.nn.Module) -> None:
    """In ``nn_module_stack``, a module that has several paths gets the first, by which the plan knows it."""
    first: dict[int, str] = {}
    names = {path: first.setdefault(id(m), path) for path, m in model.named_modules(remove_duplicate=False)}
    for node in gm.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        if any(names.get(path) != path for path, _ in stack.values()):
            node.meta["nn_module_stack"] = _by_first_path(stack, names)


def _by_first_path(stack: dict[str, tuple[str, Any]], names: dict[str, str]) -> dict[str, tuple[str, Any]]:
    """Where modules are shared, torch.export names those that a bound forward calls by their path below its module."""
    outer, found = [""], {}
    for key, (path, kind) in stack.items():
        if path not in names:
            path = next((f"{above}.{path}" for above in reversed(outer) if f"{above}.{path}" in names), path)
        outer.append(path)
        found[key] = (names.get(path, path), kind)
    return found
