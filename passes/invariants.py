"""What every graph between passes must satisfy; a violation is a bug of fxquant, named with the pass."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import fx

from fxquant.errors import InvariantViolated
from fxquant.graph.bodies import is_checkpoint, nested_graphs
from fxquant.graph.meta import site_of
from fxquant.graph.views import FakeQuant
from fxquant.passes.stages import Stage


def check_invariants(nodes: Iterable[fx.Node], when: str) -> None:
    """Raises InvariantViolated unless fake-quant nodes are well formed and read what they may.

    - its input and result have the same shape and dtype, a floating one;
    - no fake-quantized value is a scale;
    - scale and zero point of a site are float32 and an integer, or a float32 that is trained (the op itself allows
      others to those who call it).
    """
    for node in nodes:
        site = FakeQuant.of(node)
        if site is None:
            continue
        _check_value(site, when)
        if FakeQuant.of(site.scale) is not None:
            raise InvariantViolated(f"{when}: the scale of {node.name} must not be fake-quantized itself.")
        if site_of(node) is None:
            continue
        found = _tensor(site.scale)
        if found is not None and found.dtype != torch.float32:
            raise InvariantViolated(f"{when}: the scale of {node.name} must be float32: got {found.dtype}.")
        found = _tensor(site.zero_point)
        if found is not None and found.dtype.is_floating_point and not site.scale_gradient:
            raise InvariantViolated(f"{when}: the zero point of {node.name} must be an integer: got {found.dtype}.")


def check_values(gm: fx.GraphModule, known: Collection[fx.Node], when: str) -> None:
    """Raises InvariantViolated where a node, none of ``known``, lacks its value, or its stack of modules is no dict.

    Bodies count that are traced as the graph around them is: those of checkpoints.
    """
    for node in gm.graph.nodes:
        if node.op != "call_function" or node in known:
            continue
        if "val" not in node.meta and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.returns:
            raise InvariantViolated(f"{when}: {node.name} must have meta['val']: got {', '.join(sorted(node.meta))}.")
        stack = node.meta.get("nn_module_stack")
        if stack is not None and not isinstance(stack, dict):
            kind = type(stack).__name__
            raise InvariantViolated(f"{when}: meta['nn_module_stack'] of {node.name} must be a dict: got {kind}.")
        if is_checkpoint(node):
            for body in nested_graphs(gm, node):
                check_values(body, known, when)


def check_made(found: frozenset[Any], before: frozenset[Any], stage: Stage, when: str) -> None:
    """Raises InvariantViolated where a pass made an operator that belongs to another stage."""
    for op in sorted(found - before - stage.makes, key=str):
        raise InvariantViolated(f"{when}: {op} must not be put into the {stage} graph.")


def _check_value(site: FakeQuant, when: str) -> None:
    value, origin = _tensor(site.node), _tensor(site.input)
    if value is None or origin is None:
        return
    if value.dtype != origin.dtype or value.shape != origin.shape or not value.is_floating_point():
        raise InvariantViolated(
            f"{when}: {site.node.name} must keep shape and floating dtype: got {tuple(value.shape)} {value.dtype} "
            f"from {tuple(origin.shape)} {origin.dtype}."
        )


def _tensor(argument: object) -> torch.Tensor | None:
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None
