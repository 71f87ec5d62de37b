"""A graph of `exported_graph`, edited since, as an exported program again, without another trace."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymBoolArgument,
    SymFloatArgument,
    SymIntArgument,
    TensorArgument,
)
from torch.utils import _pytree

from fxquant.capture.open_sizes import OpenSizes, by_parameter

_META = "exported"  # of the graph module: what a program holds beside its graph


def remember(gm: fx.GraphModule, program: ExportedProgram) -> None:
    """Keeps with ``program.module()`` what `program_of` needs of the program."""
    gm.meta[_META] = (program.range_constraints, program.verifiers)


def program_of(
    gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: OpenSizes | None
) -> ExportedProgram:
    """The graph as a program: tensors that it reads become inputs in front, as torch.export lifts them::

        w = get_attr["conv__weight__codes"]      →   def forward(constant, x): (a buffer of that name, x)
        y = dequantize_affine(w, …)                      y = dequantize_affine(constant, …)

    ``args`` and ``kwargs`` are example inputs, ``sizes`` those that the first trace left open. Every node must have its
    fake value, as `call` gives it. torch.export on the graph itself gives the same program, and takes as long as the
    first trace did, a fifth of an export: it traces graphs alone that hold a `torch.func` transform, whose operators
    only a trace finds.
    """
    if not all(isinstance(value, (Tensor, fx.GraphModule)) for _, value in _attributes(gm)):
        gm.training = False
        return torch.export.export(gm, args, kwargs, dynamic_shapes=by_parameter(gm.forward, sizes), strict=False)
    (constraints, verifiers), lifted = gm.meta[_META], _Lifted(gm)
    names = gm.graph._codegen.pytree_info  # type: ignore[attr-defined]  # private; 2.13, read in 2.11 and 2.15
    calls = ModuleCallSignature([], [], names.in_spec, names.out_spec, names.orig_args)
    return ExportedProgram(
        gm,
        lifted.graph,
        ExportGraphSignature(lifted.inputs, lifted.outputs),
        lifted.state,
        constraints,
        [ModuleCallEntry(fqn="", signature=calls)],
        example_inputs=(args, kwargs),
        verifiers=verifiers,
    )


class _Lifted:
    """A copy of a graph whose tensors are placeholders, and the specs of its inputs and outputs."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.graph, self.state = fx.Graph(), dict[str, Tensor]()
        self.inputs: list[InputSpec] = []
        self.outputs: list[OutputSpec] = []
        self.copies: dict[fx.Node, fx.Node] = {}
        taken = {name for node in gm.graph.nodes for name in (node.name, str(node.target))}
        self.names = (name for name in map("constant_{}".format, itertools.count()) if name not in taken)
        for node, value in _attributes(gm):
            if isinstance(value, Tensor):  # bodies of branches and loops stay where they are
                self._constant(node, value)
        for node in gm.graph.nodes:
            if node in self.copies:
                continue
            if node.op == "output":
                self._output(node)
            else:
                self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
                self.copies[node].meta.pop("from_node", None)  # of the first trace, whose names are others
                if node.op == "placeholder":
                    self.copies[node].name = str(node.target)  # fx gives no node a builtin's name, as torch.export does
                    self.inputs.append(InputSpec(InputKind.USER_INPUT, _argument(self.copies[node]), None))

    def _constant(self, node: fx.Node, value: Tensor) -> None:
        name = str(node.target)
        if name in self.state:
            known = next(each for each in self.copies if each.target == name)
            self.copies[node] = self.copies[known]
            return
        made = self.graph.placeholder(next(self.names))
        made.meta = dict(node.meta)
        self.copies[node], self.state[name] = made, value
        self.inputs.append(InputSpec(InputKind.BUFFER, TensorArgument(made.name), name, persistent=True))

    def _output(self, node: fx.Node) -> None:
        (results,) = node.args
        given = [self.copies[v] if isinstance(v, fx.Node) else v for v in _pytree.tree_leaves(results)]
        self.outputs = [OutputSpec(OutputKind.USER_OUTPUT, _argument(value), None) for value in given]
        self.graph.output(tuple(given)).meta = dict(node.meta)


def _attributes(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, Any]]:
    """Nodes that read something of the module, and what."""
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            yield node, operator.attrgetter(str(node.target))(gm)


def _argument(value: Any) -> Any:
    """What a signature says of an input or an output."""
    if not isinstance(value, fx.Node):
        return ConstantArgument("", value)
    fake = value.meta["val"]
    for kind, argument in _ARGUMENTS.items():
        if isinstance(fake, kind):
            return argument(value.name)
    return ConstantArgument(value.name, fake)


_ARGUMENTS = {
    Tensor: TensorArgument,
    torch.SymInt: SymIntArgument,
    torch.SymFloat: SymFloatArgument,
    torch.SymBool: SymBoolArgument,
}
