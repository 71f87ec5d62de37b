"""Fake-quant ops into the arithmetic that Inductor fuses with its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils.checkpoint import CheckpointPolicy

from fxquant.graph.arguments import in_places
from fxquant.graph.inline import Bodies, of_operands, paste
from fxquant.graph.meta import mark_masked_gradient
from fxquant.graph.nodes import call_nodes
from fxquant.ops import fake_quantize
from fxquant.ops.integer_matmul import INTEGER_CONVOLUTION
from fxquant.ops.library import ARITHMETIC
from fxquant.ops.lowering_table import Stage, becomes
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.stages import JOINT, POST_GRAD

aten = torch.ops.aten
Where = Literal["joint", "post-grad", "anywhere"]
_INTEGER_PRODUCTS = (aten._int_mm.default, INTEGER_CONVOLUTION)


@dataclass(frozen=True, kw_only=True)
class LowerFakeQuantize(Pass):
    """``fake_quantize(x, s, z)``  →  ``div, round, add, where, where, sub, mul`` on the same operands.

    The arithmetic is traced from the op's own kernel, so eager and compiled code share one definition. What is
    inlined keeps the node's recompute tags; in the backward op, what does not depend on the gradient (the clip mask)
    must be recomputed, so that it exists only inside fused kernels.

    ``decompositions`` gives the table of the compiler that comes next, for ops that it takes in decomposed form only.
    ``where`` is the stage, by which `fxquant.ops.lowering_table` says what is replaced; by default all. It has an entry
    of its own for a joint graph in which integers are multiplied.
    """

    stages: ClassVar = (JOINT, POST_GRAD)

    decompositions: Callable[[], Mapping[Any, Callable[..., Any]]] = field(default=dict, repr=False)
    where: Where = "anywhere"

    def rewrite(self, gm: fx.GraphModule, result: PassResult) -> int:
        """Replaces every fake-quant node by its traced body."""
        calls = [(node, node.target) for node in call_nodes(gm.graph)]
        integers = self.where == "joint" and any(target in _INTEGER_PRODUCTS for _, target in calls)
        where: Stage = "beside integers" if integers else self.where
        due = {node: op for node, op in calls if isinstance(op, OpOverload) and _is_due(node, op, where)}
        bodies = Bodies(self.decompositions() if due else {})
        for node, op in due.items():
            arithmetic = of_operands(ARITHMETIC[op], *in_places(node), _is_node)
            _replace(node, bodies.of(_form(node), arithmetic, _operands(node)))
        return len(due)


def _is_due(node: fx.Node, op: OpOverload, where: Stage) -> bool:
    return op in ARITHMETIC and becomes(op, where, _device(node)) == "arithmetic"


def _device(node: fx.Node) -> str:
    """ "cpu" where all of a node's values are there."""
    values = (each.meta.get("val") for each in (node, *_operands(node)))
    devices = {value.device.type for value in values if isinstance(value, Tensor)}
    return next(iter(devices - {"cpu"}), "cpu")


def _operands(node: fx.Node) -> list[fx.Node]:
    return [a for a in in_places(node)[0] if isinstance(a, fx.Node)]


def _is_node(value: object) -> bool:
    return isinstance(value, fx.Node)


def _form(node: fx.Node) -> tuple[object, ...]:
    """What a body depends on beside its operands: the operator, and the arguments that are no nodes."""
    args, named = in_places(node)
    return node.target, tuple(None if isinstance(a, fx.Node) else a for a in args), tuple(named.items())


def _replace(node: fx.Node, body: fx.Graph) -> None:
    """Puts a body in the place of its node."""
    with node.graph.inserting_before(node):
        is_gradient = node.target in fake_quantize.BACKWARD
        made = _paste_gradient(node, body) if is_gradient else paste(node.graph, body, _operands(node), origin=node)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


def _paste_gradient(node: fx.Node, body: fx.Graph) -> fx.Node:
    """The body of a gradient; what does not depend on the incoming one is the clip mask."""
    dependent = {next(iter(body.nodes))}

    def tag(old: fx.Node, new: fx.Node) -> None:
        if any(each in dependent for each in old.all_input_nodes):
            dependent.add(old)
        else:  # a function of the input that forward could compute and keep
            new.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE

    result: fx.Node = paste(node.graph, body, _operands(node), origin=node, copied=tag)
    mark_masked_gradient(result)
    return result
